"""Models for series: sizes and patches by hand, gradients of single samples, waves they tell apart and continue."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.functional import cross_entropy

from shared_models.errors import ConfigError
from shared_models.job_parts import DataPart
from shared_models.models import configure, models
from shared_models.tasks.base import Batch, Task, tasks

LSTM, TRANSFORMER = "series-lstm", "series-transformer"
POSITIONS = ("none", "index", "normalised", "sine", "learnable")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    (LSTM, {}),
    (LSTM, {"layers": 2, "hidden": 5, "pool": "max"}),
    (TRANSFORMER, {}),
    (TRANSFORMER, {"patch": 1, "width": 12, "heads": 3, "before": True}),
    (TRANSFORMER, {"patch": 5, "positions": "sine"}),
]
SHAPE = (12, 3)


def build(name: str, shape: tuple[int, ...] = SHAPE, outputs: int = 4, *, seed: int = 0, **keys: Any) -> nn.Module:
    torch.manual_seed(seed)
    chosen, settings = configure(name, keys)
    return chosen.build(settings, shape, outputs)


def test_parameter_counts_by_hand() -> None:
    """LSTM: 4 gates of h (C + h + 2 biases). A block: 4 D (D + 1), an MLP, 2 norms of 2 D."""
    counts = {
        (LSTM, "tiny", (48, 3), 10): 4 * 64 * (3 + 64 + 2) + 10 * (64 + 1),
        (LSTM, "hydro", (270, 32), 1): 4 * 256 * (32 + 256 + 2) + (256 + 1),
    }
    for size, shape, patch, width, mlp, layers in (("tiny", (48, 3), 4, 64, 128, 2), ("tst", (144, 9), 1, 64, 256, 3),
                                                   ("patchtst", (336, 7), 16, 128, 256, 3)):  # fmt: skip
        tokens = shape[0] // patch
        block = 4 * width * (width + 1) + width * mlp + mlp + mlp * width + width + 4 * width
        counts[(TRANSFORMER, size, shape, 10)] = (
            (patch * shape[1] + 1) * width + tokens * width + layers * block + 10 * (tokens * width + 1)
        )
    for (name, size, shape, outputs), count in counts.items():
        assert models[name].usual[size] == shape
        with torch.device("meta"):
            net = build(name, shape, outputs, size=size)
        assert sum(p.numel() for p in net.parameters()) == count


def test_the_lstm_is_torchs_and_sees_its_last_state_or_the_largest() -> None:
    net = build(LSTM).double()
    x = torch.randn(5, *SHAPE, dtype=torch.float64)
    states, (last, _) = net.lstm(x)
    torch.testing.assert_close(net(x), net.head(last[0]))
    largest = build(LSTM, pool="max").double()
    torch.testing.assert_close(largest(x), net.head(states.max(dim=1).values))


def test_patches_by_hand() -> None:
    """Seven steps of two channels in patches of three: the first step is repeated twice, the latest patch is whole."""
    net = build(TRANSFORMER, (7, 2), patch=3, width=6, heads=1, positions="none")
    nn.init.eye_(net.embedding.weight)
    nn.init.zeros_(net.embedding.bias)
    x = torch.arange(14.0).reshape(1, 7, 2)  # step t holds 2t and 2t + 1
    assert net.tokens(x).tolist() == [[[0, 1, 0, 1, 0, 1], [2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13]]]
    assert net.head.in_features == 3 * 6
    assert build(TRANSFORMER, (6, 2), patch=3).head.in_features == 2 * 64


@pytest.mark.parametrize("positions", POSITIONS)
def test_tokens_may_be_exchanged_only_without_positions(positions: str) -> None:
    net = build(TRANSFORMER, patch=4, positions=positions).double().eval()
    net.head.weight.data = net.head.weight[:, :64].repeat(1, 3)  # each of the three tokens counts alike
    x = torch.randn(2, *SHAPE, dtype=torch.float64)
    turned = torch.cat([x[:, 4:], x[:, :4]], dim=1)
    assert torch.allclose(net(x), net(turned)) == (positions == "none")


@pytest.mark.parametrize(("name", "keys"), VARIANTS)
@pytest.mark.parametrize("training", [True, False])
def test_samples_do_not_mix(name: str, keys: dict[str, Any], training: bool) -> None:
    assert moved_by_others(build(name, **keys).double().train(training)) < 1e-12


def test_batch_norm_mixes_samples_in_training_alone() -> None:
    net = build(TRANSFORMER, norm="batch").double()
    chosen, settings = configure(TRANSFORMER, {"norm": "batch"})
    assert (chosen.unit(settings), chosen.unit(configure(TRANSFORMER, {})[1])) == ("batch", "sample")
    assert moved_by_others(net.train()) > 1e-3
    assert moved_by_others(net.eval()) < 1e-12


def moved_by_others(net: nn.Module) -> float:
    """How far the first sample's outputs move when all others of the batch change."""
    torch.manual_seed(5)
    x = torch.randn(4, *SHAPE, dtype=torch.float64)
    other = torch.cat([x[:1], 10 * torch.randn_like(x[1:])])
    with torch.no_grad():
        return float((net(x)[0] - net(other)[0]).abs().max())


