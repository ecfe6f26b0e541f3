"""The zoo against the papers' parameter counts, torchvision's outputs, and what federated training asks of a model."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from shared_models.errors import ConfigError, UnknownNameError
from shared_models.models import configure, model, models

NAMES = ("cnn", "logistic", "mlp", "resnet18", "vit")
VARIANTS: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("cnn", {}, (1, 8, 8)),
    ("cnn", {"size": "niid-bench"}, (3, 17, 20)),
    ("logistic", {}, (5,)),
    ("mlp", {"hidden": [7, 5]}, (2, 3, 4)),
    ("resnet18", {"width": 8}, (1, 8, 8)),
    ("resnet18", {"width": 8, "stem": "imagenet"}, (4, 33, 20)),
    ("vit", {}, (1, 8, 8)),
    ("vit", {"patch": 4, "width": 12, "heads": 3}, (2, 8, 12)),
]


def build(name: str, shape: tuple[int, ...], outputs: int = 10, *, seed: int = 0, **keys: Any) -> nn.Module:
    torch.manual_seed(seed)
    chosen, settings = configure(name, keys)
    return chosen.build(settings, shape, outputs)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "size", "shape", "outputs", "count"),
    [
        ("logistic", "tiny", (784,), 10, 7_850),  # 784 * 10 + 10
        ("mlp", "2nn", (1, 28, 28), 10, 199_210),  # McMahan et al. 2017
        ("cnn", "mcmahan", (1, 28, 28), 10, 1_663_370),  # McMahan et al. 2017
        ("cnn", "niid-bench", (3, 32, 32), 10, 62_006),  # LeNet-5 on CIFAR-10
        ("resnet18", "paper", (3, 224, 224), 1000, 11_689_512),  # He et al. 2016, as torchvision
        ("vit", "ti16", (3, 224, 224), 1000, 5_717_416),  # Touvron et al. 2021
        ("vit", "s16", (3, 224, 224), 1000, 22_050_664),  # Touvron et al. 2021
        ("vit", "b16", (3, 224, 224), 1000, 86_567_656),  # Dosovitskiy et al. 2021, as torchvision
        ("vit", "l16", (3, 224, 224), 1000, 304_326_632),  # Dosovitskiy et al. 2021, as torchvision
        ("mlp", "tiny", (1, 28, 28), 10, 50_890),
        ("cnn", "tiny", (1, 8, 8), 10, 13_706),
        ("resnet18", "tiny", (1, 8, 8), 10, 701_178),
        ("resnet18", "cifar", (3, 32, 32), 10, 11_173_962),
        ("vit", "tiny", (1, 8, 8), 10, 102_666),
    ],
)
def test_parameter_counts(name: str, size: str, shape: tuple[int, ...], outputs: int, count: int) -> None:
    with torch.device("meta"):
        assert parameters(build(name, shape, outputs, size=size)) == count


@pytest.mark.parametrize("name", NAMES)
def test_every_size_is_a_complete_row(name: str) -> None:
    assert name in models
    for size in models[name].sizes:
        with torch.device("meta"):
            scores = build(name, (3, 224, 224), 7, size=size)(torch.empty(2, 3, 224, 224))
        assert scores.shape == (2, 7)


@pytest.mark.parametrize("training", [True, False])
def test_resnet_is_torchvisions(training: bool) -> None:
    torch.manual_seed(1)
    theirs = torchvision.models.resnet18(num_classes=10).train(training)
    ours = build("resnet18", (3, 64, 48), size="paper", norm="batch").train(training)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3, 64, 48)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    for name, value in theirs.state_dict().items():  # the running statistics moved alike
        torch.testing.assert_close(ours.state_dict()[name], value, atol=1e-5, rtol=1e-5)


def vit_weights(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's ViT weights under our keys."""
    rename = {
        r"conv_proj": "patches",
        r"encoder\.layers\.encoder_layer_(\d+)": r"blocks.\1",
        r"ln_(\d)": r"norm\1",
        r"self_attention\.in_proj_": "attention.qkv.",
        r"self_attention\.out_proj": "attention.out",
        r"mlp\.0": "hidden",
        r"mlp\.3": "out",
        r"encoder\.ln": "norm",
        r"encoder\.pos_embedding": "positions.weight",
        r"class_token": "class_token.weight",
        r"heads\.head": "head",
    }
    ours = {}
    for key, value in theirs.items():
        for pattern, replacement in rename.items():
            key = re.sub(pattern, replacement, key)
        ours[key] = value[0] if value.dim() == 3 else value
    return ours


