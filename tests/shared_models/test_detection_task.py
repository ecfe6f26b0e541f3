"""Detection: pycocotools and torchmetrics on the pooled detections of several sites, and a detector that trains."""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision

from shared_models.boxes import PADDING
from shared_models.detection import Detector
from shared_models.metrics.histograms import LIMIT
from shared_models.tasks.base import Batch, Task, add_sums, tasks
from shared_models.tasks.detection import Detection
from shared_models.tasks.localization import draw_boxes
from shared_models.validation import validate

LABELS = ("car", "person", "dog")
Outputs = dict[str, Tensor]


def detection(**keys: Any) -> Detection:
    declared = tasks["detection"]
    task = declared(validate(declared.Settings, {"labels": LABELS, **keys}, "[task]"))
    assert isinstance(task, Detection)
    return task


def scene(images: int, seed: int, *, classes: int = 3, count: int = 12, apart: bool = False) -> tuple[Outputs, Batch]:
    """Up to four boxes an image; half of the detections are near one of them, half anywhere.

    With `apart` each score is the middle of one of 1024 bins, and no two detections of a class share one.
    """
    source = torch.Generator().manual_seed(seed)
    boxes = draw_boxes((images, 4), source)
    kinds = torch.randint(classes, (images, 4, 1), generator=source).float()
    there = torch.arange(4) < torch.randint(5, (images, 1), generator=source)
    truth = torch.cat([kinds.where(there[..., None], PADDING), boxes], dim=2)
    near = truth.take_along_dim(torch.randint(4, (images, count, 1), generator=source), 1)
    anywhere = (torch.rand(images, count, 1, generator=source) < 0.5) | (near[..., :1] < 0)
    moved = near[..., 1:] + 0.02 * torch.randn(images, count, 4, generator=source)
    corners = draw_boxes((images, count), source).where(anywhere, moved)
    guess = torch.randint(classes, (images, count, 1), generator=source).float().where(anywhere, near[..., :1])
    if apart:
        bins = torch.randperm(1024, generator=source)[: images * count].reshape(images, count, 1)
        scores = ((bins.double() + 0.5) / 1024 * 2 * LIMIT - LIMIT).clamp(max=14).sigmoid().float()
        guess = torch.where(bins > 900, torch.tensor(PADDING), guess)  # float32 is too coarse near 1
    else:
        scores = torch.sigmoid(torch.randn(images, count, 1, generator=source) + 1.0 * ~anywhere)
    found = torch.cat([guess, corners, scores], dim=2)
    return {"loss": torch.rand(images, generator=source), "found": found}, Batch(torch.zeros(images, 1), truth)


def rows_of(outputs: Outputs, given: Batch, rows: Tensor) -> tuple[Outputs, Batch]:
    return {n: v[rows] for n, v in outputs.items()}, Batch(given.x[rows], given.y[rows])


def at_sites(task: Task, outputs: Outputs, given: Batch, cuts: list[int]) -> dict[str, Tensor]:
    merged = dict(task.zeros)
    for rows in torch.arange(len(given)).tensor_split(cuts):
        add_sums(merged, task.sums(*rows_of(outputs, given, rows)))
    return merged


