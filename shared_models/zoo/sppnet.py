"""SPP-net for detection (He et al. 2014): one pass of the convolutions, then a pyramid of maxima of each region.

======  ========  ==========  ===========  ============  ==========================================
size    backbone  levels      hidden       M parameters  from
======  ========  ==========  ===========  ============  ==========================================
tiny    small     1, 2, 4     128          0.2           ours, for images of about 100 to 200 pixels
paper   alexnet   1, 2, 3, 6  4096, 4096   72.1          He et al. 2014, section 4
======  ========  ==========  ===========  ============  ==========================================

Parameters at 3 channels and 20 labels; AlexNet stands for the paper's ZF-5. A region has the same number of bins
whatever its size, 50 in the paper, so fully connected layers can follow; images may have any size. A bin is the maximum
of the cells in it of a grid that all levels divide; a cell is the mean of four interpolated points (RoIAlign, He et al.
2017), so that no region is moved to whole pixels of the features as in the paper.

The paper trains only the layers after the pyramid. That is fast and needs convolutions that are good already: the
size `paper` does it and should be given published weights; the size `tiny` starts from nothing and trains all. The
stages of the paper's training are one here, see `rcnn`.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from shared_models.models import Shape, model
from shared_models.regions import crop
from shared_models.zoo.rcnn import BACKBONES, RegionDetector, RegionSettings, require_image


class SPPNetSettings(RegionSettings):
    """What SPP-net adds.

    Attributes:
        levels: of the pyramid: level n has n x n bins.
        frozen_convolutions: whether the convolutions stay as they are. They are still sent and averaged, unless the
            job says `[share] base = ["features.*"]`.
    """

    levels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    frozen_convolutions: bool


def pyramid(windows: Tensor, levels: tuple[int, ...]) -> Tensor:
    """Maxima over n x n bins for each level n: (..., C, side, side) -> (..., C sum n^2); every n divides the side."""
    bins = []
    for n in levels:
        cut = (n, windows.shape[-1] // n)
        rows = windows.unflatten(-2, cut).amax(dim=-2)  # (..., C, n, side)
        bins.append(rows.unflatten(-1, cut).amax(dim=-1).flatten(-3))  # (..., C n^2)
    return torch.cat(bins, dim=-1)


class SPPNet(RegionDetector):
    """The convolutions once, without their last maximum, in whose place the pyramid is."""

    def __init__(self, settings: SPPNetSettings, channels: int, outputs: int) -> None:
        backbone, bins = BACKBONES[settings.backbone], sum(n * n for n in settings.levels)
        super().__init__(settings, backbone.build(channels)[:-1], backbone.width * bins, outputs)
        self.levels, self.frozen = settings.levels, settings.frozen_convolutions

    def pooled(self, x: Tensor, regions: Tensor) -> Tensor:
        """Convolve, sample each region on the coarsest grid that all levels divide, and pool."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            windows = crop(self.features(x), regions, math.lcm(*self.levels), points=2)  # (B, S, C', side, side)
            return pyramid(windows, self.levels)  # (B, S, C' bins)


@model(
    "sppnet",
    settings=SPPNetSettings,
    sizes={
        "tiny": {
            "backbone": "small", "hidden": (128,), "regions": 64, "foreground": 0.35,
            "levels": (1, 2, 4), "frozen_convolutions": False,
        },
        "paper": {
            "backbone": "alexnet", "hidden": (4096, 4096), "dropout": 0.5, "regions": 128, "overlap": 0.3,
            "levels": (1, 2, 3, 6), "frozen_convolutions": True,
        },
    },
    paper="He et al. 2014, Spatial Pyramid Pooling in Deep Convolutional Networks for Visual Recognition",
    tasks=("detection",),
    per_sample_gradients=("vmap", "hooks", "loop"),
    proposals=True,
    renames=((r"^classifier\.4\.", "hidden.fc7."),),
    family="detection",
    notes="Fast: one pass of the convolutions serves all proposals, and training moves the last layers alone. Less "
    "accurate than Fast R-CNN where the convolutions were not made for such images; train them at size `tiny`.",
    usual={"tiny": (3, 120, 160), "paper": (3, 375, 500)},
)  # fmt: skip
def build(settings: SPPNetSettings, shape: Shape, outputs: int) -> nn.Module:
    """A `Detector`.

    Raises:
        ConfigError: the image is too small for the convolutions.
    """
    require_image("sppnet", settings, shape)
    return SPPNet(settings, shape[0], outputs)
