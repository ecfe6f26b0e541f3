"""R-CNN, SPP-net, Fast R-CNN, and what they share: by hand, against torchvision, and learning drawn images by heart."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torchvision.ops import roi_align

from client.proposals import propose
from shared_models.boxes import pad_rows
from shared_models.detection import Detector
from shared_models.errors import ConfigError
from shared_models.models import configure, models
from shared_models.regions import Chosen, Sampling, choose, crop, decode, detections, encode, label, region_loss
from shared_models.zoo.rcnn import RegionDetector
from shared_models.zoo.sppnet import pyramid

NAMES = ("rcnn", "sppnet", "fast-rcnn")
HALF = Sampling(count=4, share=0.5, foreground=0.5, background=(0.1, 0.5))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(name: str, outputs: int = 2, shape: tuple[int, ...] = (3, 64, 64), seed: int = 0, **keys: Any) -> Any:
    torch.manual_seed(seed)
    chosen, settings = configure(name, keys)
    net = chosen.build(settings, shape, outputs)
    assert isinstance(net, Detector)
    return net


def random_boxes(*shape: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    low = torch.rand(*shape, 2, generator=source) * 0.6
    return torch.cat([low, low + 0.1 + 0.3 * torch.rand(*shape, 2, generator=source)], dim=-1)


def an_example(seed: int = 0, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, 3, 64, 64), two boxes each but for the last image, which has none, and 12 proposals."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 64, 64, generator=source)
    boxes = random_boxes(count, 12, seed=seed + 1)
    classes = torch.randint(2, (count, 2, 1), generator=source).float()
    y = torch.cat([classes, boxes[:, :2] + 0.02], dim=2)
    y[-1], y[-1, :, 0] = 0, -1
    return x, y, boxes


# What the models share.


def test_a_box_is_coded_beside_its_region() -> None:
    region, box = torch.tensor([0.2, 0.2, 0.4, 0.6]), torch.tensor([0.3, 0.1, 0.7, 0.3])
    by_hand = [(0.5 - 0.3) / 0.2, (0.2 - 0.4) / 0.4, math.log(0.4 / 0.2), math.log(0.2 / 0.4)]
    torch.testing.assert_close(encode(box, region, (1, 1, 1, 1)), torch.tensor(by_hand))
    spread = torch.tensor(by_hand) / torch.tensor([0.1, 0.1, 0.2, 0.2])
    torch.testing.assert_close(encode(box, region), spread)


def test_coding_round_trips_and_is_torchvisions() -> None:
    from torchvision.models.detection._utils import BoxCoder

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
    _, y, regions = an_example()
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


def test_a_pyramid_of_maxima() -> None:
    window = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -2], [9, 8, -3, 20]]).float()
    expected = [20, 5, 7, 9, 20, *window.flatten().tolist()]
    assert pyramid(window[None], (1, 2, 4)).tolist() == expected
    two = torch.stack([window, -window])  # channel by channel within a level
    assert pyramid(two, (1, 2)).tolist() == [20, 3, 5, 7, 9, 20, 0, -2, -8, 3]


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


# The models.


CONV = 3 * 16 * 9 + 16 + 16 * 32 * 9 + 32 + 32 * 64 * 9 + 64 + 64 * 64 * 9 + 64 + 2 * (16 + 32 + 64 + 64)
ALEXNET = 3 * 64 * 121 + 64 * 192 * 25 + 9 * (192 * 384 + 384 * 256 + 256 * 256) + 64 + 192 + 384 + 256 + 256
VGG = 14_714_688  # Simonyan & Zisserman 2015, configuration D without its fully connected layers


def heads(width: int, hidden: tuple[int, ...], labels: int) -> int:
    widths = (width, *hidden)
    layers = sum((a + 1) * b for a, b in zip(widths, hidden, strict=False))
    return layers + (hidden[-1] + 1) * 5 * (labels + 1)


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("rcnn", "tiny", CONV + heads(64 * 4 * 4, (128,), 20)),
        ("sppnet", "tiny", CONV + heads(64 * (1 + 4 + 16), (128,), 20)),
        ("fast-rcnn", "tiny", CONV + heads(64 * 4 * 4, (128,), 20)),
        ("rcnn", "paper", ALEXNET + heads(256 * 6 * 6, (4096, 4096), 20)),
        ("sppnet", "paper", ALEXNET + heads(256 * 50, (4096, 4096), 20)),
        ("fast-rcnn", "paper", VGG + heads(512 * 7 * 7, (4096, 4096), 20)),
    ],
)
def test_parameter_counts(name: str, size: str, count: int) -> None:
    with torch.device("meta"):
        net = build(name, 20, (3, 375, 500), size=size)
    assert sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parametrize(
    ("name", "theirs", "unused"),
    [
        ("rcnn", torchvision.models.alexnet, {"classifier.6"}),
        ("sppnet", torchvision.models.alexnet, {"classifier.1", "classifier.6"}),
        ("fast-rcnn", torchvision.models.vgg16, {"classifier.6"}),
    ],
)
def test_published_weights_of_imagenet_find_their_place(name: str, theirs: Any, unused: set[str]) -> None:
    with torch.device("meta"):
        published = theirs().state_dict()
        own = build(name, 20, (3, 375, 500), size="paper").state_dict()
    left = set()
    for key, value in published.items():
        for pattern, replacement in models[name].renames:
            key = re.sub(pattern, replacement, key)
        if key in own:
            assert own.pop(key).shape == value.shape
        else:
            left.add(key.rpartition(".")[0])
    assert left == unused
    assert {k.split(".")[0] for k in own} <= {"head", "hidden"}


def test_the_convolutions_are_those_of_torchvision() -> None:
    for size, name, theirs in (("paper", "rcnn", "alexnet"), ("paper", "fast-rcnn", "vgg16")):
        with torch.device("meta"):
            published = getattr(torchvision.models, theirs)().features
            own = build(name, 20, (3, 375, 500), size=size).features
        kinds = [(type(m), getattr(m, "stride", None), getattr(m, "padding", None)) for m in published]
        assert [(type(m), getattr(m, "stride", None), getattr(m, "padding", None)) for m in own] == kinds[: len(own)]
        assert len(own) == len(kinds) - (name == "fast-rcnn")  # the pooling of regions is in place of the last maximum


@pytest.mark.parametrize(("name", "passes"), [("rcnn", 2 * 8), ("sppnet", 2), ("fast-rcnn", 2)])
def test_how_often_the_convolutions_run(name: str, passes: int) -> None:
    """Once for each region, or once for each image."""
    net, (x, y, proposals) = build(name, regions=8), an_example(count=2)
    seen: list[int] = []
    net.features[0].register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    net(x, y, proposals)
    assert seen == [passes]
    seen.clear()
    with torch.no_grad():
        net.eval()(x, y, proposals)
    assert sum(seen) == (2 * 12 if name == "rcnn" else 2)
    assert max(seen) == (12 if name == "rcnn" else 2)  # R-CNN never holds the crops of two images


def test_rcnn_sees_around_its_regions() -> None:
    """With a context of a quarter of the side the crop is twice as large as the region, outside is 0 (the mean)."""
    net = build("rcnn", side=32, context=8, shape=(1, 64, 64))
    net.features = nn.Identity()
    x = torch.ones(1, 1, 64, 64)
    square = net.pooled(x, torch.tensor([[[0.0, 0.25, 0.5, 0.75]]])).reshape(32, 32)  # sees columns -16 to 48
    torch.testing.assert_close(square[:, 8:], torch.ones(32, 24))
    torch.testing.assert_close(square[:, :7], torch.zeros(32, 7))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_samples_do_not_mix(name: str, training: bool) -> None:
    net = build(name, regions=8).train(training)
    x, y, proposals = an_example()
    other = an_example(seed=7)
    with torch.no_grad():
        torch.manual_seed(5)
        first = net(x, y, proposals)
        torch.manual_seed(5)
        mixed = [torch.cat([a[:1], b[1:]]) for a, b in zip((3 * x, y, proposals), other, strict=True)]
        again = net(mixed[0] / 3, *mixed[1:])
    assert first["loss"].shape == (3,)
    torch.testing.assert_close(first["loss"][0], again["loss"][0], atol=1e-5, rtol=1e-5)
    assert (first["loss"][1:] - again["loss"][1:]).abs().min() > 1e-4
    assert ("found" in first) is not training
    if not training:
        assert first["found"].shape == (3, 100, 6)
        torch.testing.assert_close(first["found"][0], again["found"][0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_images_without_boxes_or_proposals(name: str, training: bool) -> None:
    net = build(name, regions=8).train(training)
    x, _, proposals = an_example()
    said = net(x, torch.zeros(3, 0, 5), proposals)
    assert torch.isfinite(said["loss"]).all()
    said["loss"].sum().backward()
    said = net(x, torch.zeros(3, 0, 5), torch.zeros(3, 4, 4))  # padding only
    assert said["loss"].tolist() == [0, 0, 0]
    said["loss"].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
    if not training:
        assert (said["found"][..., 0] == -1).all()
    assert net(x, torch.zeros(3, 0, 5), torch.zeros(3, 0, 4))["loss"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", NAMES)
def test_per_sample_gradients_equal_a_loop(name: str) -> None:
    """Where all regions are taken, whatever is drawn: 12 proposals and 2 boxes of 14."""
    net = build(name, regions=14, foreground_share=1.0).double()
    x, y, proposals = (t.double() for t in an_example())
    weights = {k: v.detach() for k, v in net.named_parameters()}

    def loss(weights: dict[str, Tensor], *sample: Tensor) -> Tensor:
        said: dict[str, Tensor] = functional_call(net, weights, tuple(t[None] for t in sample))
        return said["loss"][0]

    stacked = vmap(grad(loss), in_dims=(None, 0, 0, 0), randomness="different")(weights, x, y, proposals)
    for i in range(len(x)):
        net.zero_grad()
        net(x[i : i + 1], y[i : i + 1], proposals[i : i + 1])["loss"].sum().backward()
        for key, parameter in net.named_parameters():
            torch.testing.assert_close(stacked[key][i], parameter.grad, atol=1e-5, rtol=1e-4, msg=key)  # boxes: float32


@pytest.mark.parametrize("name", NAMES)
def test_hooks_are_declared_where_every_layer_sees_the_images_one_by_one(name: str) -> None:
    """Hooks take the first dimension of what a layer sees for the sample, and every layer runs once."""
    net, (x, y, proposals) = build(name, regions=8), an_example()
    seen: list[int] = []
    layers = [m for m in net.modules() if any(True for _ in m.parameters(recurse=False))]
    for layer in layers:
        layer.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    net(x, y, proposals)
    assert len(seen) == len(layers)
    assert (set(seen) == {len(x)}) == ("hooks" in models[name].per_sample_gradients)


def test_frozen_convolutions_stay_as_they_are() -> None:
    x, y, proposals = an_example()
    for frozen in (False, True):
        net = build("sppnet", frozen_convolutions=frozen)
        net(x, y, proposals)["loss"].sum().backward()
        assert all((p.grad is None) == frozen for p in net.features.parameters())
        assert all(p.grad.any() for k, p in net.named_parameters() if not k.startswith("features"))


def test_the_initialisation_is_the_seed_of_torch() -> None:
    for name in NAMES:
        first, again, other = (build(name, seed=s).state_dict() for s in (1, 1, 2))
        assert all(torch.equal(first[k], again[k]) for k in first)
        assert not torch.equal(first["features.0.weight"], other["features.0.weight"])
        assert abs(first["head.cls_score.weight"].std() - 0.01) < 0.002


@pytest.mark.parametrize(
    ("name", "keys", "shape", "message"),
    [
        ("rcnn", {"context": 16}, (3, 64, 64), "[model] rcnn: context 16 should be less than half of side 32"),
        ("rcnn", {"backbone": "alexnet"}, (3, 64, 64), "[model] rcnn: side 32 should be at least 63 for alexnet"),
        ("fast-rcnn", {"background": 0.5}, (3, 64, 64), "[model] fast-rcnn: background 0.5 should be less than "
            "foreground 0.35"),
        ("sppnet", {"size": "paper"}, (3, 30, 64), "model 'sppnet' with backbone 'alexnet' cannot take an image of "
            "30x64 pixels: its smallest is 31x31. Enlarge the images, or use backbone = 'small'"),
        ("fast-rcnn", {"size": "paper"}, (3, 64, 15), "model 'fast-rcnn' with backbone 'vgg16' cannot take an image of "
            "64x15 pixels: its smallest is 16x16. Enlarge the images, or use backbone = 'small'"),
    ],
)  # fmt: skip
def test_what_cannot_be_gets_one_clear_line(name: str, keys: dict[str, Any], shape: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(name, shape=shape, **keys)
    assert str(error.value) == message


def test_the_smallest_images_pass() -> None:
    for backbone, side in (("alexnet", 31), ("vgg16", 16), ("small", 1)):
        net = build("fast-rcnn", shape=(3, side, side), backbone=backbone)
        assert net.features(torch.zeros(1, 3, side, side)).shape[2:] == (1, 1)
        assert net.features[-1](torch.zeros(1, 1, 1, 1)).shape == (1, 1, 1, 1)
    for backbone, side in (("alexnet", 63), ("vgg16", 32), ("small", 5)):
        net = build("rcnn", backbone=backbone, side=side, context=1)
        assert net.hidden[0].in_features == net.features(torch.zeros(1, 3, side, side)).numel()


def test_without_proposals_it_says_so() -> None:
    x, y, _ = an_example()
    with pytest.raises(ConfigError, match="classifies proposals and got none"):
        build("rcnn")(x, y)


# Learning.


def drawn(count: int = 8, seed: int = 0, side: int = 64) -> tuple[Tensor, Tensor]:
    """Images of one to three rectangles (class 0) or discs (class 1) on noise: uint8, and (B, M, 5)."""
    source = np.random.default_rng(seed)
    rows, columns = np.indices((side, side))
    images, truths = [], []
    for _ in range(count):
        image, found = source.normal(100, 12, (side, side, 3)), []
        for place in source.permutation(4)[: int(source.integers(1, 4))]:  # one in each quarter
            size = int(source.integers(14, 28))
            left, top = (
                place % 2 * 32 + source.integers(2, 32 - size),
                place // 2 * 32 + source.integers(2, 32 - size),
            )
            kind = int(source.integers(2))
            inside = (columns >= left) & (columns < left + size) & (rows >= top) & (rows < top + size)
            if kind:
                half = size / 2
                inside = (columns + 0.5 - left - half) ** 2 + (rows + 0.5 - top - half) ** 2 <= half**2
            image[inside] = source.choice([20, 220], 3) + source.normal(0, 12, (int(inside.sum()), 3))
            found.append([kind, left, top, left + size, top + size])
        images.append(torch.from_numpy(image.clip(0, 255).astype(np.uint8)).permute(2, 0, 1))
        truths.append(torch.tensor(found) / torch.tensor([1, side, side, side, side]))
    return torch.stack(images), pad_rows(truths, 5)


def map50(found: Tensor, y: Tensor) -> float:
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(iou_thresholds=[0.5])
    for boxes, truth in zip(found, y, strict=True):
        boxes, truth = boxes[boxes[:, 0] >= 0], truth[truth[:, 0] >= 0]
        said = {"boxes": 640 * boxes[:, 1:5], "scores": boxes[:, 5], "labels": boxes[:, 0].long()}
        metric.update([said], [{"boxes": 640 * truth[:, 1:], "labels": truth[:, 0].long()}])
    return float(metric.compute()["map"])


@pytest.mark.parametrize(("name", "steps"), [("rcnn", 90), ("sppnet", 80), ("fast-rcnn", 80)])
def test_it_learns_drawn_images_by_heart(name: str, steps: int) -> None:
    pytest.importorskip("torchmetrics.detection")
    images, y = drawn()
    proposals = propose(images, 60)
    x = images.float() / 128 - 1
    net: RegionDetector = build(name, regions=16)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    assert map50(net.eval()(x, y, proposals)["found"], y) < 0.5
    net.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, 2 * (1 - step / steps))
        rows = torch.arange(4) + 4 * (step % 2)
        optimizer.zero_grad()
        net(x[rows], y[rows], proposals[rows])["loss"].mean().backward()
        optimizer.step()
    with torch.no_grad():
        found = net.eval()(x, y, proposals)["found"]
    assert map50(found, y) >= 0.9
