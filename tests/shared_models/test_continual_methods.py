"""Each continual method against numbers computed by hand, or an identity of its paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_models.job import Job
from shared_models.methods.base import Method, Progress, methods, objective
from shared_models.methods.ewc import fisher
from shared_models.tasks.base import Batch, Past, Task, make_task


def make(name: str, **settings: Any) -> Method:
    declared = methods[name]
    return declared(declared.Settings(**settings))


@pytest.fixture
def task(make_job: Any) -> Task:
    job: Job = make_job(task={"labels": ["a", "b", "c"]})
    return make_task(job)


def past(draw: list[int], outputs: Tensor | None = None, labels: tuple[int, ...] = ()) -> Past:
    marks = torch.tensor(draw)
    counts = torch.bincount(marks)
    return Past(marks, len(draw) / counts[marks].float(), torch.tensor(labels, dtype=torch.int64), outputs)


LOGITS = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0], [2.0, 2.0, 2.0], [1.0, 0.0, -1.0]])


def test_er_ace_lets_new_examples_compete_among_their_own_classes(task: Task) -> None:
    """Classes a and c are among the new ones: class b has no part in their softmax, and gets no gradient of theirs."""
    logits = LOGITS.clone().requires_grad_()
    batch = Batch(torch.zeros(4, 1), torch.tensor([0, 2, 1, 2]), past=past([0, 0, 1, 1], labels=(0, 2)))
    objective(task, logits, batch, {}, [(make("er-ace"), {})]).mean().backward()
    new = F.cross_entropy(LOGITS[:2, [0, 2]], torch.tensor([0, 1]))
    old = F.cross_entropy(LOGITS[2:], torch.tensor([1, 2]))
    value = objective(task, LOGITS, batch, {}, [(make("er-ace"), {})]).mean()
    assert value.item() == pytest.approx((new + old).item(), rel=1e-6)
    assert logits.grad is not None
    assert logits.grad[:2, 1].tolist() == [0.0, 0.0]
    assert (logits.grad[2:, 1] != 0).all()
    parts = [objective(task, LOGITS[i : i + 1], batch[i : i + 1], {}, [(make("er-ace"), {})]) for i in range(4)]
    assert torch.cat(parts).mean().item() == pytest.approx(value.item())  # also where the batch is cut into parts
    plain = Batch(torch.zeros(4, 1), torch.tensor([0, 2, 1, 2]))
    assert torch.equal(objective(task, LOGITS, plain, {}, [(make("er-ace"), {})]), task.loss(LOGITS, plain))


def test_the_dark_losses_by_hand(task: Task) -> None:
    """DER: ce(new) + alpha mse(old); DER++: + beta ce(other old)."""
    said = torch.tensor([[0.0] * 3, [0.0, 0.0, 1.0], [9.0] * 3, [1.0, 1.0, 1.0]])
    y = torch.tensor([1, 0, 2, 0])
    apart = ((LOGITS[1] - said[1]) ** 2).mean()
    batch = Batch(torch.zeros(2, 1), y[:2], past=past([0, 1], said[:2]))
    der = objective(task, LOGITS[:2], batch, {}, [(make("der", alpha=0.7), {})]).mean()
    assert der.item() == pytest.approx((F.cross_entropy(LOGITS[:1], y[:1]) + 0.7 * apart).item(), rel=1e-6)
    batch = Batch(torch.zeros(4, 1), y, past=past([0, 1, 2, 2], said))
    plus = objective(task, LOGITS, batch, {}, [(make("der++", alpha=0.7, beta=0.4), {})]).mean()
    expected = F.cross_entropy(LOGITS[:1], y[:1]) + 0.7 * apart + 0.4 * F.cross_entropy(LOGITS[2:], y[2:])
    assert plus.item() == pytest.approx(expected.item(), rel=1e-6)
    plain = Batch(torch.zeros(4, 1), y)
    assert torch.equal(objective(task, LOGITS, plain, {}, [(make("der++"), {})]), task.loss(LOGITS, plain))


def test_a_gem_turns_a_step_only_where_it_would_hurt() -> None:
    """g = (3, -1), r = (0, 2): g.r = -2 < 0, so g - (-2 / 4) r = (3, 0), which is orthogonal to r."""
    piece, grads = make("a-gem"), {"a": torch.tensor([3.0]), "b": torch.tensor([-1.0])}
    against = {"reference": {"a": torch.tensor([0.0]), "b": torch.tensor([2.0])}}
    assert {n: g.item() for n, g in piece.grad(grads, {}, against).items()} == {"a": 3.0, "b": 0.0}
    along = {"reference": {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}}
    assert piece.grad(grads, {}, along)["b"].item() == -1.0
    assert piece.grad(grads, {}, {}) is grads
    nothing = {"reference": {"a": torch.zeros(1), "b": torch.zeros(1)}}
    assert {n: g.item() for n, g in piece.grad(grads, {}, nothing).items()} == {"a": 3.0, "b": -1.0}


class Line(nn.Module):
    """Logits (w x, 0, 0)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.w * x, torch.zeros(len(x), 2)], dim=1)


