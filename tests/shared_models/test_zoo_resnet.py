"""ResNet-50, the backbones below detectors and FCNs, and what torchvision's weights fill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck

from shared_models.job_parts import WeightsPart
from shared_models.models import configure, models
from shared_models.weights import load_weights
from shared_models.zoo.resnet import Norm, ResNetFeatures, Stem

pytestmark = pytest.mark.usefixtures("weights_here")


def build(name: str, shape: tuple[int, ...], outputs: int = 10, **keys: Any) -> Any:
    torch.manual_seed(0)
    chosen, settings = configure(name, keys)
    return chosen.build(settings, shape, outputs)


def features(bottleneck: bool = True, stem: Stem = "imagenet", norm: Norm = "group", dilate: int = 0) -> ResNetFeatures:
    """Two blocks in each stage, 8 channels after the stem."""
    torch.manual_seed(0)
    return ResNetFeatures((2, 2, 2, 2), bottleneck, 8, stem, norm, 3, dilate)


def bottlenecks(before: int, width: int, count: int) -> int:
    """Parameters of a stage: three convolutions a block with their norms, and the first block's shortcut."""
    first = before * width + 9 * width**2 + 4 * width**2 + 2 * (width + width + 4 * width)
    later = 4 * width * width + 9 * width**2 + 4 * width**2 + 2 * (width + width + 4 * width)
    return first + 4 * before * width + 2 * 4 * width + (count - 1) * later


@pytest.mark.parametrize(
    ("size", "width", "stem", "outputs", "count"),
    [
        ("tiny", 8, 3 * 8 * 9, 10, 375_762),
        ("cifar", 64, 3 * 64 * 9, 10, 23_520_842),
        ("paper", 64, 3 * 64 * 49, 1000, 25_557_032),  # He et al. 2016, as torchvision
    ],
)
def test_parameter_counts(size: str, width: int, stem: int, outputs: int, count: int) -> None:
    with torch.device("meta"):
        net = build("resnet50", (3, 64, 64), outputs, size=size)
    stages = [bottlenecks(width, width, 3)]
    stages += [bottlenecks(2 ** (i + 1) * width, 2**i * width, n) for i, n in ((1, 4), (2, 6), (3, 3))]
    by_hand = stem + 2 * width + sum(stages) + (32 * width + 1) * outputs
    assert sum(p.numel() for p in net.parameters()) == by_hand == count


