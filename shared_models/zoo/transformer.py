"""The transformer (Vaswani et al. 2017): an encoder and a decoder of nothing but attention and MLPs.

====  ======  =====  ====  =====  =======  ============  ============================
size  layers  width  mlp   heads  dropout  M parameters  from
====  ======  =====  ====  =====  =======  ============  ============================
tiny  2 + 2   64     128   4      0        0.2           ours, for texts of about 32
base  6 + 6   512    2048  8      0.1      63.1          Vaswani et al. 2017, Table 3
big   6 + 6   1024   4096  16     0.3      214.2         the same
====  ======  =====  ====  =====  =======  ============  ============================

Parameters with a vocabulary of 37,000 (the paper says 65 and 213), of 293 for `tiny`. One table embeds the source and
the target and gives the scores (section 3.4).
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from shared_models.models import Shape, model
from shared_models.tokens import Bytes
from shared_models.transformer import (
    BlockSettings,
    DecoderBlock,
    EncoderBlock,
    EncoderDecoder,
    Position,
    PositionedSettings,
    Positions,
    causal,
    not_padding,
)


class TransformerSettings(PositionedSettings):
    """The columns of the table above, and what a lecture compares.

    Attributes:
        encoder: layers (N in the paper).
        decoder: layers.
        width: numbers per token (d_model), a multiple of `heads`.
        mlp: width of a layer's hidden layer (d_ff).
        heads: attention heads (h).
        dropout: after the embeddings, the attention weights and layers; 0 is none.
        positions: how a token tells its place; see `shared_models.transformer.Positions`.
        norm: `layer` normalises each token, `batch` each feature over all tokens of a batch: then samples mix.
        before: whether a layer's input is normalised, which learns without a warm-up (Xiong et al. 2020); else the sum
            behind it, as in the paper.
    """

    encoder: NonNegativeInt
    decoder: PositiveInt
    mlp: PositiveInt
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    positions: Position = "sine"


class Transformer(EncoderDecoder):
    """Figure 1 of the paper."""

    def __init__(self, settings: TransformerSettings, length: int, vocabulary: int) -> None:
        super().__init__()
        block = BlockSettings(
            settings.width,
            settings.heads,
            settings.mlp,
            norm=settings.norm,
            before=settings.before,
            dropout=settings.dropout,
        )
        self.scale = math.sqrt(settings.width)
        self.embedding = nn.Embedding(vocabulary, settings.width)
        self.source_positions = Positions(settings.positions, length, settings.width)
        self.target_positions = Positions(settings.positions, length, settings.width)
        self.encoder = nn.ModuleList(EncoderBlock(block) for _ in range(settings.encoder))
        self.decoder = nn.ModuleList(DecoderBlock(block) for _ in range(settings.decoder))
        self.encoder_norm = block.make_norm() if settings.before else nn.Identity()
        self.decoder_norm = block.make_norm() if settings.before else nn.Identity()
        self.dropout = nn.Dropout(settings.dropout)
        self.apply(initialise)

    def encode(self, source: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)."""
        x = self.dropout(self.source_positions(self.scale * self.embedding(source)))
        for block in self.encoder:
            x = block(x, not_padding(source))
        memory: Tensor = self.encoder_norm(x)
        return memory

    def decode(self, memory: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """(B, T, D), (B, T), (B, U) -> (B, U, V)."""
        x = self.dropout(self.target_positions(self.scale * self.embedding(target)))
        keep = causal(target.shape[1], target.device) & not_padding(target)
        for block in self.decoder:
            x = block(x, memory, keep, not_padding(source))
        return F.linear(self.decoder_norm(x), self.embedding.weight)


def initialise(module: nn.Module) -> None:
    """As the authors' code: Xavier uniform, and tokens of length 1, so of variance 1 once they are scaled."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)


@model(
    "transformer",
    settings=TransformerSettings,
    sizes={
        "tiny": {"encoder": 2, "decoder": 2, "width": 64, "mlp": 128, "heads": 4},
        "base": {"encoder": 6, "decoder": 6, "width": 512, "mlp": 2048, "heads": 8, "dropout": 0.1},
        "big": {"encoder": 6, "decoder": 6, "width": 1024, "mlp": 4096, "heads": 16, "dropout": 0.3},
    },
    paper="Vaswani et al. 2017, Attention Is All You Need",
    tasks=("translation", "denoising"),
    inputs=("tokens",),
    heads=(),
    per_sample_gradients=("vmap", "loop"),
    family="sequence to sequence",
    notes="The plain one, with positions and norms to choose from, for comparison. With the norm behind each layer, as "
    "in the paper, deep ones need a warm-up of the learning rate; `before = true` does not.",
    usual={"tiny": (32, Bytes.size), "base": (256, 37000), "big": (256, 37000)},
)
def build(settings: TransformerSettings, shape: Shape, outputs: int) -> nn.Module:
    """An `EncoderDecoder` for texts of at most T tokens, `outputs` being the vocabulary V again."""
    return Transformer(settings, *shape)
