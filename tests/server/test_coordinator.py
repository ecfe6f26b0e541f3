"""The round loop: faults injected at sites, arrival orders, crashes and resumption, streams, budgets."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from client.readers.base import Examples, Splits
from client.state import DiskState, MemoryState, State
from client.workbench import Benches
from server.coordinator import Coordinator
from server.events import Events, read_events
from server.outcome import Progress
from shared_models.errors import RunError
from shared_models.job import Job
from shared_models.messages import Budget, Contribution, Instruction, refusal
from shared_models.schedule import round_budget, task_of
from shared_models.tasks.base import Measure
from shared_models.tasks.classification import Classification
from simulations.engines.inprocess import InProcess

SITES = ("a", "b", "c", "d", "e")
Splitter = Callable[..., Splits]
Maker = Callable[..., Job]


def own(reply: Contribution) -> Contribution:
    """A copy whose tensors no engine overwrites."""
    groups = {g: {n: t.clone() for n, t in ts.items()} for g, ts in reply.groups.items()}
    return replace(reply, groups=groups)


class Disturbed(InProcess):
    """Sites in process whose training answers pass through `mend`, and arrive in a random order where asked."""

    def __init__(
        self,
        sites: dict[str, Splits],
        mend: Callable[[Contribution], Contribution],
        order: int | None,
        states: Callable[[str], State] = lambda name: MemoryState(),
    ) -> None:
        super().__init__(list(sites), sites.__getitem__, Benches(), states)
        self.mend = mend
        self.order = order

    def run(self, instructions: Iterable[Instruction]) -> Iterator[Contribution]:
        replies = [self.mend(own(r)) if r.kind == "train" else own(r) for r in super().run(instructions)]
        if self.order is not None:
            random.Random(self.order).shuffle(replies)
        yield from replies


def weights(coordinator: Coordinator) -> dict[str, torch.Tensor]:
    return {f"{g}/{n}": t.clone() for g, ts in coordinator.state.items() for n, t in ts.items()}


def run(job: Job, sites: dict[str, Splits], **options: Any) -> tuple[Coordinator, list[dict[str, Any]]]:
    mend, order = options.pop("mend", lambda r: r), options.pop("order", None)
    heard: list[dict[str, Any]] = []
    coordinator = Coordinator(
        job, Disturbed(sites, mend, order), "run", events=Events(listener=heard.append), **options
    )
    coordinator.run()
    return coordinator, heard


@pytest.fixture
def sites(make_splits: Splitter) -> dict[str, Splits]:
    return {name: make_splits(i, count=16 + 3 * i) for i, name in enumerate(SITES)}


@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
def test_arrival_order_does_not_change_a_bit(make_job: Maker, sites: dict[str, Splits], method: str) -> None:
    job = make_job(method={"name": method})
    expected = weights(run(job, sites)[0])
    for order in range(6):
        found = weights(run(job, sites, order=order)[0])
        assert all(torch.equal(found[n], v) for n, v in expected.items()), order


def spoil(groups: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    model = dict(groups["model"])
    first = next(iter(model))
    return {**groups, "model": {**model, first: change(model[first])}}


FAULTS: dict[str, Callable[[Contribution], Contribution]] = {
    "not-finite": lambda r: replace(r, groups=spoil(r.groups, lambda t: torch.full_like(t, float("nan")))),
    "wrong-shape": lambda r: replace(r, groups=spoil(r.groups, lambda t: t.flatten()[:1])),
    "wrong-dtype": lambda r: replace(r, groups=spoil(r.groups, lambda t: t.double())),
    "missing-entries": lambda r: replace(r, groups={"model": {}}),
    "extra-entries": lambda r: replace(r, groups={**r.groups, "more": {"x": torch.ones(1)}}),
    "stale-round": lambda r: replace(r, round=r.round + 1),
    "no-examples": lambda r: replace(r, examples=0),
    "norm": lambda r: replace(r, groups=spoil(r.groups, lambda t: t + 1e9)),
    "exception": lambda r: Contribution(r.kind, r.run, r.site, r.task, r.round, "exception"),
}


@pytest.mark.parametrize("code", FAULTS)
def test_a_bad_contribution_is_rejected_and_the_round_goes_on(
    make_job: Maker, sites: dict[str, Splits], code: str
) -> None:
    """The result is that of a federation in which the faulty site never answered."""

    def mend(reply: Contribution) -> Contribution:
        return FAULTS[code](reply) if reply.site == "c" else reply

    coordinator, heard = run(make_job(), sites, mend=mend)
    rejected = [e for e in heard if e["event"] == "rejected"]
    assert [(e["site"], e["code"], e["round"]) for e in rejected] == [("c", code, 0), ("c", code, 1)]
    absent, _ = run(make_job(), sites, mend=lambda r: FAULTS["exception"](r) if r.site == "c" else r)
    expected = weights(absent)
    assert all(torch.equal(v, expected[n]) for n, v in weights(coordinator).items())
    assert all(torch.isfinite(v).all() for v in weights(coordinator).values())
    rounds = [e for e in heard if e["event"] == "round"]
    assert [e["sites"] for e in rounds] == [["a", "b", "d", "e"]] * 2
    assert [e["rejected"] for e in rounds] == [{"c": code}] * 2


def test_too_few_contributions_end_the_run_with_the_reasons(make_job: Maker, sites: dict[str, Splits]) -> None:
    job = make_job(federation={"min_sites": 5})
    with pytest.raises(RunError, match=r"round 0: 4 of 5 contributions accepted, 5 needed \(c not-finite\)"):
        run(job, sites, mend=lambda r: FAULTS["not-finite"](r) if r.site == "c" else r)


@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
@pytest.mark.parametrize("kill_at", [0, 3, 7, 11])
def test_killed_and_resumed_equals_uninterrupted(
    make_job: Maker, sites: dict[str, Splits], tmp_path: Path, method: str, kill_at: int
) -> None:
    """The server dies between two answers; sites remember on disk, as nodes do, and repeat what they answered."""

    class KilledError(Exception):
        pass

    job = make_job(method={"name": method}, federation={"rounds": 3})
    expected = weights(run(job, sites)[0])
    answers = 0

    class Fragile(Disturbed):
        def run(self, instructions: Iterable[Instruction]) -> Iterator[Contribution]:
            nonlocal answers
            for reply in InProcess.run(self, instructions):
                if answers == kill_at and reply.kind == "train":
                    answers += 1
                    raise KilledError
                answers += 1
                yield reply

    engine = Fragile(sites, lambda r: r, None, lambda name: DiskState(tmp_path / "nodes", name))
    with pytest.raises(KilledError):
        Coordinator(job, engine, "run", folder=tmp_path).run()
    resumed = Coordinator(job, engine, "run", folder=tmp_path)
    outcome = resumed.run()
    assert all(torch.equal(v, expected[n]) for n, v in weights(resumed).items())
    assert [row["round"] for row in outcome.curve] == [0, 1, 2, 3]
    assert outcome.totals.rounds == 3
    found = [e["event"] for e, _ in read_events(tmp_path / "events.jsonl")]
    assert found.count("end") == 1
    assert ("resumed" in found) == (kill_at >= 5)


def test_a_checkpoint_of_another_job_is_refused(make_job: Maker, sites: dict[str, Splits], tmp_path: Path) -> None:
    run(make_job(), sites, folder=tmp_path)
    with pytest.raises(RunError, match="belongs to another job"):
        run(make_job(seed=1), sites, folder=tmp_path)


def test_a_checkpoint_that_knows_fewer_totals_is_resumed(
    make_job: Maker, sites: dict[str, Splits], tmp_path: Path
) -> None:
    coordinator, _ = run(make_job(), sites, folder=tmp_path)
    path = tmp_path / "checkpoint" / "state.json"
    facts = json.loads(path.read_text())
    del facts["progress"]["totals"]["bytes_metrics"]
    path.write_text(json.dumps(facts))
    again, heard = run(make_job(), sites, folder=tmp_path)
    assert "resumed" in [e["event"] for e in heard]
    assert again.progress.totals.bytes_metrics == 0
    assert again.progress.totals.bytes_up == coordinator.progress.totals.bytes_up


def test_a_finished_run_leaves_what_the_readme_lists(make_job: Maker, sites: dict[str, Splits], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    coordinator, _ = run(make_job(), sites, folder=tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[n], t) for n, t in coordinator.state["model"].items())
    assert (tmp_path / "checkpoint" / "state.json").exists()


def test_totals_by_hand(make_job: Maker, sites: dict[str, Splits]) -> None:
    coordinator, heard = run(make_job(), sites)
    counts = [16, 19, 22, 25, 28]
    totals = coordinator.progress.totals
    assert totals.samples == 2 * sum(counts)
    assert totals.sequential_steps == 2 * math.ceil(28 / 8)
    assert totals.optimizer_resets == 10
    size = sum(t.numel() * 4 for t in coordinator.state["model"].values())
    metrics = sum(t.numel() * 8 for t in coordinator.task.zeros.values())
    assert totals.bytes_down == 2 * 5 * size
    assert totals.bytes_up == 2 * 5 * (size + metrics)
    assert totals.bytes_metrics == 2 * 5 * metrics
    assert next(e for e in heard if e["event"] == "round")["examples"] == counts


def test_partial_participation_is_seeded(make_job: Maker, sites: dict[str, Splits]) -> None:
    job = make_job(federation={"fraction": 0.4, "rounds": 6})
    cohorts = [[e["sites"] for e in run(job, sites)[1] if e["event"] == "round"] for _ in range(2)]
    assert cohorts[0] == cohorts[1]
    assert {len(c) for c in cohorts[0]} == {2}
    assert len({tuple(c) for c in cohorts[0]}) > 1


def test_best_round_is_chosen_on_validation_only(make_job: Maker, sites: dict[str, Splits]) -> None:
    """The model that is kept is the one that scored best on validation, and test labels have no say in it."""
    job = make_job(federation={"select": "best", "rounds": 5}, train={"lr": 1.5})

    class Watched(Coordinator):
        before: list[dict[str, torch.Tensor]]

        def train_round(self, round: int) -> None:
            self.before = [*getattr(self, "before", []), dict(self.state["model"])]
            super().train_round(round)

    def chosen(splits: dict[str, Splits]) -> tuple[Watched, Any]:
        coordinator = Watched(job, Disturbed(splits, lambda r: r, None), "run")
        return coordinator, coordinator.run()

    coordinator, outcome = chosen(sites)
    curve = [row["accuracy"] for row in coordinator.progress.curve]
    assert coordinator.progress.best is not None
    score, at = coordinator.progress.best
    assert score == pytest.approx(max(curve), rel=1e-6)
    assert at == curve.index(max(curve)) < job.federation.rounds, "the last round must not be the best here"
    assert all(torch.equal(outcome.model[n], t) for n, t in coordinator.before[at].items())
    assert any(not torch.equal(outcome.model[n], t) for n, t in coordinator.state["model"].items())

    def other_test(splits: Splits) -> Splits:
        rows = splits.test.rows
        labels = splits.test.store.y.clone()
        labels[rows] = (labels[rows] + 1) % 10
        store = replace(splits.test.store, y=labels)
        return Splits(*(Examples(store, getattr(splits, part).rows) for part in ("train", "validation", "test")))

    again, measured = chosen({name: other_test(splits) for name, splits in sites.items()})
    assert all(torch.equal(measured.model[n], t) for n, t in outcome.model.items())
    assert again.progress.curve == coordinator.progress.curve
    assert measured.all_sites["accuracy"] != outcome.all_sites["accuracy"]


def test_best_by_what_validation_does_not_have_is_refused_at_the_first_round() -> None:
    progress = Progress()
    with pytest.raises(RunError, match="'best' goes by bleu on validation, where it is not measured"):
        progress.is_best("bleu", math.nan, 0, larger=True)
    assert progress.is_best("accuracy", 0.5, 0, larger=True)
    assert not progress.is_best("accuracy", math.nan, 1, larger=True), "a model that has diverged is not the best"
    assert not progress.is_best("accuracy", 0.5, 2, larger=True), "of two alike the first is kept"
    assert progress.best == (0.5, 0)
    assert progress.is_best("loss", 0.4, 3, larger=False)


def test_the_best_of_what_should_be_small_is_the_smallest(
    make_job: Maker, sites: dict[str, Splits], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Classification, "measures", {"calibration": Measure(larger=False)})
    job = make_job(task={"headline": "calibration"}, federation={"select": "best", "rounds": 5}, train={"lr": 1.5})
    coordinator, _ = run(job, sites)
    curve = [row["calibration"] for row in coordinator.progress.curve]
    assert coordinator.progress.best is not None
    score, at = coordinator.progress.best
    assert (score, at) == (pytest.approx(min(curve), rel=1e-6), curve.index(min(curve)))
    assert curve[at] < curve[0], "the first round must not be the best here"


def test_a_round_that_lost_sites_is_repeated(make_job: Maker, sites: dict[str, Splits], tmp_path: Path) -> None:
    """Two sites are lost once; the round is asked again and ends with the bits of an undisturbed run."""
    job = make_job(method={"name": "scaffold"}, federation={"min_sites": 5})
    expected = weights(run(job, sites)[0])
    lost = {("b", 1), ("d", 1)}

    def mend(reply: Contribution) -> Contribution:
        if (reply.site, reply.round) in lost:
            lost.remove((reply.site, reply.round))
            return Contribution(reply.kind, reply.run, reply.site, reply.task, reply.round, "lost")
        return reply

    heard: list[dict[str, Any]] = []
    engine = Disturbed(sites, mend, None, lambda name: DiskState(tmp_path, name))
    coordinator = Coordinator(job, engine, "run", events=Events(listener=heard.append))
    coordinator.run()
    assert [e["round"] for e in heard if e["event"] == "repeat"] == [1]
    assert all(torch.equal(v, expected[n]) for n, v in weights(coordinator).items())
    assert coordinator.progress.totals.rounds == 2


def test_a_small_cohort_needs_no_more_than_itself(make_job: Maker, sites: dict[str, Splits]) -> None:
    """min_sites = 5 waits for five willing sites; a fraction of 0.4 then selects two of them."""
    _, heard = run(make_job(federation={"min_sites": 5, "fraction": 0.4}), sites)
    assert [len(e["sites"]) for e in heard if e["event"] == "round"] == [2, 2]


def test_stream_rounds_and_budget() -> None:
    labels = [str(c) for c in range(10)]
    job = Job.resolve({
        "name": "t", "time": "continual", "model": {"name": "logistic"}, "task": {"labels": labels},
        "data": {"shape": [1, 8, 8]}, "federation": {"rounds": 7}, "stream": {"tasks": 3}, "train": {"epochs": 2},
    })  # fmt: skip
    assert [task_of(job, r) for r in range(7)] == [0, 0, 0, 1, 1, 2, 2]
    assert job.tasks == ((0, 1, 2), (3, 4, 5, 6), (7, 8, 9))
    assert round_budget(job, 0) == Budget(epochs=2 * 7 / 3)
    assert round_budget(job, 6) == Budget(epochs=2 * 7 / 2)


def test_a_stream_leaves_its_matrix_and_the_offline_budget(make_job: Maker, sites: dict[str, Splits]) -> None:
    federation, stream = {"rounds": 6}, {"tasks": 3}
    offline, _ = run(make_job(federation=federation), sites)
    coordinator, heard = run(make_job(time="continual", federation=federation, stream=stream), sites)
    matrix = coordinator.progress.matrix
    assert len(matrix) == 3
    assert all(len(row) == 3 for row in matrix)
    assert [e["task"] for e in heard if e["event"] == "task"] == [0, 1, 2]
    assert abs(coordinator.progress.totals.samples - offline.progress.totals.samples) <= 6 * len(sites)
    assert coordinator.progress.totals.rounds == offline.progress.totals.rounds


def test_a_site_without_data_of_a_task_is_left_out_not_rejected(make_job: Maker, make_splits: Splitter) -> None:
    job = make_job(time="continual", federation={"rounds": 2, "min_sites": 2}, stream={"tasks": 2})
    other = make_splits(1)
    few = Splits(*(getattr(other, part).of_tasks(job, (0,)) for part in ("train", "validation", "test")))
    sites = {"full": make_splits(0), "few": few}
    _, heard = run(job, sites)
    rounds = [e for e in heard if e["event"] == "round"]
    assert [dict(zip(e["sites"], e["examples"], strict=True)) for e in rounds] == [
        {"full": 15, "few": 15},
        {"full": 15, "few": 0},
    ]
    assert not [e for e in heard if e["event"] == "rejected"]


def test_an_unwilling_evaluator_is_said_and_left_out(make_job: Maker, sites: dict[str, Splits]) -> None:
    class Mute(Disturbed):
        def run(self, instructions: Iterable[Instruction]) -> Iterator[Contribution]:
            for instruction in instructions:
                if instruction.kind == "evaluate" and instruction.site == "b":
                    yield refusal(instruction, "timeout")
                else:
                    yield from InProcess.run(self, [instruction])

    heard: list[dict[str, Any]] = []
    outcome = Coordinator(make_job(), Mute(sites, lambda r: r, None), "run", events=Events(listener=heard.append)).run()
    assert set(outcome.per_site) == {"a", "c", "d", "e"}
    assert [(e["site"], e["code"]) for e in heard if e["event"] == "rejected"] == [("b", "timeout")]


def test_events_are_json_lines(make_job: Maker, sites: dict[str, Splits], tmp_path: Path) -> None:
    Coordinator(make_job(), Disturbed(sites, lambda r: r, None), "run", folder=tmp_path).run()
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["start", "round", "round", "end"]
    with (tmp_path / "events.jsonl").open("a") as sink:
        sink.write('{"event": "half')
    assert len(list(read_events(tmp_path / "events.jsonl"))) == 4


def test_a_metric_of_nothing_is_null_not_nan(tmp_path: Path) -> None:
    Events(tmp_path / "e.jsonl").emit("end", test={"accuracy": float("nan"), "n": [1.5, float("inf")]})
    line = (tmp_path / "e.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name))["test"] == {
        "accuracy": None,
        "n": [1.5, None],
    }
