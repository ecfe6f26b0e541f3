"""The blocks of a transformer against torch's own layers with the same weights, and who can look at whom in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from shared_models.transformer import (
    MLP,
    Activation,
    Attention,
    BatchNorm,
    BlockSettings,
    DecoderBlock,
    EncoderBlock,
    Norm,
    Position,
    Positions,
    causal,
    not_padding,
    sines,
)

B, N, M, D, H = 3, 5, 7, 16, 4
SMALL = BlockSettings(D, H, 24)
IDS = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 0, 0], [5, 0, 0, 0, 0]])
MEMORY_IDS = torch.tensor([[5, 6, 7, 8, 9, 5, 6], [5, 6, 7, 8, 0, 0, 0], [5, 0, 0, 0, 0, 0, 0]])


def randomised(module: nn.Module, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    for parameter in module.parameters():  # torch starts biases at 0 and scales at 1
        nn.init.normal_(parameter, std=0.5)
    return module


def x(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (B, N, D)), generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- torch's layers --------------------------------------------------------------------------------------------------
def attention_weights(theirs: nn.MultiheadAttention, prefix: str = "") -> dict[str, Tensor]:
    """Under our names: theirs hold the three projections as one tensor."""
    state = {}
    for kind in ("weight", "bias"):
        parts = theirs.get_parameter(f"in_proj_{kind}").chunk(3)
        state |= {f"{prefix}{name}.{kind}": part for name, part in zip("qkv", parts, strict=True)}
        state[f"{prefix}out.{kind}"] = theirs.out_proj.get_parameter(kind)
    return state


def block_weights(theirs: Any) -> dict[str, Tensor]:
    """Of a layer of an encoder or decoder."""
    state = attention_weights(theirs.self_attn, "attention.")
    if hasattr(theirs, "multihead_attn"):
        state |= attention_weights(theirs.multihead_attn, "cross.")
    names = {"linear1": "mlp.hidden", "linear2": "mlp.out", "norm1": "norm1", "norm2": "norm2", "norm3": "norm3"}
    kept = {key: value for key, value in theirs.state_dict().items() if key.partition(".")[0] in names}
    return state | {f"{names[key.partition('.')[0]]}.{key.partition('.')[2]}": value for key, value in kept.items()}


@pytest.mark.parametrize("mask", ["none", "causal", "padding", "both"])
def test_self_attention_is_torchs(mask: str) -> None:
    theirs = randomised(nn.MultiheadAttention(D, H, batch_first=True))
    ours = Attention(D, H)
    ours.load_state_dict(attention_weights(theirs))
    keep, hidden = None, {}
    if mask in ("causal", "both"):
        keep, hidden["attn_mask"] = causal(N), ~causal(N)[0, 0]
    if mask in ("padding", "both"):
        keep = not_padding(IDS) if keep is None else keep & not_padding(IDS)
        hidden["key_padding_mask"] = IDS == 0
    out, weights = theirs(x(), x(), x(), average_attn_weights=False, **hidden)
    torch.testing.assert_close(ours(x(), keep=keep), out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.weights(x(), keep=keep), weights, atol=1e-5, rtol=1e-5)


def test_attention_to_a_memory_with_a_bias_is_torchs() -> None:
    theirs = randomised(nn.MultiheadAttention(D, H, batch_first=True))
    ours = Attention(D, H)
    ours.load_state_dict(attention_weights(theirs))
    memory, bias = x(B, M, D, seed=1), x(B, H, N, M, seed=2)
    hidden = torch.zeros(B, M).masked_fill(MEMORY_IDS == 0, -math.inf)
    expected, _ = theirs(x(), memory, memory, attn_mask=bias.flatten(0, 1), key_padding_mask=hidden)
    torch.testing.assert_close(ours(x(), memory, not_padding(MEMORY_IDS), bias), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, None])
def test_heads_may_have_any_width_and_products_any_scale(scale: float | None) -> None:
    ours = randomised(Attention(D, 3, bias=False, head_width=5, scale=scale))
    assert {key: tuple(value.shape) for key, value in ours.state_dict().items()} == {
        "q.weight": (15, D), "k.weight": (15, D), "v.weight": (15, D), "out.weight": (D, 15),
    }  # fmt: skip
    q, k, v = (layer(0.3 * x()).reshape(B, N, 3, 5).transpose(1, 2) for layer in (ours.q, ours.k, ours.v))
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale or 5**-0.5)
    expected = ours.out(fused.transpose(1, 2).reshape(B, N, 15))
    torch.testing.assert_close(ours(0.3 * x(), keep=causal(N)), expected, atol=1e-5, rtol=1e-5)


GELU_TANH = nn.GELU("tanh")


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(("activation", "theirs"), [("relu", "relu"), ("gelu", "gelu"), ("gelu-tanh", GELU_TANH)])
def test_an_encoder_block_is_torchs(before: bool, activation: Activation, theirs: Any) -> None:
    layer = nn.TransformerEncoderLayer(D, H, 24, 0.0, theirs, batch_first=True, norm_first=before)
    randomised(layer)
    block = EncoderBlock(BlockSettings(D, H, 24, activation, before=before))
    block.load_state_dict(block_weights(layer))
    expected = layer(x(), src_mask=~causal(N)[0, 0], src_key_padding_mask=IDS == 0)
    torch.testing.assert_close(block(x(), causal(N) & not_padding(IDS)), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(block(x()), layer(x()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(("activation", "theirs"), [("relu", "relu"), ("gelu", "gelu"), ("gelu-tanh", GELU_TANH)])
def test_a_decoder_block_is_torchs(before: bool, activation: Activation, theirs: Any) -> None:
    layer = nn.TransformerDecoderLayer(D, H, 24, 0.0, theirs, batch_first=True, norm_first=before)
    randomised(layer)
    block = DecoderBlock(BlockSettings(D, H, 24, activation, before=before))
    block.load_state_dict(block_weights(layer))
    memory = x(B, M, D, seed=1)
    masks = {"tgt_key_padding_mask": IDS == 0, "memory_key_padding_mask": MEMORY_IDS == 0}
    expected = layer(x(), memory, tgt_mask=~causal(N)[0, 0], **masks)
    ours = block(x(), memory, causal(N) & not_padding(IDS), not_padding(MEMORY_IDS))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(block(x(), memory), layer(x(), memory), atol=1e-5, rtol=1e-5)


# ---- masks -----------------------------------------------------------------------------------------------------------
def test_masks_by_hand() -> None:
    assert causal(3).tolist() == [[[[True, False, False], [True, True, False], [True, True, True]]]]
    assert not_padding(torch.tensor([[1, 7, 0], [0, 0, 0]])).tolist() == [[[[True, True, False]]], [[[False] * 3]]]


def test_who_may_look_nowhere_gets_zeros_and_a_finite_gradient() -> None:
    attention = randomised(Attention(D, H))
    ids = torch.tensor([[0] * M, [0] * M, [5] * M])
    memory = x(B, M, D, seed=1).requires_grad_()
    assert not attention.weights(x(), memory, not_padding(ids))[:2].any()
    out = attention(x(), memory, not_padding(ids))
    torch.testing.assert_close(out[:2], attention.out.bias.expand(2, N, D))
    out.square().sum().backward()
    assert memory.grad is not None
    assert not memory.grad[:2].any()
    assert memory.grad[2].any()
    assert all(p.grad.isfinite().all() for p in attention.parameters())


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_later_token_never_changes_an_earlier_output(norm: Norm, before: bool) -> None:
    settings = BlockSettings(D, H, 24, norm=norm, before=before)
    for block, more in ((EncoderBlock(settings), ()), (DecoderBlock(settings), (x(B, M, D, seed=1),))):
        randomised(block)
        for i in range(1, N):
            other = torch.cat([x()[:, :i], x(seed=9)[:, i:]], dim=1)
            first, second = block(x(), *more, causal(N)), block(other, *more, causal(N))
            assert torch.equal(first[:, :i], second[:, :i])
            assert (first[:, i:] != second[:, i:]).any(dim=2).all()


def test_what_is_in_padding_never_changes_an_output_that_is_kept() -> None:
    there, memory = (IDS != 0)[..., None], x(B, M, D, seed=1)
    masks = causal(N) & not_padding(IDS), not_padding(MEMORY_IDS)
    block = randomised(DecoderBlock(SMALL))
    other = torch.where(there, x(), 100 * x(seed=9))
    beyond = torch.where((MEMORY_IDS != 0)[..., None], memory, 100 * x(B, M, D, seed=8))
    first, second = block(x(), memory, *masks), block(other, beyond, *masks)
    assert torch.equal(first * there, second * there)
    assert not torch.equal(first, second)


# ---- norms -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(("norm", "mixes"), [("layer", False), ("rms", False), ("batch", True)])
def test_only_batch_norm_lets_samples_see_each_other(norm: Norm, mixes: bool, before: bool) -> None:
    block = randomised(EncoderBlock(BlockSettings(D, H, 24, norm=norm, before=before))).double()
    first = x(dtype=torch.float64)
    other = torch.cat([first[:1], 10 * x(2, N, D, seed=9, dtype=torch.float64)])
    moved = (block(first)[0] - block(other)[0]).abs().max()
    assert moved > 1e-3 if mixes else moved < 1e-12
    block.eval()
    assert (block(first)[0] - block(other)[0]).abs().max() < 1e-12


def test_batch_norm_is_of_each_feature_over_all_tokens_of_all_samples() -> None:
    norm = BatchNorm(D)
    out = norm(3 + 2 * x()).flatten(0, 1)  # (B N, D)
    torch.testing.assert_close(out.mean(dim=0), torch.zeros(D), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std(dim=0, correction=0), torch.ones(D), atol=1e-4, rtol=0)
    torch.testing.assert_close(norm.running_mean, 0.1 * (3 + 2 * x()).mean(dim=(0, 1)))


def test_the_other_norms_are_of_each_token() -> None:
    settings = {"eps": 0.1, "width": D, "heads": H, "mlp": 1}
    layer, rms = (randomised(BlockSettings(norm=norm, **settings).make_norm()) for norm in ("layer", "rms"))
    centred = x() - x().mean(dim=2, keepdim=True)
    expected = centred / (centred.square().mean(dim=2, keepdim=True) + 0.1).sqrt() * layer.weight + layer.bias
    torch.testing.assert_close(layer(x()), expected)
    torch.testing.assert_close(rms(x()), x() / (x().square().mean(dim=2, keepdim=True) + 0.1).sqrt() * rms.weight)


# ---- positions -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("width", [6, 7])
def test_sine_positions_by_the_papers_formula(width: int) -> None:
    table = torch.zeros(9, width)
    for p in range(9):
        for j in range(width):
            angle = p / 10000 ** (2 * (j // 2) / width)
            table[p, j] = math.cos(angle) if j % 2 else math.sin(angle)
    torch.testing.assert_close(sines(torch.arange(9), width), table)
    torch.testing.assert_close(Positions("sine", 9, width)(x(2, 5, width)), x(2, 5, width) + table[:5])


def test_the_other_positions_by_hand() -> None:
    places = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])[:, None]
    assert torch.equal(Positions("none", 9, D)(x()), x())
    torch.testing.assert_close(Positions("index", 9, D)(x()), x() + places)
    torch.testing.assert_close(Positions("normalised", 9, D)(x()), x() + places / 8)
    torch.testing.assert_close(Positions("normalised", 1, D)(x(B, 1, D)), x(B, 1, D))
    learned = Positions("learnable", 9, D)
    torch.testing.assert_close(learned(x()), x() + learned.table.weight[:5])


@pytest.mark.parametrize("kind", ["none", "index", "normalised", "sine", "learnable"])
def test_without_positions_attention_sees_a_set(kind: Position) -> None:
    torch.manual_seed(0)
    positions, block, order = Positions(kind, N, D), EncoderBlock(SMALL), torch.tensor([3, 0, 4, 1, 2])
    moved = (block(positions(x()))[:, order] - block(positions(x()[:, order]))).abs().max()
    assert moved < 1e-5 if kind == "none" else moved > 1e-2


# ---- what federated training asks of them ----------------------------------------------------------------------------
class Model(nn.Module):
    """A decoder block with positions in front, and masks made from ids."""

    def __init__(self, kind: Position, norm: Norm, before: bool) -> None:
        super().__init__()
        self.positions = Positions(kind, N, D)
        self.block = DecoderBlock(BlockSettings(D, H, 24, "gelu", norm, before))

    def forward(self, x: Tensor, memory: Tensor, ids: Tensor, memory_ids: Tensor) -> Tensor:
        keep = causal(ids.shape[1]) & not_padding(ids)
        out: Tensor = self.block(self.positions(x), memory, keep, not_padding(memory_ids))
        return out


@pytest.mark.parametrize(
    ("kind", "norm", "before"), [("learnable", "layer", False), ("sine", "rms", True), ("normalised", "layer", True)]
)
def test_per_sample_gradients_equal_a_loop(kind: Position, norm: Norm, before: bool) -> None:
    model = randomised(Model(kind, norm, before)).double()
    batch = x(dtype=torch.float64), x(B, M, D, seed=1, dtype=torch.float64), IDS, MEMORY_IDS

    def loss(weights: dict[str, Tensor], *sample: Tensor) -> Tensor:
        return functional_call(model, weights, tuple(part[None] for part in sample)).square().sum()

    weights = {key: value.detach() for key, value in model.named_parameters()}
    stacked = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))(weights, *batch)
    for i in range(B):
        model.zero_grad()
        model(*(part[i : i + 1] for part in batch)).square().sum().backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(stacked[key][i], parameter.grad, atol=1e-8, rtol=1e-8, msg=key)


@pytest.mark.parametrize("kind", ["none", "index", "normalised", "sine", "learnable"])
def test_no_operation_is_in_place(in_place: Any, kind: Position) -> None:
    model = Model(kind, "layer", False)
    with in_place() as mode:
        model(x(), x(B, M, D, seed=1), IDS, MEMORY_IDS)
    assert mode.seen == []


@pytest.mark.parametrize(
    ("make", "places"),
    [
        (lambda p: Attention(D, H, p), 1),  # the weights
        (lambda p: MLP(D, 24, dropout=p), 1),  # the hidden layer
        (lambda p: EncoderBlock(BlockSettings(D, H, 24, dropout=p)), 4),  # both, and what each adds to x
        (lambda p: EncoderBlock(BlockSettings(D, H, 24, dropout=p, hidden_dropout=0.0)), 3),
    ],
)
def test_dropout_is_in_training_only(make: Callable[[float], nn.Module], places: int) -> None:
    torch.manual_seed(0)
    module, calls = make(0.5), []
    for part in module.modules():
        if isinstance(part, nn.Dropout) and part.p:
            part.register_forward_hook(lambda *_: calls.append(1))
    assert not torch.equal(module(x()), module(x()))
    assert len(calls) == 2 * places
    module.eval()
    assert torch.equal(module(x()), module(x()))
