"""Segmentation: torchmetrics on pooled pixels, torch's own losses image by image, pixels that do not count."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassJaccardIndex

from shared_models.errors import ConfigError
from shared_models.tasks.base import IGNORED, Batch, Task, add_sums, tasks
from shared_models.tasks.segmentation import pixel_cross_entropy, soft_dice
from shared_models.validation import validate

LABELS = ("background", "liver", "tumour")


def segmentation(**keys: Any) -> Task:
    declared = tasks["segmentation"]
    return declared(validate(declared.Settings, {"labels": LABELS, **keys}, "[task]"))


def scene(count: int, seed: int, classes: int = 3, size: int = 9) -> tuple[Tensor, Batch]:
    """Logits that lean to the truth, and masks with one pixel in five ignored."""
    source = torch.Generator().manual_seed(seed)
    mask = torch.randint(classes, (count, size, size), generator=source)
    logits = torch.randn(count, classes, size, size, generator=source) + F.one_hot(mask, classes).movedim(3, 1)
    ignored = torch.rand(mask.shape, generator=source) < 0.2
    return logits, batch(mask.masked_fill(ignored, IGNORED))


def batch(mask: Tensor) -> Batch:
    return Batch(torch.zeros(len(mask), 1, *mask.shape[1:]), mask.to(torch.uint8))


def test_by_hand() -> None:
    """Truth 0 0 1 1 255, predicted 0 1 1 1 0: Dice of 0 is 2/3, of 1 4/5; IoU 1/2 and 2/3; 3 of 4 pixels."""
    task = segmentation()
    guess = torch.tensor([0, 1, 1, 1, 0])
    logits = 9.0 * F.one_hot(guess, 3).T[None, :, None, :].float()  # (1, 3, 1, 5)
    sums = task.sums(logits, batch(torch.tensor([[[0, 0, 1, 1, 255]]])))
    assert sums["confusion"].tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    assert int(sums["examples"]) == 1
    values = task.values(sums)
    assert values["dice"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert values["iou"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert values["pixel_accuracy"] == 0.75
    assert values["dice:liver"] == pytest.approx(4 / 5)
    assert values["iou:background"] == 0.5
    assert math.isnan(values["dice:tumour"])
    hit = math.log(1 + 2 * math.exp(-9))
    assert values["loss"] == pytest.approx(hit + 9 / 4, rel=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_sums_of_sites_give_torchmetrics_pooled(classes: int) -> None:
    task = segmentation(labels=[f"l{i}" for i in range(classes)])
    logits, given = scene(20, seed=classes, classes=classes)
    merged: dict[str, Tensor] = {}
    for rows in torch.arange(20).tensor_split([3, 3, 4]):
        add_sums(merged, task.sums(logits[rows], batch(given.y[rows])))
    values = task.values(merged)
    pooled = (logits.argmax(1), given.y.long())
    kinds = {"average": "macro", "ignore_index": IGNORED}
    assert values["iou"] == pytest.approx(float(MulticlassJaccardIndex(classes, **kinds)(*pooled)), abs=1e-6)
    assert values["dice"] == pytest.approx(float(MulticlassF1Score(classes, **kinds)(*pooled)), abs=1e-6)
    accuracy = MulticlassAccuracy(classes, average="micro", ignore_index=IGNORED)
    assert values["pixel_accuracy"] == pytest.approx(float(accuracy(*pooled)), abs=1e-6)
    each = MulticlassJaccardIndex(classes, average="none", ignore_index=IGNORED)(*pooled).tolist()
    assert [values[f"iou:l{i}"] for i in range(classes)] == pytest.approx(each, abs=1e-6)
    assert values["examples"] == 20


def test_sums_over_any_split_equal_the_pooled_ones() -> None:
    task = segmentation(loss="both")
    logits, given = scene(17, seed=1)
    pooled = task.sums(logits, given)
    for seed in range(10):
        source = torch.Generator().manual_seed(seed)
        cuts = sorted(torch.randint(0, 18, (5,), generator=source).tolist())  # some parts are empty
        merged = dict(task.zeros)
        for rows in torch.randperm(17, generator=source).tensor_split(cuts):
            add_sums(merged, task.sums(logits[rows], batch(given.y[rows])))
        assert torch.equal(merged["confusion"], pooled["confusion"])
        assert torch.equal(merged["examples"], pooled["examples"])
        assert float(merged["loss"]) == pytest.approx(float(pooled["loss"]), rel=1e-6)


@pytest.mark.parametrize("weights", [(), (0.5, 1.0, 4.0)])
def test_cross_entropy_is_torchs_mean_of_each_image(weights: tuple[float, ...]) -> None:
    task = segmentation(class_weights=weights)
    logits, given = scene(6, seed=2)
    loss = task.loss(logits, given)
    assert loss.shape == (6,)
    weight = torch.tensor(weights) if weights else None
    for i in range(6):
        expected = F.cross_entropy(
            logits[i : i + 1], given.y[i : i + 1].long(), weight=weight, ignore_index=IGNORED, reduction="mean"
        )
        assert float(loss[i]) == pytest.approx(float(expected), rel=1e-5)


def test_soft_dice_pixel_by_pixel() -> None:
    logits, given = scene(4, seed=3, size=4)
    p = logits.double().softmax(1)
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for i in range(4):
        for c in range(3):
            shared = both = 0.0
            for row in range(4):
                for column in range(4):
                    truth = int(given.y[i, row, column])
                    if truth != IGNORED:
                        shared += float(p[i, c, row, column]) * (truth == c)
                        both += float(p[i, c, row, column]) + (truth == c)
            expected[i, c] = (2 * shared + 1) / (both + 1)
    torch.testing.assert_close(soft_dice(logits, given.y).double(), expected, rtol=1e-5, atol=1e-6)
    task = segmentation(loss="dice", score=["tumour", "liver"])
    torch.testing.assert_close(task.loss(logits, given).double(), 1 - expected[:, 1:].mean(1), rtol=1e-5, atol=1e-6)


def test_both_is_the_sum() -> None:
    logits, given = scene(5, seed=4)
    both, entropy, dice = (segmentation(loss=k).loss(logits, given) for k in ("both", "cross-entropy", "dice"))
    torch.testing.assert_close(both, entropy + dice)


def test_a_perfect_answer_costs_nothing() -> None:
    _, given = scene(5, seed=5)
    perfect = 99.0 * F.one_hot(given.y.long().clamp(max=2), 3).movedim(3, 1).float()
    assert float(segmentation(loss="both").loss(perfect, given).abs().max()) < 1e-6
    values = segmentation().values(segmentation().sums(perfect, given))
    assert (values["dice"], values["iou"], values["pixel_accuracy"]) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("loss", ["cross-entropy", "dice", "both"])
def test_an_image_without_a_pixel_that_counts(loss: str) -> None:
    task = segmentation(loss=loss)
    logits, given = scene(3, seed=6)
    empty = batch(torch.cat([given.y[:2], torch.full((1, 9, 9), IGNORED)]))
    assert float(task.loss(logits, empty)[2]) == 0.0
    gradient = jacrev(lambda o: task.loss(o, empty).sum())(logits)
    assert bool(torch.isfinite(gradient).all())
    assert not gradient[2].any()
    sums = task.sums(logits, empty)
    assert int(sums["examples"]) == 3
    assert torch.equal(sums["confusion"], task.sums(logits[:2], batch(given.y[:2]))["confusion"])


@pytest.mark.parametrize(
    "keys", [{}, {"loss": "dice"}, {"loss": "both", "class_weights": (1.0, 2.0, 3.0), "score": ("liver",)}]
)
def test_samples_do_not_mix(keys: dict[str, Any]) -> None:
    task = segmentation(**keys)
    logits, given = scene(4, seed=7, size=5)
    size = jacrev(lambda o: task.loss(o, given))(logits).abs().sum(dim=(2, 3, 4))  # (4, 4)
    assert bool((size.diag() > 0).all())
    assert not (size - size.diag().diag()).any()
    each = vmap(grad(lambda o, y: task.loss(o[None], Batch(o[None], y[None])).sum()))(logits, given.y)
    together = grad(lambda o: task.loss(o, given).sum())(logits)
    torch.testing.assert_close(each, together, rtol=1e-5, atol=1e-7)


def test_means_are_over_the_scored_labels_that_occur() -> None:
    logits, given = scene(4, seed=8, classes=2)
    logits = torch.cat([logits, torch.full((4, 1, 9, 9), -99.0)], dim=1)  # no tumour, and none is predicted
    scored = segmentation(score=["tumour", "liver"])
    values = scored.values(scored.sums(logits, given))
    assert values["dice"] == values["dice:liver"]
    assert values["iou"] == values["iou:liver"]
    assert not math.isnan(values["dice:background"])
    absent = segmentation(score=["tumour"])
    assert math.isnan(absent.values(absent.sums(logits, given))["dice"])


def test_logits_of_another_size_are_interpolated() -> None:
    task = segmentation(loss="both")
    coarse = torch.randn(3, 3, 4, 5, generator=torch.Generator().manual_seed(9))
    _, given = scene(3, seed=9)
    fine = F.interpolate(coarse, size=(9, 9), mode="bilinear", align_corners=False)
    torch.testing.assert_close(task.loss(coarse, given), task.loss(fine, given))
    assert torch.equal(task.sums(coarse, given)["confusion"], task.sums(fine, given)["confusion"])


def test_half_precision_counts_like_full() -> None:
    task = segmentation()
    logits, given = scene(3, seed=10)
    sums, same = task.sums(logits.bfloat16(), given), task.sums(logits.bfloat16().float(), given)
    assert all(torch.equal(sums[n], same[n]) for n in sums)


def test_the_sums_of_nothing() -> None:
    task = segmentation()
    sums = task.sums(*scene(2, seed=11))
    form = {n: (v.shape, v.dtype, v.device) for n, v in sums.items()}
    assert {n: (v.shape, v.dtype, v.device) for n, v in task.zeros.items()} == form
    assert not any(v.any() for v in task.zeros.values())
    for nothing in ({}, task.zeros):
        values = task.values(nothing)
        assert values["examples"] == 0
        assert all(math.isnan(values[n]) for n in (*task.metrics, "loss", "dice:liver", "iou:tumour"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"labels": ["a"]}, "[task]: 'labels': there is nothing to choose with one label alone, 'a'"),
        ({"labels": [str(i) for i in range(256)]}, "a mask of bytes holds at most 255 labels, not 256"),
        ({"score": ["live"]}, "score names 'live', which is not a label"),
        ({"score": ["liver", "liver"]}, "score names 'liver' twice"),
        ({"loss": "focal"}, "'loss' should be 'cross-entropy', 'dice' or 'both'"),
        ({"class_weights": [1.0]}, "1 class_weights for 3 labels"),
        ({"class_weights": [1.0] * 3, "loss": "dice"}, "which loss = 'dice' leaves out"),
    ],
)
def test_settings_that_cannot_be(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        segmentation(**keys)
    assert message in str(error.value)


def test_the_last_of_255_labels_is_counted() -> None:
    task = segmentation(labels=[str(i) for i in range(255)])
    logits = 9.0 * F.one_hot(torch.tensor([[[254, 0]]]), 255).movedim(3, 1).float()
    assert task.sums(logits, batch(torch.tensor([[[254, IGNORED]]])))["confusion"][254, 254] == 1
    assert float(pixel_cross_entropy(logits, torch.tensor([[[254, IGNORED]]]))) < 0.1


def test_a_drawn_batch_fits_loss_and_model() -> None:
    task = segmentation(loss="both")
    drawn = task.draw((3, 8, 6), 5, torch.Generator().manual_seed(0))
    assert drawn.x.shape == (5, 3, 8, 6)
    assert (drawn.y.shape, drawn.y.dtype) == ((5, 8, 6), torch.uint8)
    assert set(drawn.y.unique().tolist()) == {0, 1, 2, IGNORED}
    outputs = task.forward(nn.Conv2d(3, task.outputs, 3, padding=1), drawn)
    task.loss(outputs, drawn).mean().backward()
    assert task.values(task.sums(outputs.detach(), drawn))["examples"] == 5
