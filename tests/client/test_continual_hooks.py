"""Every client hook of a method, by a toy that uses all of them on a linear model whose steps are computed by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from client.handler import Handler
from client.policy import Policy
from client.readers.base import Examples, Splits, Store
from client.state import DiskState, MemoryState
from client.workbench import Benches
from shared_models.job import Job
from shared_models.job_parts import DataPart
from shared_models.messages import Budget, Contribution, Instruction
from shared_models.methods.base import Method, Progress, methods
from shared_models.spec import build_model
from shared_models.sums import Groups
from shared_models.tasks.base import Batch, Task

CPU = torch.device("cpu")
CALLS: list[str] = []
NOTES: list[object] = []


class Toy(Method):
    """Swaps the outputs, pulls a bias, doubles gradients, counts steps and rounds, keeps the mean image of a task."""

    continual = True
    name = "toy"

    def begin_round(self, down: Groups, kept: Groups) -> Groups:
        CALLS.append("begin_round")
        NOTES.append(torch.rand(3).tolist())
        assert down["model"].keys() == {"head.weight", "head.bias"}
        return {"steps": {"moved": torch.zeros(2)}}

    def see(self, outputs: Tensor, batch: Batch, round_state: Groups) -> Tensor:
        CALLS.append("see")
        return outputs.flip(1)

    def loss(
        self, values: Tensor, params: dict[str, Tensor], batch: Batch, outputs: Tensor, round_state: Groups
    ) -> Tensor:
        CALLS.append("loss")
        return values + 0.5 * params["head.bias"][0]

    def grad(self, grads: dict[str, Tensor], params: dict[str, Tensor], round_state: Groups) -> dict[str, Tensor]:
        CALLS.append("grad")
        return {n: 2 * g for n, g in grads.items()}

    def after_step(
        self, grads: dict[str, Tensor], before: dict[str, Tensor], params: dict[str, Tensor], round_state: Groups
    ) -> Groups:
        CALLS.append("after_step")
        NOTES.append(grads["head.bias"].tolist())
        return {"steps": {"moved": round_state["steps"]["moved"] + params["head.bias"] - before["head.bias"]}}

    def end_round(self, model: dict[str, Tensor], down: Groups, kept: Groups, round_state: Groups, progress: Progress):
        CALLS.append("end_round")
        NOTES.append(round_state["steps"]["moved"].tolist())
        rounds = kept.get("counters", {}).get("rounds", torch.tensor(0)) + 1
        return {"model": {"secret": torch.ones(1)}}, {**kept, "counters": {"rounds": rounds}}

    def end_task(self, model: nn.Module, task: Task, batches: Iterable[Batch], kept: Groups) -> Groups:
        CALLS.append("end_task")
        gradients = [p.grad is None for p in model.parameters()]
        NOTES.append((model.training, gradients, torch.rand(3).tolist(), model.state_dict()["head.bias"].tolist()))
        return {**kept, "task": {"mean": torch.cat([b.x for b in batches]).mean(0)}}


@pytest.fixture
def job(make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> Job:
    """Two classes, images of two pixels, one linear layer, plain SGD with rate 0.1."""
    assert "finetune" in methods  # loads the registry before it is changed
    monkeypatch.setitem(methods._things, "toy", Toy)
    CALLS.clear()
    NOTES.clear()
    return make_job(
        model={"name": "logistic"}, task={"labels": ["no", "yes"]}, continual={"name": "toy"},
        data={"shape": [1, 1, 2], "mean": [0.0], "std": [1.0]}, train={"lr": 0.1, "batch_size": 4},
    )  # fmt: skip


def site(left: int = 255) -> Splits:
    """One training image (left, 0) / 255 of class "no"."""
    images = torch.tensor([[[[left, 0]]]] * 3, dtype=torch.uint8)
    data = DataPart(shape=(1, 1, 2), mean=(0.0,), std=(1.0,))
    store = Store(images, torch.tensor([0, 0, 0]), ["a", "b", "c"], data)
    return Splits(*(Examples(store, torch.tensor([i])) for i in range(3)))


def ask(job: Job, kind: str = "train", **fields: object) -> Instruction:
    zero = {"model": {"head.weight": torch.zeros(2, 2), "head.bias": torch.zeros(2)}}
    common = {"rounds": 2, "groups": zero, "budget": Budget(steps=1), **fields}
    return Instruction(kind, "run", "a", job, build_model(job)[1].fingerprint, **common)  # type: ignore[arg-type]


def test_one_step_by_hand(job: Job) -> None:
    """From zero both classes have probability 1/2, so d loss / d logits seen is p - y = +-1/2.

    Own sample x = (1, 0), class 0, the outputs swapped:  dW = [[.5, 0], [-.5, 0]],   db = [.5, -.5]
    `loss` adds .5 to db_0:                                                           db = [1, -.5]
    `grad` doubles, the rate is .1:                       W = [[-.1, 0], [.1, 0]],    b = [-.2, .1]
    """
    state = MemoryState()
    handler = Handler("a", lambda job: site(), state, Policy(approve_all=True), Benches(CPU))
    reply = handler.handle(ask(job))
    assert CALLS == ["begin_round", "see", "loss", "grad", "after_step", "end_round"]
    assert (reply.code, reply.examples, reply.samples, reply.steps) == ("ok", 1, 1, 1)
    assert reply.groups.keys() == {"model"}  # what a continual piece offers does not go up
    torch.testing.assert_close(reply.groups["model"]["head.weight"], torch.tensor([[-0.1, 0.0], [0.1, 0.0]]))
    torch.testing.assert_close(reply.groups["model"]["head.bias"], torch.tensor([-0.2, 0.1]))
    assert "secret" not in reply.groups["model"]
    _, gradient, moved = NOTES
    assert gradient == pytest.approx([1.0, -0.5])  # of the loss, before `grad`
    assert moved == pytest.approx([-0.2, 0.1])


def test_what_is_kept_comes_back_and_survives_the_end_of_the_task(job: Job, tmp_path) -> None:
    state = DiskState(tmp_path, "a")
    handler = Handler("a", lambda job: site(), state, Policy(approve_all=True), Benches(CPU))
    for round in range(3):
        handler.handle(ask(job, round=round))
        assert state.load("run")["toy"]["counters"]["rounds"].item() == round + 1
    reply = handler.handle(ask(job, "end_task", round=2))
    assert reply == Contribution("end_task", "run", "a", round=2, examples=1)
    kept = state.load("run")["toy"]
    assert kept["counters"]["rounds"].item() == 3
    assert kept["task"]["mean"].tolist() == [[[1.0, 0.0]]]
    assert CALLS.count("end_task") == 1
    handler.handle(ask(job, "end_task", round=2))  # repeated after a crash
    handler.handle(ask(job, round=2))
    assert CALLS.count("end_task") == 1
    assert CALLS.count("end_round") == 3
    handler.handle(ask(job, round=3))
    assert state.load("run")["toy"]["task"]["mean"].tolist() == [[[1.0, 0.0]]]


def test_the_end_of_a_task_sees_the_servers_model_and_nothing_of_the_past(job: Job) -> None:
    """The same mode, gradients, random numbers and weights, whatever the shared workbench did before."""
    trained = {"model": {"head.weight": torch.eye(2), "head.bias": torch.tensor([3.0, 4.0])}}
    end = ask(job, "end_task", groups=trained)
    busy, other = Benches(CPU), MemoryState()
    Handler("b", lambda job: site(9), other, Policy(approve_all=True), busy).handle(replace(ask(job), site="b"))
    torch.manual_seed(1)
    for benches in (Benches(CPU), busy):
        Handler("a", lambda job: site(), MemoryState(), Policy(approve_all=True), benches).handle(end)
        torch.rand(5)
    first, again = NOTES[-2:]  # before them, what `b` drew
    assert first == again
    training, gradients, _, bias = first
    assert (training, gradients, bias) == (False, [True, True], [3.0, 4.0])


def test_what_a_method_draws_is_keyed_by_site_and_round(job: Job) -> None:
    for name, round in (("a", 0), ("a", 0), ("a", 1), ("b", 0)):
        handler = Handler(name, lambda job: site(), MemoryState(), Policy(approve_all=True), Benches(CPU))
        handler.handle(replace(ask(job, round=round), site=name))
    first, again, later, elsewhere = NOTES[::3]
    assert first == again
    assert later != first != elsewhere != later


def test_two_sites_do_not_share_what_a_method_keeps(job: Job) -> None:
    benches, states = Benches(CPU), {"a": MemoryState(), "b": MemoryState()}
    for name in ("a", "b", "a"):
        handler = Handler(name, lambda job: site(), states[name], Policy(approve_all=True), benches)
        handler.handle(replace(ask(job, round=len(CALLS)), site=name))
    rounds = {name: state.load("run")["toy"]["counters"]["rounds"].item() for name, state in states.items()}
    assert rounds == {"a": 2, "b": 1}
