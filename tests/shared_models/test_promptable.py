"""Objects and prompts made from masks, and the promptable task: its loss by pixel, and sums that merge."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shared_models.errors import ConfigError
from shared_models.models import configure
from shared_models.promptable import HIGH_CORNER, INSIDE, LOW_CORNER, PADDING, Masks, Promptable
from shared_models.prompts import DRAWS, NONE, by_box, by_chance, by_point, choose
from shared_models.tasks.base import IGNORED, Batch, Task, add_sums, tasks
from shared_models.tasks.promptable import Answers, dice_loss, focal_loss, overlaps
from shared_models.validation import validate

LABELS = ("background", "cell", "nucleus")


def sam(shape: tuple[int, ...] = (1, 32, 32), *, seed: int = 0, **keys: Any) -> Any:
    torch.manual_seed(seed)
    chosen, settings = configure("sam", keys)
    return chosen.build(settings, shape, 3)


def promptable(**keys: Any) -> Any:
    declared = tasks["promptable"]
    return declared(validate(declared.Settings, {"labels": LABELS, **keys}, "[task]"))


def drawn(count: int = 8, shape: tuple[int, ...] = (1, 32, 32), seed: int = 0, task: Task | None = None) -> Batch:
    return (task or promptable()).draw(shape, count, torch.Generator().manual_seed(seed))


# ---- prompts ---------------------------------------------------------------------------------------------------------

SCENE = np.array([
    [1, 1, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 2, 2, 2, 2, 2],
    [0, 0, 1, 2, 2, 2, 2, 2],
    [0, 0, 0, 2, 2, 2, 2, 2],
    [1, 1, 255, 1, 1, 0, 0, 0],
])  # fmt: skip
PARTS = [4, 1, 2, 2, 15]  # pixels: four of class 1 in the order of their first pixel, for corners do not join; one of 2


def test_objects_are_connected_components_of_one_class() -> None:
    chosen = [choose(SCENE, [1, 2], 1, (i + 0.5) / 5) for i in range(5)]
    assert [int(o.pixels.sum()) for o in chosen] == PARTS
    assert [o.label for o in chosen] == [1, 1, 1, 1, 2]
    assert [int(choose(SCENE, [1, 2], 2, u).pixels.sum()) for u in (0.0, 0.26, 0.51, 0.76)] == [4, 2, 2, 15]
    assert choose(SCENE, [1, 2], 1).label == 2  # the largest
    assert np.argwhere(choose(SCENE, [1], 1).pixels).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    nothing = choose(SCENE, [3], 1)
    assert (nothing.label, nothing.pixels.any()) == (NONE, False)
    assert choose(SCENE, [2], 16, 0.5).label == NONE


def test_prompts_of_an_object_by_hand() -> None:
    thing = choose(SCENE, [2], 1)  # rows 1 to 3, columns 3 to 7 of 5 x 8
    assert by_box(thing).labels == (LOW_CORNER, HIGH_CORNER)
    np.testing.assert_allclose(by_box(thing).points, [(3 / 8, 1 / 5), (1.0, 4 / 5)])
    assert by_point(thing).labels == (INSIDE, PADDING)
    np.testing.assert_allclose(by_point(thing).points[0], (4.5 / 8, 2.5 / 5))  # the first of the three innermost
    nothing = choose(SCENE, [3], 1)
    for prompt in (by_box(nothing), by_point(nothing), by_chance(nothing, [0.5] * 6)):
        assert prompt.labels == (PADDING, PADDING)


def test_random_prompts_are_points_of_the_object_or_boxes_near_it() -> None:
    thing = choose(SCENE, [2], 1)
    pixels, boxes = set(), []
    for draws in torch.rand(600, DRAWS - 1, generator=torch.Generator().manual_seed(0)).tolist():
        points, labels = by_chance(thing, draws)
        if labels == (INSIDE, PADDING):
            pixels.add((int(points[0, 1] * 5), int(points[0, 0] * 8)))
        else:
            boxes.append(points)
    assert pixels == {(r, c) for r in (1, 2, 3) for c in range(3, 8)}
    assert len(boxes) == pytest.approx(300, abs=40)
    moved = np.stack(boxes) - by_box(thing).points
    assert np.abs(moved).max() == pytest.approx(20 / 1024)
    assert moved[:, 1, 0].max() == 0  # the box ends at the image's edge and stays in it
    assert abs(moved[:, 0].mean()) < 0.002
    np.testing.assert_allclose(by_chance(thing, [0.7, 0.3, 0.5, 0.5, 0.5, 0.5]).points, by_box(thing).points)
    wide = choose(np.pad(np.ones((90, 10), dtype=int), ((5, 5), (45, 45))), [1], 1)  # 10 % of 0.1 is below the limit
    up = by_chance(wide, [0.7, 0.3, 0.841345, 0.5, 0.158655, 0.5])  # one standard deviation right, and left
    np.testing.assert_allclose(up.points[:, 0], (0.46, 0.54), atol=1e-6)


# ---- the task --------------------------------------------------------------------------------------------------------


class Told(Promptable):
    """Says what it is told, and remembers what it is asked; logits (B, 3, h, w) and scores (B, 3)."""

    def __init__(self, logits: Tensor, scores: Tensor) -> None:
        super().__init__()
        self.said = Masks(logits, scores)
        self.images = 0
        self.asked: list[dict[str, Any]] = []

    def encode(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return x

    def decode(
        self, image: Tensor, points: Tensor, labels: Tensor, mask: Tensor | None = None, *, single: bool = False
    ) -> Masks:
        self.asked.append({"points": points, "labels": labels, "mask": mask, "single": single})
        return Masks(self.said.logits[:, :1], self.said.scores[:, :1]) if single else self.said


def one_scene() -> Batch:
    return Batch(torch.zeros(1, 1, 5, 8), torch.from_numpy(SCENE).to(torch.uint8)[None])


def rectangle(rows: slice, columns: slice) -> Tensor:
    """Logits (5, 8), 9 inside and -9 outside."""
    logits = torch.full((5, 8), -9.0)
    logits[rows, columns] = 9.0
    return logits


def test_evaluation_asks_for_the_largest_object_by_point_and_by_box() -> None:
    model = Told(torch.zeros(1, 3, 5, 8), torch.zeros(1, 3)).eval()
    outputs = promptable().forward(model, one_scene())
    assert model.images == 1
    point, box = model.asked
    torch.testing.assert_close(point["points"], torch.tensor([[[4.5 / 8, 2.5 / 5], [0.0, 0.0]]]))
    torch.testing.assert_close(box["points"], torch.tensor([[[3 / 8, 1 / 5], [1.0, 4 / 5]]]))
    assert point["labels"].tolist() == [[INSIDE, PADDING]]
    assert box["labels"].tolist() == [[LOW_CORNER, HIGH_CORNER]]
    assert outputs.classes.tolist() == [2]
    assert torch.equal(outputs.target[0], torch.from_numpy(SCENE == 2))


def test_training_gives_the_best_candidate_back_to_be_improved() -> None:
    torch.manual_seed(0)
    logits, scores = torch.randn(1, 3, 5, 8), torch.tensor([[0.1, 0.7, 0.2]])
    model = Told(logits, scores).train()
    outputs = promptable().forward(model, one_scene())
    first, second = model.asked
    assert model.images == 1
    assert (first["mask"], first["single"], second["single"]) == (None, False, True)
    assert torch.equal(second["mask"], logits[:, 1])
    assert torch.equal(first["points"], second["points"])
    assert [m.logits.shape[1] for m in outputs.masks] == [3, 1]


def test_metrics_by_hand() -> None:
    """Object of 15 pixels. Point: 10 of them and nothing else; box: all of them, two ignored or not, and three more."""
    task, batch = promptable(), one_scene()
    batch.y[0, 1, 3], batch.y[0, 0, 7] = IGNORED, IGNORED  # a corner of the object does not count: 14 are left
    target = batch.y == 2
    ten = rectangle(slice(2, 4), slice(3, 8))
    more = rectangle(slice(0, 4), slice(3, 8))  # 20 pixels, of which 18 count and 14 are right
    empty = torch.full((5, 8), -9.0)
    point = Masks(torch.stack([more, ten, empty])[None], torch.tensor([[0.3, 0.5, 0.4]]))
    box = Masks(torch.stack([more, ten, empty])[None], torch.tensor([[0.9, 0.5, 0.4]]))
    sums = task.sums(Answers((point, box), target, torch.tensor([2])), batch)
    assert sums["iou"].tolist() == pytest.approx([10 / 14, 14 / 18])
    assert sums["dice"].tolist() == pytest.approx([20 / 24, 28 / 32])
    values = task.values(sums)
    assert values["iou_point"] == pytest.approx(10 / 14)
    assert values["iou_box"] == pytest.approx(14 / 18)
    assert values["iou"] == pytest.approx((10 / 14 + 14 / 18) / 2)
    assert values["dice"] == pytest.approx((20 / 24 + 28 / 32) / 2)
    assert values["examples"] == 1
    seen = task.predict(Answers((point, box), target, torch.tensor([2])), batch)[0]
    assert torch.equal(seen, torch.where(ten > 0, 2, IGNORED))


def test_losses_pixel_by_pixel() -> None:
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=source, dtype=torch.float64)
    target = torch.rand(2, 4, 5, generator=source) < 0.4
    counted = torch.rand(2, 4, 5, generator=source) < 0.8
    target = target & counted
    focal, dice, iou = torch.zeros(3, 2, 3, dtype=torch.float64)
    for b in range(2):
        for n in range(3):
            total = shared = both = 0.0
            hits = union = 0
            for row in range(4):
                for column in range(5):
                    if not counted[b, row, column]:
                        continue
                    truth, logit = bool(target[b, row, column]), float(logits[b, n, row, column])
                    p = 1 / (1 + math.exp(-logit))
                    right = p if truth else 1 - p
                    total -= (0.3 if truth else 0.7) * (1 - right) ** 2 * math.log(right)
                    shared, both = shared + p * truth, both + p + truth
                    hits, union = hits + (truth and logit > 0), union + (truth or logit > 0)
            focal[b, n] = total / int(counted[b].sum())
            dice[b, n] = 1 - (2 * shared + 1) / (both + 1)
            iou[b, n] = hits / union
    torch.testing.assert_close(focal_loss(logits, target, counted, 0.3), focal)
    torch.testing.assert_close(dice_loss(logits, target, counted), dice)
    torch.testing.assert_close(overlaps(logits, target, counted)[0].double(), iou, atol=1e-6, rtol=1e-6)

    task = promptable(focal=2.0, alpha=0.3, dice=0.5, overlap=3.0)
    scores = torch.rand(2, 3, generator=source, dtype=torch.float64)
    y = torch.where(target, 2, 0).masked_fill(~counted, IGNORED).to(torch.uint8)
    batch = Batch(torch.zeros(2, 1, 4, 5), y)
    answers = Masks(logits, scores), Masks(logits[:, :1], scores[:, :1])
    loss = task.loss(Answers(answers, target, torch.tensor([2, 2])), batch)
    mask, error = 2 * focal + 0.5 * dice, 3 * (scores - iou) ** 2
    expected = (mask.amin(1) + error.mean(1) + mask[:, 0] + error[:, 0]) / 2
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-5)


def test_the_best_candidate_alone_learns_its_mask_and_all_learn_their_scores() -> None:
    task, batch = promptable(), one_scene()
    good, bad = rectangle(slice(1, 4), slice(3, 8)) / 9, rectangle(slice(0, 1), slice(0, 2)) / 9
    logits = torch.stack([bad, good, bad])[None].requires_grad_()
    scores = torch.tensor([[0.5, 0.5, 0.5]], requires_grad=True)
    masks = Masks(logits, scores)
    task.loss(Answers((masks, masks), batch.y == 2, torch.tensor([2])), batch).sum().backward()
    assert logits.grad is not None
    assert scores.grad is not None
    assert logits.grad.abs().sum(dim=(2, 3))[0].gt(0).tolist() == [False, True, False]
    assert scores.grad.sign().tolist() == [[1.0, -1.0, 1.0]]  # down to 0, up to 1, down to 0


@pytest.mark.parametrize("training", [True, False])
def test_an_image_without_an_object_costs_nothing_and_counts_nowhere(training: bool) -> None:
    task, net, full = promptable(), sam().train(training), drawn(2)
    empty = Batch(full.x, full.y.masked_fill(full.y != IGNORED, 0))
    loss = task.loss(task.forward(net, empty), empty)
    assert loss.tolist() == [0.0, 0.0]
    loss.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters() if training or p.grad is not None)
    with torch.no_grad():
        net.eval()
        mixed = Batch(full.x, torch.cat([full.y[:1], empty.y[1:]]))
        alone, both = (task.sums(task.forward(net, b), b) for b in (full[:1], mixed))
        assert (int(both["examples"]), int(both["objects"])) == (2, 1)
        assert task.values(both)["loss"] == pytest.approx(task.values(alone)["loss"], rel=1e-5)
        torch.testing.assert_close(both["iou"], alone["iou"])
        outputs = task.forward(net, empty)
        assert (task.predict(outputs, empty) == IGNORED).all()
        assert math.isnan(task.values(task.sums(outputs, empty))["iou"])


def test_sums_over_any_split_equal_the_pooled_ones() -> None:
    task, net, batch = promptable(), sam().eval(), drawn(7)
    with torch.no_grad():
        pooled = task.sums(task.forward(net, batch), batch)
        merged = dict(task.zeros)
        for rows in (slice(0, 1), slice(1, 5), slice(5, 7)):
            add_sums(merged, task.sums(task.forward(net, batch[rows]), batch[rows]))
    assert merged.keys() == pooled.keys()
    for name, value in pooled.items():
        assert (merged[name].dtype, merged[name].shape) == (value.dtype, value.shape)
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-6)
    assert not any(value.any() for value in task.zeros.values())
    for nothing in ({}, task.zeros):
        values = task.values(nothing)
        assert values["examples"] == 0
        assert all(math.isnan(values[name]) for name in (*task.metrics, "loss"))


def test_chance_is_the_global_seed_and_is_each_images_own() -> None:
    task, net, batch = promptable(), sam().train(), drawn(6)

    def losses(seed: int, *parts: Batch) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return torch.cat([task.loss(task.forward(net, part), part) for part in parts])

    assert torch.equal(losses(1, batch), losses(1, batch))
    assert not torch.equal(losses(1, batch), losses(2, batch))
    torch.testing.assert_close(losses(1, batch[:2], batch[2:]), losses(1, batch), rtol=1e-4, atol=1e-5)
    state = torch.get_rng_state()
    net.eval()
    with torch.no_grad():
        first, again = (task.sums(task.forward(net, batch), batch) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("training", [True, False])
def test_samples_do_not_mix_in_the_loss(training: bool) -> None:
    task, net = promptable(), sam().double().train(training)
    batch, other = drawn(4), drawn(4, seed=1)
    mixed = Batch(torch.cat([batch.x[:1], 3 * other.x[1:]]), torch.cat([batch.y[:1], other.y[1:]]))
    first = []
    for b in (batch, mixed):
        torch.manual_seed(0)
        with torch.no_grad():
            b = Batch(b.x.double(), b.y)
            first.append(task.loss(task.forward(net, b), b)[0])
    torch.testing.assert_close(first[0], first[1], rtol=1e-6, atol=1e-7)


def test_draw_shows_two_objects() -> None:
    batch = drawn(20, (3, 32, 48))
    assert batch.x.shape == (20, 3, 32, 48)
    assert (batch.y.shape, batch.y.dtype) == ((20, 32, 48), torch.uint8)
    assert set(batch.y.unique().tolist()) == {0, 1, 2, IGNORED}
    for mask in batch.y.numpy():
        halves = mask[:, :24], mask[:, 24:]
        for half in halves:
            assert choose(half, [1, 2], 60, 0.99).label in (1, 2)
            assert choose(half, [1, 2], 60, 0.0).label == choose(half, [1, 2], 60, 0.99).label
    everything = drawn(3, task=promptable(background=()))
    assert set(everything.y.unique().tolist()) <= {0, 1, 2, IGNORED}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"background": ["cel"]}, "background names 'cel', which is not a label"),
        ({"background": LABELS}, "there is no object where every label is background: background, cell, nucleus"),
        ({"labels": ["cell"]}, "there is no object where every label is background: cell"),
        ({"labels": [str(i) for i in range(256)]}, "a mask of bytes holds at most 255 labels, not 256"),
        ({"focal": 0, "dice": 0}, "with focal and dice both 0 no mask is learned"),
        ({"smallest": 0}, "'smallest' should be greater than 0, not 0"),
    ],
)
def test_task_settings_that_cannot_be(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        promptable(**keys)
    assert message in str(error.value)


def test_background_is_the_first_label_or_those_that_are_named() -> None:
    assert promptable().settings.classes == [1, 2]
    assert promptable(background=["cell", "background"]).settings.classes == [2]
    assert promptable(labels=["cell"], background=[]).settings.classes == [0]