def test_vit_is_torchvisions() -> None:
    torch.manual_seed(1)
    theirs = torchvision.models.VisionTransformer(
        image_size=12, patch_size=4, num_layers=3, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=10
    ).eval()
    for parameter in theirs.parameters():  # torchvision starts the head and the class token at zero
        nn.init.normal_(parameter, std=0.3)
    ours = build("vit", (3, 12, 12), layers=3, heads=4, width=32, mlp=48, patch=4)
    ours.load_state_dict(vit_weights(theirs.state_dict()))
    x = torch.randn(5, 3, 12, 12)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "keys", "shape"), VARIANTS)
def test_per_sample_gradients_equal_a_loop(name: str, keys: dict[str, Any], shape: tuple[int, ...]) -> None:
    net = build(name, shape, 3, **keys).double()
    x, y = torch.randn(4, *shape, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    weights = {k: v.detach() for k, v in net.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(net, weights, (x[None],)), y[None])

    stacked = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    for i in range(len(x)):
        net.zero_grad()
        cross_entropy(net(x[i : i + 1]), y[i : i + 1]).backward()
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


def test_the_in_place_detector_detects(in_place: Any) -> None:
    net, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True)), torch.ones(1, 2)
    with in_place() as mode:
        net(x)
    assert mode.seen == ["aten.relu_.default"]


def moved_by_others(net: nn.Module, shape: tuple[int, ...]) -> float:
    """How far the first sample's outputs move when all others of the batch change."""
    torch.manual_seed(5)
    x = torch.randn(4, *shape, dtype=torch.float64)
    other = torch.cat([x[:1], 10 * torch.randn_like(x[1:])])
    with torch.no_grad():
        return float((net(x)[0] - net(other)[0]).abs().max())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "keys", "shape"), VARIANTS)
def test_samples_do_not_mix(name: str, keys: dict[str, Any], shape: tuple[int, ...], training: bool) -> None:
    assert moved_by_others(build(name, shape, **keys).double().train(training), shape) < 1e-12


def test_batch_norm_mixes_samples_in_training() -> None:
    net = build("resnet18", (1, 8, 8), width=8, norm="batch").double()
    assert moved_by_others(net.train(), (1, 8, 8)) > 1e-3


@pytest.mark.parametrize(("name", "keys", "shape"), VARIANTS)
def test_initialisation_is_the_seed_of_torch_and_nothing_else(
    name: str, keys: dict[str, Any], shape: tuple[int, ...]
) -> None:
    random.seed(1)
    first = build(name, shape, seed=3, **keys).state_dict()
    random.seed(2)
    again, other = (build(name, shape, seed=s, **keys).state_dict() for s in (3, 4))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize(("name", "keys", "shape"), VARIANTS)
def test_training_lowers_the_loss(name: str, keys: dict[str, Any], shape: tuple[int, ...]) -> None:
    net = build(name, shape, **keys)
    x, y = torch.randn(16, *shape), torch.arange(16) % 10
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(20):
        loss = cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_tiny_vit_reads_digits() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    net = build("vit", (1, 8, 8))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for step in range(120):
        batch = train[(torch.arange(32) + 32 * step) % len(train)]
        optimizer.zero_grad()
        cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        assert (net(x[test]).argmax(1) == y[test]).float().mean() > 0.88


def test_dropout_acts_in_training_only() -> None:
    net = build("vit", (1, 8, 8), dropout=0.5)
    x = torch.randn(2, 1, 8, 8)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


