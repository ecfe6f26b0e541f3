"""Faster R-CNN against torchvision's, piece by piece and whole, and what federated training asks of it."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from shared_models.boxes import pairwise_iou
from shared_models.detection import Detector
from shared_models.errors import ConfigError
from shared_models.models import configure, models
from shared_models.regions import Chosen
from shared_models.zoo.faster_rcnn import FasterRCNN, lay_anchors, proposal_loss


def build(outputs: int = 2, shape: tuple[int, ...] = (3, 64, 64), seed: int = 0, **keys: Any) -> FasterRCNN:
    torch.manual_seed(seed)
    chosen, settings = configure("faster-rcnn", keys)
    net = chosen.build(settings, shape, outputs)
    assert isinstance(net, Detector)
    assert isinstance(net, FasterRCNN)
    return net


def an_example(seed: int = 0, count: int = 3) -> tuple[Tensor, Tensor]:
    """Images (B, 3, 64, 64), two boxes each but for the last image, which has none."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 64, 64, generator=source)
    low = torch.rand(count, 2, 2, generator=source) * 0.6
    classes = torch.randint(2, (count, 2, 1), generator=source).float()
    y = torch.cat([classes, low, low + 0.1 + 0.3 * torch.rand(count, 2, 2, generator=source)], dim=2)
    y[-1], y[-1, :, 0] = 0, -1
    return x, y


def test_anchors_are_torchvisions() -> None:
    ratios = (0.5, 1.0, 2.0)
    maps = [(6, 9), (3, 5)]
    sides = ((10.0, 24.0, 48.0), (30.0, 50.0, 70.0))
    generator = AnchorGenerator(sides, (ratios,) * 2)
    expected = generator.grid_anchors([list(m) for m in maps], [[4, 4], [8, 8]])
    for size, stride, one, anchors in zip(maps, (4, 8), sides, expected, strict=True):
        torch.testing.assert_close(lay_anchors(size, stride, one, ratios), anchors)


def test_anchors_by_hand() -> None:
    """Side 8 in ratios 1 and 4 (height by width): 8x8 and 4x16; places row by row."""
    anchors = lay_anchors((2, 2), 10, (8.0,), (1.0, 4.0))
    assert anchors[:2].tolist() == [[-4, -4, 4, 4], [-2, -8, 2, 8]]
    assert (anchors[2::2] - anchors[0]).tolist() == [[10, 0, 10, 0], [0, 10, 0, 10], [10, 10, 10, 10]]


def test_the_proposals_loss_by_hand() -> None:
    """Anchors 2 (an object) and 0 (background) of three, of a first image; a second image without any."""
    scores = torch.tensor([[1.0, 50.0, -2.0]]).repeat(2, 1)
    shifts = torch.zeros(2, 3, 4)
    shifts[0, 2] = torch.tensor([1.0, 0.05, 0.0, 0.0])
    shifts[0, 0] = 9.0  # background: not looked at
    index, labels = torch.tensor([[2, 0]]).expand(2, 2), torch.tensor([[1, 0]]).expand(2, 2)
    weights = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    loss = proposal_loss(scores, shifts, Chosen(index, labels, torch.zeros(2, 2, 4), weights))
    boxes = (1 - 1 / 18) + 0.5 * 0.05**2 * 9
    by_hand = (math.log(1 + math.e**2) + math.log(1 + math.e) + boxes) / 2
    torch.testing.assert_close(loss, torch.tensor([by_hand, 0.0]))


# The published network.


def test_parameters_and_keys_are_torchvisions() -> None:
    with torch.device("meta"):
        theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91).state_dict()
        ours = {norm: build(90, (3, 800, 1088), size="r50-fpn", norm=norm) for norm in ("frozen", "batch", "group")}
    count = {norm: sum(p.numel() for p in net.parameters()) for norm, net in ours.items()}
    assert count["frozen"] == 41_755_286  # as torchvision publishes it
    assert count["batch"] == count["group"] == 41_755_286 + 53_120  # weights and biases of the norms
    expected = [(k, v.shape) for k, v in theirs.items() if not k.endswith("num_batches_tracked")]
    assert [(k, v.shape) for k, v in ours["frozen"].state_dict().items()] == expected


