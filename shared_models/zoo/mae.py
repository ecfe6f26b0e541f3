"""Masked autoencoder (He et al. 2022): a ViT encodes the visible patches alone, a light decoder paints the others.

====  ======  =====  =====  =======  =============  ============  ==============================
size  layers  width  patch  decoder  decoder width  M parameters  from
====  ======  =====  =====  =======  =============  ============  ==============================
tiny  3       64     2      1        32             0.1           ours, for images of about 8x8
b16   12      768    16     8        512            111.9         He et al. 2022, section 4
l16   24      1024   16     8        512            329.5         He et al. 2022, section 4
h14   32      1280   14     8        512            657.1         He et al. 2022, section 4
====  ======  =====  =====  =======  =============  ============  ==============================

Parameters at 224x224x3, but for `tiny` (8x8x1). The encoder has the entries of `vit`, by name and shape, and `tiny` and
`b16` are those sizes there: what was trained here goes on there. That is why both tables of positions are trained too;
they start as the paper's, which stay what they are.
"""

from __future__ import annotations

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from shared_models.backbone import MaskedAutoencoder
from shared_models.models import Shape, model
from shared_models.zoo.vit import Block, Encoder, ViTSettings, initialise, require_patches


class MAESettings(ViTSettings):
    """A ViT and the decoder behind it, whose MLPs are four times as wide as its tokens.

    Attributes:
        decoder_layers: transformer blocks.
        decoder_width: numbers per token, a multiple of `decoder_heads`.
        decoder_heads: attention heads.
    """

    decoder_layers: PositiveInt = 8
    decoder_width: PositiveInt = 512
    decoder_heads: PositiveInt = 16

    @model_validator(mode="after")
    def _widths_fit(self) -> MAESettings:
        if self.decoder_width % self.decoder_heads:
            raise ValueError(
                f"decoder_width {self.decoder_width} should be a multiple of decoder_heads {self.decoder_heads}"
            )
        if self.width % 4 or self.decoder_width % 4:
            raise ValueError("width and decoder_width should be multiples of 4: sine and cosine, down and across")
        return self

    @property
    def decoder(self) -> ViTSettings:
        """The decoder's blocks."""
        return ViTSettings(
            layers=self.decoder_layers,
            width=self.decoder_width,
            mlp=4 * self.decoder_width,
            heads=self.decoder_heads,
            patch=self.patch,
            position_std=self.position_std,
            dropout=self.dropout,
        )


