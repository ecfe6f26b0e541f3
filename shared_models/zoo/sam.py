"""Segment Anything (Kirillov et al. 2023): a ViT embeds the image once, a light decoder answers prompts about it.

====  ======  =====  =====  =====  ======  ========  =========  ============  ============================
size  layers  width  heads  patch  window  global    embedding  M parameters  from
====  ======  =====  =====  =====  ======  ========  =========  ============  ============================
tiny  3       64     4      8      4       the last  128        0.8           ours, for 32 to 128 pixels
b     12      768    12     16     14      4 of 12   256        93.7          published weights, ViT-B
l     24      1024   16     16     14      4 of 24   256        312.3         published weights, ViT-L
h     32      1280   16     16     14      4 of 32   256        641.1         published weights, ViT-H
====  ======  =====  =====  =====  ======  ========  =========  ============  ============================

Parameters at 1024x1024x3, but for `tiny` (64x64x3). The image encoder is that of Li et al. 2022 (ViTDet): attention
within windows in most blocks, over the whole image in the `global` ones, with decomposed relative positions. The state
dict has the keys of the published weights, which load at the images they were made for, 1024x1024; at another size the
positions of the whole image do not fit and stay as initialised. By those keys the positions are `nn.Parameter` tables,
here and nowhere else in the zoo.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from shared_models.errors import ConfigError
from shared_models.models import ModelSettings, Shape, model
from shared_models.promptable import Masks, Promptable
from shared_models.sam_decoder import ChannelNorm, MaskDecoder, PromptEncoder, TokenMLP


class SAMSettings(ModelSettings):
    """The image encoder, and the decoder after it.

    Attributes:
        layers: blocks of the image encoder.
        width: numbers per token there, a multiple of `heads`.
        mlp: width of a block's hidden layer.
        heads: attention heads of a block.
        patch: side of a square patch in pixels; must divide both sides of the image.
        window: side of the square windows, in patches, that most blocks attend within.
        global_layers: blocks that attend over the whole image, counted from 0.
        embedding: channels of the image embedding and width of the decoder, a multiple of 8 and of twice its heads.
        decoder_layers: two-way blocks.
        decoder_mlp: width of their hidden layer.
        decoder_heads: their attention heads.
    """

    layers: PositiveInt
    width: PositiveInt
    mlp: PositiveInt
    heads: PositiveInt
    patch: PositiveInt
    window: PositiveInt
    global_layers: tuple[NonNegativeInt, ...]
    embedding: int = Field(256, gt=0, multiple_of=8)
    decoder_layers: PositiveInt = 2
    decoder_mlp: PositiveInt = 2048
    decoder_heads: PositiveInt = 8

    @model_validator(mode="after")
    def _fit_together(self) -> SAMSettings:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} should be a multiple of heads {self.heads}")
        if self.embedding % (2 * self.decoder_heads):
            raise ValueError(
                f"embedding {self.embedding} should be a multiple of twice the decoder_heads {self.decoder_heads}"
            )
        if max(self.global_layers, default=0) >= self.layers:
            raise ValueError(
                f"global_layers names block {max(self.global_layers)}, the last of {self.layers} is {self.layers - 1}"
            )
        return self


class GridAttention(nn.Module):
    """Self-attention over a grid with decomposed relative positions (Li et al. 2022, section 3): (B, h, w, D) -> same.

    The score of query i and key j is q_i k_j / sqrt(d) + q_i R^h[row_i - row_j] + q_i R^w[column_i - column_j].
    """

    def __init__(self, width: int, heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid[0] - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid[1] - 1, width // heads))

    def forward(self, x: Tensor) -> Tensor:
        """Softmax of the scores, times the values, per head of d numbers."""
        b, h, w, width = x.shape
        qkv = self.qkv(x).reshape(b, h * w, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, d), N = h w
        scores = q @ k.transpose(2, 3) / math.sqrt(width // self.heads) + self._relative(q, h, w)
        out: Tensor = self.proj((torch.softmax(scores, dim=-1) @ v).transpose(1, 2).reshape(b, h, w, width))
        return out

    def _relative(self, q: Tensor, h: int, w: int) -> Tensor:
        """(B, heads, N, d) -> (B, heads, N, N)."""
        grid = q.unflatten(2, (h, w))
        rows = torch.einsum("bnhwd,hkd->bnhwk", grid, _apart(self.rel_pos_h, h))  # (B, heads, h, w, h)
        columns = torch.einsum("bnhwd,wkd->bnhwk", grid, _apart(self.rel_pos_w, w))  # (B, heads, h, w, w)
        return (rows[..., None] + columns[..., None, :]).flatten(4).flatten(2, 3)


def _apart(table: Tensor, side: int) -> Tensor:
    """Rows of a table (2 side - 1, d) of distances -> (side, side, d), by the distance of each query and key."""
    places = torch.arange(side, device=table.device)
    return table[places[:, None] - places + side - 1]


class WindowBlock(nn.Module):
    """x + attention(norm1(x)) within windows of a side, or over the whole grid; then x + mlp(norm2(x))."""

    def __init__(self, settings: SAMSettings, grid: tuple[int, int], window: int) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(settings.width, eps=1e-6)
        self.attn = GridAttention(settings.width, settings.heads, (window, window) if window else grid)
        self.norm2 = nn.LayerNorm(settings.width, eps=1e-6)
        self.mlp = TokenMLP(settings.width, settings.mlp, F.gelu)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, h, w, D); `window` 0 is the whole grid."""
        inner = self.norm1(x)
        x = x + (self._in_windows(inner) if self.window else self.attn(inner))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def _in_windows(self, x: Tensor) -> Tensor:
        """Attention in each window; the grid is filled up with zeros to whole windows, and cut again."""
        s, (b, h, w, d) = self.window, x.shape
        x = F.pad(x, (0, 0, 0, -w % s, 0, -h % s))
        tall, wide = x.shape[1] // s, x.shape[2] // s
        windows = x.reshape(b, tall, s, wide, s, d).transpose(2, 3).reshape(-1, s, s, d)
        seen = self.attn(windows).reshape(b, tall, wide, s, s, d).transpose(2, 3).reshape(x.shape)
        whole: Tensor = seen[:, :h, :w]
        return whole


