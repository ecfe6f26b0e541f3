"""The segmentation family: counts by hand against the papers, torchvision's outputs, and what each model promises."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from shared_models.errors import ConfigError
from shared_models.job import Job
from shared_models.models import configure, models
from shared_models.tasks.base import Batch, make_task
from shared_models.zoo.fcn import bilinear_

NAMES = ("fcn", "patchwise", "segmenter", "unet")
VARIANTS: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("fcn", {}, (1, 9, 14)),
    ("patchwise", {"patch": 9, "kernels": [3, 2], "channels": [4, 5], "hidden": 6}, (2, 9, 14)),
    ("segmenter", {"width": 16, "mlp": 24}, (2, 8, 12)),
    ("unet", {"width": 8, "depth": 2}, (3, 8, 12)),
    ("unet", {"width": 8, "depth": 1, "norm": "none"}, (1, 6, 4)),
]


def build(name: str, shape: tuple[int, ...], outputs: int = 3, *, seed: int = 0, **keys: Any) -> Any:
    torch.manual_seed(seed)
    chosen, settings = configure(name, keys)
    return chosen.build(settings, shape, outputs)


# ---- counts ----------------------------------------------------------------------------------------------------------
def conv(before: int, after: int, kernel: int = 3) -> int:
    return before * after * kernel**2 + after


def unet(width: int, depth: int, channels: int, classes: int, norm: int) -> int:
    """Two convolutions at each level down, a doubling and two convolutions at each level up, the head."""
    w = [width * 2**i for i in range(depth + 1)]
    total = conv(channels, w[0]) + conv(w[0], w[0]) + conv(w[0], classes, 1)
    total += sum(conv(w[i], w[i + 1]) + conv(w[i + 1], w[i + 1]) for i in range(depth))
    total += sum(conv(w[i + 1], w[i], 2) + conv(2 * w[i], w[i]) + conv(w[i], w[i]) for i in range(depth))
    return total + norm * 2 * 2 * (sum(w) + sum(w[:-1]))  # two norms a level, scale and shift of each channel


def skip_fcn(blocks: tuple[tuple[int, int], ...], kernel: int, hidden: int, classes: int, norm: int) -> int:
    """Blocks of (channels, convolutions), two hidden layers, and scores at three places."""
    total, before = 0, 3
    for width, count in blocks:
        total += conv(before, width) + (count - 1) * conv(width, width) + norm * count * 2 * width
        before = width
    total += conv(before, hidden, kernel) + conv(hidden, hidden, 1) + norm * 2 * 2 * hidden
    total += conv(hidden, classes, 1) + conv(blocks[-2][0], classes, 1) + conv(blocks[-3][0], classes, 1)
    return total + 2 * classes**2 * 4**2  # two learned doublings


def segmenter(layers: int, decoder: int, width: int, mlp: int, patch: int, tokens: int, classes: int) -> int:
    d = width
    block = 2 * 2 * d + 3 * d * d + 3 * d + d * d + d + 2 * d * mlp + d + mlp
    vit = conv(3, d, patch) + (1 + 1 + tokens) * d + layers * block + 2 * d
    return vit + d * d + d + classes * d + decoder * block + 2 * d + 2 * d * d + 2 * classes


SEGMENTERS = [("ti16", 12, 192, 7), ("s16", 12, 384, 27), ("b16", 12, 768, 106), ("l16", 24, 1024, 334)]


@pytest.mark.parametrize(
    ("name", "size", "shape", "outputs", "by_hand", "count"),
    [
        ("unet", "paper", (1, 512, 512), 2, unet(64, 4, 1, 2, 0), 31_030_658),
        ("unet", "tiny", (1, 64, 64), 2, unet(16, 3, 1, 2, 1), 483_170),
        (
            "fcn", "paper", (3, 500, 500), 21,
            skip_fcn(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), 7, 4096, 21, 0), 134_376_863,
        ),  # "134M", Long et al. 2015, Table 1
        ("fcn", "tiny", (3, 64, 64), 21, skip_fcn(((16, 2), (32, 2), (64, 2)), 3, 64, 21, 1), 130_399),
        # ResNet-50 without its head, a 3x3 convolution and its norm, the scores: torchvision's 32.95M
        ("fcn", "resnet50", (3, 520, 520), 21, 23_508_032 + 9 * 2048 * 512 + 1024 + conv(512, 21, 1), 32_957_013),
        (
            "patchwise", "paper", (1, 512, 512), 2,
            conv(1, 48, 4) + conv(48, 48, 5) + 2 * conv(48, 48, 4) + conv(48, 200, 3) + conv(200, 2, 1), 219_290,
        ),
        (
            "patchwise", "tiny", (1, 64, 64), 2,
            conv(1, 16, 6) + conv(16, 32, 3) + conv(32, 64, 3) + conv(64, 2, 1), 23_858,
        ),
        ("segmenter", "tiny", (3, 64, 64), 3, segmenter(2, 1, 64, 128, 4, 256, 3), 132_870),
        *(
            ("segmenter", size, (3, 512, 512), 150, segmenter(layers, 2, d, 4 * d, 16, 1024, 150), None)
            for size, layers, d, _ in SEGMENTERS
        ),
    ],
)  # fmt: skip
def test_parameter_counts(
    name: str, size: str, shape: tuple[int, ...], outputs: int, by_hand: int, count: int | None
) -> None:
    with torch.device("meta"):
        net = build(name, shape, outputs, size=size)
    assert sum(p.numel() for p in net.parameters()) == by_hand == (count or by_hand)


@pytest.mark.parametrize(("size", "layers", "width", "published"), SEGMENTERS)
def test_segmenters_are_of_the_published_sizes(size: str, layers: int, width: int, published: int) -> None:
    """In millions, as in the authors' table; their encoder still carries its ImageNet head, which nothing uses."""
    ours = segmenter(layers, 2, width, 4 * width, 16, 1024, 150) + 1000 * (width + 1)
    assert ours / 1e6 == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_every_size_takes_its_usual_image_and_says_a_class_for_each_pixel(name: str) -> None:
    declared = models[name]
    assert declared.tasks == ("segmentation",)
    assert set(declared.usual) == set(declared.sizes)
    for size, shape in declared.usual.items():
        with torch.device("meta"):
            assert build(name, shape, 5, size=size)(torch.empty(2, *shape)).shape == (2, 5, *shape[1:])


