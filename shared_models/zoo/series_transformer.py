"""Transformer for series: patches of steps become tokens, all tokens together say the answer (Nie et al. 2023).

========  ======  =====  ====  =====  =====  =======  ============  ===================================
size      layers  width  mlp   heads  patch  dropout  M parameters  from
========  ======  =====  ====  =====  =====  =======  ============  ===================================
tiny      2       64     128   4      4      0        0.1           ours
tst       3       64     256   8      1      0.1      0.3           Zerveas et al. 2021, their code
patchtst  3       128    256   16     16     0.2      0.4           Nie et al. 2023, theirs for weather
========  ======  =====  ====  =====  =====  =======  ============  ===================================

Parameters for 10 outputs at (T, C) = (48, 3), (144, 9) and (336, 7). As in Zerveas et al. a token holds all C numbers
of its steps (Nie et al. give each channel tokens of its own, which overlap by half), and the head is a linear layer on
all tokens. Both papers normalise over the batch, `norm = "batch"`; the default here is over each token, so that samples
do not mix.
"""

from __future__ import annotations

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from shared_models.models import Shape, model
from shared_models.transformer import BlockSettings, EncoderBlock, Position, PositionedSettings, Positions


class SeriesTransformerSettings(PositionedSettings):
    """The columns of the table above, and what a lecture compares.

    Attributes:
        layers: transformer blocks.
        width: numbers per token (D), a multiple of `heads`.
        mlp: width of a block's hidden layer.
        heads: attention heads.
        patch: steps (P) that become one token; 1: a token for each step.
        dropout: after the positions, the attention weights and layers; 0 is none.
        positions: how a token tells its place; see `shared_models.transformer.Positions`.
        norm: `layer` normalises each token, `batch` each feature over all tokens of a batch: then samples mix.
        before: whether a layer's input is normalised, which deep ones need to learn without a warm-up (Xiong et al.
            2020); else the sum behind it, as in both papers.
    """

    layers: PositiveInt
    mlp: PositiveInt
    patch: PositiveInt
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    positions: Position = "learnable"


class SeriesTransformer(nn.Module):
    """Patches, positions, blocks, and a linear layer on all tokens; N = T / P tokens, rounded up."""

    def __init__(self, settings: SeriesTransformerSettings, shape: Shape, outputs: int) -> None:
        super().__init__()
        length, channels = shape
        self.patch = settings.patch
        self.fill = -length % settings.patch
        tokens = (length + self.fill) // settings.patch
        block = BlockSettings(
            settings.width,
            settings.heads,
            settings.mlp,
            activation="gelu",
            norm=settings.norm,
            before=settings.before,
            dropout=settings.dropout,
        )
        self.embedding = nn.Linear(settings.patch * channels, settings.width)
        self.positions = Positions(settings.positions, tokens, settings.width)
        self.dropout = nn.Dropout(settings.dropout)
        self.blocks = nn.ModuleList(EncoderBlock(block) for _ in range(settings.layers))
        self.norm = block.make_norm() if settings.before else nn.Identity()
        self.head = nn.Linear(tokens * settings.width, outputs)

    def tokens(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, N, D); where P does not divide T, the first step is repeated before itself."""
        if self.fill:
            x = torch.cat([x[:, :1].expand(-1, self.fill, -1), x], dim=1)
        patches = x.unflatten(1, (-1, self.patch)).flatten(2)  # (B, N, P C)
        tokens: Tensor = self.dropout(self.positions(self.embedding(patches)))
        return tokens

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, outputs)."""
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        said: Tensor = self.head(self.norm(x).flatten(1))
        return said


@model(
    "series-transformer",
    settings=SeriesTransformerSettings,
    sizes={
        "tiny": {"layers": 2, "width": 64, "mlp": 128, "heads": 4, "patch": 4},
        "tst": {"layers": 3, "width": 64, "mlp": 256, "heads": 8, "patch": 1, "dropout": 0.1},
        "patchtst": {"layers": 3, "width": 128, "mlp": 256, "heads": 16, "patch": 16, "dropout": 0.2},
    },
    paper="Nie et al. 2023, A Time Series is Worth 64 Words: Long-term Forecasting with Transformers",
    tasks=("forecasting", "classification"),
    inputs=("series",),
    family="series",
    notes="Sees all steps at once, so what happened far back counts as much; `patch` steps at a time keep long series "
    "cheap. Attention costs the square of the number of patches, and the head grows with it.",
    usual={"tiny": (48, 3), "tst": (144, 9), "patchtst": (336, 7)},
)
def build(settings: SeriesTransformerSettings, shape: Shape, outputs: int) -> nn.Module:
    """Series (B, T, C) -> (B, outputs)."""
    return SeriesTransformer(settings, shape, outputs)
