"""The blocks of a transformer (Vaswani et al. 2017, Attention Is All You Need), from which models are put together.

::

    keep = causal(x.shape[1], x.device) & not_padding(ids)  # (B, 1, N, N): who may look at whom
    x = Positions("sine", length, width)(embedding(ids))  # (B, N, D)
    x = EncoderBlock(BlockSettings(width, heads, mlp))(x, keep)  # with a causal `keep` it is a block of GPT

B samples, N tokens of D numbers each, M tokens of the memory that is looked at, h heads of d numbers each. Attention is
written out: the gradient of torch's fused call may differ between runs on CUDA, and has no `vmap` rule on CPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from shared_models.errors import ConfigError
from shared_models.models import ModelSettings
from shared_models.tokens import PAD

Activation = Literal["relu", "gelu", "gelu-tanh", "gelu-quick"]
Norm = Literal["layer", "batch", "rms"]
Position = Literal["none", "index", "normalised", "sine", "learnable"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu-tanh": partial(F.gelu, approximate="tanh"),
    "gelu-quick": lambda x: x * torch.sigmoid(1.702 * x),  # Hendrycks & Gimpel 2016, section 2, and CLIP
}


class AttentionSettings(ModelSettings):
    """Settings of a model with attention.

    Attributes:
        width: numbers per token, a multiple of `heads`.
        heads: attention heads.
    """

    width: PositiveInt
    heads: PositiveInt

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} should be a multiple of heads {self.heads}")
        return self


class PositionedSettings(AttentionSettings):
    """Settings of a model that lets its blocks and positions be chosen.

    Attributes:
        positions: how a token tells its place; see `Positions`.
        norm: `layer` normalises each token, `batch` each feature over all tokens of a batch: then samples mix.
        before: whether a layer's input is normalised, which learns without a warm-up (Xiong et al. 2020); else the sum
            behind it, as in the first papers.
    """

    positions: Position
    norm: Literal["layer", "batch"] = "layer"
    before: bool = False

    @model_validator(mode="after")
    def _positions_are_seen(self) -> Self:
        if self.before and self.norm == "layer" and self.positions in ("index", "normalised"):
            raise ValueError(
                f"positions '{self.positions}' add one number to all of a token's, which norm = 'layer' takes out "
                "again with before = true"
            )
        return self


def causal(n: int, device: torch.device | str | None = None) -> Tensor:
    """Token i may look at tokens 0 to i: (1, 1, N, N) bool."""
    index = torch.arange(n, device=device)
    return (index[:, None] >= index)[None, None]


def not_padding(ids: Tensor) -> Tensor:
    """Nobody may look at padding: ids (B, N) -> (B, 1, 1, N) bool."""
    return (ids != PAD)[:, None, None]


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2).

    Args:
        width: D, of what comes in and of what comes out.
        heads: h.
        dropout: of the attention weights.
        bias: whether the four linear layers have one.
        head_width: d; `width / heads` unless told.
        scale: of the products; 1/sqrt(d) unless told.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        head_width: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        head_width = head_width or width // heads
        self.heads = heads
        self.scale = head_width**-0.5 if scale is None else scale
        self.q = nn.Linear(width, heads * head_width, bias)
        self.k = nn.Linear(width, heads * head_width, bias)
        self.v = nn.Linear(width, heads * head_width, bias)
        self.out = nn.Linear(heads * head_width, width, bias)
        self.dropout = nn.Dropout(dropout)

    def weights(
        self, x: Tensor, memory: Tensor | None = None, keep: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """softmax(q k^T / sqrt(d)) (eq. 1), arguments as for `forward`: (B, h, N, M), rows that sum to 1.

        A row of `keep` that is False everywhere gets zeros.
        """
        memory = x if memory is None else memory
        scores = self.split(self.q(x)) @ self.split(self.k(memory)).transpose(2, 3) * self.scale  # (B, h, N, M)
        if bias is not None:
            scores = scores + bias
        if keep is None:
            return scores.softmax(dim=-1)
        scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)  # finite, for a row that may look nowhere
        return scores.softmax(dim=-1).masked_fill(~keep, 0.0)

    def forward(
        self, x: Tensor, memory: Tensor | None = None, keep: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """softmax(q k^T / sqrt(d)) v, per head.

        Args:
            x: (B, N, D), what looks.
            memory: (B, M, D), what is looked at; `x` itself unless given.
            keep: bool, broadcastable to (B, h, N, M), True where x may look.
            bias: float, broadcastable to (B, h, N, M), added to the scaled products.

        Returns:
            (B, N, D).
        """
        values = self.split(self.v(x if memory is None else memory))  # (B, h, M, d)
        mixed = self.dropout(self.weights(x, memory, keep, bias)) @ values  # (B, h, N, d)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))  # (B, N, D)
        return out

    def split(self, x: Tensor) -> Tensor:
        """(B, N, h d) -> (B, h, N, d)."""
        heads: Tensor = x.unflatten(2, (self.heads, -1)).transpose(1, 2)
        return heads


class MLP(nn.Module):
    """The same two layers for each token (Vaswani et al. 2017, eq. 2): (B, N, D) -> (B, N, D)."""

    def __init__(
        self, width: int, hidden: int, activation: Activation = "relu", dropout: float = 0.0, bias: bool = True
    ) -> None:
        super().__init__()
        self.activation = activation
        self.hidden = nn.Linear(width, hidden, bias)
        self.out = nn.Linear(hidden, width, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """out(activation(hidden(x)))."""
        out: Tensor = self.out(self.dropout(ACTIVATIONS[self.activation](self.hidden(x))))
        return out


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation of each of the D features over all tokens of all samples, padding too: (B, N, D).

    In training samples see each other through it, and tokens see later ones: a decoder with it is causal in
    evaluation only.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        out: Tensor = super().forward(x.transpose(1, 2)).transpose(1, 2)
        return out


NORMS: dict[str, Callable[..., nn.Module]] = {"layer": nn.LayerNorm, "batch": BatchNorm, "rms": nn.RMSNorm}


@dataclass(frozen=True)
class BlockSettings:
    """What encoder and decoder blocks are made of.

    Attributes:
        width: D.
        heads: h.
        mlp: width of the hidden layer.
        activation: of the hidden layer.
        norm: over a token's features (Ba et al. 2016), over all tokens and samples (Ioffe & Szegedy 2015), or by the
            root mean square of a token's features alone (Zhang & Sennrich 2019).
        before: x + layer(norm(x)), which learns without a warm-up (Xiong et al. 2020) and leaves the last sum to be
            normalised by the model; else norm(x + layer(x)), as in Vaswani et al. 2017.
        dropout: of attention weights, of the hidden layer, and of what is added to x. The paper has the last only.
        hidden_dropout: of the hidden layer; `dropout` unless told. BERT, ELECTRA and GPT-2 have none there.
        bias: whether linear layers have one.
        eps: added to the variance in the norms.
        head_width: d; `width / heads` unless told.
        scale: of the products in attention; 1/sqrt(d) unless told.
    """

    width: int
    heads: int
    mlp: int
    activation: Activation = "relu"
    norm: Norm = "layer"
    before: bool = False
    dropout: float = 0.0
    hidden_dropout: float | None = None
    bias: bool = True
    eps: float = 1e-5
    head_width: int | None = None
    scale: float | None = None

    def make_attention(self) -> Attention:
        """One attention layer."""
        return Attention(self.width, self.heads, self.dropout, self.bias, self.head_width, self.scale)

    def make_mlp(self) -> MLP:
        """One MLP."""
        dropout = self.dropout if self.hidden_dropout is None else self.hidden_dropout
        return MLP(self.width, self.mlp, self.activation, dropout, self.bias)

    def make_norm(self) -> nn.Module:
        """One norm."""
        return NORMS[self.norm](self.width, eps=self.eps)


class Block(nn.Module):
    """What both kinds of block have: self-attention and an MLP, each with a norm, added to what comes in."""

    def __init__(self, settings: BlockSettings) -> None:
        super().__init__()
        self.before = settings.before
        self.attention = settings.make_attention()
        self.mlp = settings.make_mlp()
        self.norm1 = settings.make_norm()
        self.norm2 = settings.make_norm()
        self.dropout = nn.Dropout(settings.dropout)

    def add(self, x: Tensor, norm: nn.Module, layer: Callable[[Tensor], Tensor]) -> Tensor:
        """A layer's residual connection, (B, N, D) -> (B, N, D), with the norm before the layer or at the end."""
        out: Tensor = x + self.dropout(layer(norm(x))) if self.before else norm(x + self.dropout(layer(x)))
        return out


