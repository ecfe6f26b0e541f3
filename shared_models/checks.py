"""What a contribution must be before it may reach a sum. Runs on the server, and on the node before it sends."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from shared_models.errors import Rejected
from shared_models.messages import OK, Contribution, Instruction
from shared_models.sums import Groups

MAX_METRIC_VALUES = 1_000_000


def check_contribution(contribution: Contribution, instruction: Instruction, expected: Groups, max_norm: float) -> float:
    """The L2 norm of the update, `||model_up - model_down||`, of a contribution that may be added.

    Args:
        contribution: the answer.
        instruction: what was asked; its `model` group is the point the update starts from.
        expected: tensors of the groups, names, shapes and dtypes a training answer must have.
        max_norm: largest norm of the update.

    Raises:
        Rejected: with one of the codes stale-round, wrong-kind, the contribution's own code, no-examples,
            missing-entries, extra-entries, wrong-shape, wrong-dtype, not-finite, norm.
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
    if contribution.code != OK:
        raise Rejected(f"the site answered '{contribution.code}'", code=contribution.code)
    _check_metrics(contribution)
    if instruction.kind != "train":
        return 0.0
    if contribution.examples <= 0:
        raise Rejected("an update from zero examples", code="no-examples")
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
    return _check_values(contribution.groups, instruction.groups, max_norm)


def _check_values(groups: Groups, sent: Groups, max_norm: float) -> float:
    update = 0.0
    for group, tensors in groups.items():
        values = list(tensors.values())
        if group == "model":
            start = sent["model"]
            values = torch._foreach_sub(values, [start[name] for name in tensors])
        norm = _norm(values)
        if not math.isfinite(norm):
            raise Rejected(f"'{group}/{_first_bad(tensors)}' is not finite", code="not-finite")
        if group == "model":
            update = norm
    if update > max_norm:
        raise Rejected(f"the update's norm {update:.3g} is above the limit {max_norm:.3g}", code="norm")
    return update


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)).float())) if tensors else 0.0


def _first_bad(tensors: Mapping[str, Tensor]) -> str:
    return next((name for name, t in tensors.items() if not bool(torch.isfinite(t).all())), next(iter(tensors)))


def _check_metrics(contribution: Contribution) -> None:
    if sum(t.numel() for t in contribution.metrics.values()) > MAX_METRIC_VALUES:
        raise Rejected("metric sums of absurd size", code="metrics")
    if any(not bool(torch.isfinite(t).all()) for t in contribution.metrics.values()):
        raise Rejected("metric sums are not finite", code="metrics")


def _same_names(given: set[str], expected: set[str], what: str) -> None:
    if missing := sorted(expected - given):
        raise Rejected(f"{what} '{missing[0]}' is missing ({len(missing)} in all)", code="missing-entries")
    if extra := sorted(given - expected):
        raise Rejected(f"{what} '{extra[0][:80]}' was not asked for ({len(extra)} in all)", code="extra-entries")
