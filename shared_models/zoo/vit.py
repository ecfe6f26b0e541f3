"""Vision Transformer (Dosovitskiy et al. 2021): pre-norm, class token, learned positions, GELU.

====  ======  =====  ====  =====  =====  ============  ===================================
size  layers  width  mlp   heads  patch  M parameters  from
====  ======  =====  ====  =====  =====  ============  ===================================
tiny  3       64     128   4      2      0.1           ours, for images of about 8x8
ti16  12      192    768   3      16     5.7           Touvron et al. 2021 (DeiT), Table 1
s16   12      384    1536  6      16     22.1          Touvron et al. 2021 (DeiT), Table 1
b16   12      768    3072  12     16     86.6          Dosovitskiy et al. 2021, Table 1
l16   24      1024   4096  16     16     304.3         Dosovitskiy et al. 2021, Table 1
====  ======  =====  ====  =====  =====  ============  ===================================

Parameters at 224x224x3 and 1000 outputs, but for `tiny` (8x8x1, 10). The cost grows with the number of patches: with
`tiny`, take `patch = 4` for images of about 32x32. The class token and the positions are `nn.Embedding` tables and no
operation is in place, so hooks and `torch.func` see every parameter through a module.

`tiny` starts its positions at the scale of the patch tokens: with the paper's 0.02 attention cannot tell patches apart
at first, and a few hundred steps are too few to learn it. On scikit-learn's digits (1,200 images, batch 32, 200 steps
of SGD 0.05 with momentum 0.9, one thread, 3 seeds) that is 0.93 instead of 0.78 test accuracy;
AdamW 0.001 gives 0.96.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from shared_models.errors import ConfigError
from shared_models.models import Shape, model
from shared_models.transformer import AttentionSettings


class ViTSettings(AttentionSettings):
    """The columns of the table above, and dropout.

    Attributes:
        layers: transformer blocks.
        width: numbers per token (D), a multiple of `heads`.
        mlp: width of a block's hidden layer.
        heads: attention heads.
        patch: side of a square patch in pixels; must divide both sides of the image.
        position_std: standard deviation of the positions at the start.
        dropout: after the positions, the attention and both layers of the MLP; 0 is none.
    """

    layers: PositiveInt
    mlp: PositiveInt
    patch: PositiveInt
    position_std: float = Field(0.02, gt=0.0)
    dropout: float = Field(0.0, ge=0.0, lt=1.0)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, eq. 1): (B, N, D) -> (B, N, D).

    Written out: the gradient of torch's fused call may differ between runs on CUDA, and has no `vmap` rule on CPU.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(D/h)) v, per head."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)  # (B, h, N, D/h)
        weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(d // self.heads), dim=-1)  # (B, h, N, N)
        out: Tensor = self.out((weights @ v).transpose(1, 2).reshape(b, n, d))  # (B, N, D)
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (Dosovitskiy et al. 2021, eq. 2 and 3)."""

    def __init__(self, settings: ViTSettings) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(settings.width, eps=1e-6)
        self.attention = Attention(settings.width, settings.heads)
        self.norm2 = nn.LayerNorm(settings.width, eps=1e-6)
        self.hidden = nn.Linear(settings.width, settings.mlp)
        self.out = nn.Linear(settings.mlp, settings.width)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        hidden = self.dropout(F.gelu(self.hidden(self.norm2(x))))  # (B, N, mlp)
        out: Tensor = x + self.dropout(self.out(hidden))
        return out