class EncoderBlock(Block):
    """Self-attention, then an MLP (Vaswani et al. 2017, section 3.1)."""

    def forward(self, x: Tensor, keep: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """x (B, N, D), `keep` and `bias` as for `Attention` with M = N -> (B, N, D)."""
        x = self.add(x, self.norm1, lambda y: self.attention(y, keep=keep, bias=bias))
        return self.add(x, self.norm2, self.mlp)


class DecoderBlock(Block):
    """Self-attention, attention to the encoder's tokens, then an MLP (Vaswani et al. 2017, section 3.1)."""

    def __init__(self, settings: BlockSettings) -> None:
        super().__init__(settings)
        self.cross = settings.make_attention()
        self.norm3 = settings.make_norm()

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        keep: Tensor | None = None,
        memory_keep: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x (B, N, D), memory (B, M, D) -> (B, N, D); `keep` and `bias` say who in x may look at whom in x."""
        x = self.add(x, self.norm1, lambda y: self.attention(y, keep=keep, bias=bias))
        x = self.add(x, self.norm2, lambda y: self.cross(y, memory, memory_keep))
        return self.add(x, self.norm3, self.mlp)


def sines(points: Tensor, width: int) -> Tensor:
    """sin(p / 10000^(2i/D)) and cos(p / 10000^(2i/D)) in turn (Vaswani et al. 2017, section 3.5): (N,) -> (N, D)."""
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=points.device) / width)
    angles = points[:, None] * rates  # (N, D/2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]


def require_positions(model: str, positions: int | None, length: int) -> None:
    """Raise a ConfigError where a table that has so many rows is too small for texts of this length."""
    if positions is not None and length > positions:
        raise ConfigError(
            f"model '{model}' has {positions} positions, too few for texts of {length} tokens",
            hint="Set positions to at least that, or let texts be shorter",
        )


class Positions(nn.Module):
    """Tells each token its place, by adding to its D numbers; without, attention sees a set: (B, N, D) -> (B, N, D).

    Args:
        kind: `none`; `index`, the number 0, 1, 2, ... to every feature; `normalised`, that over `length - 1`; `sine`,
            see `sines`; `learnable`, a row of a table for each place (Gehring et al. 2017).
        length: the most tokens that there can be; only `index` and `sine` go on beyond it.
        width: D.
    """

    def __init__(self, kind: Position, length: int, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.length = length
        if kind == "learnable":
            self.table = nn.Embedding(length, width)

    def forward(self, x: Tensor) -> Tensor:
        """x + positions."""
        if self.kind == "none":
            return x
        _, n, width = x.shape
        index = torch.arange(n, device=x.device)
        if self.kind == "learnable":
            places = self.table(index.expand(len(x), -1))  # (B, N, D): once a sample, as hooks on modules want it
        elif self.kind == "sine":
            places = sines(index, width)  # (N, D)
        else:
            places = index[:, None] / (max(self.length - 1, 1) if self.kind == "normalised" else 1)  # (N, 1)
        out: Tensor = x + places.to(x.dtype)
        return out


class EncoderDecoder(nn.Module, ABC):
    """What turns one text into another: ids (B, T) int64, 0 is padding, and the target starts with `tokens.BEGIN`."""

    @abstractmethod
    def encode(self, source: Tensor) -> Tensor:
        """(B, T) int64 -> memory (B, T, D)."""

    @abstractmethod
    def decode(self, memory: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Scores of the token that follows each one of the target, which sees no later one.

        Args:
            memory: (B, T, D) from `encode`.
            source: (B, T) int64, says where the memory is of padding.
            target: (B, U) int64.

        Returns:
            (B, U, V) for a vocabulary of V.
        """

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """(B, T) and (B, U) int64 -> (B, U, V)."""
        return self.decode(self.encode(source), source, target)