def test_the_fisher_information_of_a_line_by_hand(task: Task) -> None:
    """At w = 0 each probability is 1/3: d log p(a | x) / dw = 2/3 x, d log p(b | x) / dw = -x / 3."""
    batches = [
        Batch(torch.tensor([[3.0], [6.0]]), torch.tensor([0, 1])),
        Batch(torch.tensor([[1.0]]), torch.tensor([2])),
    ]
    found = fisher(Line(), task, batches, 10)
    assert found["w"].item() == pytest.approx((2.0**2 + 2.0**2 + (1 / 3) ** 2) / 3)
    assert fisher(Line(), task, batches, 1)["w"].item() in (pytest.approx(4.0), pytest.approx(1 / 9))


def test_ewc_pulls_towards_the_anchor_and_gathers_over_tasks(task: Task) -> None:
    piece = make("ewc", strength=10.0, decay=0.5)
    batches = [Batch(torch.tensor([[3.0]]), torch.tensor([0]))]
    kept = piece.end_task(Line(), task, batches, {})
    assert kept["fisher"]["w"].item() == pytest.approx(4.0)
    model = Line()
    with torch.no_grad():
        model.w.fill_(0.2)
    state = piece.begin_round({"model": {}}, kept)
    grads = {"w": torch.tensor([1.0]), "other": torch.tensor([1.0])}
    params = {"w": model.w.detach(), "other": torch.tensor([9.0])}
    pulled = piece.grad(grads, params, state)
    assert pulled["w"].item() == pytest.approx(1.0 + 10 * 4 * (0.2 - 0.0))
    assert pulled["other"].item() == 1.0
    later = piece.end_task(model, task, batches, kept)
    assert later["anchor"]["w"].item() == pytest.approx(0.2)
    p = math.exp(0.6) / (math.exp(0.6) + 2)
    assert later["fisher"]["w"].item() == pytest.approx(0.5 * 4 + (3 * (1 - p)) ** 2)
    assert piece.begin_round({}, {}) == {"fisher": {}, "anchor": {}}


def test_si_s_path_is_the_fall_of_the_loss(task: Task) -> None:
    """With small steps on L = 3 w^2 / 2 from 2 to w: omega -> L(2) - L(w); then Omega = omega / ((w - 2)^2 + xi)."""
    piece, rate = make("si", strength=0.5, damping=0.1), 1e-4
    down = {"model": {"w": torch.tensor([2.0])}}
    kept: Any = {}
    params = {"w": torch.tensor([2.0], dtype=torch.float64)}
    for _ in range(2):  # two rounds of one task
        state = piece.begin_round(down, kept)
        for _ in range(2000):
            grads = {"w": 3 * params["w"]}
            before, params = params, {"w": params["w"] - rate * 3 * params["w"]}
            state = piece.after_step(grads, before, params, state)
        _, kept = piece.end_round(params, down, kept, state, Progress(2000, 2000, 0.2))
    w = params["w"].item()
    fallen = 1.5 * (2.0**2 - w**2)
    assert kept["path"]["w"].item() == pytest.approx(fallen, rel=1e-3)
    model = Line()
    with torch.no_grad():
        model.w.fill_(w)
    after = piece.end_task(model, task, [], kept)
    assert after["importance"]["w"].item() == pytest.approx(fallen / ((w - 2) ** 2 + 0.1), rel=1e-3)
    assert after.keys() == {"importance", "anchor"}  # the next task's path begins at nothing
    state = piece.begin_round({"model": {"w": torch.tensor([w])}}, after)
    pulled = piece.grad({"w": torch.tensor([0.0])}, {"w": torch.tensor([w + 1.0])}, state)
    assert pulled["w"].item() == pytest.approx(2 * 0.5 * after["importance"]["w"].item(), rel=1e-5)


