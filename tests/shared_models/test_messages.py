"""The two values that cross the boundary: frozen, without shared defaults, and counted in bytes as they travel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from shared_models.job import Job
from shared_models.messages import Budget, Contribution, Instruction, payload_bytes, refusal
from shared_models.wire import decode_contribution, digest, encode_contribution

MakeJob = Callable[..., Job]


def test_a_refusal_answers_its_instruction_and_carries_only_a_code(make_job: MakeJob) -> None:
    groups = {"model": {"w": torch.ones(3)}}
    asked = Instruction("train", "run-1", "site-a", make_job(), "f", task=2, round=5, groups=groups)
    answer = refusal(asked, "not-approved")
    assert answer == Contribution("train", "run-1", "site-a", task=2, round=5, code="not-approved")
    assert (answer.examples, answer.samples, answer.steps) == (0, 0, 0)
    assert not answer.groups
    assert not answer.metrics
    assert not answer.document


def test_both_are_frozen_and_share_no_defaults(make_job: MakeJob) -> None:
    first, second = (Instruction("probe", "r", site, make_job(), "f") for site in "ab")
    answers = [refusal(i, "x") for i in (first, second)]
    with pytest.raises(FrozenInstanceError):
        first.round = 1  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        answers[0].code = "ok"  # type: ignore[misc]
    assert first.groups is not second.groups
    assert answers[0].metrics is not answers[1].metrics
    assert first.budget == Budget(epochs=1.0, steps=None)


def test_payload_bytes_are_those_of_the_blob() -> None:
    groups = {
        "model": {"w": torch.zeros(3, 5), "half": torch.zeros(7, dtype=torch.bfloat16), "none": torch.zeros(0, 4)},
        "control": {"n": torch.zeros((), dtype=torch.int64), "strided": torch.zeros(4, 4).t()[::2]},
    }
    assert payload_bytes(groups) == 60 + 14 + 0 + 8 + 32
    _, blob = encode_contribution(Contribution("train", "r", "s", groups=groups))
    assert len(blob) == payload_bytes(groups)
    assert payload_bytes({}) == 0


def test_an_instruction_s_digest_depends_on_all_it_says_but_not_on_the_order_of_tensors(make_job: MakeJob) -> None:
    job = make_job()
    w, b = torch.ones(2), torch.zeros(1)
    base = Instruction("train", "r", "s", job, "f", rounds=3, groups={"model": {"w": w, "b": b}, "control": {"w": b}})
    turned = replace(base, groups={"control": {"w": b}, "model": {"b": b, "w": w}})
    assert digest(base) == digest(turned)
    others = [
        replace(base, round=1), replace(base, run="q"), replace(base, site="t"), replace(base, task=1),
        replace(base, rounds=4), replace(base, budget=Budget(epochs=2.0)), replace(base, statistics={"mean": w}),
        replace(base, job=job.replace(seed=1)),
        replace(base, groups={"model": {"w": w + 1, "b": b}, "control": {"w": b}}),
        replace(base, groups={"model": {"w": b, "b": w}, "control": {"w": b}}),
    ]  # fmt: skip
    assert len({digest(base), *map(digest, others)}) == len(others) + 1


def test_an_answer_s_noise_travels() -> None:
    answer = Contribution("train", "r", "s", noise=1.25)
    assert decode_contribution(*encode_contribution(answer)) == answer
