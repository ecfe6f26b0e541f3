"""Regions by hand and against torchvision: coding, labels, samples, pooling, loss and detections."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import roi_align

from shared_models.regions import Chosen, Sampling, choose, crop, decode, detections, encode, label, region_loss

HALF = Sampling(count=4, share=0.5, foreground=0.5, background=(0.1, 0.5))


def random_boxes(*shape: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    low = torch.rand(*shape, 2, generator=source) * 0.6
    return torch.cat([low, low + 0.1 + 0.3 * torch.rand(*shape, 2, generator=source)], dim=-1)


def test_a_box_is_coded_beside_its_region() -> None:
    region, box = torch.tensor([0.2, 0.2, 0.4, 0.6]), torch.tensor([0.3, 0.1, 0.7, 0.3])
    by_hand = [(0.5 - 0.3) / 0.2, (0.2 - 0.4) / 0.4, math.log(0.4 / 0.2), math.log(0.2 / 0.4)]
    torch.testing.assert_close(encode(box, region, (1, 1, 1, 1)), torch.tensor(by_hand))
    spread = torch.tensor(by_hand) / torch.tensor([0.1, 0.1, 0.2, 0.2])
    torch.testing.assert_close(encode(box, region), spread)


def test_coding_round_trips_and_is_torchvisions() -> None:
    boxes, regions = random_boxes(5, 7, seed=1), random_boxes(5, 7, seed=2)
    torch.testing.assert_close(decode(encode(boxes, regions), regions), boxes)
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    torch.testing.assert_close(encode(boxes, regions)[0], coder.encode_single(boxes[0], regions[0]))
    wild = 30 * torch.randn(7, 4)  # beyond the largest growth
    torch.testing.assert_close(decode(wild, regions[0]), coder.decode_single(wild, regions[0]), rtol=1e-4, atol=1e-4)


def test_coding_padding_is_finite() -> None:
    nothing = torch.zeros(1, 4)
    assert torch.isfinite(encode(nothing, random_boxes(1))).all()
    assert torch.isfinite(encode(random_boxes(1), nothing)).all()


def test_regions_get_the_class_of_the_box_they_overlap_most() -> None:
    y = torch.tensor([[[1.0, 0.0, 0.0, 0.5, 0.5], [0.0, 0.5, 0.5, 1.0, 1.0], [-1.0, 0.0, 0.0, 1.0, 1.0]]])
    regions = torch.tensor([[
        [0.0, 0.0, 0.5, 0.5],  # IoU 1 with the first
        [0.5, 0.5, 1.0, 0.75],  # 1/2 with the second: just an object
        [0.5, 0.5, 1.0, 0.74],  # less: background
        [0.4, 0.4, 0.6, 0.6],  # 0.01 / (0.25 + 0.04 - 0.01) = 0.04 with both: neither
        [0.0, 0.0, 1.0, 1.0],  # 1/4 with both: background; the third box is padding
        [0.0, 0.0, 0.0, 0.0],  # padding
    ]])  # fmt: skip
    kinds, boxes = label(regions, y, HALF)
    assert kinds.tolist() == [[2, 1, 0, -1, 0, -1]]
    torch.testing.assert_close(boxes[0, :3], y[0, [0, 1, 1], 1:])
    everything = Sampling(4, 0.5, 0.5, (0.0, 0.5))
    assert label(regions, y, everything)[0].tolist() == [[2, 1, 0, 0, 0, -1]]


def test_the_nearest_region_of_each_box_is_an_object_where_asked() -> None:
    y = torch.tensor([[[0.0, 0.0, 0.0, 0.4, 0.4], [1.0, 0.6, 0.6, 0.8, 0.8], [0.0, 0.9, 0.0, 1.0, 0.1]]])
    regions = torch.tensor([[[0.0, 0.0, 0.4, 0.1], [0.0, 0.0, 0.4, 0.2], [0.0, 0.2, 0.4, 0.4], [0.6, 0.6, 1.0, 1.0]]])
    how = Sampling(4, 0.5, 0.7, (0.0, 0.3), nearest=True)
    # 1/4, 1/2, 1/2 with the first box, 1/4 with the second, none with the third
    assert label(regions, y, how)[0].tolist() == [[0, 1, 1, 2]]


def test_without_boxes_all_is_background() -> None:
    regions = random_boxes(2, 5)
    nothing = torch.tensor([[[-1.0, 0, 0, 0, 0]]]).expand(2, 1, 5)
    for y in (torch.zeros(2, 0, 5), nothing):
        for nearest in (False, True):
            kinds, _ = label(regions, y, Sampling(4, 0.5, 0.5, (0.0, 0.5), nearest))
            assert (kinds == 0).all()
    assert (label(regions, nothing, HALF)[0] == -1).all()  # an IoU of 0 is below 0.1


def sampled(objects: int, background: int, rest: int, how: Sampling, training: bool = True) -> Chosen:
    """What is chosen from so many regions on a box of class 1, so many near it, and so many far away."""
    y = torch.tensor([[[1.0, 0.0, 0.0, 0.4, 0.4]]])
    kinds = [[0.0, 0.0, 0.4, 0.4]] * objects + [[0.0, 0.0, 0.4, 0.1]] * background + [[0.5, 0.5, 1.0, 1.0]] * rest
    return choose(torch.tensor([kinds]), y, how, training=training)


@pytest.mark.parametrize(
    ("objects", "background", "expected"),
    [
        (5, 5, ([2, 2, 0, 0], [1, 1, 1, 1])),  # half objects at most
        (1, 5, ([2, 0, 0, 0], [1, 1, 1, 1])),  # filled up with background
        (5, 1, ([2, 2, 0, 0], [1, 1, 1, 0])),  # not with objects
        (0, 0, ([0, 0, 0, 0], [0, 0, 0, 0])),
    ],
)
def test_a_sample_is_objects_first_then_background(objects: int, background: int, expected: Any) -> None:
    chosen = sampled(objects, background, 6, HALF)
    assert (chosen.labels * (chosen.weights > 0)).tolist() == [expected[0]]
    assert chosen.weights.tolist() == [expected[1]]
    assert len(set(chosen.index[0].tolist())) == 4
    torch.testing.assert_close(chosen.targets[chosen.labels > 0], torch.zeros(int((chosen.labels > 0).sum()), 4))


def test_fewer_regions_than_the_sample() -> None:
    assert sampled(1, 1, 0, HALF).weights.tolist() == [[1, 1]]
    assert sampled(3, 0, 0, Sampling(4, 0.5, 0.5, (0.1, 0.5))).weights.tolist() == [[1, 1, 0]]


def test_draws_are_uniform_repeat_with_the_seed_and_stand_still_in_evaluation() -> None:
    how = Sampling(2, 0.5, 0.5, (0.1, 0.5))
    torch.manual_seed(0)
    drawn = torch.cat([sampled(4, 4, 2, how).index for _ in range(400)])
    counts = torch.bincount(drawn.flatten(), minlength=10)
    assert (counts[:8] > 60).all()  # 100 on average
    assert (counts[8:] == 0).all()
    torch.manual_seed(0)
    assert torch.equal(sampled(4, 4, 2, how).index, drawn[:1])
    before = torch.get_rng_state()
    assert torch.equal(sampled(4, 4, 2, how, False).index, sampled(4, 4, 2, how, False).index)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_drawn_for_an_image_does_not_depend_on_the_others() -> None:
    regions = random_boxes(3, 12)
    y = torch.cat([torch.ones(3, 2, 1), regions[:, :2] + 0.02], dim=2)
    other = y.clone()
    other[1:] = torch.tensor([-1.0, 0, 0, 0, 0])
    torch.manual_seed(3)
    first = choose(regions, y, HALF, training=True)
    torch.manual_seed(3)
    again = choose(torch.cat([regions[:1], random_boxes(2, 12, seed=9)]), other, HALF, training=True)
    assert torch.equal(first.index[0], again.index[0])
    assert not torch.equal(first.labels[1:], again.labels[1:])


@pytest.mark.parametrize(("side", "points"), [(1, 1), (3, 2), (5, 3)])
def test_crop_is_roi_align(side: int, points: int) -> None:
    source = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, 9, 14, generator=source, dtype=torch.float64, requires_grad=True)
    regions = torch.cat([random_boxes(2, 6), random_boxes(2, 4, seed=5) * 1.6 - 0.3], dim=1).double()  # some leave it
    pixels = list(regions * torch.tensor([14, 9, 14, 9]))
    theirs = roi_align(features, pixels, side, 1.0, points, aligned=True).reshape(2, 10, 3, side, side)
    ours = crop(features, regions, side, points)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn(ours.shape, generator=source, dtype=torch.float64)
    (first,) = torch.autograd.grad((ours * weights).sum(), features)
    (second,) = torch.autograd.grad((theirs * weights).sum(), features)
    torch.testing.assert_close(first, second)


def test_a_crop_on_pixel_borders_is_the_pixels() -> None:
    features = torch.arange(24.0).reshape(1, 1, 4, 6)
    region = torch.tensor([[[2 / 6, 1 / 4, 5 / 6, 4 / 4]]])
    torch.testing.assert_close(crop(features, region, 3)[0, 0], features[0, :, 1:4, 2:5])


def test_the_loss_by_hand() -> None:
    """Three regions of a first image, one of them padding, one of class 1 of 2; a second image without any."""
    scores = torch.tensor([[[0.0, 1.0, 2.0], [3.0, 0.0, 1.0], [9.0, 9.0, 9.0]]]).repeat(2, 1, 1).requires_grad_()
    shifts = torch.zeros(2, 3, 3, 4)
    shifts[0, 0, 1] = torch.tensor([0.5, 0.0, 3.0, -1.0])
    shifts[0, 0, 2] = shifts[0, 1] = 100.0  # of other classes and of background: not looked at
    targets = torch.zeros(2, 3, 4)
    targets[:, 1:] = 50.0
    weights = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    chosen = Chosen(torch.arange(3).expand(2, 3), torch.tensor([[1, 0, 2]]).expand(2, 3), targets, weights)
    first = -1 + math.log(1 + math.e + math.e**2) + (0.5 * 0.25 + 0 + 2.5 + 0.5)
    second = -3 + math.log(math.e**3 + 1 + math.e)
    loss = region_loss(scores, shifts, chosen)
    torch.testing.assert_close(loss, torch.tensor([(first + second) / 2, 0.0]))
    loss.sum().backward()
    assert scores.grad is not None
    assert not scores.grad[0, 2].any()
    assert not scores.grad[1].any()


def test_detections_by_hand() -> None:
    regions = torch.tensor([[[0.1, 0.1, 0.3, 0.3], [0.11, 0.1, 0.3, 0.3], [0.5, 0.5, 0.9, 0.9], [0.0, 0.0, 0.0, 0.0]]])
    chances = torch.tensor([[0.1, 0.8, 0.1], [0.2, 0.7, 0.1], [0.6, 0.1, 0.3], [0.0, 0.1, 0.9]]).log()[None]
    shifts = torch.zeros(1, 4, 3, 4)
    shifts[0, 2, 2] = encode(torch.tensor([0.5, 0.5, 0.7, 1.1]), regions[0, 2])  # leaves the image
    found = detections(regions, chances, shifts, keep=3, overlap=0.5, least=0.2)
    expected = [[0, 0.1, 0.1, 0.3, 0.3, 0.8], [1, 0.5, 0.5, 0.7, 1.0, 0.3], [-1, 0, 0, 0, 0, 0]]
    torch.testing.assert_close(found, torch.tensor([expected]))