@cache
def pair() -> tuple[nn.Module, FasterRCNN]:
    """torchvision's network with the proposals of ours, and ours with its weights."""
    torch.manual_seed(0)
    theirs = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=4, rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_test=40,
    )  # fmt: skip
    for module in theirs.modules():  # statistics of a batch, so that features are of about unit size
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        theirs.backbone(torch.randn(4, 3, 128, 192))
    for name, weight in theirs.named_parameters():  # at first all scores are nearly alike
        if "cls_" in name or "bbox_pred" in name or "rpn.head.conv" in name:
            nn.init.normal_(weight, std=0.01 if name == "rpn.head.bbox_pred.weight" else 0.05)
    ours = build(3, size="r50-fpn", candidates=50, proposals=40, least=0.05)
    kept = {k: v for k, v in theirs.state_dict().items() if not k.endswith("num_batches_tracked")}
    ours.load_state_dict(kept)
    return theirs.eval(), ours.eval()


def test_it_finds_what_torchvision_finds() -> None:
    theirs, ours = pair()
    x = torch.randn(2, 3, 128, 192, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = theirs.backbone(x)
        proposals, _ = theirs.rpn(ImageList(x, [(128, 192)] * 2), features)
        expected, _ = theirs.roi_heads(features, proposals, [(128, 192)] * 2)
        found = ours(x, torch.zeros(2, 0, 5))["found"]
        regions, _ = ours.rpn(x, ours.backbone(x), torch.zeros(2, 0, 5))
    scale = torch.tensor([192, 128, 192, 128])
    for image, boxes, said, there in zip(regions, proposals, found, expected, strict=True):
        assert len(boxes) > 20
        torch.testing.assert_close((image * scale)[: len(boxes)], boxes, atol=1e-2, rtol=0)
        assert not image[len(boxes) :].any()
        count = len(there["scores"])
        assert count > 20
        assert (said[:count, 0] >= 0).all()
        assert (said[count:, 0] == -1).all()
        torch.testing.assert_close(said[:count, 5], there["scores"], atol=1e-4, rtol=0)
        mine = torch.cat([said[:count, :1] + 1, said[:count, 1:5] * scale, 100 * said[:count, 5:]], dim=1)
        wanted = torch.cat([there["labels"][:, None], there["boxes"], 100 * there["scores"][:, None]], dim=1)
        distance = torch.cdist(mine, wanted, p=math.inf)  # near ties may come in another order
        assert distance.amin(dim=0).max() < 0.02
        assert distance.amin(dim=1).max() < 0.02


def test_the_proposals_loss_is_torchvisions_where_all_anchors_count() -> None:
    theirs, _ = pair()
    ours = build(3, size="r50-fpn", anchors_sampled=10**6)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.endswith("num_batches_tracked")})
    x = torch.randn(1, 3, 128, 192, generator=torch.Generator().manual_seed(2))
    pixels = torch.tensor([[20.0, 30.0, 60.0, 80.0], [100.0, 10.0, 180.0, 100.0], [5.0, 5.0, 12.0, 9.0]])
    y = torch.cat([torch.zeros(3, 1), pixels / torch.tensor([192, 128, 192, 128])], dim=1)[None]
    theirs.rpn.fg_bg_sampler.batch_size_per_image = 10**6
    theirs.rpn.train()
    with torch.no_grad():
        maps = theirs.backbone(x)
        _, losses = theirs.rpn(ImageList(x, [(128, 192)]), maps, [{"boxes": pixels}])
        _, loss = ours.rpn(x, list(maps.values()), y)
    theirs.rpn.eval()
    torch.testing.assert_close(loss[0], losses["loss_objectness"] + losses["loss_rpn_box_reg"], atol=1e-5, rtol=1e-4)