@pytest.mark.parametrize(("name", "size"), [(name, size) for name in NAMES for size in models[name].sizes])
def test_heads_are_the_entries_that_the_number_of_classes_shapes(name: str, size: str) -> None:
    declared = models[name]
    with torch.device("meta"):
        few, many = (build(name, declared.usual[size], k, size=size).state_dict() for k in (3, 4))
    shaped = {key for key, value in few.items() if value.shape != many[key].shape}
    assert {key for key in few if any(fnmatchcase(key, p) for p in declared.heads)} == shaped


# ---- FCN -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("norm", "theirs"), [("none", "vgg16"), ("batch", "vgg16_bn")])
def test_the_convolutions_have_the_keys_and_shapes_of_torchvisions_vgg(norm: str, theirs: str) -> None:
    with torch.device("meta"):
        state = build("fcn", (3, 64, 64), 5, size="paper", norm=norm).state_dict()
        expected = torchvision.models.get_model(theirs, weights=None).features.state_dict()
    ours = {key: value.shape for key, value in state.items() if key.startswith("features.")}
    assert ours == {f"features.{key}": value.shape for key, value in expected.items()}


def test_the_doublings_start_as_bilinear_interpolation() -> None:
    double = nn.ConvTranspose2d(3, 3, 4, 2, padding=1, bias=False)
    bilinear_(double.weight)
    x = torch.randn(2, 3, 5, 7)
    expected = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(double(x)[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])  # its border is of zeros


