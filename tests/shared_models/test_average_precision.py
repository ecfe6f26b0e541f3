"""Matching and average precision against COCO's rules written out, one detection after another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from shared_models.metrics.average_precision import average_precision
from shared_models.metrics.matching import match

OVERLAPS = torch.tensor([0.5, 0.75], dtype=torch.float64)


def coco_ap(hits: list[bool], truths: int) -> float:
    """`COCOeval.accumulate` for one class and overlap: hits are those of the detections, best first."""
    found, wrong = np.cumsum(hits).astype(float), np.cumsum(~np.array(hits, dtype=bool)).astype(float)
    precision = (found / (found + wrong)).tolist()
    for i in range(len(precision) - 1, 0, -1):
        precision[i - 1] = max(precision[i - 1], precision[i])
    reached = np.searchsorted(found / truths, np.linspace(0.0, 1.0, 101), side="left")
    return float(np.mean([precision[i] if i < len(precision) else 0.0 for i in reached]))


def histograms(bins: Tensor, hits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    return torch.bincount(bins[hits], minlength=count), torch.bincount(bins[~hits], minlength=count)


def test_ap_by_hand() -> None:
    """Right, wrong, right of 4 true boxes: precision 1 up to recall .25 (26 points), 2/3 up to .5 (25), then 0."""
    hits, misses = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 0])
    low, high = average_precision(hits, misses, torch.tensor(4))
    assert float(low) == float(high) == pytest.approx((26 + 25 * 2 / 3) / 101)


def test_a_bin_with_both_by_hand() -> None:
    """One bin, one right and one wrong, one true box: 1/2 if the wrong one comes first, 1 if the right one does."""
    low, high = average_precision(torch.tensor([1]), torch.tensor([1]), torch.tensor(1))
    assert (float(low), float(high)) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("hits", "misses", "expected"), [([0, 0], [0, 0], 0.0), ([0, 0], [2, 1], 0.0), ([2, 1], [0, 0], 1.0)]
)
def test_extremes(hits: list[int], misses: list[int], expected: float) -> None:
    low, high = average_precision(torch.tensor(hits), torch.tensor(misses), torch.tensor(3))
    assert float(low) == float(high) == expected
    low, high = average_precision(torch.tensor(hits), torch.tensor(misses), torch.tensor(0))
    assert bool(low.isnan() & high.isnan())


@pytest.mark.parametrize("truths", [1, 2, 3, 7, 10, 20, 50, 99, 100, 101, 300])
def test_ap_is_exact_where_each_bin_holds_one_detection(truths: int) -> None:
    """100, 50, 20 and 10: where k / truths and the points of the curve differ in the last bit."""
    source = torch.Generator().manual_seed(truths)
    for share in (0.1, 0.5, 0.9, 1.0):
        hits = torch.rand(400, generator=source) < share
        hits = hits & (hits.cumsum(0) <= truths)
        bins = torch.randperm(1000, generator=source)[:400].sort(descending=True).values
        low, high = average_precision(*histograms(bins, hits, 1000), torch.tensor(truths))
        assert float(low) == float(high) == pytest.approx(coco_ap(hits.tolist(), truths), abs=1e-14)


@pytest.mark.parametrize("count", [1, 2, 5, 30])
@pytest.mark.parametrize("seed", range(8))
def test_ap_lies_between_the_bounds_whatever_the_order_within_bins(seed: int, count: int) -> None:
    source = torch.Generator().manual_seed(seed)
    bins = torch.randint(count, (60,), generator=source).sort(descending=True).values
    hits = torch.rand(60, generator=source) < 0.5
    low, high = average_precision(*histograms(bins, hits, count), torch.tensor(40))
    for first, bound in ((hits, high), (~hits, low)):  # the bounds are those of two of the orders
        order = torch.argsort(-2 * bins - first.long(), stable=True)
        assert float(bound) == pytest.approx(coco_ap(hits[order].tolist(), 40), abs=1e-14)
    for _ in range(10):
        order = torch.argsort(-bins + 0.5 * torch.rand(60, generator=source))
        assert float(low) - 1e-14 <= coco_ap(hits[order].tolist(), 40) <= float(high) + 1e-14


def test_leading_dimensions_are_kept() -> None:
    source = torch.Generator().manual_seed(0)
    hits, misses = torch.randint(3, (2, 4, 5, 16), generator=source).unbind(0)
    truths = torch.randint(60, 90, (4, 5), generator=source)
    low, high = average_precision(hits, misses, truths)
    for i in range(4):
        for j in range(5):
            one = average_precision(hits[i, j], misses[i, j], truths[i, j])
            assert (float(low[i, j]), float(high[i, j])) == tuple(map(float, one))


def greedy(found: Tensor, truth: Tensor, overlap: float) -> list[bool]:
    """`COCOeval.evaluateImg` for one image, class by class: a hit or not for each detection of a class, as given."""
    hits = [False] * len(found)
    order = sorted((i for i in range(len(found)) if found[i, 0] >= 0), key=lambda i: -float(found[i, 5]))
    taken: set[int] = set()
    for i in order:
        best, chosen = overlap, -1
        for j in range(len(truth)):
            if truth[j, 0] != found[i, 0] or j in taken:
                continue
            covered = one_iou(found[i, 1:5].tolist(), truth[j, 1:].tolist())
            if covered >= best:
                best, chosen = covered, j
        if chosen >= 0:
            taken.add(chosen)
            hits[i] = True
    return hits


def one_iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def crowded(images: int, count: int, boxes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Detections near true boxes that overlap each other, of two classes, with padding in both."""
    source = torch.Generator().manual_seed(seed)
    low = 0.2 * torch.rand(images, boxes, 2, generator=source)
    corners = torch.cat([low, low + 0.5], dim=2)
    classes = torch.randint(-1, 2, (images, boxes, 1), generator=source).float()
    near = torch.randint(boxes, (images, count, 1), generator=source)
    moved = corners.take_along_dim(near, 1) + 0.05 * torch.randn(images, count, 4, generator=source)
    guess = torch.randint(-1, 2, (images, count, 1), generator=source).float()
    scores = torch.rand(images, count, 1, generator=source)
    return torch.cat([guess, moved, scores], dim=2), torch.cat([classes, corners], dim=2)