def coco(outputs: Outputs, given: Batch, classes: int = 3) -> COCOeval:
    """pycocotools on all images at once."""
    annotations, results = [], []
    for i, (found, truth) in enumerate(zip(outputs["found"].tolist(), given.y.tolist(), strict=True)):
        for kind, x0, y0, x1, y1 in truth:
            if kind >= 0:
                box, size = [x0, y0, x1 - x0, y1 - y0], (x1 - x0) * (y1 - y0)
                annotations.append({"image_id": i, "category_id": int(kind), "bbox": box, "area": size, "iscrowd": 0})
        for kind, x0, y0, x1, y1, score in found:
            if kind >= 0:
                box = [x0, y0, x1 - x0, y1 - y0]
                results.append({"image_id": i, "category_id": int(kind), "bbox": box, "score": score})
    truth_side = COCO()
    truth_side.dataset = {
        "info": {},
        "images": [{"id": i} for i in range(len(given))],
        "annotations": [{"id": 1 + n, **a} for n, a in enumerate(annotations)],
        "categories": [{"id": c} for c in range(classes)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth_side.createIndex()
        evaluation = COCOeval(truth_side, truth_side.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def coco_aps(evaluation: COCOeval) -> Tensor:
    """AP of each class and overlap (K, 10), NaN for a class without truth."""
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (10, 101, K), -1 for a class without truth
    aps = torch.from_numpy(precision).mean(dim=1).T
    return aps.where(aps >= 0, torch.nan)


@pytest.mark.parametrize("seed", range(4))
def test_equals_pycocotools_where_no_two_scores_of_a_class_share_a_bin(seed: int) -> None:
    task = detection()
    outputs, given = scene(60, seed, apart=True)
    merged = at_sites(task, outputs, given, [7, 20, 20])
    assert int(merged["detections"].max()) == 1
    evaluation = coco(outputs, given)
    exact = coco_aps(evaluation)
    for bound in task.average_precisions(merged):
        torch.testing.assert_close(bound, exact, rtol=0, atol=1e-12)
    values = task.values(merged)
    assert values["map50"] == pytest.approx(float(exact[:, 0].mean()), abs=1e-12)
    assert values["map"] == pytest.approx(float(exact.mean()), abs=1e-12)
    assert [values[f"ap50:{label}"] for label in LABELS] == pytest.approx(exact[:, 0].tolist(), abs=1e-12)
    share = evaluation.eval["recall"][0, :, 0, -1]
    truths = merged["truths"].numpy()
    assert values["recall"] == pytest.approx(float((share * truths).sum() / truths.sum()), abs=1e-12)
    assert 0.05 < values["map"] < values["map50"] < 0.95


@pytest.mark.parametrize("seed", range(3))
def test_equals_torchmetrics_where_no_two_scores_of_a_class_share_a_bin(seed: int) -> None:
    task = detection()
    outputs, given = scene(40, seed, apart=True)
    values = task.values(at_sites(task, outputs, given, [15]))
    recalls, overlaps = np.linspace(0.0, 1.0, 101).tolist(), np.linspace(0.5, 0.95, 10).tolist()
    # by default torchmetrics rounds COCO's two lists to float32, which moves single points of the curve
    oracle = MeanAveragePrecision(backend="pycocotools", iou_thresholds=overlaps, rec_thresholds=recalls)
    for found, truth in zip(outputs["found"], given.y, strict=True):
        found, truth = found[found[:, 0] >= 0], truth[truth[:, 0] >= 0]
        guess = {"boxes": found[:, 1:5], "scores": found[:, 5], "labels": found[:, 0].long()}
        oracle.update([guess], [{"boxes": truth[:, 1:], "labels": truth[:, 0].long()}])
    exact = oracle.compute()
    assert values["map50"] == pytest.approx(float(exact["map_50"]), abs=1e-6)
    assert values["map"] == pytest.approx(float(exact["map"]), abs=1e-6)


@pytest.mark.parametrize("bins", [1024, 64, 16])
@pytest.mark.parametrize("seed", range(3))
def test_pycocotools_lies_between_the_bounds(seed: int, bins: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Detection, "most_bins", bins)
    task = detection()
    outputs, given = scene(100, seed)
    merged = at_sites(task, outputs, given, [1, 50])
    assert merged["detections"].shape == (3, bins)
    exact = coco_aps(coco(outputs, given))
    low, high = task.average_precisions(merged)
    assert bool(((low - 1e-12 <= exact) & (exact <= high + 1e-12)).all())
    assert float((high - low).max()) > 0
    values = task.values(merged)
    assert values["map50"] == pytest.approx(float(exact[:, 0].mean()), abs=float((high - low)[:, 0].mean()) / 2 + 1e-12)
    if bins == 1024:
        assert float((high - low).max()) < 0.02


def test_sums_over_any_split_equal_the_pooled_ones() -> None:
    task = detection()
    outputs, given = scene(23, seed=5)
    pooled = task.sums(outputs, given)
    for seed in range(8):
        source = torch.Generator().manual_seed(seed)
        cuts = sorted(torch.randint(0, 24, (5,), generator=source).tolist())  # some parts may be empty
        merged = dict(task.zeros)
        for rows in torch.randperm(23, generator=source).tensor_split(cuts):
            add_sums(merged, task.sums(*rows_of(outputs, given, rows)))
        for name in ("detections", "hits", "truths", "examples"):
            assert torch.equal(merged[name], pooled[name])
        assert float(merged["loss"]) == pytest.approx(float(pooled["loss"]), rel=1e-12)


def test_by_hand() -> None:
    """A car is detected twice, best with IoU .8125, then with .90625; a dog is not."""
    truth = torch.tensor([[[0.0, 0.0, 0.0, 0.5, 1.0], [2.0, 0.5, 0.5, 1.0, 1.0], [-1.0, 0.0, 0.0, 0.0, 0.0]]])
    found = torch.tensor(
        [[[0.0, 0.0, 0.0, 0.5, 0.8125, 0.9], [0.0, 0.0, 0.0, 0.5, 0.90625, 0.4], [-1.0, 0, 0, 0, 0, 0]]]
    )
    task = detection()
    sums = task.sums({"loss": torch.tensor([0.25]), "found": found}, Batch(torch.zeros(1, 1), truth))
    assert sums["truths"].tolist() == [1, 0, 1]
    assert sums["detections"].sum(1).tolist() == [2, 0, 0]
    assert sums["hits"].sum(2).tolist() == [[1] * 9 + [0], [0] * 10, [0] * 10]
    values = task.values(sums)
    assert values["ap50:car"] == 1.0
    assert math.isnan(values["ap50:person"])  # neither there nor counted in the means
    assert values["ap50:dog"] == 0.0
    assert values["map50"] == 0.5
    # the car at .50 to .80: 1; at .85 and .90 the second detection is right and the first wrong: 1/2; at .95: 0
    assert values["map"] == pytest.approx((7 * 1 + 2 * 0.5 + 0) / 20)
    assert values["recall"] == 0.5
    assert values["loss"] == 0.25
    assert values["examples"] == 1


def test_a_class_that_is_nowhere_true_costs_nothing_but_is_counted() -> None:
    outputs, given = scene(30, seed=6, classes=2, apart=True)
    outputs["found"][:, 0, 0] = 2.0  # dogs are seen and there are none
    values = detection().values(detection().sums(outputs, given))
    assert math.isnan(values["ap50:dog"])
    assert values["map50"] == pytest.approx((values["ap50:car"] + values["ap50:person"]) / 2, abs=1e-12)
    exact = coco_aps(coco(outputs, given))
    assert values["map50"] == pytest.approx(float(np.nanmean(exact[:, 0])), abs=1e-12)


def test_images_without_truth_only_add_misses() -> None:
    task = detection()
    outputs, given = scene(30, seed=7)
    empty = Batch(given.x, torch.full_like(given.y, PADDING))
    sums = task.sums(outputs, empty)
    assert not sums["hits"].any()
    assert not sums["truths"].any()
    assert int(sums["detections"].sum()) == 30 * 12
    values = task.values(sums)
    assert all(math.isnan(values[n]) for n in task.metrics)
    assert values["examples"] == 30
    no_rows = Batch(given.x, given.y[:, :0])
    assert all(torch.equal(v, sums[n]) for n, v in task.sums(outputs, no_rows).items())
    together = dict(task.sums(outputs, given))
    add_sums(together, sums)
    assert task.values(together)["map50"] < task.values(task.sums(outputs, given))["map50"]


def test_padding_does_not_count() -> None:
    task = detection()
    outputs, given = scene(10, seed=8)
    plain = task.sums(outputs, given)
    row = torch.tensor([PADDING, 0.0, 0.0, 1.0, 1.0])
    found = torch.cat([outputs["found"], torch.cat([row, torch.zeros(1)]).expand(10, 5, 6)], dim=1)
    longer = Batch(given.x, torch.cat([row.expand(10, 3, 5), given.y], dim=1))
    assert all(torch.equal(v, plain[n]) for n, v in task.sums({**outputs, "found": found}, longer).items())


def test_the_sums_of_nothing() -> None:
    task = detection()
    form = {n: (v.shape, v.dtype, v.device) for n, v in task.sums(*scene(2, seed=9)).items()}
    assert {n: (v.shape, v.dtype, v.device) for n, v in task.zeros.items()} == form
    assert not any(v.any() for v in task.zeros.values())
    for nothing in ({}, task.zeros):
        values = task.values(nothing)
        assert values["examples"] == 0
        assert all(math.isnan(values[n]) for n in (*task.metrics, "loss", "ap50:dog"))


def test_histograms_stay_small() -> None:
    assert detection().zeros["hits"].shape == (3, 10, 1024)
    many = detection(labels=[str(i) for i in range(80)]).zeros
    assert many["hits"].shape == (80, 10, 512)
    assert many["hits"].nbytes + many["detections"].nbytes <= 4 * 2**20


def test_scores_that_are_no_numbers_are_counted_too() -> None:
    task = detection()
    outputs, given = scene(3, seed=10)
    broken = {**outputs, "found": torch.cat([outputs["found"][..., :1], torch.full((3, 12, 5), math.nan)], dim=2)}
    sums = task.sums(broken, given)
    assert int(sums["detections"].sum()) == 36
    assert not sums["hits"].any()


def test_sums_that_contradict_each_other_give_values_nevertheless() -> None:
    """A server computes with what sites send: more hits than detections or true boxes."""
    task = detection()
    values = task.values({n: torch.full_like(v, 3 + i) for i, (n, v) in enumerate(task.zeros.items())})
    assert all(values[n] >= 0 for n in task.metrics)


class OneBox(Detector):
    """A detector of one box an image, a linear function of it; each image's own loss."""

    def __init__(self, numbers: int, classes: int) -> None:
        super().__init__()
        self.box = nn.Linear(numbers, 4)
        self.kind = nn.Linear(numbers, classes)

    def forward(self, x: Tensor, y: Tensor, proposals: Tensor | None = None) -> dict[str, Tensor]:
        flat = x.flatten(1)
        box, scores = self.box(flat), self.kind(flat).softmax(dim=1)
        there = (y[..., 0] >= 0).float()  # (B, M)
        off = (box[:, None] - y[..., 1:]).abs().mean(dim=2)
        loss = (off * there).sum(dim=1) / there.sum(dim=1).clamp(min=1)
        if self.training:
            return {"loss": loss}
        best, kind = scores.max(dim=1)
        return {"loss": loss, "found": torch.cat([kind[:, None].float(), box, best[:, None]], dim=1)[:, None]}


def test_a_drawn_batch_fits_loss_and_model() -> None:
    task = detection()
    drawn = task.draw((3, 4, 4), 40, torch.Generator().manual_seed(0))
    assert drawn.x.shape == (40, 3, 4, 4)
    assert drawn.y.shape == (40, 3, 5)
    assert set(drawn.y[..., 0].unique().tolist()) == {PADDING, 0.0, 1.0, 2.0}
    there = drawn.y[..., 0] >= 0
    assert set(there.sum(1).tolist()) == {0, 1, 2, 3}
    assert bool((drawn.y[there][:, 3:] - drawn.y[there][:, 1:3] > 0.09).all())
    assert not drawn.y[~there][:, 1:].any()
    assert drawn.proposals is not None
    assert drawn.proposals.shape == (40, 64, 4)
    model = OneBox(48, task.outputs)
    outputs = task.forward(model, drawn)
    task.loss(outputs, drawn).mean().backward()
    assert model.box.weight.grad is not None
    model.eval()
    with torch.no_grad():
        values = task.values(task.sums(task.forward(model, drawn), drawn))
    assert values["examples"] == 40
    assert task.headline == "map50"
    assert 0 <= values["map50"] <= 1
