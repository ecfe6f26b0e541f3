"""Approval: by the hash this node computes itself, and without it nothing runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import client.policy
from client.config import PolicyPart
from client.handler import Handler
from client.policy import Policy
from client.state import MemoryState
from shared_models.errors import ConfigError, PolicyError
from shared_models.job import Job
from shared_models.messages import Budget, Instruction
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
    with pytest.raises(PolicyError, match=rf"job 'test' asks to train .* client approve {job.hash}"):
        Policy(requests=requests).require(arrived)
    assert [p.name for p in requests.iterdir()] == [f"{job.hash}.toml"]
    assert Job.load(requests / f"{job.hash}.toml").hash == job.hash


def test_the_hash_of_a_job_that_is_only_read_is_that_of_the_job(make_job: Callable[..., Job]) -> None:
    """So that what is built of it was approved, and what is approved can be built; also of a chain of stages."""
    stages = [{"name": "one"}, {"name": "two", "train": {"lr": 0.2}}]
    jobs = [make_job(model={"name": "vit"}, method={"name": "scaffold"}), make_job(stages=stages).steps[1]]
    for job in jobs:
        sent = encode_instruction(ask(job))
        read = decode_instruction(*sent, lambda job: False)
        assert (read.job.hash, read.job.whole.hash, read.job.stage) == (job.whole.hash, job.whole.hash, job.stage)
        assert replace(read, job=job) == replace(decode_instruction(*sent), job=job)
        policy = Policy([job.whole.hash])
        assert policy.approves(read.job)
        assert decode_instruction(*sent, policy.approves).job.hash == job.hash
        assert not Policy(["0" * 64]).approves(read.job)


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


def refuse(policy: Policy, job: Job, code: str = "not-approved") -> str:
    with pytest.raises(PolicyError) as caught:
        policy.require(ask(job))
    assert caught.value.code == code
    return str(caught.value)


def test_a_request_is_kept_once(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    policy, job = Policy(requests=tmp_path), make_job()
    refuse(policy, job)
    (tmp_path / f"{job.hash}.toml").write_text("# read by the owner")
    refuse(policy, job)
    assert (tmp_path / f"{job.hash}.toml").read_text() == "# read by the owner"


def test_the_newest_hundred_requests_are_kept(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    """So a node that is old, or that was asked a hundred times, still shows what asks now."""
    for number in range(100):
        path = tmp_path / f"{number:064x}.toml"
        path.write_text("old, long done")
        os.utime(path, (1000 + number, 1000 + number))
    policy, jobs = Policy(requests=tmp_path), [make_job(seed=seed) for seed in range(3)]
    for number, job in enumerate(jobs):
        refuse(policy, job)
        left = {path.stem for path in tmp_path.iterdir()}
        assert left == {f"{n:064x}" for n in range(number + 1, 100)} | {job.hash for job in jobs[: number + 1]}


def test_requests_are_bounded_in_size(
    tmp_path: Path, make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job beyond the limit is not kept; others make room for a new one, the oldest first."""
    jobs = [make_job(seed=seed) for seed in range(4)]
    size = len(jobs[0].to_toml().encode())
    monkeypatch.setattr(client.policy, "MAX_REQUEST_BYTES", size)
    monkeypatch.setattr(client.policy, "MAX_BYTES", 3 * size)
    policy = Policy(requests=tmp_path)
    for number, job in enumerate(jobs):
        refuse(policy, job)
        os.utime(tmp_path / f"{job.hash}.toml", (1000 + number, 1000 + number))
    assert {path.stem for path in tmp_path.iterdir()} == {job.hash for job in jobs[1:]}
    larger = make_job(name="a-longer-name")
    said = refuse(policy, larger, "too-large")
    assert "nothing was written" in said
    assert not (tmp_path / f"{larger.hash}.toml").exists()
    Policy([larger.hash], requests=tmp_path).require(ask(larger))  # a hash that was agreed to is agreed to


def test_a_job_of_ten_megabytes_as_with_a_large_tokenizer_can_be_read(
    tmp_path: Path, make_job: Callable[..., Job]
) -> None:
    job = make_job(task={"labels": [f"{i:04}{'x' * 96}" for i in range(100_000)]})
    assert len(job.to_toml()) > 10_000_000
    refuse(Policy(requests=tmp_path), job)
    assert Job.load(tmp_path / f"{job.hash}.toml").hash == job.hash