def test_regions_are_pooled_from_the_map_that_fits_their_size() -> None:
    _, ours = pair()
    maps = [torch.full((1, 256, 256 // s, 256 // s), float(s)) for s in (4, 8, 16, 32)]
    sides = torch.tensor([30.0, 60.0, 113.0, 225.0])[:, None] / 256
    seen: list[Tensor] = []
    handle = ours.roi_heads.box_head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    ours.roi_heads(torch.zeros(1, 3, 256, 256), maps, torch.cat([0 * sides, 0 * sides, sides, sides], dim=1)[None])
    handle.remove()
    assert seen[0][:, 0, 0, 0].tolist() == [4, 4, 8, 16]  # floor(4 + log2(side / 224)), at least 2


# The tiny one.


def test_the_tiny_one_has_so_many_parameters() -> None:
    backbone = 3 * 16 * 9 + 16 + 16 * 32 * 9 + 32 + 32 * 64 * 9 + 64 + 64 * 64 * 9 + 64 + 2 * (16 + 32 + 64 + 64)
    proposer = 64 * 64 * 9 + 64 + 65 * 9 * (1 + 4)
    head = (64 * 16 + 1) * 128 + 129 * 128 + 129 * 5 * 4
    assert sum(p.numel() for p in build(3).parameters()) == backbone + proposer + head


@pytest.mark.parametrize("training", [True, False])
def test_samples_do_not_mix(training: bool) -> None:
    net = build().train(training)
    (x, y), (x2, y2) = an_example(), an_example(seed=7)
    with torch.no_grad():
        torch.manual_seed(5)
        first = net(x, y)
        torch.manual_seed(5)
        again = net(torch.cat([x[:1], 3 * x2[1:]]), torch.cat([y[:1], y2[1:]]))
    assert first["loss"].shape == (3,)
    torch.testing.assert_close(first["loss"][0], again["loss"][0], atol=1e-5, rtol=1e-5)
    assert (first["loss"][1:] - again["loss"][1:]).abs().min() > 1e-4
    assert ("found" in first) is not training
    if not training:
        assert first["found"].shape == (3, 100, 6)
        torch.testing.assert_close(first["found"][0], again["found"][0], atol=1e-5, rtol=1e-5)


def test_batch_norm_mixes_them() -> None:
    net = build(norm="batch").train()
    (x, y), (x2, _) = an_example(), an_example(seed=7)
    with torch.no_grad():
        torch.manual_seed(5)
        first = net(x, y)["loss"][0]
        torch.manual_seed(5)
        assert abs(first - net(torch.cat([x[:1], 3 * x2[1:]]), y)["loss"][0]) > 1e-4


def test_the_gradient_of_a_batch_is_the_sum_of_those_of_its_images_one_by_one() -> None:
    """With all anchors and all regions in the loss, whatever is drawn; its declared way to per-sample gradients."""
    assert models["faster-rcnn"].per_sample_gradients == ("loop",)
    net = build(anchors_sampled=10**5, regions=10**5)
    x, y = an_example()
    net.train()(x, y)["loss"].sum().backward()
    together = {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}
    assert len(together) == len(list(net.parameters()))
    net.zero_grad()
    for i in range(len(x)):
        net(x[i : i + 1], y[i : i + 1])["loss"].sum().backward()
    for key, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, together[key], atol=1e-5, rtol=1e-3, msg=key)


@pytest.mark.parametrize("training", [True, False])
def test_images_without_boxes(training: bool) -> None:
    net = build().train(training)
    x, _ = an_example()
    said = net(x, torch.zeros(3, 0, 5))
    assert torch.isfinite(said["loss"]).all()
    assert (said["loss"] > 0).all()  # that nothing is there is to be learned too
    said["loss"].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_no_gradient_goes_through_the_proposals() -> None:
    """The head's loss reaches the proposals' network through the features alone: approximate joint training."""
    net = build()
    x, y = an_example()
    maps = net.backbone(x)
    regions, _ = net.rpn(x, maps, y)
    assert not regions.requires_grad
    assert (pairwise_iou(regions[0], regions[0]) - torch.eye(len(regions[0]))).max() <= 0.7 + 1e-5
    assert regions.shape == (3, 100, 4)


def test_the_initialisation_is_the_seed_of_torch() -> None:
    first, again, other = (build(seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["backbone.body.0.weight"], other["backbone.body.0.weight"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"anchors": [[8], [16]]}, "anchors should have 1 entries for backbone small, not 2"),
        (
            {"size": "r50-fpn", "anchors": [[8], [16], [32], [64], [64, 128]]},
            "anchors should have as many sides on each feature map",
        ),
    ],
)
def test_wrong_settings_get_one_clear_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(**keys)
    assert message in str(error.value)