def test_fcn_starts_with_unmodified_predictions() -> None:
    """Before any training the logits are the coarsest scores, interpolated; the skip connections are silent."""
    net = build("fcn", (1, 128, 128))
    x = torch.randn(1, 1, 128, 128)
    scores = net.score(net.hidden(net.features(x)))
    y = F.interpolate(scores, scale_factor=2, mode="bilinear", align_corners=False)
    y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
    y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
    inside = (..., slice(16, -16), slice(16, -16))
    torch.testing.assert_close(net(x)[inside], y[inside], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", [1, 2, 7, 8, 9, 31, 33])
def test_fcn_takes_images_of_any_size(side: int) -> None:
    assert build("fcn", (1, 1, 1))(torch.randn(2, 1, side, 40 - side)).shape == (2, 3, side, 40 - side)


def test_an_odd_side_is_a_crop_and_moves_nothing() -> None:
    """Rows and columns that are added at the far sides do not move what is said about the near corner."""
    net = build("fcn", (1, 1, 1), norm="none")
    x = torch.randn(1, 1, 80, 80)
    torch.testing.assert_close(net(x)[..., :20, :20], net(x[..., :73, :61])[..., :20, :20], atol=1e-5, rtol=1e-5)


# ---- patch by patch --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("stride", "shape"), [(1, (2, 11, 9)), (2, (2, 11, 14)), (3, (1, 14, 16)), (4, (2, 13, 12))])
def test_a_grid_pixel_is_the_cnn_on_the_patch_around_it(stride: int, shape: tuple[int, ...]) -> None:
    net = build("patchwise", shape, patch=9, stride=stride, kernels=[3, 2], channels=[4, 5], hidden=6)
    x = torch.randn(2, *shape)
    logits, mirrored = net(x), F.pad(x, (4, 4, 4, 4), mode="reflect")
    for i in range(0, shape[1], stride):
        for j in range(0, shape[2], stride):
            alone = net.net(mirrored[..., i : i + 9, j : j + 9])
            torch.testing.assert_close(logits[..., i, j], alone, atol=1e-5, rtol=1e-5)


def test_a_grid_pixel_depends_on_its_patch_alone() -> None:
    net = build("patchwise", (1, 40, 40), patch=9, stride=4, kernels=[3, 2], channels=[4, 5], hidden=6)
    x = torch.randn(1, 1, 40, 40).requires_grad_()
    (gradient,) = torch.autograd.grad(net(x)[0, :, 20, 16].square().sum(), x)
    seen = gradient[0, 0].abs() > 1e-5  # an interpolation's weights may be off from 0 by a rounding
    assert seen.any()
    seen[16:25, 12:21] = False
    assert not seen.any()


def test_between_grid_pixels_logits_are_interpolated() -> None:
    net = build("patchwise", (1, 24, 26), stride=4)
    y = net(torch.randn(1, 1, 24, 26))
    torch.testing.assert_close(y[..., 4, 10], (y[..., 4, 8] + y[..., 4, 12]) / 2)
    torch.testing.assert_close(y[..., 5, 8], (3 * y[..., 4, 8] + y[..., 8, 8]) / 4)


# ---- U-Net and Segmenter ---------------------------------------------------------------------------------------------
def test_unet_drops_at_the_end_of_the_contracting_path_in_training_only() -> None:
    net = build("unet", (1, 16, 16), width=8, dropout=0.5)
    calls: list[tuple[int, ...]] = []
    net.dropout.register_forward_hook(lambda module, args, output: calls.append(tuple(output.shape[1:])))
    x = torch.randn(1, 1, 16, 16)
    assert not torch.equal(net(x), net(x))
    assert calls[:2] == [(32, 4, 4), (64, 2, 2)]
    net.eval()
    assert torch.equal(net(x), net(x))


def test_segmenters_classes_are_a_set() -> None:
    """Class tokens have no positions: to exchange the rows of two classes exchanges their masks and no more."""
    net = build("segmenter", (1, 16, 24), 4)
    x, order = torch.randn(2, 1, 16, 24), torch.tensor([2, 0, 3, 1])
    before = net(x)
    with torch.no_grad():
        net.classes.weight.copy_(net.classes.weight[order])
    torch.testing.assert_close(net(x), before[:, order], atol=1e-4, rtol=1e-4)


def test_segmenters_logits_of_a_patch_are_centred_over_classes_and_bounded() -> None:
    net = build("segmenter", (1, 16, 24), 5, mask_scale=3.0, mask_eps=0.1)
    y = net(1e3 * torch.randn(2, 1, 16, 24))
    torch.testing.assert_close(y.mean(dim=1), torch.zeros(2, 16, 24), atol=1e-5, rtol=0)
    assert y.abs().max() <= 3.0 * 5**0.5
    assert 0.01 < y.std() < 3.0


# ---- what all promise ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "keys", "shape"), VARIANTS)
def test_samples_do_not_mix(name: str, keys: dict[str, Any], shape: tuple[int, ...], training: bool) -> None:
    net = build(name, shape, **keys).double().train(training)
    assert moved_by_others(net, shape) < 1e-12


@pytest.mark.parametrize("name", ["fcn", "unet"])
def test_batch_norm_mixes_samples_in_training(name: str) -> None:
    assert moved_by_others(build(name, (1, 8, 8), norm="batch").double().train(), (1, 8, 8)) > 1e-3


def moved_by_others(net: nn.Module, shape: tuple[int, ...]) -> float:
    """How far the first sample's logits move when all others of the batch change."""
    x = torch.randn(3, *shape, dtype=torch.float64)
    other = torch.cat([x[:1], 10 * torch.randn_like(x[1:])])
    with torch.no_grad():
        return float((net(x)[0] - net(other)[0]).abs().max())


@pytest.mark.parametrize(("name", "keys", "shape"), VARIANTS)
def test_per_sample_gradients_equal_a_loop(name: str, keys: dict[str, Any], shape: tuple[int, ...]) -> None:
    net = build(name, shape, **keys).double()
    x, y = torch.randn(3, *shape, dtype=torch.float64), torch.randint(3, (3, *shape[1:]))
    weights = {k: v.detach() for k, v in net.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, weights, (x[None],)), y[None])

    stacked = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    for i in range(len(x)):
        net.zero_grad()
        F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]).backward()
        for key, parameter in net.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.any(), key
            torch.testing.assert_close(stacked[key][i], parameter.grad, atol=1e-10, rtol=1e-8, msg=key)


