"""The end of a task with class means: one for all sites, faults injected, crashes and resumption."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from client.readers.base import Examples, Splits
from client.state import DiskState, MemoryState, State
from client.workbench import Benches
from server.coordinator import Coordinator
from server.events import Events
from server.outcome import Outcome
from shared_models.errors import RunError
from shared_models.job import Job
from shared_models.messages import Contribution, Instruction
from shared_models.nearest_mean import MEANS, SUMS, merge
from simulations.engines.inprocess import InProcess

Maker = Callable[..., Job]
Mend = Callable[[Contribution], Contribution]


class Watched(InProcess):
    """Sites in process; what they are asked is noted, and their answers to the end of a task pass through `mend`."""

    def __init__(
        self, sites: dict[str, Splits], mend: Mend = lambda r: r, states: Callable[[str], State] | None = None
    ) -> None:
        super().__init__(list(sites), sites.__getitem__, Benches(), states or (lambda name: MemoryState()))
        self.mend = mend
        self.asked: list[Instruction] = []
        self.given: dict[tuple[str, int], torch.Tensor] = {}

    def run(self, instructions: Iterable[Instruction]) -> Iterator[Contribution]:
        for instruction in instructions:
            self.asked.append(instruction)
            reply = next(iter(super().run([instruction])))
            if reply.kind == "end_task":
                reply = self.mend(reply)
                if SUMS in reply.groups:
                    self.given[reply.site, reply.task] = reply.groups[SUMS]["sum"]
            yield reply


@pytest.fixture
def job(make_job: Maker) -> Job:
    return make_job(
        time="continual", stream={"tasks": 2}, continual={"name": "icarl", "buffer": 20},
        federation={"rounds": 4, "min_sites": 1},
    )  # fmt: skip


@pytest.fixture
def sites(make_splits: Callable[..., Splits]) -> dict[str, Splits]:
    return {name: make_splits(i, count=30 + 10 * i) for i, name in enumerate("abc")}


def run(job: Job, engine: Watched, **options: Any) -> tuple[Outcome, list[dict[str, Any]], Coordinator]:
    heard: list[dict[str, Any]] = []
    coordinator = Coordinator(job, engine, "run", events=Events(listener=heard.append), **options)
    return coordinator.run(), heard, coordinator


def test_the_test_is_measured_with_the_means_of_all_sites_exemplars(job: Job, sites: dict[str, Splits]) -> None:
    engine = Watched(sites)
    outcome, _, coordinator = run(job, engine)
    means = []
    for task in (0, 1):
        total = torch.stack([engine.given[site, task] for site in "abc"]).sum(dim=0)
        means.append((total / total.norm(dim=1, keepdim=True).clamp(min=1e-12)).float())
    measured = [i for i in engine.asked if i.kind == "evaluate"]
    with_none, first, second, last = (measured[i : i + 3] for i in (0, 3, 6, 9))
    assert len(measured) == 12
    assert all(MEANS not in i.groups for i in with_none)  # before any training
    assert all(torch.equal(i.groups[MEANS]["mean"], means[0]) for i in first)
    assert all(torch.equal(i.groups[MEANS]["mean"], means[1]) for i in second + last)
    assert all(i.groups.keys() == {"model"} for i in engine.asked if i.kind in ("train", "end_task"))
    assert ((means[0] != 0).any(dim=1)).tolist() == [True] * 5 + [False] * 5
    assert (means[1] != 0).any(dim=1).all()
    (until, after) = outcome.matrix
    assert until[1] == 0  # no exemplar, no mean, never chosen
    assert outcome.all_sites["accuracy"] == pytest.approx((after[0] + after[1]) / 2, abs=1e-6)
    assert torch.equal(coordinator.means["mean"], means[1])
    sums = sum(t.numel() * 8 for t in engine.given.values())
    plain, _, _ = run(job.replace(continual={"name": "finetune"}), Watched(sites))
    assert outcome.totals.bytes_up == plain.totals.bytes_up + sums


def test_validation_is_answered_by_the_models_outputs(job: Job, sites: dict[str, Splits]) -> None:
    """The last point of the curve is measured beside the test, and is of a kind with the points before it."""
    outcome, _, coordinator = run(job, Watched(sites))
    coordinator.means = {}
    by_outputs = coordinator._finish()
    assert by_outputs.curve[-1] == by_outputs.curve[-2]  # the last point, with the means and without
    assert by_outputs.all_sites["loss"] != outcome.all_sites["loss"]


@pytest.mark.parametrize("method", ["fedavg", "fedprox", "scaffold", "fedadam"])
def test_any_federated_method_goes_with_it(job: Job, sites: dict[str, Splits], method: str) -> None:
    outcome, heard, _ = run(job.replace(method={"name": method}), Watched(sites))
    assert not [e for e in heard if e["event"] == "rejected"]
    assert outcome.matrix[1][0] > 0.5
    assert outcome.known[1][0] >= outcome.matrix[1][0]


@pytest.mark.parametrize("kill_at", [0, 2, 3, 4, 5])
def test_killed_at_the_end_of_a_task_and_resumed_equals_uninterrupted(
    job: Job, sites: dict[str, Splits], tmp_path: Path, kill_at: int
) -> None:
    """The server dies before an answer to the end of a task, between the tasks, or before one of the last task."""

    class KilledError(Exception):
        pass

    expected, _, whole = run(job, Watched(sites))
    answers = 0

    class Fragile(Watched):
        def run(self, instructions: Iterable[Instruction]) -> Iterator[Contribution]:
            nonlocal answers
            for reply in super().run(instructions):
                if reply.kind == "end_task" or (answers == 3 and reply.kind == "train"):
                    answers += 1
                    if answers == kill_at + 1:
                        raise KilledError
                yield reply

    def engine() -> Fragile:
        return Fragile(sites, states=lambda name: DiskState(tmp_path / "nodes", name))

    with pytest.raises(KilledError):
        run(job, engine(), folder=tmp_path)
    found, heard, coordinator = run(job, engine(), folder=tmp_path)
    assert "resumed" in [e["event"] for e in heard]
    assert all(torch.equal(t, found.model[n]) for n, t in expected.model.items())
    assert torch.equal(coordinator.means["mean"], whole.means["mean"])
    assert (found.matrix, found.known, found.all_sites) == (expected.matrix, expected.known, expected.all_sites)


def test_means_survive_a_stop_after_the_last_task(job: Job, sites: dict[str, Splits], tmp_path: Path) -> None:
    """Then no task ends any more: what measures the model comes from the checkpoint."""
    expected, _, _ = run(job, Watched(sites), folder=tmp_path)
    engine = Watched(sites)
    found, _, _ = run(job, engine, folder=tmp_path)
    assert {i.kind for i in engine.asked} == {"evaluate"}
    assert found.all_sites == expected.all_sites
    assert torch.equal(load_file(tmp_path / "means.safetensors")["mean"], engine.asked[0].groups[MEANS]["mean"])


def test_sums_that_cannot_be_are_left_out(job: Job, sites: dict[str, Splits]) -> None:
    def mend(reply: Contribution) -> Contribution:
        return replace(reply, groups={SUMS: {"sum": 1e6 + reply.groups[SUMS]["sum"]}}) if reply.site == "b" else reply

    engine = Watched(sites, mend)
    _, heard, coordinator = run(job, engine)
    assert [(e["site"], e["code"]) for e in heard if e["event"] == "rejected"] == [("b", "norm")] * 2
    expected = merge({"sum": engine.given[s, 1]} for s in "ac")["mean"]
    assert torch.equal(coordinator.means["mean"], expected)


def test_a_site_that_was_lost_is_asked_again(job: Job, sites: dict[str, Splits]) -> None:
    lost, whole = {("b", 0)}, Watched(sites)
    run(job, whole)

    def mend(reply: Contribution) -> Contribution:
        if (reply.site, reply.task) not in lost:
            return reply
        lost.remove((reply.site, reply.task))
        return replace(reply, code="lost", groups={}, examples=0)

    engine = Watched(sites, mend)
    run(job, engine)
    assert not lost
    assert [i.site for i in engine.asked if i.kind == "end_task"] == ["a", "b", "c", "b", "a", "b", "c"]
    for one, other in zip(_means(whole), _means(engine), strict=True):
        assert torch.equal(one, other)


def _means(engine: Watched) -> list[torch.Tensor]:
    """What each model that was tested was tested with."""
    return [i.groups[MEANS]["mean"] for i in engine.asked if MEANS in i.groups]


def test_without_any_sums_the_run_ends_with_the_reason(job: Job, sites: dict[str, Splits]) -> None:
    def mend(reply: Contribution) -> Contribution:
        return replace(reply, code="exception", groups={}, examples=0)

    with pytest.raises(RunError, match="no site gave the sums of its exemplars"):
        run(job, Watched(sites, mend))


@pytest.fixture
def late(sites: dict[str, Splits]) -> dict[str, Splits]:
    """The sites without a training example of the first task."""
    trains = {name: splits.train for name, splits in sites.items()}
    rows = {name: train.rows[train.store.y[train.rows] >= 5] for name, train in trains.items()}
    return {name: replace(sites[name], train=Examples(trains[name].store, rows[name])) for name in sites}


@pytest.mark.parametrize("names", ["a", "abc"])
def test_until_a_site_holds_an_exemplar_the_models_outputs_answer(
    job: Job, late: dict[str, Splits], names: str
) -> None:
    engine = Watched({name: late[name] for name in names})
    outcome, heard, coordinator = run(job, engine)
    assert not [e for e in heard if e["event"] == "rejected"]
    asked = len(names)
    measured = [MEANS in i.groups for i in engine.asked if i.kind == "evaluate"]
    assert measured == [False] * 2 * asked + [True] * 2 * asked  # untrained, the two tasks, the end
    assert outcome.matrix[0] == outcome.untrained  # nobody had anything to learn from
    assert torch.equal(coordinator.means["mean"], merge({"sum": engine.given[s, 1]} for s in names)["mean"])


def test_that_one_site_has_none_excuses_no_other(job: Job, sites: dict[str, Splits]) -> None:
    def mend(reply: Contribution) -> Contribution:
        return replace(reply, code="exception" if reply.site == "b" else "no-data", groups={}, examples=0)

    with pytest.raises(RunError, match="no site gave the sums of its exemplars"):
        run(job, Watched(sites, mend))


def test_without_means_a_run_is_resumed_to_the_same_bits(job: Job, late: dict[str, Splits], tmp_path: Path) -> None:
    """The server dies in the second task: the checkpoint says that the first one left no means."""

    class KilledError(Exception):
        pass

    class Fragile(Watched):
        def run(self, instructions: Iterable[Instruction]) -> Iterator[Contribution]:
            for reply in super().run(instructions):
                if (reply.kind, reply.round) == ("train", 3):
                    raise KilledError
                yield reply

    def states(name: str) -> State:
        return DiskState(tmp_path / "nodes", name)

    expected, _, whole = run(job, Watched(late))
    with pytest.raises(KilledError):
        run(job, Fragile(late, states=states), folder=tmp_path)
    found, heard, coordinator = run(job, Watched(late, states=states), folder=tmp_path)
    assert "resumed" in [e["event"] for e in heard]
    assert all(torch.equal(t, found.model[n]) for n, t in expected.model.items())
    assert torch.equal(coordinator.means["mean"], whole.means["mean"])
    assert (found.matrix, found.known, found.all_sites) == (expected.matrix, expected.known, expected.all_sites)