@pytest.mark.parametrize("seed", range(6))
def test_matching_is_cocos(seed: int) -> None:
    found, truth = crowded(6, 12, 5, seed)
    matches = match(found, truth, OVERLAPS)
    order = found[..., 5].argsort(dim=1, descending=True)
    for i in range(6):
        assert matches.classes[i].tolist() == found[i, order[i], 0].tolist()
        assert torch.equal(matches.scores[i], found[i, order[i], 5])
        for t, overlap in enumerate(OVERLAPS.tolist()):
            expected = torch.tensor(greedy(found[i], truth[i], overlap))[order[i]]
            assert torch.equal(matches.hits[i, :, t], expected)
    assert bool(matches.hits.any())


def test_a_true_box_is_found_once_and_by_the_best_score() -> None:
    box = [0.0, 0.0, 1.0, 1.0]
    found = torch.tensor([[[0.0, *box, 0.3], [0.0, *box, 0.9], [1.0, *box, 0.95]]])
    matches = match(found, torch.tensor([[[0.0, *box]]]), OVERLAPS)
    assert matches.classes.tolist() == [[1, 0, 0]]
    assert matches.hits.tolist() == [[[False, False], [True, True], [False, False]]]


def test_an_overlap_of_exactly_the_limit_counts() -> None:
    found = torch.tensor([[[0.0, 0.0, 0.0, 1.0, 0.5, 0.9]]])
    assert match(found, torch.tensor([[[0.0, 0.0, 0.0, 1.0, 1.0]]]), OVERLAPS).hits.tolist() == [[[True, False]]]


def test_of_two_boxes_covered_alike_the_later_is_taken() -> None:
    """Only the earlier one is left for the second detection, which covers it alone."""
    left, right = [0.0, 0.0, 0.5, 0.25], [0.25, 0.0, 0.75, 0.25]
    between, on_left = [0.125, 0.0, 0.625, 0.25], [0.0, 0.0, 0.5, 0.25]
    truth = torch.tensor([[[0.0, *left], [0.0, *right]]])
    found = torch.tensor([[[0.0, *between, 0.9], [0.0, *on_left, 0.8]]])
    assert match(found, truth, OVERLAPS).hits[0, :, 0].tolist() == [True, True]
    assert match(found, truth.flip(1), OVERLAPS).hits[0, :, 0].tolist() == [True, False]


def test_padding_finds_nothing_and_is_not_found() -> None:
    row = [-1.0, 0.0, 0.0, 1.0, 1.0]
    matches = match(torch.tensor([[[*row, 0.9]]]), torch.tensor([[row]]), OVERLAPS)
    assert matches.classes.tolist() == [[-1]]
    assert not matches.hits.any()


def test_only_the_best_hundred_of_a_class_and_image_count() -> None:
    found = torch.zeros(1, 230, 6)
    found[0, :, 5] = torch.linspace(0.9, 0.1, 230)
    found[0, 110:, 0] = 1.0
    found[0, 100:110, 1:5] = torch.tensor([0.0, 0.0, 1.0, 1.0])  # of class 0, and too late
    matches = match(found, torch.tensor([[[0.0, 0.0, 0.0, 1.0, 1.0]]]), OVERLAPS)
    assert matches.classes[0].tolist() == [0] * 100 + [-1] * 10 + [1] * 100 + [-1] * 20
    assert not matches.hits.any()


@pytest.mark.parametrize(("images", "count", "boxes"), [(0, 3, 2), (2, 0, 2), (2, 3, 0), (0, 0, 0)])
def test_nothing_to_match(images: int, count: int, boxes: int) -> None:
    matches = match(torch.zeros(images, count, 6), torch.zeros(images, boxes, 5), OVERLAPS)
    assert matches.hits.shape == (images, count, 2)
    assert not matches.hits.any()
