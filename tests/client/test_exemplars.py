"""Exemplars: herding by hand, how many of each class after each task, and training on them when their task is gone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from client.exemplars import firsts, herd
from client.handler import Handler
from client.policy import Policy
from client.readers.base import Examples, Splits, Store
from client.replay import MEMORY
from client.state import DiskState, MemoryState, State
from client.workbench import Benches
from shared_models.job import Job
from shared_models.messages import Budget, Contribution, Instruction
from shared_models.nearest_mean import SUMS
from shared_models.spec import build_model

CPU = torch.device("cpu")
MakeJob = Callable[..., Job]
MakeSplits = Callable[..., Splits]


def test_herding_by_hand() -> None:
    """The mean is (1.6, 1.8) / 3. First (.6, .8) at distance^2 .044; then not (0, 1), which is nearer to the mean (.444
    against .578), but (1, 0): the mean of both is (.8, .4) at .111, that with (0, 1) is (.3, .9) at .144.
    """
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    assert herd(features, 3) == [2, 0, 1]
    assert herd(features, 2) == [2, 0]
    assert herd(features, 9) == [2, 0, 1]
    assert herd(torch.ones(3, 2), 2) == [0, 1]  # equal ones are not taken twice


def test_the_first_of_each_class_in_order() -> None:
    assert firsts(torch.tensor([3, 0, 0, 3, 0, 3, 1]), 2).tolist() == [0, 1, 2, 3, 6]
    assert firsts(torch.tensor([3, 0, 0, 3, 0, 3, 1]), 0).tolist() == []


def ask(job: Job, kind: str, task: int, weights: dict[str, torch.Tensor] | None = None) -> Instruction:
    model, spec = build_model(job)
    rounds = job.federation.rounds
    return Instruction(
        kind, "run", "a", job, spec.fingerprint, task=task, round=task, rounds=rounds,  # type: ignore[arg-type]
        groups={"model": weights or dict(model.state_dict())}, budget=Budget(epochs=2.0),
    )  # fmt: skip


def node(splits: Splits, state: State) -> Handler:
    return Handler("a", lambda job: splits, state, Policy(approve_all=True), Benches(CPU))


@pytest.fixture
def stream(make_job: MakeJob) -> Callable[..., Job]:
    def make(**parts: object) -> Job:
        part = {"time": "continual", "stream": {"tasks": 5}, "continual": {"name": "icarl", "buffer": 23}}
        return make_job(**{**part, "federation": {"rounds": 5}, **parts})

    return make


def test_the_memory_is_shared_out_over_the_classes_seen(stream: MakeJob, make_splits: MakeSplits) -> None:
    """23 examples: 11 of each of two classes, then 5 of four, 3 of six, 2 of eight and of ten; each list the start of
    the one before, the first of it what herding finds.
    """
    job, state, splits = stream(), MemoryState(), make_splits(0, count=200)
    site, before = node(splits, state), torch.empty(0)
    for task, each in enumerate((11, 5, 3, 2, 2)):
        reply = site.handle(ask(job, "end_task", task))
        assert (reply.code, reply.examples) == ("ok", 40)
        kept = state.load("run")["icarl"][MEMORY]
        assert kept["y"].tolist() == [c for c in range(2 * task + 2) for _ in range(each)]
        assert kept["x"].dtype == torch.uint8
        assert int(kept["seen"]) == 40 * (task + 1)
        if task:
            assert torch.equal(kept["x"][: each * 2 * task], before[:, :each].flatten(0, 1))
        before = kept["x"].unflatten(0, (-1, each))
    examples = splits.train.of_tasks(job, (4,))
    found = _features(job, examples.batch(torch.arange(40)).x)[examples.y == 9]
    chosen = examples.store.x[examples.rows[examples.y == 9][herd(found.double(), 2)]]
    assert torch.equal(before[9], chosen)


def _features(job: Job, x: torch.Tensor) -> torch.Tensor:
    """What the last layer of the model sees, by running all others."""
    model, _ = build_model(job)
    with torch.no_grad():
        layers = [layer for name, layer in model.eval().named_children() if name != "head"]
        return torch.nn.functional.normalize(torch.nn.Sequential(*layers)(x), dim=1)


def test_sums_are_those_of_all_that_is_kept_under_the_model_of_now(stream: MakeJob, make_splits: MakeSplits) -> None:
    job, state = stream(), MemoryState()
    site = node(make_splits(0, count=60), state)
    site.handle(ask(job, "end_task", 0))
    moved = {n: t + 0.1 for n, t in build_model(job)[0].state_dict().items()}
    reply = site.handle(ask(job, "end_task", 1, moved))
    kept = state.load("run")["icarl"][MEMORY]
    model = build_model(job)[0]
    model.load_state_dict(moved)
    (total,) = reply.groups[SUMS].values()
    layers = [layer for name, layer in model.named_children() if name != "head"]
    with torch.no_grad():
        for label in range(10):
            x = (kept["x"][kept["y"] == label].float() / 255 - 0.5) / 0.5  # the default mean and std
            found = torch.nn.functional.normalize(torch.nn.Sequential(*layers)(x), dim=1)
            torch.testing.assert_close(total[label].float(), found.sum(dim=0))
    assert (total[:4].norm(dim=1) > 0).all()
    assert (total[4:] == 0).all()


def test_a_site_without_a_tasks_examples_still_gives_the_sums_of_its_own(
    stream: MakeJob, make_splits: MakeSplits
) -> None:
    job, state, whole = stream(), MemoryState(), make_splits(0, count=60)
    few = Splits(*(getattr(whole, part).of_tasks(job, (0,)) for part in ("train", "validation", "test")))
    site = node(few, state)
    assert site.handle(ask(job, "train", 1)).code == "no-data"
    assert site.handle(ask(job, "end_task", 1)).code == "no-data"  # nothing was kept yet
    site.handle(ask(job, "end_task", 0))
    moved = {n: t + 0.1 for n, t in build_model(job)[0].state_dict().items()}
    later = site.handle(ask(job, "end_task", 1, moved))
    assert (later.code, later.examples) == ("ok", 0)
    kept = state.load("run")["icarl"]
    assert kept[MEMORY]["y"].tolist() == [0] * 6 + [1] * 6
    assert all(torch.equal(t, moved[n]) for n, t in kept["former"].items())


def test_the_end_of_a_task_that_is_told_twice_changes_nothing(stream: MakeJob, make_splits: MakeSplits) -> None:
    """A simulated site remembers no answers: it chooses again, and finds the same."""
    job, state = stream(), MemoryState()
    site = node(make_splits(0, count=60), state)
    site.handle(ask(job, "end_task", 0))
    first = site.handle(ask(job, "end_task", 1))
    kept = state.load("run")["icarl"][MEMORY]
    again = site.handle(ask(job, "end_task", 1))
    for name in ("x", "y"):
        assert torch.equal(state.load("run")["icarl"][MEMORY][name], kept[name])
    assert torch.equal(first.groups[SUMS]["sum"], again.groups[SUMS]["sum"])


def test_a_step_by_hand(make_job: MakeJob) -> None:
    """Class 0 is old, class 1 is new. From zero g = 1/2; the former model says q_0 = 3/4 (its bias is log 3).

    d L / d logit_0 = g_0 - q_0 = -1/4 for both examples. d L / d logit_1 = g_1 - y_1: -1/2 for the new one, x = (1, 0),
    and 1/2 for the exemplar of class 0, x = (0, 1). The mean of both, with the rate .1:
    W = [[.0125, .0125], [.025, -.025]], b = [.025, 0]
    """
    job = make_job(
        model={"name": "logistic"}, task={"labels": ["no", "yes"]},
        data={"shape": [1, 1, 2], "mean": [0.0], "std": [1.0]}, train={"lr": 0.1, "batch_size": 4},
        time="continual", stream={"tasks": 2}, continual={"name": "icarl"},
    )  # fmt: skip
    x = torch.tensor([[[[255, 0]]]] * 3, dtype=torch.uint8)
    store = Store(x, torch.ones(3, dtype=torch.int64), "abc", job.data)
    splits = Splits(*(Examples(store, torch.tensor([i])) for i in range(3)))
    zero = {n: torch.zeros_like(t) for n, t in build_model(job)[0].state_dict().items()}
    old = {"x": torch.tensor([[[[0, 255]]]], dtype=torch.uint8), "y": torch.tensor([0]), "seen": torch.tensor(1)}
    former = {**zero, "head.bias": torch.tensor([math.log(3), 7.0])}
    state = MemoryState()
    state.save(
        ask(job, "end_task", 0), {"icarl": {MEMORY: old, "former": former}}, Contribution("end_task", "run", "a")
    )
    asked = replace(ask(job, "train", 1, zero), budget=Budget(steps=1))
    reply = node(splits, state).handle(asked)
    torch.testing.assert_close(reply.groups["model"]["head.weight"], torch.tensor([[0.0125, 0.0125], [0.025, -0.025]]))
    torch.testing.assert_close(reply.groups["model"]["head.bias"], torch.tensor([0.025, 0.0]))
    assert state.load("run")["icarl"][MEMORY]["y"].tolist() == [0]  # what is kept changes at the end of a task alone
    assert reply.groups.keys() == {"model"}


def test_exemplars_are_trained_on_after_their_task_is_gone(
    stream: MakeJob, make_splits: MakeSplits, tmp_path: Path
) -> None:
    """The second task runs in a new process on a store from which the first task's examples were deleted."""
    job = stream(stream={"tasks": 2}, federation={"rounds": 2})
    whole = make_splits(0)
    expected = _two_tasks(job, whole, whole, tmp_path / "expected")
    store = whole.train.store
    gone = torch.isin(store.y, torch.arange(5))
    noise = torch.randint(0, 256, store.x.shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    x = torch.where(gone[:, None, None, None], noise, store.x)
    other = Store(x, torch.where(gone, -1, store.y), store.names, store.data)
    without = Splits(*(Examples(other, getattr(whole, p).rows) for p in ("train", "validation", "test")))
    found = _two_tasks(job, whole, without, tmp_path / "found")
    assert all(torch.equal(t, found[n]) for n, t in expected.items())
    less = stream(stream={"tasks": 2}, federation={"rounds": 2}, continual={"name": "icarl", "buffer": 11})
    fewer = _two_tasks(less, whole, without, tmp_path / "fewer")
    assert any(not torch.equal(t, fewer[n]) for n, t in found.items())  # they have a part in it


def _two_tasks(job: Job, first: Splits, second: Splits, folder: Path) -> dict[str, torch.Tensor]:
    for kind, task, splits in (("train", 0, first), ("end_task", 0, first), ("train", 1, second)):
        reply = node(splits, DiskState(folder, "a")).handle(ask(job, kind, task))
        assert reply.code == "ok"
    return {n: t.clone() for n, t in reply.groups["model"].items()}
