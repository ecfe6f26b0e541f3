"""Segmentation patch by patch (Ciresan et al. 2012): a small CNN names each pixel from the square around it, alone.

=====  =====  ======  ==============  ==========  ======  ==========  ==================================
size   patch  stride  channels        kernels     hidden  parameters  from
=====  =====  ======  ==============  ==========  ======  ==========  ==================================
tiny   21     4       16, 32          6, 3        64      23,858      ours, for images of about 32 to 128
paper  95     8       48, 48, 48, 48  4, 5, 4, 4  200     219,290     Ciresan et al. 2012, network N4
=====  =====  ======  ==============  ==========  ======  ==========  ==================================

Parameters at one channel and 2 outputs. It is the baseline that shows what the others save. Two neighbouring pixels see
nearly the same patch, and yet the whole network runs for each of them: an image of H x W pixels costs H W passes over
patch x patch pixels where a fully convolutional network makes one pass over H x W. And no pixel knows anything beyond
its patch, so a larger patch buys context with time and loses the exact place to pooling.

`stride` thins the grid of classified pixels, in training and afterwards; logits between them are interpolated. The
paper classifies every pixel (`stride = 1`) and trains on pixels drawn at random, as many of each class.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, field_validator, model_validator
from torch import Tensor, nn

from shared_models.errors import ConfigError
from shared_models.models import ModelSettings, Shape, model

Positive = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class PatchwiseSettings(ModelSettings):
    """The grid and the CNN.

    Attributes:
        patch: side of the square around a pixel, odd.
        stride: of the grid of classified pixels.
        channels: of each convolution; a 2x2 max pooling follows each.
        kernels: side of the filters of each convolution, without padding.
        hidden: width of the fully connected layer before the head.
    """

    patch: PositiveInt
    stride: PositiveInt
    channels: Positive
    kernels: Positive
    hidden: PositiveInt

    @field_validator("patch")
    @classmethod
    def _has_a_centre(cls, patch: int) -> int:
        if patch % 2 == 0:
            raise ValueError(f"should be odd, not {patch}")
        return patch

    @model_validator(mode="after")
    def _something_is_left(self) -> PatchwiseSettings:
        if len(self.kernels) != len(self.channels):
            raise ValueError(f"{len(self.channels)} channels should have as many kernels, not {len(self.kernels)}")
        if self.left < 1:
            raise ValueError(f"patch {self.patch} is too small for kernels {self.kernels}, each with a pooling")
        return self

    @property
    def left(self) -> int:
        """Side of what the convolutions and poolings leave of a patch."""
        side = self.patch
        for kernel in self.kernels:
            side = (side - kernel + 1) // 2
        return side


class Patchwise(nn.Module):
    """The CNN `net`, (P, C, patch, patch) -> (P, outputs), at every pixel of the grid (i stride, j stride)."""

    def __init__(self, settings: PatchwiseSettings, channels: int, outputs: int) -> None:
        super().__init__()
        self.patch, self.stride = settings.patch, settings.stride
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        widths = pairwise((channels, *settings.channels))
        for i, ((before, after), kernel) in enumerate(zip(widths, settings.kernels, strict=True), start=1):
            layers |= {f"conv{i}": nn.Conv2d(before, after, kernel), f"relu{i}": nn.ReLU(), f"pool{i}": nn.MaxPool2d(2)}
        layers["flatten"] = nn.Flatten()
        layers["hidden"] = nn.Linear(settings.channels[-1] * settings.left**2, settings.hidden)
        layers["hidden_relu"] = nn.ReLU()
        layers["head"] = nn.Linear(settings.hidden, outputs)
        self.net = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, outputs, H, W) logits; the image is mirrored at its border, as in the paper."""
        height, width = x.shape[2:]
        bottom, right = (-(-(side - 1) // self.stride) * self.stride for side in (height, width))  # the last grid pixel
        half = self.patch // 2
        x = F.pad(x, (half, half + right - width + 1, half, half + bottom - height + 1), mode="reflect")
        patches = x.unfold(2, self.patch, self.stride).unfold(3, self.patch, self.stride)  # (B, C, h, w, patch, patch)
        rows = [self.net(row.transpose(1, 2).flatten(0, 1)) for row in patches.unbind(2)]  # h of (B w, outputs)
        scores = torch.stack(rows).unflatten(1, (len(x), patches.shape[3]))  # (h, B, w, outputs)
        size = (bottom + 1, right + 1)
        logits = F.interpolate(scores.permute(1, 3, 0, 2), size, mode="bilinear", align_corners=True)
        return logits[..., :height, :width]


@model(
    "patchwise",
    settings=PatchwiseSettings,
    sizes={
        "tiny": {"patch": 21, "stride": 4, "channels": (16, 32), "kernels": (6, 3), "hidden": 64},
        "paper": {"patch": 95, "stride": 8, "channels": (48, 48, 48, 48), "kernels": (4, 5, 4, 4), "hidden": 200},
    },
    paper="Ciresan et al. 2012, Deep Neural Networks Segment Neuronal Membranes in Electron Microscopy Images",
    tasks=("segmentation",),
    per_sample_gradients=("vmap", "loop"),  # a hook would see patches, not images
    heads=("net.head.*",),
    family="segmentation",
    notes="The naive baseline: the whole CNN runs again for each pixel and shares nothing. Few parameters, many times "
    "the work of the others, and no context beyond the patch.",
    usual={"tiny": (3, 64, 64), "paper": (1, 512, 512)},
)
def build(settings: PatchwiseSettings, shape: Shape, outputs: int) -> nn.Module:
    """(B, C, H, W) -> (B, outputs, H, W) logits.

    Raises:
        ConfigError: the image is too small to be mirrored by half a patch; names the smallest that fits.
    """
    smallest = settings.patch // 2 + settings.stride
    if min(shape[1:]) < smallest:
        raise ConfigError(
            f"model 'patchwise' cannot mirror an image of {shape[1]}x{shape[2]} pixels by half a patch of side "
            f"{settings.patch}: its smallest is {smallest}x{smallest}",
            hint="Enlarge the images, or use a smaller patch",
        )
    return Patchwise(settings, shape[0], outputs)
