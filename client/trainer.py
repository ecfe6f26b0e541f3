"""The one training loop: every paradigm, method and engine trains through `train`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from client.readers.base import Examples
from client.workbench import Workbench
from shared_models.job import TrainPart
from shared_models.keys import generator, key, keyed_global
from shared_models.messages import Budget, Instruction
from shared_models.methods.base import Progress, overrides
from shared_models.tasks.base import Batch, add_sums

if TYPE_CHECKING:
    from shared_models.sums import Groups

EVALUATION_BATCH = 256


def train(bench: Workbench, data: Examples, instruction: Instruction, states: Sequence[Groups]) -> Progress:
    """Train the workbench's model for one round's budget.

    Args:
        bench: holds the model, already loaded.
        data: the site's training examples of this task, at least one.
        instruction: round, budget, site.
        states: one round state per method piece.
    """
    job, part = instruction.job, instruction.job.train
    pieces = list(zip(bench.pieces, states, strict=True))
    replay, losses, grads = ([p for p in pieces if overrides(p[0], h)] for h in ("extra_batch", "loss", "grad"))
    site, task, number = instruction.site, instruction.task, instruction.round
    steps = count_steps(len(data), part.batch_size, instruction.budget)
    samples, lr_sum = 0, 0.0
    if not bench.model.training:
        bench.model.train()
    with keyed_global(key(job.seed, "forward", site=site, task=task, round=number), bench.device):
        order = batches(len(data), part.batch_size, instruction.budget, job.seed, site=site, task=task, round=number)
        for step, rows in enumerate(order):
            lr = learning_rate(part, (number + (step + 0.5) / steps) / instruction.rounds)
            batch = data.batch(rows, bench.device)
            for piece, state in replay:
                batch = piece.extra_batch(batch, state)
            outputs = bench.model(batch.x)
            loss = bench.task.loss(outputs, batch)  # (B,)
            for piece, state in losses:
                extra = piece.loss(bench.trained, batch, outputs, state)
                loss = loss if extra is None else loss + extra
            bench.optimizer.zero_grad(set_to_none=True)
            loss.mean().backward()
            for piece, state in grads:
                apply_grad(bench, piece.grad, state)
            bench.optimizer.param_groups[0]["lr"] = lr
            bench.optimizer.step()
            samples, lr_sum = samples + len(rows), lr_sum + lr
    return Progress(steps, samples, lr_sum)


@torch.no_grad()
def apply_grad(bench: Workbench, grad: object, state: Groups) -> None:
    """Replace the parameters' gradients by what a method makes of them; one that got none counts as zero."""
    given = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in bench.trained.items()}
    for name, value in grad(given, bench.trained, state).items():  # type: ignore[operator]
        bench.trained[name].grad = value


def count_steps(examples: int, batch_size: int, budget: Budget) -> int:
    """Optimizer steps that a budget makes on so many examples."""
    if budget.steps is not None:
        return budget.steps
    epochs, rest = divmod(count_samples(examples, batch_size, budget), examples)
    return epochs * math.ceil(examples / batch_size) + math.ceil(rest / batch_size)


def count_samples(examples: int, batch_size: int, budget: Budget) -> int:
    """Examples processed, counting repeats: `round(epochs * examples)`, at least one, or those of the steps."""
    if budget.steps is None:
        return max(1, round((budget.epochs or 0.0) * examples))
    epochs, rest = divmod(budget.steps, math.ceil(examples / batch_size))
    return epochs * examples + min(rest * batch_size, examples)


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
def evaluate(bench: Workbench, data: Examples) -> dict[str, Tensor]:
    """Metric sums of the loaded model on these examples; empty for none."""
    sums: dict[str, Tensor] = {}
    if not len(data):
        return sums
    bench.model.eval()
    for rows in torch.arange(len(data)).split(EVALUATION_BATCH):
        batch: Batch = data.batch(rows, bench.device)
        add_sums(sums, bench.task.sums(bench.model(batch.x), batch))
    return sums
