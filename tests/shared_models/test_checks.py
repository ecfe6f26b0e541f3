"""Every way a contribution can be bad, its code, and that the good one beside it passes with the right norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from shared_models.checks import check_contribution
from shared_models.errors import Rejected
from shared_models.job import Job
from shared_models.messages import Contribution, Instruction, Part
from shared_models.sums import Groups
from shared_models.tasks.base import make_task

MakeJob = Callable[..., Job]
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def asked(make_job: MakeJob) -> Instruction:
    """Round 3 of task 1, with two groups down and one validation to report."""
    job = make_job(task={"labels": ["a", "b", "c"]})
    down = {
        "model": {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor(0.0)},
        "control": {"w": torch.zeros(2, 2)},
    }
    asks: tuple[tuple[Part, int], ...] = (("validation", 0),)
    return Instruction("train", "run-1", "site-a", job, "f", task=1, round=3, evaluate=asks, groups=down)


@pytest.fixture
def good(asked: Instruction) -> Contribution:
    """w moved by (3, 0, 0, 4), b by 12: the norm is sqrt(9 + 16 + 144) = 13."""
    up = {
        "model": {"w": asked.groups["model"]["w"] + torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "b": torch.tensor(12.0)},
        "control": {"w": torch.full((2, 2), 100.0)},
    }
    sums = {f"validation/0/{name}": zero.clone() for name, zero in make_task(asked.job).zeros.items()}
    sums["validation/0/confusion"] = torch.eye(3, dtype=torch.int64)
    sums["validation/0/loss"] = torch.tensor(1.5, dtype=torch.float64)
    return Contribution("train", "run-1", "site-a", 1, 3, examples=5, samples=10, steps=2, metrics=sums, groups=up)


def check(contribution: Contribution, asked: Instruction, max_norm: float = 1e6) -> float:
    return check_contribution(contribution, asked, asked.groups, max_norm)


def code(contribution: Contribution, asked: Instruction, max_norm: float = 1e6) -> str:
    with pytest.raises(Rejected) as error:
        check(contribution, asked, max_norm)
    assert "\n" not in str(error.value)
    return error.value.code


def with_tensor(groups: Groups, path: str, tensor: Tensor) -> Groups:
    group, name = path.split("/")
    return {**groups, group: {**groups[group], name: tensor}}


def test_a_good_contribution_has_the_norm_worked_out_by_hand(asked: Instruction, good: Contribution) -> None:
    assert check(good, asked) == pytest.approx(13.0)
    assert check(good, asked, max_norm=13.01) == pytest.approx(13.0)
    unmoved = replace(good, groups=asked.groups, metrics={})
    assert check(unmoved, asked, max_norm=1e-9) == 0.0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"round": 2}, "stale-round"),
        ({"task": 0}, "stale-round"),
        ({"run": "run-0"}, "stale-round"),
        ({"site": "site-b"}, "stale-round"),
        ({"kind": "evaluate"}, "wrong-kind"),
        ({"code": "exception"}, "exception"),
        ({"code": "no-data"}, "no-data"),
        ({"examples": 0}, "no-examples"),
        ({"examples": -1}, "no-examples"),
        ({"groups": {}}, "missing-entries"),
    ],
)
def test_wrong_fields(asked: Instruction, good: Contribution, fields: dict[str, Any], expected: str) -> None:
    assert code(replace(good, **fields), asked) == expected


def test_missing_and_extra_entries(asked: Instruction, good: Contribution) -> None:
    model, control = good.groups["model"], good.groups["control"]
    assert code(replace(good, groups={"model": model}), asked) == "missing-entries"
    assert code(replace(good, groups={"model": {"w": model["w"]}, "control": control}), asked) == "missing-entries"
    assert code(replace(good, groups={**good.groups, "more": {}}), asked) == "extra-entries"
    assert code(replace(good, groups=with_tensor(good.groups, "model/x", torch.ones(1))), asked) == "extra-entries"


@pytest.mark.parametrize(
    ("path", "tensor", "expected"),
    [
        ("model/w", torch.zeros(4), "wrong-shape"),
        ("model/w", torch.zeros(1, 2), "wrong-shape"),  # would broadcast
        ("model/b", torch.zeros(1), "wrong-shape"),
        ("control/w", torch.zeros(2, 3), "wrong-shape"),
        ("model/w", torch.zeros(2, 2, dtype=torch.float64), "wrong-dtype"),
        ("model/w", torch.zeros(2, 2, dtype=torch.float16), "wrong-dtype"),
        ("control/w", torch.zeros(2, 2, dtype=torch.int32), "wrong-dtype"),
        ("model/w", torch.tensor([[1.0, 2.0], [3.0, NAN]]), "not-finite"),
        ("model/b", torch.tensor(INF), "not-finite"),
        ("model/b", torch.tensor(-INF), "not-finite"),
        ("control/w", torch.tensor([[0.0, NAN], [0.0, 0.0]]), "not-finite"),
        ("model/b", torch.tensor(1e7), "norm"),
        ("model/b", torch.tensor(1e30), "norm"),  # finite, though its square is not
        ("control/w", torch.full((2, 2), 1e30), "norm"),
    ],
)
def test_wrong_tensors(asked: Instruction, good: Contribution, path: str, tensor: Tensor, expected: str) -> None:
    assert code(replace(good, groups=with_tensor(good.groups, path, tensor)), asked) == expected


def test_the_bad_entry_is_named(asked: Instruction, good: Contribution) -> None:
    bad = with_tensor(good.groups, "model/b", torch.tensor(NAN))
    with pytest.raises(Rejected, match="'model/b' is not finite"):
        check(replace(good, groups=bad), asked)


def test_the_norm_limit_is_of_the_update_not_of_the_model(asked: Instruction, good: Contribution) -> None:
    assert code(good, asked, max_norm=12.99) == "norm"
    far = {**asked.groups, "model": {n: t + 1000 for n, t in asked.groups["model"].items()}}
    moved = {**good.groups, "model": {n: t + 1000 for n, t in good.groups["model"].items()}}
    assert check(replace(good, groups=moved), replace(asked, groups=far), max_norm=13.01) == pytest.approx(13, rel=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"validation/0/loss": torch.tensor(NAN, dtype=torch.float64)},
        {"validation/0/loss": torch.tensor(INF, dtype=torch.float64)},
        {"validation/0/loss": torch.tensor(1.0)},  # float32
        {"validation/0/loss": torch.ones(2, dtype=torch.float64)},
        {"validation/0/confusion": torch.eye(4, dtype=torch.int64)},  # could not be added to the others
        {"validation/0/confusion": torch.zeros((), dtype=torch.int64)},  # would broadcast over them
        {"validation/0/confusion": torch.eye(3)},
        {"validation/0/more": torch.zeros(())},
        {"validation/1/loss": torch.tensor(1.0, dtype=torch.float64)},  # a task that was not asked for
        {"test/0/loss": torch.tensor(1.0, dtype=torch.float64)},  # a part that was not asked for
        {"loss": torch.tensor(1.0, dtype=torch.float64)},
        {"validation/0/patient X/loss": torch.tensor(1.0, dtype=torch.float64)},
        {"validation/0/confusion": torch.zeros(2000, 2000, dtype=torch.int64)},
    ],
)
@pytest.mark.parametrize("answer", ["ok", "no-data"])  # a site without training data may still report metrics
def test_metric_sums_that_could_not_be_added(
    asked: Instruction, good: Contribution, change: dict[str, Tensor], answer: str
) -> None:
    assert code(replace(good, metrics={**good.metrics, **change}, code=answer), asked) == "metrics"


def test_metric_sums_come_whole_or_not_at_all(asked: Instruction, good: Contribution) -> None:
    for name in good.metrics:
        assert code(replace(good, metrics={name: good.metrics[name]}), asked) == "metrics"
    assert check(replace(good, metrics={}), asked) == pytest.approx(13.0)  # a site without validation data


def test_only_training_answers_need_tensors(asked: Instruction, good: Contribution) -> None:
    for kind in ("evaluate", "probe", "end_task"):
        answer = replace(good, kind=kind, groups={}, examples=0)
        assert check_contribution(answer, replace(asked, kind=kind), {}, INF) == 0.0
        assert code(replace(answer, round=0), replace(asked, kind=kind)) == "stale-round"
