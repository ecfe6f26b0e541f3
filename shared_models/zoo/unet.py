"""U-Net (Ronneberger et al. 2015): down to where a pixel sees the whole, and up again beside what was seen on the way.

=====  =====  =====  =====  =======  ==========  ======================================
size   width  depth  norm   dropout  parameters  from
=====  =====  =====  =====  =======  ==========  ======================================
tiny   16     3      group  0        483,170     ours
paper  64     4      none   0.5      31,030,658  Ronneberger et al. 2015, Figure 1
=====  =====  =====  =====  =======  ==========  ======================================

Parameters at one channel and 2 outputs. Convolutions are zero-padded, so that the logits have the image's size; the
paper's are not, and it predicts the middle of a larger, mirrored image. The paper has no normalisation.
"""

from __future__ import annotations

from itertools import pairwise
from math import ceil, floor
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from shared_models.errors import ConfigError
from shared_models.models import ModelSettings, Shape, model
from shared_models.zoo.resnet import Norm, norm_layer


class UNetSettings(ModelSettings):
    """The network's form.

    Attributes:
        width: channels at the image's resolution, a multiple of 8; doubles with each halving of the resolution.
        depth: how often the resolution is halved.
        norm: `group`, `batch` or `none`, after each 3x3 convolution.
        dropout: at the end of the contracting path, i.e. after its last two levels.
    """

    width: int = Field(gt=0, multiple_of=8)
    depth: PositiveInt
    norm: Literal["group", "batch", "none"]
    dropout: float = Field(0.0, ge=0.0, lt=1.0)


class DoubleConvolution(nn.Sequential):
    """Twice a 3x3 convolution, norm and ReLU: (B, before, H, W) -> (B, after, H, W)."""

    def __init__(self, before: int, after: int, norm: Norm) -> None:
        super().__init__(
            nn.Conv2d(before, after, 3, padding=1), norm_layer(norm, after), nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1), norm_layer(norm, after), nn.ReLU(),
        )  # fmt: skip


class UNet(nn.Module):
    """`depth` levels down by max pooling, as many up by 2x2 transposed convolutions, and a 1x1 convolution `head`."""

    def __init__(self, settings: UNetSettings, channels: int, outputs: int) -> None:
        super().__init__()
        norm = settings.norm
        widths = [settings.width * 2**i for i in range(settings.depth + 1)]
        steps = list(pairwise(widths))  # (finer, coarser), from the finest on
        self.first = DoubleConvolution(channels, widths[0], norm)
        self.down = nn.ModuleList(DoubleConvolution(fine, coarse, norm) for fine, coarse in steps)
        self.up = nn.ModuleList(nn.ConvTranspose2d(coarse, fine, 2, stride=2) for fine, coarse in steps)
        self.merge = nn.ModuleList(DoubleConvolution(2 * fine, fine, norm) for fine, _ in steps)
        self.dropout = nn.Dropout(settings.dropout)
        self.head = nn.Conv2d(widths[0], outputs, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al. 2015, section 3 of the paper
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, outputs, H, W) logits, for sides that are multiples of 2**depth."""
        seen = [self.first(x)]  # (B, w, H, W)
        for i, level in enumerate(self.down):
            x = level(F.max_pool2d(seen[-1], 2))  # (B, 2w, H/2, W/2), (B, 4w, H/4, W/4), ...
            seen.append(self.dropout(x) if i >= len(self.down) - 2 else x)
        x = seen.pop()
        for up, merge in zip(reversed(self.up), reversed(self.merge), strict=True):
            x = merge(torch.cat([seen.pop(), up(x)], dim=1))
        logits: Tensor = self.head(x)
        return logits


@model(
    "unet",
    settings=UNetSettings,
    sizes={
        "tiny": {"width": 16, "depth": 3, "norm": "group"},
        "paper": {"width": 64, "depth": 4, "norm": "none", "dropout": 0.5},
    },
    paper="Ronneberger et al. 2015, U-Net: Convolutional Networks for Biomedical Image Segmentation",
    tasks=("segmentation",),
    family="segmentation",
    notes="The first choice for few images and fine structures: it ends at full resolution and learns from scratch.",
    usual={"tiny": (3, 64, 64), "paper": (1, 512, 512)},
)
def build(settings: UNetSettings, shape: Shape, outputs: int) -> nn.Module:
    """(B, C, H, W) -> (B, outputs, H, W) logits.

    Raises:
        ConfigError: a side of the image is no multiple of 2**depth; names the sizes that fit.
    """
    step = 2**settings.depth
    channels, *sides = shape
    if any(side % step for side in sides):
        fitting = {tuple(max(step, step * round_(side / step)) for side in sides) for round_ in (floor, ceil)}
        nearest = " and ".join(f"{height}x{width}" for height, width in sorted(fitting))
        raise ConfigError(
            f"model 'unet' of depth {settings.depth} cannot take an image of {sides[0]}x{sides[1]} pixels: "
            f"both sides should be multiples of {step}",
            hint=f"Sizes that fit: {nearest}; a smaller depth fits more",
        )
    return UNet(settings, channels, outputs)