def alone(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Gradients of each sample by itself, stacked."""
    found: dict[str, list[Tensor]] = {}
    for i in range(len(x)):
        net.zero_grad()
        cross_entropy(net(x[i : i + 1]), y[i : i + 1]).backward()
        for key, parameter in net.named_parameters():
            assert parameter.grad is not None, key
            found.setdefault(key, []).append(parameter.grad.clone())
    return {key: torch.stack(grads) for key, grads in found.items()}


def hooked(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The same from one backward pass: what goes into a linear layer, norm or table, and the gradient of its output."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str, module: nn.Module) -> None:
        def after(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            out.register_hook(lambda g: seen.__setitem__(name, (given[0].detach(), g)))

        module.register_forward_hook(after)

    parts = {n: m for n, m in net.named_modules() if isinstance(m, nn.Linear | nn.LayerNorm | nn.Embedding)}
    for name, module in parts.items():
        watch(name, module)
    cross_entropy(net(x), y, reduction="sum").backward()
    grads = {}
    for name, (given, g) in seen.items():
        module = parts[name]
        assert len(given) == len(g) == len(x), name
        if isinstance(module, nn.Embedding):
            grads[f"{name}.weight"] = torch.zeros(len(x), *module.weight.shape).double()
            for i in range(len(x)):
                grads[f"{name}.weight"][i].index_add_(0, given[i], g[i])
            continue
        flat, flat_g = given.reshape(len(x), -1, given.shape[-1]), g.reshape(len(x), -1, g.shape[-1])
        if isinstance(module, nn.LayerNorm):
            normal = nn.functional.layer_norm(flat, flat.shape[-1:], eps=module.eps)
            grads[f"{name}.weight"] = (flat_g * normal).sum(1)
        else:
            grads[f"{name}.weight"] = torch.einsum("bno,bni->boi", flat_g, flat)
        grads[f"{name}.bias"] = flat_g.sum(1)
    return grads


@pytest.mark.parametrize(("name", "keys"), VARIANTS)
def test_per_sample_gradients_as_declared(name: str, keys: dict[str, Any]) -> None:
    net = build(name, **keys).double()
    x, y = torch.randn(4, *SHAPE, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    truth, declared = alone(net, x, y), models[name].per_sample_gradients
    assert all(g.any() for key, g in truth.items() if not key.endswith("attention.k.bias"))  # softmax takes that out
    if "vmap" in declared:
        weights = {k: v.detach() for k, v in net.named_parameters()}

        def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(functional_call(net, weights, (x[None],)), y[None])

        stacked = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y)
        for key, value in truth.items():
            torch.testing.assert_close(stacked[key], value, atol=1e-10, rtol=1e-8, msg=key)
    from_hooks = hooked(net, x, y)
    assert (from_hooks.keys() == truth.keys()) == ("hooks" in declared)
    for key in from_hooks:
        torch.testing.assert_close(from_hooks[key], truth[key], atol=1e-10, rtol=1e-8, msg=key)


def test_models_are_stacked_as_declared() -> None:
    x = torch.randn(2, 4, *SHAPE)
    for name in (LSTM, TRANSFORMER):
        nets = [build(name, seed=seed) for seed in range(2)]
        weights, buffers = stack_module_state(nets)

        def stacked(x: Tensor, base: nn.Module = nets[0], given: Any = (weights, buffers)) -> Tensor:
            return vmap(lambda w, b, x: functional_call(base, (w, b), (x,)))(*given, x)

        if models[name].stackable:
            each = torch.stack([net(part) for net, part in zip(nets, x, strict=True)])
            torch.testing.assert_close(stacked(x), each, atol=1e-5, rtol=1e-4)
        else:
            with pytest.raises(RuntimeError, match="Batching rule not implemented for aten::lstm"):
                stacked(x)


@pytest.mark.parametrize("name", [LSTM, TRANSFORMER])
def test_the_start_is_the_seed_of_torch_and_dropout_acts_in_training_only(name: str) -> None:
    first, again, other = (build(name, seed=seed, dropout=0.5) for seed in (3, 3, 4))
    x = torch.randn(2, *SHAPE)
    assert torch.equal(first.eval()(x), again.eval()(x))
    assert not torch.equal(first(x), other.eval()(x))
    first.train()
    assert not torch.equal(first(x), first(x))


@pytest.mark.parametrize(
    ("name", "keys", "shape", "message"),
    [
        (TRANSFORMER, {"heads": 5}, SHAPE, "width 64 should be a multiple of heads 5"),
        (TRANSFORMER, {"norm": "rms"}, SHAPE, "'norm' should be 'layer' or 'batch', not 'rms'"),
        (TRANSFORMER, {"positions": "sin"}, SHAPE, "'positions' should be"),
        (TRANSFORMER, {"positions": "index", "before": True}, SHAPE, "takes out again with before = true"),
        (LSTM, {"pool": "mean"}, SHAPE, "'pool' should be 'last' or 'max', not 'mean'"),
        (LSTM, {}, (12,), "model 'series-lstm' cannot take an example of shape (12,). It takes a series (T, C)"),
    ],
)
def test_what_cannot_be_gets_one_clear_line(
    name: str, keys: dict[str, Any], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        build(name, shape, **keys)
    assert message in str(error.value)


# ---- what they learn -------------------------------------------------------------------------------------------------
DATA = DataPart(shape=(48, 2))


def waves(count: int, seed: int) -> Batch:
    """Circles (cos, sin) of 24, 12 and 8 steps a turn at any phase, in noise of 0.1; the turn is the class."""
    source, y = torch.Generator().manual_seed(seed), torch.arange(count) % 3
    angle = 2 * math.pi * (torch.rand(count, 1, generator=source) + (1 + y[:, None]) * torch.arange(48) / 24)
    x = torch.stack([angle.cos(), angle.sin()], dim=2)
    return Batch(x + 0.1 * torch.randn(count, *DATA.shape, generator=source), y)


def learned(name: str, task: Task, keys: dict[str, Any], steps: int = 60) -> dict[str, float]:
    net = build(name, task.shape(DATA.shape), task.outputs, **keys)
    train, test = waves(256, 0), waves(96, 1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01 if name == LSTM else 0.002)
    for step in range(steps):
        rows = (torch.arange(32) + 32 * step) % len(train)
        part = Batch(train.x[rows], train.y[rows])
        optimizer.zero_grad()
        task.loss(task.forward(net, part), part).mean().backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        return task.values(task.sums(task.forward(net, test), test))


LEARNERS: list[tuple[str, dict[str, Any]]] = [
    (LSTM, {}), (TRANSFORMER, {}), (TRANSFORMER, {"norm": "batch"}), (TRANSFORMER, {"before": True}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "keys"), LEARNERS)
def test_they_tell_frequencies_apart(name: str, keys: dict[str, Any]) -> None:
    task = tasks["classification"](tasks["classification"].Settings(labels=("slow", "middle", "fast")), DATA)
    assert learned(name, task, {**keys, **({"pool": "max"} if name == LSTM else {})})["accuracy"] > 0.95


@pytest.mark.parametrize(("name", "keys"), LEARNERS)
def test_they_continue_waves_far_better_than_the_last_value(name: str, keys: dict[str, Any]) -> None:
    task = tasks["forecasting"](tasks["forecasting"].Settings(horizon=12), DATA)
    assert learned(name, task, keys)["skill"] > 0.85
