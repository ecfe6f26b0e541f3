"""R-CNN, SPP-net and Fast R-CNN by hand and against torchvision; with Faster R-CNN they learn drawn images by heart."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from client.proposals import propose
from shared_models.boxes import pad_rows
from shared_models.detection import Detector
from shared_models.errors import ConfigError
from shared_models.models import configure, models
from shared_models.zoo.sppnet import pyramid

NAMES = ("rcnn", "sppnet", "fast-rcnn")


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


def test_a_pyramid_of_maxima() -> None:
    window = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -2], [9, 8, -3, 20]]).float()
    expected = [20, 5, 7, 9, 20, *window.flatten().tolist()]
    assert pyramid(window[None], (1, 2, 4)).tolist() == expected
    two = torch.stack([window, -window])  # channel by channel within a level
    assert pyramid(two, (1, 2)).tolist() == [20, 3, 5, 7, 9, 20, 0, -2, -8, 3]


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


@pytest.mark.parametrize(
    ("name", "steps", "keys"),
    [
        ("rcnn", 90, {"regions": 16}),
        ("sppnet", 80, {"regions": 16}),
        ("fast-rcnn", 80, {"regions": 16}),
        ("faster-rcnn", 150, {"regions": 32, "proposals": 40, "anchors": [[12, 20, 28]], "ratios": [1.0]}),
    ],
)
def test_it_learns_drawn_images_by_heart(name: str, steps: int, keys: dict[str, Any]) -> None:
    pytest.importorskip("torchmetrics.detection")
    images, y = drawn()
    proposals = propose(images, 60) if models[name].proposals else None
    x = images.float() / 128 - 1
    net = build(name, **keys)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    assert map50(net.eval()(x, y, proposals)["found"], y) < 0.5
    net.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, 2 * (1 - step / steps))
        rows = slice(0, 4) if step % 2 else slice(4, 8)
        optimizer.zero_grad()
        net(x[rows], y[rows], None if proposals is None else proposals[rows])["loss"].mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert map50(net.eval()(x, y, proposals)["found"], y) >= 0.9
