"""Every rule of the compatibility table: one job that breaks it and is told why, one beside it that may run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from compat_cases import CASES as OTHER_CASES
from compat_cases import ZERO_SHOT, Parts
from compat_privacy_cases import PRIVACY_CASES

from shared_models.compat import RULES
from shared_models.errors import CompatibilityError
from shared_models.job import Job
from shared_models.methods.base import Method, methods
from shared_models.models import models

MakeJob = Callable[..., Job]
CASES = [*OTHER_CASES, *PRIVACY_CASES]


class Rehearsal(Method):
    """A continual method that replays."""

    continual, name, draws = True, "rehearsal", 1


class Importance(Method):
    """A continual method that measures a task's examples and keeps the result."""

    continual, name = True, "importance"

    def end_task(self, model, task, batches, kept):  # type: ignore[no-untyped-def]
        return kept


@pytest.fixture(autouse=True)
def continual_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "finetune" in list(methods)
    for declared in (Rehearsal, Importance):
        monkeypatch.setitem(methods._things, declared.name, declared)


@pytest.mark.parametrize(("reason", "broken", "counterpart"), CASES)
def test_each_rule_refuses_with_its_reason_and_lets_its_counterpart_pass(
    make_job: MakeJob, reason: str, broken: Parts, counterpart: Parts
) -> None:
    with pytest.raises(CompatibilityError) as error:
        make_job(**broken)
    assert str(error.value).startswith("job 'test': ")
    assert reason in str(error.value)
    assert make_job(**counterpart).name == "test"


def test_a_model_that_cannot_serve_the_task_is_refused(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_job(model={"name": "mlp"}).model.name == "mlp"
    monkeypatch.setitem(models._things, "mlp", replace(models["mlp"], tasks=("detection",)))
    with pytest.raises(CompatibilityError, match="model 'mlp' cannot serve the task 'classification'"):
        make_job(model={"name": "mlp"})


def test_what_replays_choices_goes_with_every_task_that_makes_them(make_job: MakeJob) -> None:
    for parts in ({}, ZERO_SHOT):
        assert make_job(**parts, continual={"name": "er"}).continual.name == "er"


def test_no_rule_is_without_a_case(make_job: MakeJob) -> None:
    """The cases above and the model's break each rule of the table alone, so a new rule needs a new case."""
    covered = set()
    for _, broken, _ in CASES:
        job = Job.model_validate({**make_job().model_dump(), **merged(make_job().model_dump(), broken)})
        covered |= {i for i, (breaks, _) in enumerate(RULES) if breaks(job)}
    assert covered == set(range(1, len(RULES)))  # rule 0 is the model's


def merged(base: Parts, parts: Parts) -> Parts:
    return {k: {**base[k], **v} if isinstance(v, dict) and "name" not in v else v for k, v in parts.items()}
