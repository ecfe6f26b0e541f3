"""The one training loop: every paradigm, method and engine trains through `train`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from client.private import Plan, PrivateSteps
from client.readers.base import Examples
from client.replay import Replay, join
from client.workbench import Workbench
from shared_models.job_parts import TrainPart
from shared_models.keys import generator, key, keyed_global
from shared_models.messages import Budget, Instruction, Part
from shared_models.methods.base import NEVER, Pieces, Progress, objective, overrides
from shared_models.nearest_mean import nearness
from shared_models.schedule import count_samples, count_steps
from shared_models.tasks.base import Batch, add_sums

if TYPE_CHECKING:
    from shared_models.sums import Groups

EVALUATION_NUMBERS = 2**20  # of the inputs of one batch that is measured, where the job's own batch is not larger


def train(
    bench: Workbench,
    data: Examples,
    instruction: Instruction,
    states: list[Groups],
    plan: Plan | None = None,
    replay: Replay | None = None,
) -> Progress:
    """Train the workbench's model for one round's budget.

    Args:
        bench: holds the model, already loaded.
        data: the site's training examples of this task, at least one.
        instruction: round, budget, site.
        states: one round state per method piece; what `after_step` makes of them is put in their place.
        plan: noise, sampling and key of DP-SGD; None trains plainly.
        replay: what the last piece keeps of examples, where it does.

    Raises:
        PrivacyError: this model and task cannot be trained so.
        torch.OutOfMemoryError: not even a single example fits.
    """
    job, part = instruction.job, instruction.job.train
    pieces = list(zip(bench.pieces, states, strict=True))
    losses = [p for p in pieces if overrides(p[0], "loss") or overrides(p[0], "see")]
    pulls, followers = (
        [i for i, piece in enumerate(bench.pieces) if overrides(piece, hook)] for hook in ("grad", "after_step")
    )
    outputs: Tensor | None = None
    keep = replay is not None and replay.piece.keeps_outputs
    former = next((bench.former(weights) for piece, state in pieces if (weights := piece.former(state))), None)
    site, task, number = instruction.site, instruction.task, instruction.round
    steps = count_steps(len(data), part.batch_size, instruction.budget)
    samples, lr_sum, halved = 0, 0.0, bench.halvings
    bench.to_training()
    private = None if plan is None else PrivateSteps(bench, data, plan, losses)
    drawn = key(job.seed, "forward", site=site, task=task, round=number)
    order = batches(len(data), part.batch_size, instruction.budget, job.seed, site=site, task=task, round=number)
    if private is not None and private.poisson:
        drawn, order = private.seed("forward"), private.order()
    with keyed_global(drawn, bench.device):
        for step, rows in enumerate(order):
            lr = learning_rate(part, (number + (step + 0.5) / steps) / instruction.rounds)
            batch = data.batch(rows, bench.device, bench.augment if len(rows) else None)
            old = replay.draw(data) if replay is not None else []
            if old and replay is not None and replay.piece.reference:
                gradients(bench, old[0], [])
                states[-1] = {**states[-1], "reference": read_grad(bench)}
                old = []
            batch = join(batch, old, [_said(bench, former, part) for part in (batch, *old)])
            if private is None:
                outputs = gradients(bench, batch, losses, keep)
            else:
                private.gradients(batch, lambda batch: gradients(bench, batch, losses))
            found, before = (_copies(read_grad(bench)), _copies(bench.trained)) if followers else ({}, {})
            for i in pulls:
                apply_grad(bench, bench.pieces[i].grad, states[i])
            if part.clip:
                torch.nn.utils.clip_grad_norm_(bench.trained.values(), part.clip)
            bench.optimizer.param_groups[0]["lr"] = lr
            bench.optimizer.step()
            for i in followers:
                states[i] = bench.pieces[i].after_step(found, before, bench.trained, states[i])
            if replay is not None:
                replay.add(data, rows, None if outputs is None else outputs[: len(rows)])
            samples, lr_sum = samples + len(rows), lr_sum + lr
    if private is not None:  # neither how many examples came nor what they needed leaves the site
        return Progress(steps, count_samples(len(data), part.batch_size, instruction.budget), lr_sum)
    return Progress(steps, samples, lr_sum, bench.halvings - halved)


@torch.no_grad()
def _said(bench: Workbench, former: nn.Module | None, batch: Batch) -> Tensor | None:
    """What an earlier model says of a batch."""
    if former is None:
        return None
    with bench.autocast():
        outputs: Tensor = bench.task.forward(former, batch)
    return outputs.float()


def read_grad(bench: Workbench) -> dict[str, Tensor]:
    """The parameters' gradients as they lie there; one that got none counts as zero."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in bench.trained.items()}


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in tensors.items()}