class PatchEmbedding(nn.Module):
    """Patches to tokens: (B, C, H, W) -> (B, h, w, D)."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """A convolution whose stride is its side."""
        out: Tensor = self.proj(x)
        return out.movedim(1, -1)


class ImageEncoder(nn.Module):
    """Patches, positions, blocks, and a neck of two convolutions: (B, C, H, W) -> (B, embedding, H/patch, W/patch)."""

    def __init__(self, settings: SAMSettings, shape: Shape) -> None:
        super().__init__()
        grid = shape[1] // settings.patch, shape[2] // settings.patch
        self.patch_embed = PatchEmbedding(shape[0], settings.width, settings.patch)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, *grid, settings.width))
        self.blocks = nn.Sequential(
            *(
                WindowBlock(settings, grid, 0 if i in settings.global_layers else settings.window)
                for i in range(settings.layers)
            )
        )
        self.neck = nn.Sequential(
            nn.Conv2d(settings.width, settings.embedding, 1, bias=False),
            ChannelNorm(settings.embedding),
            nn.Conv2d(settings.embedding, settings.embedding, 3, padding=1, bias=False),
            ChannelNorm(settings.embedding),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The image embedding."""
        tokens = self.blocks(self.patch_embed(x) + self.pos_embed)  # (B, h, w, D)
        embedding: Tensor = self.neck(tokens.movedim(-1, 1))
        return embedding


class SAM(Promptable):
    """Image encoder, prompt encoder, mask decoder; masks of 4 H/patch x 4 W/patch, H/4 x W/4 with the paper's patch."""

    def __init__(self, settings: SAMSettings, shape: Shape, candidates: int) -> None:
        super().__init__()
        width = settings.embedding
        self.image_encoder = ImageEncoder(settings, shape)
        self.prompt_encoder = PromptEncoder(width)
        self.mask_decoder = MaskDecoder(
            width, settings.decoder_layers, settings.decoder_heads, settings.decoder_mlp, candidates
        )

    def encode(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, embedding, H/patch, W/patch)."""
        out: Tensor = self.image_encoder(x)
        return out

    def decode(
        self, image: Tensor, points: Tensor, labels: Tensor, mask: Tensor | None = None, *, single: bool = False
    ) -> Masks:
        """Logits (B, N, 4h, 4w) of an image embedding (B, D, h, w), and scores (B, N); N is 1 where `single`."""
        prompt = self.prompt_encoder(points, labels)  # (B, P, D)
        places = self.prompt_encoder.pe_layer.grid(*image.shape[2:])  # (D, h, w)
        answer: Masks = self.mask_decoder(image + self.prompt_encoder.dense(mask, image), places, prompt, single=single)
        return answer


@model(
    "sam",
    settings=SAMSettings,
    sizes={
        "tiny": {
            "layers": 3, "width": 64, "mlp": 128, "heads": 4, "patch": 8, "window": 4, "global_layers": (2,),
            "embedding": 128, "decoder_mlp": 128,
        },
        "b": {
            "layers": 12, "width": 768, "mlp": 3072, "heads": 12, "patch": 16, "window": 14,
            "global_layers": (2, 5, 8, 11),
        },
        "l": {
            "layers": 24, "width": 1024, "mlp": 4096, "heads": 16, "patch": 16, "window": 14,
            "global_layers": (5, 11, 17, 23),
        },
        "h": {
            "layers": 32, "width": 1280, "mlp": 5120, "heads": 16, "patch": 16, "window": 14,
            "global_layers": (7, 15, 23, 31),
        },
    },
    paper="Kirillov et al. 2023, Segment Anything",
    tasks=("promptable",),
    stackable=False,
    per_sample_gradients=("loop",),
    heads=("mask_decoder.*",),
    notes="One model for any object: a click or a box says which. It knows no classes; what it answers is one mask.",
    usual={"tiny": (3, 64, 64), "b": (3, 1024, 1024), "l": (3, 1024, 1024), "h": (3, 1024, 1024)},
)  # fmt: skip
def build(settings: SAMSettings, shape: Shape, outputs: int) -> nn.Module:
    """A `Promptable` with `outputs` candidate masks, for images of any two sides that the patch divides.

    Raises:
        ConfigError: the patch does not divide the image; names the patches that do.
    """
    _, height, width = shape
    if height % settings.patch or width % settings.patch:
        common = math.gcd(height, width)
        fitting = ", ".join(str(p) for p in range(1, common + 1) if common % p == 0)
        raise ConfigError(
            f"model 'sam' cannot cut an image of {height}x{width} pixels into patches of side {settings.patch}",
            hint=f"Set patch to one of {fitting}, or the image size to a multiple of {settings.patch}",
        )
    return SAM(settings, shape, outputs)
