"""Whole runs with privacy at the server: resumed, repeated, told in events, and without noise the plain run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from client.readers.base import Splits
from client.workbench import Benches
from server.checkpoint import read_checkpoint
from server.coordinator import Coordinator
from server.events import Events
from shared_models.job import Job
from shared_models.messages import Contribution, Instruction, refusal
from shared_models.privacy import Spend, client_spend, epsilon
from simulations.engines.inprocess import InProcess

MakeJob = Callable[..., Job]
MakeSplits = Callable[..., Splits]


class Crash(Exception):  # noqa: N818
    """The process is gone."""


class Fragile(InProcess):
    """Ends the process, so to speak, before it answers in one round."""

    def __init__(self, sites: dict[str, Splits], at: int) -> None:
        super().__init__(list(sites), sites.__getitem__, Benches(torch.device("cpu")))
        self.at = at

    def run(self, instructions: Iterable[Instruction]) -> Iterator[Contribution]:
        for reply in super().run(instructions):
            if (reply.kind, reply.round, reply.site) == ("train", self.at, "c"):
                raise Crash
            yield reply


@pytest.fixture
def sites(make_splits: MakeSplits) -> dict[str, Splits]:
    return {name: make_splits(i, count=12 + i) for i, name in enumerate("abcd")}


def coordinate(
    job: Job, sites: dict[str, Splits], folder: Path | None = None, at: int = -1, **more: Any
) -> Coordinator:
    made = Coordinator(job, Fragile(sites, at), "run", folder=folder, **more)
    made.run()
    return made


@pytest.mark.parametrize(
    "privacy",
    [
        {"mode": "sample", "epsilon": 5.0},
        {"mode": "client", "noise": 0.5, "clip": 0.4, "quantile": 0.5},
        {"mode": "client", "noise": 0.5, "mechanism": "ftrl"},
        {"mode": "client", "noise": 0.5, "noise_by": "clients"},
    ],
    ids=["sample", "adaptive", "ftrl", "clients"],
)
def test_a_resumed_run_has_the_same_bits_and_the_same_account(
    make_job: MakeJob, sites: dict[str, Splits], tmp_path: Path, privacy: dict[str, Any]
) -> None:
    federation = {"rounds": 4, "fraction": 0.5 if "mechanism" in privacy else 1.0}
    job = make_job(privacy=privacy, method={"name": "fedavg", "weighting": "uniform"}, federation=federation)
    secret, resumed = {"secret": b"q" * 32}, tmp_path / "resumed"
    (tmp_path / "whole").mkdir()
    resumed.mkdir()
    whole = coordinate(job, sites, tmp_path / "whole", **secret)
    at = next(
        e["round"] for e in map(json.loads, (tmp_path / "whole" / "events.jsonl").read_text().splitlines())
        if e["event"] == "round" and "c" in e["sites"] and e["round"] >= 1
    )  # fmt: skip
    with pytest.raises(Crash):
        coordinate(job, sites, resumed, at, **secret)
    again = coordinate(job, sites, resumed, **secret)
    assert all(torch.equal(again.state["model"][n], t) for n, t in whole.state["model"].items())
    assert again.privacy.state == whole.privacy.state
    assert again.privacy.summary() == whole.privacy.summary()


def test_what_a_task_of_a_stream_gave_out_is_not_made_anew_under_the_same_noise(
    client_job: MakeJob, sites: dict[str, Splits], tmp_path: Path
) -> None:
    """Stopped when a task's model has left for its test: the round was over, whoever would come to it now.

    Two means under one noise would differ by what one site did, without any noise.
    """

    class Watched(InProcess):
        """Notes the models that are measured, and stops at the first; later the site c does not train any more."""

        def __init__(self, stop: bool) -> None:
            super().__init__(list(sites), sites.__getitem__, Benches(torch.device("cpu")))
            self.stop, self.given = stop, []  # type: ignore[var-annotated]

        def run(self, instructions: Iterable[Instruction]) -> Iterator[Contribution]:
            for asked in instructions:
                if asked.kind == "evaluate":
                    self.given.append({n: t.clone() for n, t in asked.groups["model"].items()})
                    if self.stop:
                        raise Crash
                lost = not self.stop and asked.kind == "train" and asked.site == "c"
                yield refusal(asked, "exception") if lost else self.handler(asked.site).handle(asked)

    job = client_job({"noise": 0.5}, time="continual", stream={"tasks": 2}, federation={"rounds": 2})
    first, second = Watched(stop=True), Watched(stop=False)
    with pytest.raises(Crash):
        Coordinator(job, first, "run", folder=tmp_path, secret=b"q" * 32).run()
    Coordinator(job, second, "run", folder=tmp_path, secret=b"q" * 32).run()
    assert all(torch.equal(second.given[0][n], t) for n, t in first.given[0].items())


class Liar(InProcess):
    """The site a says of its training what it likes."""

    def __init__(self, sites: dict[str, Splits], lie: dict[str, Any]) -> None:
        super().__init__(list(sites), sites.__getitem__, Benches(torch.device("cpu")))
        self.lie = lie

    def run(self, instructions: Iterable[Instruction]) -> Iterator[Contribution]:
        for reply in super().run(instructions):
            lies = reply.site == "a" and reply.kind == "train"
            yield replace(reply, **self.lie) if lies else reply


LIES: dict[str, dict[str, Any]] = {
    "a noise next to nothing": {"noise": 1e-200},
    "without an update": {"noise": 1e-200, "groups": {}},
    "a noise beyond all numbers": {"noise": 1e300},
    "an infinite noise": {"noise": float("inf")},
    "no number": {"noise": float("nan")},
    "more steps than there are": {"steps": 2**52},
    "and samples for them": {"steps": 2**52, "samples": 2**52},
    "no step": {"steps": 0},
    "no sample": {"samples": 0},
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("privacy", [{"epsilon": 5.0}, {"noise": 1.0}])
def test_what_one_site_says_of_its_noise_and_steps_does_not_end_the_run(
    make_job: MakeJob, sites: dict[str, Splits], tmp_path: Path, lie: str, privacy: dict[str, Any]
) -> None:
    heard: list[dict[str, Any]] = []
    job, events = make_job(privacy={"mode": "sample", **privacy}), Events(listener=heard.append)
    outcome = Coordinator(job, Liar(sites, LIES[lie]), "run", folder=tmp_path, events=events).run()
    rejected = [(e["round"], e["site"], e["code"]) for e in heard if e["event"] == "rejected"]
    assert rejected == [(round, "a", "privacy") for round in range(job.federation.rounds)]
    assert outcome.privacy["epsilon"].keys() == {"b", "c", "d"}
    facts = read_checkpoint(tmp_path / "checkpoint")[1]  # type: ignore[index]
    assert facts["progress"]["privacy"]["spends"].keys() == {"b", "c", "d"}


def test_a_run_goes_on_with_a_site_that_was_rejected_before(
    make_job: MakeJob, sites: dict[str, Splits], tmp_path: Path
) -> None:
    """Its account begins with the first answer that went into a sum."""
    job = make_job(privacy={"mode": "sample", "noise": 1.0}, federation={"rounds": 3})

    class Mended(Liar):
        def run(self, instructions: Iterable[Instruction]) -> Iterator[Contribution]:
            for reply in super().run(instructions):
                if (reply.kind, reply.round, reply.site) == ("train", 1, "c"):
                    raise Crash
                yield reply

    with pytest.raises(Crash):
        Coordinator(job, Mended(sites, {"groups": {}, "noise": 1e-200}), "run", folder=tmp_path).run()
    outcome = Coordinator(job, Liar(sites, {}), "run", folder=tmp_path).run()
    steps = -(-len(sites["a"].train) // job.train.batch_size)
    assert outcome.privacy["epsilon"]["a"] == pytest.approx(epsilon([Spend(1.0, 1 / steps, 2 * steps)], 1e-5))


def test_the_job_and_its_seed_do_not_give_the_server_s_noise(client_job: MakeJob, sites: dict[str, Splits]) -> None:
    job = client_job()
    one, same, other = (coordinate(job, sites, secret=s * 32).state["model"] for s in (b"a", b"a", b"b"))
    assert all(torch.equal(same[n], t) for n, t in one.items())
    assert not any(torch.equal(other[n], t) for n, t in one.items())


def test_no_noise_and_no_clip_are_the_plain_run_bit_for_bit(
    make_job: MakeJob, client_job: MakeJob, sites: dict[str, Splits]
) -> None:
    uniform = {"name": "fedavg", "weighting": "uniform"}
    plain = coordinate(make_job(method=uniform), sites).state["model"]
    off = {"mode": "sample", "noise": 0, "clip": 0, "sampling": "shuffle"}
    jobs = [
        make_job(method=uniform, privacy=off),
        client_job({"noise": 0, "clip": 0}),
        client_job({"noise": 0, "clip": 1e6}),
        client_job({"noise": 0, "clip": 0, "noise_by": "clients"}),
    ]
    for job in jobs:
        found = coordinate(job, sites).state["model"]
        assert all(torch.equal(found[n], t) for n, t in plain.items()), job.privacy


def test_epsilon_of_each_site_and_round_stands_in_the_events(make_job: MakeJob, sites: dict[str, Splits]) -> None:
    heard: list[dict[str, Any]] = []
    job = make_job(privacy={"mode": "sample", "noise": 1.2, "delta": 1e-4}, federation={"rounds": 3})
    outcome = Coordinator(job, Fragile(sites, -1), "run", events=Events(listener=heard.append)).run()
    rounds = [e for e in heard if e["event"] == "round"]
    for number, event in enumerate(rounds, start=1):
        told = event["privacy"]
        assert (told["unit"], told["delta"], told["accountant"]) == ("sample", 1e-4, "rdp")
        assert told["neighbours"] == "one training example added or removed"
        assert told["noise"] == [1.2] * 4
        for site, examples, steps, found in zip(
            event["sites"], event["examples"], event["steps"], told["epsilon"], strict=True
        ):
            assert examples == len(sites[site].train)
            assert found == pytest.approx(epsilon([Spend(1.2, 1 / steps, number * steps)], 1e-4)), site
    assert outcome.privacy["epsilon"] == dict(zip("abcd", rounds[-1]["privacy"]["epsilon"], strict=True))
    assert outcome.privacy["statement"].startswith("epsilon ")
    assert "delta 0.0001, unit sample, neighbours: one training example" in outcome.privacy["statement"]
    assert heard[-1]["privacy"] == outcome.privacy


def test_epsilon_of_a_site_as_the_unit_stands_in_the_events(client_job: MakeJob, sites: dict[str, Splits]) -> None:
    heard: list[dict[str, Any]] = []
    job = client_job({"noise": 2.0}, federation={"rounds": 4, "fraction": 0.4})
    outcome = Coordinator(job, Fragile(sites, -1), "run", events=Events(listener=heard.append), secret=b"z" * 32).run()
    told = [e["privacy"] for e in heard if e["event"] == "round"]
    assert [t["epsilon"] for t in told] == [epsilon([client_spend(job, r)], 1e-5) for r in (1, 2, 3, 4)]
    assert all((t["unit"], t["rate"], t["mechanism"]) == ("client", 0.4, "gaussian") for t in told)
    assert outcome.privacy["epsilon"] == {"every site": told[-1]["epsilon"]}
    assert outcome.privacy["statement"].endswith(
        "(RDP accountant); assumes that the server is trusted with the updates and adds the noise and that each site "
        "takes part by chance (0.4), and who did is known to the server alone (a site's own ledger counts its rounds "
        "without that chance)"
    )
    shared = Coordinator(client_job({"noise_by": "clients"}), Fragile(sites, -1), "run").run().privacy["statement"]
    assert (
        "assumes that 1 or more sites add their shares of the noise, and only their sum is seen, by one who added none"
        in shared
    )
    assert "(a site's own ledger counts its share alone) and that every site takes part in every round" in shared
    silent = Coordinator(client_job({"noise": 0}), Fragile(sites, -1), "run").run().privacy["statement"]
    assert silent == "no differential privacy (unit client: the noise is 0)"


def test_without_privacy_nothing_is_said(make_job: MakeJob, sites: dict[str, Splits]) -> None:
    heard: list[dict[str, Any]] = []
    outcome = Coordinator(make_job(), Fragile(sites, -1), "run", events=Events(listener=heard.append)).run()
    assert outcome.privacy == {}
    assert not any("privacy" in event for event in heard)