def gradients(bench: Workbench, batch: Batch, losses: Pieces, keep: bool = False) -> Tensor | None:
    """Gradients of the batch's mean loss, computed in `accumulate` parts; the parts are halved where memory runs out.

    With more than one part a model whose samples see each other (batch normalisation) sees fewer of them at once. With
    `keep` the model's outputs for the batch come back.
    """
    while True:
        bench.optimizer.zero_grad(set_to_none=True)
        size = math.ceil(len(batch) / (bench.job.train.accumulate * 2**bench.halvings))
        try:
            outputs = []
            for start in range(0, len(batch), size):
                part = batch if size >= len(batch) else batch[start : start + size]
                outputs.append(_backward(bench, part, losses, len(batch), keep))
            return torch.cat(outputs) if keep else None  # type: ignore[arg-type]
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        bench.halvings += 1  # out here the exception is gone, and with it what it held in memory
        bench.free()


def _backward(bench: Workbench, part: Batch, losses: Pieces, total: int, keep: bool) -> Tensor | None:
    """Add this part's share of the mean over `total` samples; nothing of it outlives the call, or the exception.

    With `keep` the outputs come back, without their graph.
    """
    with bench.autocast():
        outputs = bench.task.forward(bench.model, part)
        loss = objective(bench.task, outputs, part, bench.trained, losses)  # (B,)
    (loss.mean() if len(part) == total else loss.sum() / total).backward()
    return outputs.detach() if keep else None


@torch.no_grad()
def apply_grad(bench: Workbench, grad: object, state: Groups) -> None:
    """Replace the parameters' gradients by what a method makes of them; one that got none counts as zero."""
    for name, value in grad(read_grad(bench), bench.trained, state).items():  # type: ignore[operator]
        bench.trained[name].grad = value


def batches(
    examples: int, batch_size: int, budget: Budget, seed: int, *, site: str, task: int, round: int
) -> Iterator[Tensor]:
    """Row indices of each step: one keyed permutation after another, the last batch of an epoch may be smaller.

    A budget of epochs is exact in samples: `round(epochs * examples)` rows in all.
    """
    steps = count_steps(examples, batch_size, budget)
    left = None if budget.steps is not None else count_samples(examples, batch_size, budget)
    done = epoch = 0
    while done < steps:
        order = torch.randperm(
            examples, generator=generator(seed, "order", site=site, task=task, round=round, step=epoch)
        )
        if left is not None:
            order = order[:left]
            left -= len(order)
        for rows in order.split(batch_size)[: steps - done]:
            yield rows
            done += 1
        epoch += 1


def learning_rate(part: TrainPart, position: float) -> float:
    """The rate at `position` in [0, 1) of the whole run: linear warm-up, then constant or half a cosine to zero."""
    if position < part.warmup:
        return part.lr * position / part.warmup
    if part.schedule == "constant":
        return part.lr
    done = (position - part.warmup) / (1 - part.warmup)
    return part.lr * (1 + math.cos(math.pi * done)) / 2


@torch.inference_mode()
def evaluate(
    bench: Workbench,
    data: Examples,
    site: str = "",
    part: Part = "test",
    among: Sequence[int] = (),
    means: Tensor | None = None,
) -> dict[str, Tensor]:
    """Metric sums of the loaded model on these examples; empty for none.

    With `among` the model has to choose among these classes alone, as if it were told the task (task-incremental). With
    `means` (C, D) the nearest of them to an example's features stands in for the model's own outputs.

    What a task draws while it measures depends on the job's seed and the site alone: every model is measured alike.
    """
    sums: dict[str, Tensor] = {}
    bench.model.eval()
    draws = bench.task.draws
    with keyed_global(key(bench.job.seed, "evaluate", site=site), bench.device) if draws else nullcontext():
        for batch in in_order(data, bench):
            add_sums(sums, _measure(bench, batch, part, among, means))
    return sums


def _measure(
    bench: Workbench, batch: Batch, part: Part, among: Sequence[int] = (), means: Tensor | None = None
) -> dict[str, Tensor]:
    """Metric sums of one batch, in halves where memory runs out."""
    try:
        if means is None:
            with bench.autocast():
                outputs = bench.task.examine(bench.model, batch, "validation" if part == "validation" else "test")
        else:
            outputs = nearness(bench.features(batch), means)
        if among:
            others = torch.ones(outputs.shape[1], dtype=torch.bool, device=outputs.device)
            others[list(among)] = False
            outputs = outputs.masked_fill(others, NEVER)
        return bench.task.sums(outputs, batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    bench.free()
    middle = len(batch) // 2
    sums = _measure(bench, batch[:middle], part, among, means)
    add_sums(sums, _measure(bench, batch[middle:], part, among, means))
    return sums


def in_order(data: Examples, bench: Workbench) -> Iterator[Batch]:
    """All examples once, in order, in batches of at most 256 and about a million numbers, or the job's own size."""
    size = max(min(256, EVALUATION_NUMBERS // math.prod(bench.job.data.sample)), bench.job.train.batch_size)
    size = bench.task.evaluation_batch(size)
    for rows in torch.arange(len(data)).split(size) if len(data) else ():
        yield data.batch(rows, bench.device)