def test_resnet50_is_torchvisions() -> None:
    torch.manual_seed(1)
    theirs = torchvision.models.resnet50(num_classes=10)
    ours = build("resnet50", (3, 64, 48), size="paper", norm="batch")
    ours.load_state_dict(theirs.state_dict())
    for training in (True, False):
        x = torch.randn(4, 3, 64, 48)
        with torch.no_grad():
            scores, expected = ours.train(training)(x), theirs.train(training)(x)
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    for name, value in theirs.state_dict().items():  # the running statistics moved alike
        torch.testing.assert_close(ours.state_dict()[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("bottleneck", "dilate"), [(False, 0), (True, 0), (True, 1), (True, 2), (True, 3)])
def test_feature_maps_are_torchvisions(bottleneck: bool, dilate: int) -> None:
    torch.manual_seed(1)
    theirs = torchvision.models.ResNet(
        Bottleneck if bottleneck else BasicBlock,
        [2, 2, 2, 2],
        replace_stride_with_dilation=[dilate > 2, dilate > 1, dilate > 0],
    ).eval()
    ours = ResNetFeatures((2, 2, 2, 2), bottleneck, 64, "imagenet", "batch", 3, dilate).eval()
    state = {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    ours.load_state_dict(state)
    stages = IntermediateLayerGetter(theirs, {f"layer{i}": str(i) for i in (1, 2, 3, 4)})
    x = torch.randn(2, 3, 33, 48)
    with torch.no_grad():
        for map_, other in zip(ours(x), stages(x).values(), strict=True):
            torch.testing.assert_close(map_, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize(
    ("dilate", "strides"), [(0, (1, 2, 4, 8)), (1, (1, 2, 4, 4)), (2, (1, 2, 2, 2)), (3, (1, 1, 1, 1))]
)
def test_widths_and_strides_are_those_of_the_maps(
    bottleneck: bool, stem: Stem, dilate: int, strides: tuple[int, ...]
) -> None:
    net = features(bottleneck, stem, dilate=dilate)
    assert net.widths == ((32, 64, 128, 256) if bottleneck else (8, 16, 32, 64))
    assert net.strides == tuple(stride * (4 if stem == "imagenet" else 1) for stride in strides)
    maps = net(torch.randn(1, 3, 33, 70))
    for map_, width, stride in zip(maps, net.widths, net.strides, strict=True):
        assert map_.shape == (1, width, -(-33 // stride), -(-70 // stride))


def test_a_frozen_norm_is_batch_norm_of_which_nothing_moves() -> None:
    batch, frozen = features(norm="batch"), features(norm="frozen")
    state = batch.state_dict()
    for key, value in state.items():
        if "running" in key:
            value.copy_(torch.rand_like(value) + 0.5)
    frozen.load_state_dict(state)  # a counter of batches is left out
    x = torch.randn(2, 3, 32, 32)
    for ours, theirs in zip(frozen.train()(x), batch.eval()(x), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, state[key]) for key, value in frozen.state_dict().items())
    convolutions = {name for name, _ in frozen.named_parameters()}
    assert convolutions == {name for name, p in batch.named_parameters() if p.dim() == 4}


def test_without_a_norm_the_blocks_are_convolutions_alone() -> None:
    assert all(p.dim() == 4 for p in features(norm="none").parameters())


def test_published_weights_load_but_for_the_head(tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = torchvision.models.resnet50(num_classes=1000)
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    ours = build("resnet50", (3, 64, 64), 7, size="paper", norm="batch")
    match = load_weights(ours, WeightsPart(file="resnet50.pth"), models["resnet50"].renames)
    assert [d.key for d in match.mismatched] == ["fc.weight", "fc.bias"]
    assert not match.missing
    assert not match.unused
    assert torch.equal(ours.state_dict()["layer4.2.conv3.weight"], theirs.layer4[2].conv3.weight)


def test_per_sample_gradients_equal_a_loop() -> None:
    net = build("resnet50", (1, 8, 8), 3).double()
    x, y = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2])
    weights = {k: v.detach() for k, v in net.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(net, weights, (x[None],)), y[None])

    stacked = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    for i in range(len(x)):
        net.zero_grad()
        cross_entropy(net(x[i : i + 1]), y[i : i + 1]).backward()
        for key, parameter in net.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.any(), key
            torch.testing.assert_close(stacked[key][i], parameter.grad, atol=1e-9, rtol=1e-8, msg=key)


@pytest.mark.parametrize(("norm", "mixes"), [("group", False), ("batch", True)])
def test_samples_mix_under_batch_norm_only(norm: str, mixes: bool) -> None:
    net = build("resnet50", (1, 8, 8), 3, norm=norm).double().train()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    other = torch.cat([x[:1], 10 * torch.randn_like(x[1:])])
    moved = (net(x)[0] - net(other)[0]).abs().max()
    assert (moved > 1e-3) if mixes else (moved < 1e-12)


def test_tiny_resnet50_learns_shapes() -> None:
    """Bars that lie or stand in noise, told apart by their direction alone."""
    source = torch.Generator().manual_seed(0)
    x = 0.3 * torch.randn(24, 1, 16, 16, generator=source)
    y = torch.arange(24) % 2
    for i in range(24):
        top, left = torch.randint(2, 8, (2,), generator=source).tolist()
        height, width = (2, 7) if y[i] else (7, 2)
        x[i, 0, top : top + height, left : left + width] += 2
    net = build("resnet50", (1, 16, 16), 2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(16):
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        assert (net(x).argmax(1) == y).float().mean() > 0.9


def test_fcn_resnet50_is_torchvisions() -> None:
    torch.manual_seed(1)
    theirs = torchvision.models.segmentation.fcn_resnet50(
        weights=None, weights_backbone=None, aux_loss=None, num_classes=5
    ).eval()
    state = theirs.state_dict()
    for key, value in state.items():
        if "running" in key:
            value.copy_(torch.rand_like(value) + 0.5)
    ours = build("fcn", (3, 40, 51), 5, size="resnet50", norm="batch").eval()
    ours.load_state_dict(state)
    x = torch.randn(2, 3, 40, 51)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x)["out"], atol=1e-5, rtol=1e-5)


def test_weights_of_a_resnet50_go_into_the_backbone(tmp_path: Path) -> None:
    theirs = torchvision.models.resnet50(num_classes=4)
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    net = build("fcn", (3, 32, 32), 5, size="resnet50", norm="batch")
    match = load_weights(net, WeightsPart(file="resnet50.pth"), models["fcn"].renames)
    assert match.unused == ("fc.weight", "fc.bias")
    assert all(key.startswith("classifier.") for key in match.missing)
    assert torch.equal(net.backbone.layer3[1].conv2.weight, theirs.layer3[1].conv2.weight)


@pytest.mark.parametrize("published", [True, False])
def test_weights_of_a_vit_go_into_vit_and_the_segmenters_encoder(tmp_path: Path, published: bool) -> None:
    """Files that torchvision publishes still have older names for the layers of the MLP."""
    torch.manual_seed(1)
    theirs = torchvision.models.VisionTransformer(
        image_size=12, patch_size=4, num_layers=3, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=10
    ).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    state = theirs.state_dict()
    if published:
        state = {k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v for k, v in state.items()}
    file = tmp_path / "vit.pth"
    torch.save(state, file)
    form: dict[str, Any] = {"layers": 3, "heads": 4, "width": 32, "mlp": 48, "patch": 4}
    vit, net = build("vit", (3, 12, 12), 10, **form).eval(), build("segmenter", (3, 12, 12), 2, **form).eval()
    whole = load_weights(vit, WeightsPart(file=file.name), models["vit"].renames)
    assert (whole.missing, whole.mismatched, whole.unused) == ((), (), ())
    part = load_weights(net, WeightsPart(file=file.name), models["segmenter"].renames)
    assert set(part.loaded) == {key for key in net.state_dict() if key.startswith("encoder.")}
    x = torch.randn(4, 3, 12, 12)
    torch.testing.assert_close(vit(x), theirs(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(net.encoder(x), vit.norm(vit.tokens(x)))
    again = load_weights(net, WeightsPart(file=save(net, tmp_path).name), models["segmenter"].renames)
    assert set(again.loaded) == set(net.state_dict())  # our own keys are not renamed


def save(net: nn.Module, folder: Path) -> Path:
    torch.save(net.state_dict(), folder / "ours.pth")
    return folder / "ours.pth"
