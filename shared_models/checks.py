"""What a contribution must be before it may reach a sum. Runs on the server, and on the node before it sends."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from shared_models.errors import Rejected
from shared_models.messages import OK, Contribution, Instruction
from shared_models.methods.base import make_pieces
from shared_models.nearest_mean import SUMS
from shared_models.normalisation import no_sums
from shared_models.privacy import MAX_NOISE, Spend, accounted, sampling_rate
from shared_models.schedule import count_samples, count_steps
from shared_models.sums import Groups
from shared_models.tasks.base import make_task

MAX_COUNT = 10**9  # examples of one site: what it says is its weight in every mean
MAX_TALLY = 10**15  # of what a metric counts: pixels, boxes at several thresholds
MARGIN = 0.02  # beside a target epsilon: what PRV finds of a part may be that much above what it finds of the whole


def check_contribution(
    contribution: Contribution, instruction: Instruction, expected: Groups, max_norm: float
) -> float:
    """The L2 norm of the update, `||model_up - model_down||`, of a contribution that may be added.

    Args:
        contribution: the answer.
        instruction: what was asked; its `model` group is the point the update starts from.
        expected: tensors of the groups, names, shapes and dtypes an answer must have; one to the end of a task has none
            where nothing is expected.
        max_norm: largest norm of the update.

    Raises:
        Rejected: with one of the codes stale-round, wrong-kind, metrics, the contribution's own code, no-examples,
            privacy, missing-entries, extra-entries, wrong-shape, wrong-dtype, not-finite, norm. With a code of its own
            the metric sums are sound nevertheless.
    """
    asked = (instruction.run, instruction.site, instruction.task, instruction.round)
    if (contribution.run, contribution.site, contribution.task, contribution.round) != asked:
        raise Rejected(
            f"an answer to round {contribution.round} of task {contribution.task} of run '{contribution.run[:80]}', "
            f"asked was round {instruction.round} of task {instruction.task} of run '{instruction.run}'",
            code="stale-round",
        )
    if contribution.kind != instruction.kind:
        raise Rejected(f"a '{contribution.kind}' answer to a '{instruction.kind}' instruction", code="wrong-kind")
    _check_metrics(contribution, instruction)
    if contribution.code != OK:
        raise Rejected(f"the site answered '{contribution.code}'", code=contribution.code)
    if instruction.kind == "statistics":
        expected, max_norm = {"statistics": no_sums(instruction.job.data.channels)}, math.inf
    elif instruction.kind != "train" and not (instruction.kind == "end_task" and expected):
        return 0.0
    if not contribution.examples <= MAX_COUNT:
        raise Rejected(f"{contribution.examples} examples are beyond any site", code="no-examples")
    if contribution.examples <= 0 and instruction.kind != "end_task":
        raise Rejected("an update from zero examples", code="no-examples")
    if instruction.kind == "train" and instruction.job.privacy.mode == "sample":
        check_spend(contribution, instruction)
    _same_names(set(contribution.groups), set(expected), "group")
    for group, tensors in expected.items():
        given = contribution.groups[group]
        _same_names(set(given), set(tensors), f"{group} entry")
        for name, tensor in tensors.items():
            if given[name].shape != tensor.shape:
                raise Rejected(
                    f"'{group}/{name}' has shape {tuple(given[name].shape)}, expected {tuple(tensor.shape)}",
                    code="wrong-shape",
                )
            if given[name].dtype != tensor.dtype:
                raise Rejected(
                    f"'{group}/{name}' has dtype {given[name].dtype}, expected {tensor.dtype}", code="wrong-dtype"
                )
    norm = _check_values(contribution.groups, instruction.groups, max_norm)
    if instruction.kind == "statistics":
        count, squares = (contribution.groups["statistics"][name] for name in ("count", "squares"))
        if not bool(((count >= 0) & (count <= MAX_TALLY) & (squares >= 0)).all()):
            raise Rejected("statistics count below 0 or beyond any site", code="statistics")
    if SUMS in expected:
        most = make_pieces(instruction.job)[-1].settings.buffer  # vectors of length 1
        if not bool((contribution.groups[SUMS]["sum"].norm(dim=1) <= most * (1 + 1e-6)).all()):
            raise Rejected(f"a class's sum of features is longer than {most} exemplars can make it", code="norm")
    return norm


def check_spend(contribution: Contribution, instruction: Instruction) -> None:
    """What the site says that its training spent is what the job makes of so many examples, and can be added up.

    Raises:
        Rejected: with code privacy; no-examples where it says that it has none, or more than any site.
    """
    if not 0 < contribution.examples <= MAX_COUNT:
        raise Rejected(f"an update from {contribution.examples} examples", code="no-examples")
    part, size = instruction.job.privacy, instruction.job.train.batch_size
    noise, examples = contribution.noise, contribution.examples
    if part.noise not in (None, noise):
        raise Rejected(f"steps with the noise multiplier {noise:g}, the job says {part.noise:g}", code="privacy")
    steps, samples = (count(examples, size, instruction.budget) for count in (count_steps, count_samples))
    if (contribution.steps, contribution.samples) != (steps, samples):
        raise Rejected(
            f"{contribution.steps} steps and {contribution.samples} samples, the job makes {steps} and {samples} of "
            f"{examples} examples",
            code="privacy",
        )
    if part.noise is not None:
        return
    if not 0 < noise <= MAX_NOISE:
        raise Rejected(f"the noise multiplier {noise:g} is none that a target gives", code="privacy")
    spent = accounted([Spend(noise, sampling_rate(examples, samples, steps), steps)], part.delta, part.accountant)
    if not spent <= part.epsilon * (1 + MARGIN) + MARGIN:
        raise Rejected(
            f"one round with the noise multiplier {noise:g} spends epsilon {spent:.3g}, the job's target is "
            f"{part.epsilon:g}",
            code="privacy",
        )


def _check_values(groups: Groups, sent: Groups, max_norm: float) -> float:
    update = 0.0
    for group, tensors in groups.items():
        values = tuple(tensors.values())
        if group == "model":
            start = sent["model"]
            values = torch._foreach_sub(values, tuple(start[name] for name in tensors))
        norm = _norm(values)
        if not math.isfinite(norm):
            if bad := _first_bad(tensors):
                raise Rejected(f"'{group}/{bad}' is not finite", code="not-finite")
            raise Rejected(f"the norm of '{group}' is beyond float32", code="norm")
        if group == "model":
            update = norm
    if update > max_norm:
        raise Rejected(f"the update's norm {update:.3g} is above the limit {max_norm:.3g}", code="norm")
    return update


def _norm(tensors: tuple[Tensor, ...]) -> float:
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)).float())) if tensors else 0.0


def _first_bad(tensors: Mapping[str, Tensor]) -> str:
    return next((name for name, t in tensors.items() if not bool(torch.isfinite(t).all())), "")


def _check_metrics(contribution: Contribution, instruction: Instruction) -> None:
    """Each part and task that was asked for comes with all of its sums, or, without examples, with none."""
    form = make_task(instruction.job).no_sums()
    reported = {path.rpartition("/")[0] for path in contribution.metrics}
    if unasked := sorted(reported - {f"{part}/{task}" for part, task in instruction.evaluate}):
        raise Rejected(f"metric sums of '{unasked[0][:80]}' were not asked for", code="metrics")
    if contribution.metrics.keys() != {f"{prefix}/{name}" for prefix in reported for name in form}:
        raise Rejected(f"metric sums are not exactly {', '.join(form)}", code="metrics")
    for path, value in contribution.metrics.items():
        like = form[path.rpartition("/")[2]]
        if value.shape != like.shape or value.dtype != like.dtype:
            raise Rejected(
                f"metric sum '{path}' has another shape or dtype than {like.dtype} {tuple(like.shape)}", code="metrics"
            )
        if not like.dtype.is_floating_point and not bool(((value >= 0) & (value <= MAX_TALLY)).all()):
            raise Rejected(f"metric sum '{path}' counts below 0 or beyond any site", code="metrics")
    if bad := _first_bad(contribution.metrics):
        raise Rejected(f"metric sum '{bad}' is not finite", code="metrics")


def _same_names(given: set[str], expected: set[str], what: str) -> None:
    if missing := sorted(expected - given):
        raise Rejected(f"{what} '{missing[0]}' is missing ({len(missing)} in all)", code="missing-entries")
    if extra := sorted(given - expected):
        raise Rejected(f"{what} '{extra[0][:80]}' was not asked for ({len(extra)} in all)", code="extra-entries")