@pytest.mark.parametrize(("name", "keys", "shape"), VARIANTS)
def test_no_operation_is_in_place(in_place: Any, name: str, keys: dict[str, Any], shape: tuple[int, ...]) -> None:
    net = build(name, shape, **keys)
    with in_place() as mode:
        net(torch.randn(2, *shape))
    assert mode.seen == []


def drawn(count: int, side: int) -> Batch:
    """Images of noise with a light disc (class 1) and a dark square (class 2)."""
    source = torch.Generator().manual_seed(0)
    x = 0.5 * torch.randn(count, 1, side, side, generator=source)
    y = torch.zeros(count, side, side, dtype=torch.uint8)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    for i in range(count):
        radius, half = torch.randint(5, 8, (2,), generator=source).tolist()
        (a, b), (c, d) = torch.randint(8, side - 8, (2, 2), generator=source).tolist()
        disc = (row - a) ** 2 + (column - b) ** 2 <= radius**2
        square = ((row - c).abs() <= half) & ((column - d).abs() <= half)
        y[i] = torch.where(square, 2, torch.where(disc, 1, 0))
        x[i, 0] += 1.5 * (y[i] == 1) - 1.5 * (y[i] == 2)
    return Batch(x, y)


@pytest.mark.parametrize(
    ("name", "rate", "steps"),
    [("fcn", 0.01, 36), ("patchwise", 0.005, 44), ("segmenter", 0.003, 50), ("unet", 0.005, 40)],
)
def test_tiny_learns_eight_images(name: str, rate: float, steps: int) -> None:
    job = Job.resolve({
        "name": "shapes", "model": {"name": name}, "data": {"shape": [1, 32, 32]},
        "task": {"name": "segmentation", "labels": ["noise", "disc", "square"]},
    })  # fmt: skip
    task, batch = make_task(job), drawn(8, 32)
    net = build(name, (1, 32, 32))
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss(net(batch.x), batch).mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert task.values(task.sums(net.eval()(batch.x), batch))["dice"] >= 0.9


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("unet", {"width": 12}, "[model] unet: 'width' should be a multiple of 8, not 12"),
        ("unet", {"norm": "layer"}, "[model] unet: 'norm' should be 'group', 'batch' or 'none', not 'layer'"),
        ("fcn", {"size": "resnet50", "norm": "none"}, "[model] fcn: backbone 'resnet50' does not train without a norm"),
        ("patchwise", {"patch": 16}, "[model] patchwise: 'patch': should be odd, not 16"),
        ("patchwise", {"kernels": [3]}, "[model] patchwise: 2 channels should have as many kernels, not 1"),
        (
            "patchwise", {"patch": 9},
            "[model] patchwise: patch 9 is too small for kernels (6, 3), each with a pooling",
        ),
        ("segmenter", {"heads": 5}, "[model] segmenter: width 64 should be a multiple of heads 5"),
    ],
)  # fmt: skip
def test_wrong_settings_get_one_clear_line(name: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        configure(name, keys)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "unet", (1, 30, 45),
            "model 'unet' of depth 3 cannot take an image of 30x45 pixels: both sides should be multiples of 8. "
            "Sizes that fit: 24x40 and 32x48; a smaller depth fits more",
        ),
        (
            "unet", (1, 4, 16),
            "model 'unet' of depth 3 cannot take an image of 4x16 pixels: both sides should be multiples of 8. "
            "Sizes that fit: 8x16; a smaller depth fits more",
        ),
        (
            "segmenter", (1, 30, 20),
            "model 'segmenter' cannot cut an image of 30x20 pixels into patches of side 4. "
            "Set patch to one of 1, 2, 5, 10, or the image size to a multiple of 4",
        ),
        (
            "patchwise", (1, 13, 64),
            "model 'patchwise' cannot mirror an image of 13x64 pixels by half a patch of side 21: its smallest is "
            "14x14. Enlarge the images, or use a smaller patch",
        ),
        ("fcn", (30,), "model 'fcn' cannot take an example of shape (30,). It takes an image (C, H, W)"),
    ],
)  # fmt: skip
def test_images_that_do_not_fit_get_one_clear_line(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(name, shape)
    assert str(error.value) == message


def test_patchwise_takes_its_smallest_image() -> None:
    for side in range(14, 20):
        assert build("patchwise", (1, side, 14))(torch.randn(1, 1, side, 14)).shape == (1, 3, side, 14)
