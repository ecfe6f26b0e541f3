"""What a site keeps of its examples: a fair sample, kept raw, drawn by key, told apart in the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from client.handler import Handler
from client.policy import Policy
from client.readers.base import Examples, Splits, Store
from client.replay import MEMORY, Replay, join
from client.state import DiskState, MemoryState
from client.workbench import Benches, Workbench
from shared_models.job import Job
from shared_models.job_parts import DataPart
from shared_models.messages import Budget, Contribution, Instruction
from shared_models.methods.base import make_pieces
from shared_models.spec import build_model
from shared_models.tasks.base import Batch, Past

CPU = torch.device("cpu")
MakeJob = Callable[..., Job]


def numbered(count: int) -> Examples:
    """Images whose every pixel is their number."""
    x = torch.arange(count, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
    store = Store(x, torch.arange(count) % 10, [str(i) for i in range(count)], DataPart(shape=(1, 8, 8)))
    return Examples(store, torch.arange(count))


def memory(make_job: MakeJob, seed: int = 0, method: str = "er", **settings: int) -> Replay:
    job = make_job(time="continual", stream={"tasks": 2}, continual={"name": method, **settings})
    return Replay(make_pieces(job)[-1], {}, Workbench(job, CPU), torch.Generator().manual_seed(seed))


def test_every_example_seen_is_kept_with_the_same_probability(make_job: MakeJob) -> None:
    """400 reservoirs of 10 from 50: each example is kept Binomial(400, 0.2) times; chi-square below its 1 - 1e-6."""
    from scipy.stats import chi2

    data, kept = numbered(50), torch.zeros(50)
    for seed in range(400):
        reservoir = memory(make_job, seed, buffer=10)
        for rows in torch.randperm(50, generator=torch.Generator().manual_seed(seed)).split(8):
            reservoir.add(data, rows, None)
        held = reservoir.held["x"][:, 0, 0, 0].long()
        assert len(held.unique()) == 10
        kept[held] += 1
    assert kept.sum() == 4000
    statistic = float(((kept - 80).square() / (80 * 0.8)).sum()) * 49 / 50
    assert statistic < chi2.ppf(1 - 1e-6, 49)


def test_while_there_is_room_all_is_kept_with_what_was_said(make_job: MakeJob) -> None:
    data, reservoir = numbered(9), memory(make_job, method="der", buffer=20)
    outputs = torch.arange(90.0).reshape(9, 10)
    for rows in torch.arange(9).split(4):
        reservoir.add(data, rows, outputs[rows])
    assert reservoir.held["x"][:, 0, 0, 0].tolist() == list(range(9))
    assert torch.equal(reservoir.held["outputs"], outputs)
    assert reservoir.seen == len(reservoir) == 9


def test_a_draw_is_of_different_examples_and_is_normalised_like_new_ones(make_job: MakeJob) -> None:
    data, reservoir = numbered(30), memory(make_job, buffer=20, replay=12)
    assert reservoir.draw(data) == []
    reservoir.add(data, torch.arange(30), None)
    (drawn,) = reservoir.draw(data)
    numbers = ((drawn.x[:, 0, 0, 0] * 0.5 + 0.5) * 255).round().long()  # the default mean and std are 0.5
    assert len(numbers.unique()) == 12
    assert torch.equal(drawn.y, numbers % 10)
    assert torch.equal(drawn.x, data.batch(numbers).x)
    again = memory(make_job, buffer=20, replay=12)
    again.add(data, torch.arange(30), None)
    assert torch.equal(again.draw(data)[0].x, drawn.x)


def test_the_scale_makes_each_draws_own_mean_of_the_mean_over_all() -> None:
    own = Batch(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
    marks = [Past(torch.full((n,), i), torch.ones(n), own.y, torch.full((n, 2), float(i))) for i, n in ((1, 5), (2, 2))]
    drawn = [Batch(torch.ones(len(p.draw), 2), torch.ones(len(p.draw), dtype=torch.int64), past=p) for p in marks]
    batch = join(own, drawn)
    assert batch.past is not None
    assert batch.past.outputs is not None
    values = torch.tensor([1.0, 2, 6, 10, 20, 30, 40, 50, 7, 9])
    total = float((values * batch.past.scale).mean())
    assert total == pytest.approx(3 + 30 + 8)
    assert batch.past.draw.tolist() == [0] * 3 + [1] * 5 + [2] * 2
    assert batch.past.outputs[:, 0].tolist() == [0.0] * 3 + [1.0] * 5 + [2.0] * 2
    part = batch[2:4]
    assert part.past is not None
    assert part.past.draw.tolist() == [0, 1]
    assert join(own, []) is own
    asked = join(
        own, drawn, [torch.full((len(p), 2), 9.0) for p in (own, *drawn)]
    )  # an earlier model's word goes first
    assert asked.past is not None
    assert (asked.past.outputs == 9).all()


def test_a_step_of_er_by_hand(make_job: MakeJob) -> None:
    """From zero both classes have probability 1/2: d loss / d logits is p - y = +-1/2 for new and old alike.

    New x = (1, 0), class 0: dW = [[-.5, 0], [.5, 0]]; old x = (0, 1), class 1: dW = [[0, .5], [0, -.5]].
    Their mean, with the rate .1: W = [[.025, -.025], [-.025, .025]]
    """
    job = make_job(
        model={"name": "logistic"}, task={"labels": ["no", "yes"]},
        data={"shape": [1, 1, 2], "mean": [0.0], "std": [1.0]}, train={"lr": 0.1, "batch_size": 4},
        time="continual", stream={"tasks": 2}, continual={"name": "er"},
    )  # fmt: skip
    store = Store(
        torch.tensor([[[[255, 0]]]] * 3, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), "abc", job.data
    )
    splits = Splits(*(Examples(store, torch.tensor([i])) for i in range(3)))
    state = MemoryState()
    old = {"x": torch.tensor([[[[0, 255]]]], dtype=torch.uint8), "y": torch.tensor([1]), "seen": torch.tensor(1)}
    model, spec = build_model(job)
    zero = {n: torch.zeros_like(t) for n, t in model.state_dict().items()}
    asked = Instruction(
        "train", "run", "a", job, spec.fingerprint, rounds=2, budget=Budget(steps=1), groups={"model": zero}
    )
    before = Contribution("train", "run", "a")
    state.save(asked, {"er": {MEMORY: old}}, before)
    reply = Handler("a", lambda job: splits, state, Policy(approve_all=True), Benches(CPU)).handle(asked)
    torch.testing.assert_close(reply.groups["model"]["head.weight"], torch.tensor([[0.025, -0.025], [-0.025, 0.025]]))
    assert (reply.examples, reply.samples) == (1, 1)  # what is replayed is not counted as new
    assert state.load("run")["er"][MEMORY]["y"].tolist() == [1, 0]


def ask(job: Job, round: int, site: str = "a", kind: str = "train") -> Instruction:
    model, spec = build_model(job)
    sent = {n: t for n, t in model.state_dict().items() if n in spec.sent}
    task = 0 if round < 1 or kind == "end_task" else 1
    return Instruction(
        kind, "run", site, job, spec.fingerprint, task=task, round=round, rounds=2,  # type: ignore[arg-type]
        groups={"model": sent}, budget=Budget(epochs=2.0),
    )  # fmt: skip


@pytest.mark.parametrize("method", ["er", "er-ace", "der", "der++", "a-gem"])
def test_earlier_examples_are_replayed_from_the_node_after_they_are_gone(
    make_job: MakeJob, make_splits: Callable[..., Splits], tmp_path: Path, method: str
) -> None:
    """The second task runs in a new process on a store from which the first task's examples were deleted."""
    job = make_job(time="continual", stream={"tasks": 2}, continual={"name": method, "buffer": 12})
    everything = make_splits(0)

    def node(keep: bool, state: DiskState) -> Handler:
        store = everything.train.store
        if not keep:  # what is not of the second task is white noise of another class
            gone = torch.isin(store.y, torch.arange(5))
            x = torch.where(gone[:, None, None, None], torch.randint(0, 256, store.x.shape).to(torch.uint8), store.x)
            store = Store(x, torch.where(gone, -1, store.y), store.names, store.data)
        splits = Splits(*(Examples(store, getattr(everything, p).rows) for p in ("train", "validation", "test")))
        return Handler("a", lambda job: splits, state, Policy(approve_all=True), Benches(CPU))

    first = node(True, DiskState(tmp_path, "a"))
    assert first.handle(ask(job, 0)).code == "ok"
    kept = DiskState(tmp_path, "a").load("run")[method][MEMORY]
    assert len(kept["y"]) == 12
    assert set(kept["y"].tolist()) <= set(range(5))
    assert kept["x"].dtype == torch.uint8
    with_all = node(True, DiskState(tmp_path, "a")).handle(ask(job, 1))
    again = DiskState(tmp_path / "copy", "a")
    node(True, again).handle(ask(job, 0))
    without = node(False, again).handle(ask(job, 1))
    assert with_all.code == without.code == "ok"
    assert all(torch.equal(t, without.groups["model"][n]) for n, t in with_all.groups["model"].items())
    assert with_all.groups.keys() == {"model"}  # no example leaves the node
    later = again.load("run")[method][MEMORY]
    assert int(later["seen"]) == 2 * len(everything.train)
    assert {int(y) < 5 for y in later["y"]} == {True, False}
    plain = job.replace(continual={"name": "finetune"})
    forgetful = Handler("a", lambda job: everything, MemoryState(), Policy(approve_all=True), Benches(CPU))
    other = forgetful.handle(ask(plain, 1)).groups["model"]
    assert any(not torch.equal(t, other[n]) for n, t in with_all.groups["model"].items())


@pytest.mark.parametrize("method", ["er", "er-ace", "der++", "a-gem", "ewc", "lwf", "joint", "icarl"])
def test_offline_a_continual_method_changes_nothing(
    make_job: MakeJob, make_splits: Callable[..., Splits], method: str
) -> None:
    job, state = make_job(time="offline", continual={"name": method}), MemoryState()
    handler = Handler("a", lambda job: make_splits(0), state, Policy(approve_all=True), Benches(CPU))
    plain = handler.handle(ask(make_job(time="offline"), 0))
    sums = {n: t.clone() for n, t in plain.groups["model"].items()}
    reply = handler.handle(ask(job, 0))
    assert all(torch.equal(t, sums[n]) for n, t in reply.groups["model"].items())
    assert state.load("run") == {}