class Encoder(nn.Module):
    """Patches to tokens, a class token in front, positions added, blocks: (B, C, H, W) -> (B, 1 + N, D).

    A model built on it calls `initialise` once it has all its modules.
    """

    def __init__(self, settings: ViTSettings, shape: Shape) -> None:
        super().__init__()
        channels, height, width = shape
        tokens = 1 + (height // settings.patch) * (width // settings.patch)
        self.position_std = settings.position_std
        self.patches = nn.Conv2d(channels, settings.width, settings.patch, stride=settings.patch)
        self.class_token = nn.Embedding(1, settings.width)
        self.positions = nn.Embedding(tokens, settings.width)
        self.dropout = nn.Dropout(settings.dropout)
        self.blocks = nn.Sequential(*(Block(settings) for _ in range(settings.layers)))
        self.norm = nn.LayerNorm(settings.width, eps=1e-6)

    def initialise(self) -> None:
        """Start values of everything in it, from torch's global generator."""
        self.apply(initialise)
        nn.init.normal_(self.positions.weight, std=self.position_std)

    def tokens(self, x: Tensor) -> Tensor:
        """The tokens before the last norm."""
        x = self.patches(x).flatten(2).transpose(1, 2)  # (B, N, D)
        ids = torch.arange(1 + x.shape[1], device=x.device).expand(x.shape[0], -1)  # (B, 1 + N)
        x = torch.cat([self.class_token(ids[:, :1]), x], dim=1)  # (B, 1 + N, D)
        tokens: Tensor = self.blocks(self.dropout(x + self.positions(ids)))  # (B, 1 + N, D)
        return tokens

    def forward(self, x: Tensor) -> Tensor:
        """The tokens after the last norm."""
        tokens: Tensor = self.norm(self.tokens(x))
        return tokens


class VisionTransformer(Encoder):
    """A linear head on the class token; `top` as in `shared_models.backbone`."""

    top: ClassVar[tuple[str, ...]] = ("head",)

    def __init__(self, settings: ViTSettings, shape: Shape, outputs: int) -> None:
        super().__init__(settings, shape)
        self.head = nn.Linear(settings.width, outputs)
        self.initialise()
        nn.init.trunc_normal_(self.head.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, outputs) scores."""
        scores: Tensor = self.head(self.norm(self.tokens(x)[:, 0]))  # (B, outputs)
        return scores

    def maps(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, H/patch, W/patch), the patches' tokens after the last norm."""
        grid = [side // patch for side, patch in zip(x.shape[2:], self.patches.stride, strict=True)]
        maps: Tensor = self.norm(self.tokens(x)[:, 1:]).transpose(1, 2).unflatten(2, grid)
        return maps


def initialise(module: nn.Module) -> None:
    """Xavier uniform for the blocks (the paper's own code), truncated normals elsewhere, biases at zero."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        nn.init.zeros_(module.get_parameter("bias"))
    elif isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)


def require_patches(name: str, settings: ViTSettings, shape: Shape) -> None:
    """Raise a ConfigError where the patch does not divide an image (C, H, W); it names the patches that do."""
    _, height, width = shape
    if height % settings.patch or width % settings.patch:
        common = math.gcd(height, width)
        fitting = ", ".join(str(p) for p in range(1, common + 1) if common % p == 0)
        raise ConfigError(
            f"model '{name}' cannot cut an image of {height}x{width} pixels into patches of side {settings.patch}",
            hint=f"Set patch to one of {fitting}, or the image size to a multiple of {settings.patch}",
        )


# torchvision's keys -> ours; published files still call the layers of the MLP `linear_1` and `linear_2`.
RENAMES = (
    (r"^conv_proj\.", "patches."),
    (r"^class_token$", "class_token.weight"),
    (r"^encoder\.pos_embedding$", "positions.weight"),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attention.qkv."),
    (r"\.self_attention\.out_proj\.", ".attention.out."),
    (r"\.mlp\.(0|linear_1)\.", ".hidden."),
    (r"\.mlp\.(3|linear_2)\.", ".out."),
    (r"^heads\.head\.", "head."),
)


@model(
    "vit",
    settings=ViTSettings,
    sizes={
        "tiny": {"layers": 3, "width": 64, "mlp": 128, "heads": 4, "patch": 2, "position_std": 1.0},
        "ti16": {"layers": 12, "width": 192, "mlp": 768, "heads": 3, "patch": 16},
        "s16": {"layers": 12, "width": 384, "mlp": 1536, "heads": 6, "patch": 16},
        "b16": {"layers": 12, "width": 768, "mlp": 3072, "heads": 12, "patch": 16},
        "l16": {"layers": 24, "width": 1024, "mlp": 4096, "heads": 16, "patch": 16},
    },
    paper="Dosovitskiy et al. 2021, An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
    tasks=("classification", "localization", "rotation", "jigsaw", "colorization", "masked-autoencoding"),
    renames=RENAMES,
    usual={"tiny": (1, 8, 8)} | dict.fromkeys(("ti16", "s16", "b16", "l16"), (3, 224, 224)),
)
def build(settings: ViTSettings, shape: Shape, outputs: int) -> nn.Module:
    """(B, C, H, W) -> (B, outputs) scores.

    Raises:
        ConfigError: the patch does not divide the image; names the patches that do.
    """
    require_patches("vit", settings, shape)
    return VisionTransformer(settings, shape, outputs)