def test_lwf_by_hand_among_the_classes_that_were_known(task: Task) -> None:
    piece = make("lwf", alpha=2.0, temperature=2.0)
    said = torch.tensor([[2.0, 0.0, 5.0]])
    state = {"former": {}, "known": {"classes": torch.tensor([1, 1, 0], dtype=torch.uint8)}}
    batch = Batch(torch.zeros(1, 1), torch.tensor([2]), past=past([0], said))
    value = objective(task, LOGITS[:1], batch, {}, [(piece, state)])
    then = torch.softmax(torch.tensor([1.0, 0.0]), 0)
    now = torch.log_softmax(torch.tensor([0.5, 1.0]), 0)
    expected = F.cross_entropy(LOGITS[:1], batch.y) - 2 * (then * now).sum()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_icarl_by_hand(task: Task) -> None:
    """Class a is old, b new, c of a later task: it has no term. Without a former model an old class has none either."""
    piece, log = make("icarl"), math.log
    said = torch.tensor([[log(3), 9.0, 9.0], [-log(3), 9.0, 9.0]])  # q_a = 3/4 and 1/4
    logits = torch.tensor([[0.0, log(4), 5.0], [log(4), 0.0, 5.0]])  # g: 1/2, 4/5; 4/5, 1/2
    stream = {"before": torch.tensor([True, False, False]), "now": torch.tensor([False, True, False])}
    y = torch.tensor([1, 0])
    batch = Batch(torch.zeros(2, 1), y, past=past([0, 1], said))
    values = objective(task, logits, batch, {}, [(piece, {"stream": stream, "former": {}})])
    new, exemplar = log(2) - log(0.8), -0.25 * log(0.8) - 0.75 * log(0.2) + log(2)
    assert values.tolist() == pytest.approx([new, exemplar], rel=1e-6)
    plain = Batch(torch.zeros(2, 1), y)
    values = objective(task, logits, plain, {}, [(piece, {"stream": stream, "former": {}})])
    assert values.tolist() == pytest.approx([-log(0.8), log(2)], rel=1e-6)
    offline = objective(task, logits, plain, {}, [(piece, piece.begin_round({}, {}))])
    assert torch.equal(offline, task.loss(logits, plain))


def test_icarl_keeps_the_model_of_the_last_task(task: Task) -> None:
    piece, model = make("icarl"), Line()
    assert piece.former(piece.begin_round({}, {})) == {}
    first = piece.end_task(model, task, [], {})
    with torch.no_grad():
        model.w.fill_(5.0)
    assert piece.former(piece.begin_round({}, first))["w"].item() == 0.0
    assert piece.former(piece.begin_round({}, piece.end_task(model, task, [], first)))["w"].item() == 5.0


def test_lwf_keeps_the_model_and_the_classes_of_every_task_so_far(task: Task) -> None:
    piece, model = make("lwf"), Line()
    assert piece.former(piece.begin_round({}, {})) == {}
    first = piece.end_task(model, task, [Batch(torch.zeros(2, 1), torch.tensor([0, 0]))], {})
    assert first["known"]["classes"].tolist() == [1, 0, 0]
    with torch.no_grad():
        model.w.fill_(5.0)
    assert piece.former(piece.begin_round({}, first))["w"].item() == 0.0
    second = piece.end_task(model, task, [Batch(torch.zeros(1, 1), torch.tensor([2]))], first)
    assert second["known"]["classes"].tolist() == [1, 0, 1]
    assert second["former"]["w"].item() == 5.0
