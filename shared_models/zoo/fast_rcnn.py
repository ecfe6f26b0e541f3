"""Fast R-CNN (Girshick 2015): one pass of the convolutions, one grid of each region, and everything learns.

======  ========  ====  ===========  ============  ==========================================
size    backbone  grid  hidden       M parameters  from
======  ========  ====  ===========  ============  ==========================================
tiny    small     4     128          0.2           ours, for images of about 100 to 200 pixels
paper   vgg16     7     4096, 4096   134.7         Girshick 2015, model L
======  ========  ====  ===========  ============  ==========================================

Parameters at 3 channels and 20 labels. The gradient reaches the convolutions through the pooling of the regions because
all regions of a step lie in few images, whose features they share. A bin is the mean of four interpolated points
(RoIAlign, He et al. 2017), not the paper's maximum over whole pixels of the features.
"""

from __future__ import annotations

from pydantic import PositiveInt
from torch import Tensor, nn

from shared_models.models import Shape, model
from shared_models.regions import crop
from shared_models.zoo.rcnn import BACKBONES, RegionDetector, RegionSettings, require_image


class FastRCNNSettings(RegionSettings):
    """What Fast R-CNN adds.

    Attributes:
        grid: bins of a region's side.
    """

    grid: PositiveInt


class FastRCNN(RegionDetector):
    """The convolutions once, without their last maximum, in whose place the pooling of regions is."""

    def __init__(self, settings: FastRCNNSettings, channels: int, outputs: int) -> None:
        backbone = BACKBONES[settings.backbone]
        super().__init__(settings, backbone.build(channels)[:-1], backbone.width * settings.grid**2, outputs)
        self.grid = settings.grid

    def pooled(self, x: Tensor, regions: Tensor) -> Tensor:
        """Convolve, then pool."""
        windows = crop(self.features(x), regions, self.grid, points=2)  # (B, S, C', grid, grid)
        return windows.flatten(2)


@model(
    "fast-rcnn",
    settings=FastRCNNSettings,
    sizes={
        "tiny": {"backbone": "small", "hidden": (128,), "regions": 64, "foreground": 0.35, "grid": 4},
        "paper": {
            "backbone": "vgg16", "hidden": (4096, 4096), "dropout": 0.5, "regions": 64, "background": 0.1,
            "overlap": 0.3, "grid": 7,
        },
    },
    paper="Girshick 2015, Fast R-CNN",
    tasks=("detection",),
    per_sample_gradients=("vmap", "hooks", "loop"),
    proposals=True,
    renames=(
        (r"^classifier\.0\.", "hidden.fc6."),
        (r"^classifier\.3\.", "hidden.fc7."),
    ),
    family="detection",
    notes="Fast and accurate: one pass of the convolutions serves all proposals and learns from them. What is left to "
    "pay is the search for the proposals, which does not learn.",
    usual={"tiny": (3, 120, 160), "paper": (3, 600, 800)},
)  # fmt: skip
def build(settings: FastRCNNSettings, shape: Shape, outputs: int) -> nn.Module:
    """A `Detector`.

    Raises:
        ConfigError: the image is too small for the convolutions.
    """
    require_image("fast-rcnn", settings, shape)
    return FastRCNN(settings, shape[0], outputs)
