"""Localization: numbers by hand, torchvision's losses, sums that merge, and a head that learns where the spot is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap
from torchvision.ops import box_iou, generalized_box_iou_loss

from shared_models.boxes import to_centres
from shared_models.errors import ConfigError
from shared_models.tasks.base import Batch, Task, add_sums, tasks
from shared_models.tasks.localization import draw_boxes, to_box
from shared_models.validation import validate


def localization(**keys: Any) -> Task:
    declared = tasks["localization"]
    return declared(validate(declared.Settings, {"labels": ["lesion"], **keys}, "[task]"))


def raw(boxes: Tensor) -> Tensor:
    """The outputs whose box this is."""
    return torch.logit(to_centres(boxes))


def batch(boxes: Tensor) -> Batch:
    return Batch(torch.zeros(len(boxes), 1), boxes)


def scene(count: int, seed: int) -> tuple[Tensor, Batch]:
    source = torch.Generator().manual_seed(seed)
    boxes = draw_boxes((count,), source)
    return raw(boxes) + 0.5 * torch.randn(count, 4, generator=source), batch(boxes)


def test_to_box_by_hand() -> None:
    assert to_box(torch.zeros(1, 4)).tolist() == [[0.25, 0.25, 0.75, 0.75]]
    boxes = draw_boxes((50,), torch.Generator().manual_seed(0))
    torch.testing.assert_close(to_box(raw(boxes)), boxes, rtol=1e-5, atol=1e-6)


def test_by_hand() -> None:
    """Truth the left half of the image, answers: itself, the right half, the whole image: IoU 1, 0 and 1/2."""
    task = localization(distance=1.0, overlap=1.0, beta=0.5)
    answers = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    outputs = raw(answers).clamp(-30, 30)
    sums = task.sums(outputs, batch(torch.tensor([[0.0, 0.0, 0.5, 1.0]] * 3)))
    values = task.values(sums)
    assert values["iou"] == pytest.approx(0.5)
    assert values["within50"] == pytest.approx(2 / 3)
    assert values["examples"] == 3
    # distances: 0; centre x off by .5 (from beta on linear: .5 - .25); centre x by .25 and width by .5 (.0625 + .25)
    # 1 - GIoU: 0; 1 (IoU 0, no gap in the hull); 1/2
    assert values["loss"] == pytest.approx((0 + 0.25 + 1 + 0.0625 + 0.25 + 0.5) / 3, abs=1e-5)


@pytest.mark.parametrize(("distance", "overlap", "beta"), [(5.0, 2.0, 0.1), (1.0, 0.0, 0.0), (0.0, 3.0, 1.0)])
def test_loss_is_torchs_and_torchvisions(distance: float, overlap: float, beta: float) -> None:
    task = localization(distance=distance, overlap=overlap, beta=beta)
    outputs, given = scene(20, seed=1)
    near = F.smooth_l1_loss(outputs.sigmoid(), to_centres(given.y), beta=beta, reduction="none").sum(1)
    expected = distance * near + overlap * generalized_box_iou_loss(to_box(outputs), given.y)
    torch.testing.assert_close(task.loss(outputs, given), expected, rtol=1e-4, atol=1e-5)


def test_sums_of_sites_give_torchvisions_overlaps_pooled() -> None:
    task = localization()
    outputs, given = scene(60, seed=2)
    overlap = box_iou(to_box(outputs), given.y).diag()
    pooled = task.sums(outputs, given)
    for seed in range(5):
        source = torch.Generator().manual_seed(seed)
        cuts = sorted(torch.randint(0, 61, (4,), generator=source).tolist())  # some parts may be empty
        merged = dict(task.zeros)
        for rows in torch.randperm(60, generator=source).tensor_split(cuts):
            add_sums(merged, task.sums(outputs[rows], batch(given.y[rows])))
        assert torch.equal(merged["within50"], pooled["within50"])
        values = task.values(merged)
        assert values["iou"] == pytest.approx(float(overlap.double().mean()), abs=1e-6)
        assert values["within50"] == pytest.approx(float((overlap >= 0.5).double().mean()), abs=1e-12)
        assert values["loss"] == pytest.approx(float(task.loss(outputs, given).double().mean()), rel=1e-6)
    assert 0 < values["within50"] < 1


def test_samples_do_not_mix() -> None:
    task = localization()
    outputs, given = scene(6, seed=3)
    size = jacrev(lambda o: task.loss(o, given))(outputs).abs().sum(dim=2)  # (6, 6)
    assert bool((size.diag() > 0).all())
    assert not (size - size.diag().diag()).any()
    each = vmap(grad(lambda o, y: task.loss(o[None], Batch(o[None], y[None])).sum()))(outputs, given.y)
    together = grad(lambda o: task.loss(o, given).sum())(outputs)
    torch.testing.assert_close(each, together, rtol=1e-5, atol=1e-6)


def test_the_sums_of_nothing() -> None:
    task = localization()
    form = {n: (v.shape, v.dtype, v.device) for n, v in task.sums(*scene(3, seed=4)).items()}
    assert {n: (v.shape, v.dtype, v.device) for n, v in task.zeros.items()} == form
    assert not any(v.any() for v in task.zeros.values())
    for nothing in ({}, task.zeros):
        values = task.values(nothing)
        assert values["examples"] == 0
        assert all(math.isnan(values[n]) for n in (*task.metrics, "loss"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"distance": 0, "overlap": 0}, "with distance and overlap both 0 there is no loss"),
        ({"distance": -1.0}, "'distance'"),
        ({"beta": -0.1}, "'beta'"),
    ],
)
def test_settings_that_cannot_be(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        localization(**keys)
    assert message in str(error.value)


def test_a_drawn_batch_fits_loss_and_model() -> None:
    task = localization()
    drawn = task.draw((3, 8, 8), 200, torch.Generator().manual_seed(0))
    assert drawn.x.shape == (200, 3, 8, 8)
    low, high = drawn.y[:, :2], drawn.y[:, 2:]
    assert float(drawn.y.min()) >= 0
    assert float(drawn.y.max()) <= 1
    assert float((high - low).min()) >= 0.1 - 1e-6
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, task.outputs))
    outputs = task.forward(model, drawn)
    task.loss(outputs, drawn).mean().backward()
    assert task.values(task.sums(outputs.detach(), drawn))["examples"] == 200


def test_a_linear_model_learns_where_the_rectangle_is() -> None:
    task = localization()
    source, grid = torch.Generator().manual_seed(1), (torch.arange(12) + 0.5) / 12
    boxes = draw_boxes((128,), source)
    across = (grid >= boxes[:, 0, None]) & (grid < boxes[:, 2, None])  # (B, 12)
    down = (grid >= boxes[:, 1, None]) & (grid < boxes[:, 3, None])
    given = Batch((down[:, :, None] & across[:, None, :]).float()[:, None], boxes)  # (B, 1, 12, 12)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    before = task.values(task.sums(model(given.x).detach(), given))
    for _ in range(150):
        optimizer.zero_grad()
        task.loss(task.forward(model, given), given).mean().backward()
        optimizer.step()
    after = task.values(task.sums(model(given.x).detach(), given))
    assert before["iou"] < 0.3
    assert after["iou"] > 0.6
    assert after["within50"] > 0.8