def test_it_is_said_when_a_request_cannot_be_written(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    blocked = tmp_path / "requests"
    blocked.write_text("no folder")
    said = refuse(Policy(requests=blocked), make_job())
    assert "nothing was written" in said
    assert str(blocked) in said


# ---- no more than the job says ---------------------------------------------------------------------------------------
def written(job: Job, round: int, task: int, budget: Budget, **fields: object) -> Instruction:
    parts = (("validation", 0), ("validation", 1))
    return replace(ask(job), round=round, rounds=4, task=task, budget=budget, evaluate=parts, **fields)  # type: ignore[arg-type]


@pytest.fixture
def stream(make_job: Callable[..., Job]) -> Job:
    """Two tasks of two rounds: each round passes twice over its task's data, since half of the rounds are its own."""
    return make_job(time="continual", stream={"tasks": 2}, federation={"rounds": 4})


def test_the_work_that_a_job_says_is_done(stream: Job, make_job: Callable[..., Job]) -> None:
    policy = Policy([stream.hash], as_written=True)
    for round, task in enumerate((0, 0, 1, 1)):
        policy.require(written(stream, round, task, Budget(epochs=2.0)))
        policy.require(written(stream, round, task, Budget(epochs=2.0), kind="end_task"))
        policy.require(written(stream, 4, task, Budget(epochs=1.0), kind="evaluate"))  # the end of the run
    counted = make_job(train={"steps": 3})
    Policy([counted.hash], as_written=True).require(replace(ask(counted), rounds=2, budget=Budget(steps=3)))


@pytest.mark.parametrize(
    "more",
    [
        {"budget": Budget(epochs=2.1)},
        {"budget": Budget(steps=10**6)},
        {"round": 4},
        {"round": -1},
        {"rounds": 5},
        {"task": 1},
        {"round": 2},
        {"task": 2, "kind": "end_task"},
        {"round": 5, "kind": "evaluate"},
        {"evaluate": (("test", 2),)},
        {"evaluate": (("test", 0),) * 2, "kind": "evaluate"},
    ],
    ids=str,
)
@pytest.mark.parametrize("approve_all", [False, True])
def test_work_that_a_job_does_not_say_is_refused(stream: Job, more: dict[str, object], approve_all: bool) -> None:
    greedy = replace(written(stream, 0, 0, Budget(epochs=2.0)), **more)  # type: ignore[arg-type]
    policy = Policy([stream.hash], approve_all=approve_all, as_written=True)
    with pytest.raises(PolicyError, match="asks for more than job 'test' says") as caught:
        policy.require(greedy)
    assert caught.value.code == "beyond-job"
    Policy([stream.hash]).require(greedy)  # the simulator's baselines may


def test_a_site_trains_when_a_stream_of_sites_says(make_job: Callable[..., Job]) -> None:
    """Site a joins in the second of two tasks, of two rounds each, and passes as often over its data as offline."""
    for stay in (False, True):
        groups = {"kind": "sites", "sites": [["b"], ["a"]], "stay": stay}
        job = make_job(time="continual", stream=groups, federation={"rounds": 4})
        policy = Policy([job.hash], as_written=True)
        policy.require(written(job, 3, 1, Budget(epochs=2.0)))
        with pytest.raises(PolicyError, match="more than"):
            policy.require(written(job, 3, 1, Budget(epochs=1.0)))
        first = replace(written(job, 3, 1, Budget(epochs=1.0 if stay else 2.0)), site="b")
        policy.require(first)
        for kind in ("probe", "train", "end_task", "evaluate"):
            with pytest.raises(PolicyError, match="which site is when at which task, and 'c' is not named") as caught:
                policy.require(replace(first, site="c", kind=kind))
            assert caught.value.code == "not-named"
        offline = job.replace(time="offline")
        Policy([offline.hash], as_written=True).require(replace(ask(offline), rounds=4, site="c"))


def test_a_node_takes_part_in_federations_only(make_job: Callable[..., Job]) -> None:
    for place in ("centralized", "isolated"):
        job = make_job(place=place)
        with pytest.raises(PolicyError, match="more than"):
            Policy([job.hash], as_written=True).require(replace(ask(job), rounds=2))


def test_what_is_written_counts_at_each_instruction(make_job: Callable[..., Job]) -> None:
    job, written = make_job(), PolicyPart()
    policy = Policy(written=lambda: (written, "none"))
    instruction = Instruction("probe", "r", "a", job, "")
    for given in (PolicyPart(approve=(job.hash,)), PolicyPart(approve_all=True)):
        written = PolicyPart()
        with pytest.raises(PolicyError, match=f"fedzoo client approve {job.hash}"):
            policy.require(instruction)
        written = given
        policy.require(instruction)


# ---- jobs without privacy --------------------------------------------------------------------------------------------
PRIVACY = {
    "none": {},
    "sample": {"mode": "sample", "noise": 1.0},
    "client": {"mode": "client", "noise": 1.0},
    "without noise": {"mode": "sample", "noise": 0.0},
}


@pytest.mark.parametrize(
    ("required", "taken"),
    [
        ("none", set(PRIVACY)),
        ("sample", {"sample"}),
        ("client", {"client"}),
        ("any", {"sample", "client"}),
    ],
)
def test_a_site_can_take_only_jobs_with_privacy(make_job: Callable[..., Job], required: str, taken: set[str]) -> None:
    """However they were approved, and whatever they ask for."""
    for name, part in PRIVACY.items():
        job = make_job(privacy=part, method={"name": "fedavg", "weighting": "uniform"})
        for policy in (Policy([job.hash], privacy=required), Policy(approve_all=True, privacy=required)):  # type: ignore[arg-type]
            for kind in KINDS:
                if name in taken:
                    policy.require(ask(job, kind))
                else:
                    with pytest.raises(PolicyError, match="gives no guarantee that this site requires") as caught:
                        policy.require(ask(job, kind))
                    assert caught.value.code == "privacy-required"


def test_what_the_job_has_instead_is_said(make_job: Callable[..., Job]) -> None:
    with pytest.raises(PolicyError, match=r"requires \(sample or client\): its privacy mode is 'sample' without noise"):
        Policy(approve_all=True, privacy="any").require(ask(make_job(privacy=PRIVACY["without noise"])))


def test_stages_too(make_job: Callable[..., Job]) -> None:
    job = make_job(stages=[{"name": "one"}, {"name": "two", "train": {"lr": 0.2}}])
    for step in (job, *job.steps):
        with pytest.raises(PolicyError, match="gives no guarantee"):
            Policy(approve_all=True, privacy="sample").require(ask(step))


def test_an_unapproved_job_is_not_told_what_the_site_requires(make_job: Callable[..., Job]) -> None:
    with pytest.raises(PolicyError) as caught:
        Policy(privacy="sample").require(ask(make_job()))
    assert caught.value.code == "not-approved"


# ---- jobs that ask for sums over examples ----------------------------------------------------------------------------
SUMMING = {
    "icarl": {"time": "continual", "stream": {"tasks": 2}, "continual": {"name": "icarl", "buffer": 20}},
    "lloyd": {"model": {"name": "kmeans"}, "task": {"name": "clustering"}, "method": {"name": "lloyd"}},
    "pca": {"model": {"name": "pca"}, "task": {"name": "reconstruction"}, "method": {"name": "pca"}},
    "a stage of it": {
        "model": {"name": "kmeans"},
        "task": {"name": "clustering"},
        "stages": [{"name": "tuned"}, {"name": "found", "method": {"name": "lloyd"}}],
    },
}


@pytest.mark.parametrize(
    ("name", "asked"),
    [(name, "sums over examples") for name in SUMMING if name != "icarl"] + [("icarl", "sums of exemplars' features")],
)
def test_a_site_that_gives_no_sums_refuses_jobs_that_ask_for_them(
    make_job: Callable[..., Job], caplog: pytest.LogCaptureFixture, name: str, asked: str
) -> None:
    """However they were approved, from the probe on, and before anything of the data is touched."""
    job = make_job(**SUMMING[name])

    def touch(*_: object) -> None:
        raise AssertionError

    for policy in (Policy([job.hash], statistics=False), Policy(approve_all=True, statistics=False)):
        handler = Handler("a", touch, MemoryState(), policy, touch)  # type: ignore[arg-type]
        for step in job.steps:
            for kind in KINDS:
                assert handler.handle(ask(step, kind)).code == "no-statistics"
    assert f"job '{job.name}' asks for sums that this site does not give: {asked}" in caplog.text
    assert "statistics = false in [policy] of client.toml" in caplog.text
    Policy([job.hash]).require(ask(job, "probe"))


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"time": "continual", "stream": {"tasks": 2}, "continual": {"name": "er"}},
        {"continual": {"name": "icarl", "buffer": 20}},  # offline: no task ends
        {"model": {"name": "kmeans"}, "task": {"name": "clustering"}},
    ],
)
def test_jobs_that_ask_for_none_are_taken(make_job: Callable[..., Job], parts: dict[str, object]) -> None:
    for kind in KINDS:
        Policy(approve_all=True, statistics=False).require(ask(make_job(**parts), kind))


def test_of_normalisation_only_the_round_of_sums_is_refused(make_job: Callable[..., Job]) -> None:
    """The site trains by what the others measured."""
    policy, job = Policy(approve_all=True, statistics=False), make_job(data={"normalise_by": "sites"})
    for kind in KINDS:
        policy.require(ask(job, kind))
    with pytest.raises(PolicyError) as caught:
        policy.require(ask(job, "statistics"))
    assert caught.value.code == "no-statistics"