class Decoder(nn.Module):
    """Visible tokens to pixels: (B, 1 + V, D), order (B, N) -> (B, N, patch * patch * C), rows before channels."""

    def __init__(self, settings: MAESettings, grid: tuple[int, int], channels: int) -> None:
        super().__init__()
        width = settings.decoder_width
        self.grid = grid
        self.embed = nn.Linear(settings.width, width)
        self.mask_token = nn.Embedding(1, width)
        self.positions = nn.Embedding(1 + grid[0] * grid[1], width)
        self.blocks = nn.Sequential(*(Block(settings.decoder) for _ in range(settings.decoder_layers)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = nn.Linear(width, settings.patch**2 * channels)

    def forward(self, tokens: Tensor, order: Tensor) -> Tensor:
        """Mask tokens where nothing was seen, all in their own places again, positions added, blocks."""
        x = self.embed(tokens)  # (B, 1 + V, D')
        missing = order.shape[1] + 1 - x.shape[1]
        nothing = self.mask_token(order.new_zeros(len(order), missing))  # (B, N - V, D')
        patches = _taken(torch.cat([x[:, 1:], nothing], dim=1), order.argsort(dim=1))  # (B, N, D')
        ids = torch.arange(1 + order.shape[1], device=x.device).expand(len(x), -1)  # (B, 1 + N)
        x = torch.cat([x[:, :1], patches], dim=1) + self.positions(ids)
        pixels: Tensor = self.out(self.norm(self.blocks(x)))[:, 1:]
        return pixels


class MAE(Encoder, MaskedAutoencoder):
    """A ViT without a head, and a `Decoder`; called, it gives the tokens of the whole image, (B, 1 + N, D)."""

    def __init__(self, settings: MAESettings, shape: Shape) -> None:
        super().__init__(settings, shape)
        self.patch = settings.patch
        self.grid = (shape[1] // settings.patch, shape[2] // settings.patch)
        self.decoder = Decoder(settings, self.grid, shape[0])
        self.apply(initialise)
        for table in (self.positions, self.decoder.positions):
            with torch.no_grad():
                table.weight.copy_(sine_cosine(self.grid, table.embedding_dim))

    def reconstruct(self, x: Tensor, order: Tensor, visible: int) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); see `MaskedAutoencoder`."""
        patches = self.patches(x).flatten(2).transpose(1, 2)  # (B, N, D)
        seen = order[:, :visible]  # (B, V)
        first = order.new_zeros(len(order), 1)
        tokens = torch.cat([self.class_token(first), _taken(patches, seen)], dim=1)  # (B, 1 + V, D)
        tokens = self.dropout(tokens + self.positions(torch.cat([first, 1 + seen], dim=1)))
        pixels = self.decoder(self.norm(self.blocks(tokens)), order)  # (B, N, p * p * C)
        squares = pixels.unflatten(2, (self.patch, self.patch, x.shape[1])).unflatten(1, self.grid)
        whole: Tensor = squares.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return whole


def sine_cosine(grid: tuple[int, int], width: int) -> Tensor:
    """Positions (1 + h * w, width): zero for the class token, then row by row those of the patches.

    A quarter each of the numbers: sine and cosine of the column, sine and cosine of the row, at frequencies from 1 down
    to 1/10000 (Vaswani et al. 2017, section 3.5).
    """
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    down, across = (torch.arange(side, dtype=torch.float64)[:, None] * frequencies for side in grid)
    rows, columns = (torch.cat([angle.sin(), angle.cos()], dim=1) for angle in (down, across))
    places = torch.cat([columns[None].expand(grid[0], -1, -1), rows[:, None].expand(-1, grid[1], -1)], dim=2)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), places.flatten(0, 1)]).float()


def _taken(tokens: Tensor, ids: Tensor) -> Tensor:
    """(B, N, D), (B, K) -> (B, K, D)."""
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))


# The authors' keys -> ours.
RENAMES = (
    (r"^patch_embed\.proj\.", "patches."),
    (r"^cls_token$", "class_token.weight"),
    (r"^pos_embed$", "positions.weight"),
    (r"^mask_token$", "decoder.mask_token.weight"),
    (r"^decoder_pos_embed$", "decoder.positions.weight"),
    (r"^decoder_blocks\.", "decoder.blocks."),
    (r"^decoder_embed\.", "decoder.embed."),
    (r"^decoder_norm\.", "decoder.norm."),
    (r"^decoder_pred\.", "decoder.out."),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"\.mlp\.fc1\.", ".hidden."),
    (r"\.mlp\.fc2\.", ".out."),
)


@model(
    "mae",
    settings=MAESettings,
    sizes={
        "tiny": {
            "layers": 3, "width": 64, "mlp": 128, "heads": 4, "patch": 2, "decoder_layers": 1, "decoder_width": 32,
            "decoder_heads": 4,
        },
        "b16": {"layers": 12, "width": 768, "mlp": 3072, "heads": 12, "patch": 16},
        "l16": {"layers": 24, "width": 1024, "mlp": 4096, "heads": 16, "patch": 16},
        "h14": {"layers": 32, "width": 1280, "mlp": 5120, "heads": 16, "patch": 14},
    },
    paper="He et al. 2022, Masked Autoencoders Are Scalable Vision Learners",
    tasks=("masked-autoencoding",),
    heads=("decoder.*",),
    renames=RENAMES,
    notes="Learns from images without labels. Its encoder is that of `vit`, where it goes on; three quarters of the "
    "patches are never computed, so it is several times as fast as `vit` with the same task.",
    usual={"tiny": (1, 8, 8)} | dict.fromkeys(("b16", "l16", "h14"), (3, 224, 224)),
)  # fmt: skip
def build(settings: MAESettings, shape: Shape, outputs: int) -> nn.Module:
    """A `MaskedAutoencoder`, whatever `outputs` says.

    Raises:
        ConfigError: the patch does not divide the image; names the patches that do.
    """
    require_patches("mae", settings, shape)
    return MAE(settings, shape)