@pytest.mark.parametrize(("size", "smallest"), [("tiny", 4), ("mcmahan", 4), ("niid-bench", 16)])
def test_cnn_takes_every_image_from_its_smallest(size: str, smallest: int) -> None:
    for side in range(smallest, smallest + 6):
        assert build("cnn", (2, side, smallest), size=size)(torch.randn(1, 2, side, smallest)).shape == (1, 10)
    with pytest.raises(ConfigError, match=f"{smallest}x{smallest - 1} pixels: its smallest is {smallest}x{smallest}"):
        build("cnn", (2, smallest, smallest - 1), size=size)


def test_a_setting_beside_the_size_wins_over_its_row() -> None:
    _, settings = configure("vit", {"size": "ti16", "patch": 8})
    assert settings.model_dump() == {
        "size": "ti16", "layers": 12, "width": 192, "mlp": 768, "heads": 3, "patch": 8,
        "position_std": 0.02, "dropout": 0.0,
    }  # fmt: skip
    assert configure("vit", settings.model_dump())[1] == settings  # a resolved job resolves to itself


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("vti", {}, "[model]: unknown model 'vti'. did you mean 'vit'?"),
        ("vit", {"widht": 3}, "[model] vit: unknown key 'widht', did you mean 'width'?"),
        ("vit", {"dropout": 1}, "[model] vit: 'dropout' should be less than 1, not 1"),
        ("vit", {"dropout": float("nan")}, "[model] vit: 'dropout' should be a finite number, not nan"),
        ("vit", {"heads": 5}, "[model] vit: width 64 should be a multiple of heads 5"),
        ("cnn", {"kernel": 4}, "[model] cnn: 'kernel': should be odd, not 4"),
        ("cnn", {"channels": [8, 0]}, "[model] cnn: 'channels.1' should be greater than 0, not 0"),
        ("resnet18", {"norm": "layer"}, "[model] resnet18: 'norm' should be 'group' or 'batch', not 'layer'"),
        ("resnet18", {"width": 12}, "[model] resnet18: 'width' should be a multiple of 8, not 12"),
        ("vit", {"size": "b61"}, "[model]: model 'vit' has no size 'b61'. known: b16, l16, s16, ti16, tiny"),
        ("vit", {"size": 16}, "[model]: model 'vit' has no size 16. known: b16, l16, s16, ti16, tiny"),
    ],
)
def test_wrong_settings_get_one_clear_line(name: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        configure(name, keys)
    assert str(error.value) == message
    assert isinstance(error.value, UnknownNameError) == ("known:" in message or "unknown model" in message)


@pytest.mark.parametrize(
    ("name", "keys", "shape", "outputs", "message"),
    [
        (
            "vit", {"patch": 8}, (1, 28, 20), 10,
            "model 'vit' cannot cut an image of 28x20 pixels into patches of side 8. "
            "Set patch to one of 1, 2, 4, or the image size to a multiple of 8",
        ),
        ("cnn", {}, (30,), 10, "model 'cnn' cannot take an example of shape (30,). It takes an image (C, H, W)"),
        (
            "mlp", {}, (3, 4), 10,
            "model 'mlp' cannot take an example of shape (3, 4). It takes an image (C, H, W) or features (F,)",
        ),
        ("logistic", {}, (0,), 2, "model 'logistic' cannot take an example of shape (0,). It takes an image "
            "(C, H, W) or features (F,)"),
        ("mlp", {}, (3,), 0, "model 'mlp' needs at least one output, not 0"),
    ],
)  # fmt: skip
def test_examples_that_do_not_fit_get_one_clear_line(
    name: str, keys: dict[str, Any], shape: tuple[int, ...], outputs: int, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        build(name, shape, outputs, **keys)
    assert str(error.value) == message


def test_a_second_model_of_one_name_is_an_error() -> None:
    vit = models["vit"]
    with pytest.raises(ConfigError, match="model 'vit' is registered twice"):
        model("vit", settings=vit.settings, sizes=vit.sizes, paper=vit.paper)(vit.builder)
