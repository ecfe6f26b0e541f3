"""Approval: by the hash this node computes itself, and without it nothing runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from client.handler import Handler
from client.policy import Policy
from client.state import MemoryState
from shared_models.errors import ConfigError, PolicyError
from shared_models.job import Job
from shared_models.messages import Instruction
from shared_models.wire import decode_instruction, encode_instruction

KINDS = ("probe", "train", "evaluate", "end_task")


def ask(job: Job, kind: str = "train") -> Instruction:
    return Instruction(kind, "run", "a", job, "")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_without_approval_nothing_is_touched(make_job: Callable[..., Job], kind: str) -> None:
    touched: list[str] = []

    def touch(*_: object) -> None:
        touched.append("data or model")
        raise AssertionError

    class State(MemoryState):
        load = replay = save = touch  # type: ignore[assignment]

    handler = Handler("a", touch, State(), Policy(["0" * 64]), touch)  # type: ignore[arg-type]
    reply = handler.handle(ask(make_job(), kind))
    assert reply.code == "not-approved"
    assert (reply.groups, reply.metrics, reply.document, reply.examples) == ({}, {}, {}, 0)
    assert not touched


def test_a_request_is_left_for_the_owner_to_read(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    """As it arrives over the network: without [simulation], and every default filled in."""
    job = make_job(
        train={"steps": 3, "lr": 1e-7}, simulation={"sites": 7}, model={"name": "vit"}, method={"name": "scaffold"}
    )
    arrived = decode_instruction(*encode_instruction(ask(job)))
    requests = tmp_path / "not" / "yet"
    with pytest.raises(PolicyError, match=rf"job 'test' asks to train .* --approve {job.hash}"):
        Policy(requests=requests).require(arrived)
    assert [p.name for p in requests.iterdir()] == [f"{job.hash}.toml"]
    assert Job.load(requests / f"{job.hash}.toml").hash == job.hash


def test_approval_is_of_one_job(make_job: Callable[..., Job]) -> None:
    job = make_job()
    policy = Policy([job.hash])
    policy.require(ask(job))
    policy.require(ask(make_job(simulation={"sites": 9})))  # not part of what runs on a node
    for other in (make_job(seed=1), make_job(train={"lr": 0.2}), make_job(name="other")):
        with pytest.raises(PolicyError):
            policy.require(ask(other))


def test_a_copy_of_an_approved_job_does_not_inherit_its_hash(make_job: Callable[..., Job]) -> None:
    """A job that says more than what was approved is another job, whatever hash its sender cached."""
    job = make_job()
    policy = Policy([job.hash])
    greedy = job.replace(train={"epochs": 1000.0})
    arrived = decode_instruction(*encode_instruction(replace(ask(job), job=greedy)))
    with pytest.raises(PolicyError):
        policy.require(arrived)


def test_approve_all(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    Policy(approve_all=True, requests=tmp_path / "requests").require(ask(make_job()))
    assert not (tmp_path / "requests").exists()


@pytest.mark.parametrize("word", ["", "abc", "0" * 63, "0" * 65, "G" * 64, "A" * 64, "0" * 64 + "\n", " " + "0" * 63])
def test_a_word_that_is_no_hash_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="is not a job hash"):
        Policy(["0" * 64, word])
