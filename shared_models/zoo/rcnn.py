"""R-CNN (Girshick et al. 2014): every proposed region is cut out, warped to a square and passed through a CNN alone.

======  ========  ====  ===========  ============  ==========================================
size    backbone  side  hidden       M parameters  from
======  ========  ====  ===========  ============  ==========================================
tiny    small     32    128          0.2           ours, for images of about 100 to 200 pixels
paper   alexnet   227   4096, 4096   57.4          Girshick et al. 2014
======  ========  ====  ===========  ============  ==========================================

Parameters at 3 channels and 20 labels. `RegionDetector` is what R-CNN, SPP-net (`sppnet`) and Fast R-CNN (`fast_rcnn`)
have in common; they differ only in where a region's numbers come from:

===========  ===============================================  ======================  ==============  =============
model        passes of the convolutions for R regions         what learns             training, ms    inference, ms
===========  ===============================================  ======================  ==============  =============
rcnn         R, each over a warped region                     everything              29              78
sppnet       1, then a pyramid of maxima of each region       what follows (paper)    13              18
fast-rcnn    1, then a grid of means of each region           everything              9               15
faster-rcnn  1, which also finds the regions                  everything              21              15
===========  ===============================================  ======================  ==============  =============

Milliseconds an image at size `tiny`, 160x120 pixels, 300 proposals, one core of an AMD EPYC. To the first three comes
the search for proposals, about 110 once an image (`client.proposals`).

The paper trains in stages: the CNN with a softmax, then an SVM a class, then box regression on stored features. Here
all is one network with one loss: the softmax (50.9 instead of 54.2 % mAP on VOC 2007 in Appendix B, which puts the
difference down to how examples are chosen) and a class's own box regression (Appendix C), both on the last hidden
layer.

Proposals rarely overlap small objects by half (0.5, the paper's): `tiny` counts those from 0.35 on as objects, whose
box it learns to move.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from shared_models.boxes import to_centres, to_corners
from shared_models.detection import Detector
from shared_models.errors import ConfigError
from shared_models.models import ModelSettings, Shape, model
from shared_models.regions import Sampling, TwoBranches, choose, crop, detections, region_loss, take
from shared_models.zoo.resnet import Norm, norm_layer

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class RegionSettings(ModelSettings):
    """What the three models share.

    Attributes:
        backbone: the convolutions: `small` (ours, stride 4), `alexnet` or `vgg16`.
        hidden: widths of the fully connected layers.
        dropout: after each of them.
        regions: how many regions of an image the loss sees in a training step.
        foreground_share: of them, at most, objects.
        foreground: IoU with a true box from which a region is an object.
        background: IoU below that from which a region is background; those below it are not used.
        detections: how many boxes an image has at most.
        overlap: IoU above which the lower score of one class goes.
        least: scores below it are no detection.
    """

    backbone: Literal["small", "alexnet", "vgg16"]
    hidden: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    regions: PositiveInt
    foreground_share: float = Field(0.25, gt=0.0, le=1.0)
    foreground: float = Field(0.5, gt=0.0, le=1.0)
    background: Fraction = 0.0
    detections: PositiveInt = 100
    overlap: Fraction = 0.5
    least: float = Field(0.01, gt=0.0, le=1.0)

    @model_validator(mode="after")
    def _background_below_foreground(self) -> RegionSettings:
        if self.background >= self.foreground:
            raise ValueError(f"background {self.background} should be less than foreground {self.foreground}")
        return self

    @property
    def sampling(self) -> Sampling:
        """Which regions the loss sees."""
        return Sampling(self.regions, self.foreground_share, self.foreground, (self.background, self.foreground))


def small(channels: int, norm: Norm = "group") -> nn.Sequential:
    """Four 3x3 convolutions to 64 channels at stride 4, and a last 2x2 maximum."""
    layers: list[nn.Module] = []
    for before, after, stride in ((channels, 16, 2), (16, 32, 2), (32, 64, 1), (64, 64, 1)):
        layers += [nn.Conv2d(before, after, 3, stride, padding=1), norm_layer(norm, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2))


def alexnet(channels: int) -> nn.Sequential:
    """The convolutions of AlexNet (Krizhevsky 2014) with torchvision's keys: 256 channels at stride 16."""
    return nn.Sequential(
        nn.Conv2d(channels, 64, 11, 4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
    )  # fmt: skip


def vgg16(channels: int) -> nn.Sequential:
    """The convolutions of VGG-16 (Simonyan & Zisserman 2015) with torchvision's keys: 512 channels at stride 16."""
    layers: list[nn.Module] = []
    for after, times in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(times):
            layers += [nn.Conv2d(channels, after, 3, padding=1), nn.ReLU()]
            channels = after
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


class Backbone(NamedTuple):
    """Convolutions that end with a maximum, which SPP-net and Fast R-CNN replace by the pooling of regions.

    Attributes:
        build: number of channels of an image -> the layers.
        width: channels of the result.
        image: smallest side of an image without the last maximum.
        square: smallest side of an image with it.
    """

    build: Callable[[int], nn.Sequential]
    width: int
    image: int
    square: int


BACKBONES = {
    "small": Backbone(small, 64, 1, 5),
    "alexnet": Backbone(alexnet, 256, 31, 63),
    "vgg16": Backbone(vgg16, 512, 16, 32),
}


class RegionDetector(Detector):
    """Numbers of each region, hidden layers, and the two branches; a subclass says where the numbers come from.

    Args:
        settings: of the model.
        features: the convolutions.
        width: numbers of a region, D.
        outputs: labels.
    """

    def __init__(self, settings: RegionSettings, features: nn.Module, width: int, outputs: int) -> None:
        super().__init__()
        self.settings = settings
        self.features = features
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (before, after) in enumerate(pairwise((width, *settings.hidden)), start=6):  # after five convolutions
            layers |= {
                f"fc{i}": nn.Linear(before, after),
                f"relu{i}": nn.ReLU(),
                f"drop{i}": nn.Dropout(settings.dropout),
            }
        self.hidden = nn.Sequential(layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.get_parameter("bias"))
        self.head = TwoBranches(settings.hidden[-1], outputs)

    @abstractmethod
    def pooled(self, x: Tensor, regions: Tensor) -> Tensor:
        """Images (B, C, H, W) and regions (B, S, 4) -> the numbers of each region, (B, S, D)."""

    def forward(self, x: Tensor, y: Tensor, proposals: Tensor | None = None) -> dict[str, Tensor]:
        """See `Detector`. The true boxes join the proposals in training; in evaluation all proposals are scored."""
        if proposals is None:
            raise ConfigError("this detector classifies proposals and got none")
        settings = self.settings
        regions = torch.cat([proposals, y[..., 1:]], dim=1) if self.training else proposals  # (B, R, 4)
        chosen = choose(regions, y, settings.sampling, training=self.training)
        if self.training:
            scores, shifts = self.head(self.hidden(self.pooled(x, take(regions, chosen.index))))
            return {"loss": region_loss(scores, shifts, chosen)}
        scores, shifts = self.head(self.hidden(self.pooled(x, regions)))  # (B, R, K + 1), (B, R, K + 1, 4)
        return {
            "loss": region_loss(take(scores, chosen.index), take(shifts, chosen.index), chosen),
            "found": detections(
                regions, scores, shifts, keep=settings.detections, overlap=settings.overlap, least=settings.least
            ),
        }


def require_image(name: str, settings: RegionSettings, shape: Shape) -> None:
    """Raise a ConfigError where the convolutions leave nothing of an image (C, H, W)."""
    smallest = BACKBONES[settings.backbone].image
    if min(shape[1:]) < smallest:
        raise ConfigError(
            f"model '{name}' with backbone '{settings.backbone}' cannot take an image of {shape[1]}x{shape[2]} pixels: "
            f"its smallest is {smallest}x{smallest}",
            hint="Enlarge the images, or use backbone = 'small'",
        )


class RCNNSettings(RegionSettings):
    """What R-CNN adds.

    Attributes:
        side: of the square that each region is warped to, in pixels.
        context: how many of these pixels on each side lie around the region (Appendix A).
    """

    side: PositiveInt
    context: int = Field(ge=0)

    @model_validator(mode="after")
    def _something_is_left(self) -> RCNNSettings:
        if 2 * self.context >= self.side:
            raise ValueError(f"context {self.context} should be less than half of side {self.side}")
        if self.side < BACKBONES[self.backbone].square:
            raise ValueError(
                f"side {self.side} should be at least {BACKBONES[self.backbone].square} for {self.backbone}"
            )
        return self


class RCNN(RegionDetector):
    """The whole CNN for every region."""

    def __init__(self, settings: RCNNSettings, channels: int, outputs: int) -> None:
        features = BACKBONES[settings.backbone].build(channels)
        with torch.no_grad():
            width = features(torch.zeros(1, channels, settings.side, settings.side)).numel()
        super().__init__(settings, features, width, outputs)
        self.side = settings.side
        self.zoom = settings.side / (settings.side - 2 * settings.context)

    def pooled(self, x: Tensor, regions: Tensor) -> Tensor:
        """Warp and convolve; in evaluation one image at a time, for the crops of all may not fit into memory."""
        if not self.training and len(x) > 1:
            return torch.cat([self.pooled(*pair) for pair in zip(x[:, None], regions[:, None], strict=True)])
        centre, size = to_centres(regions).split(2, dim=-1)
        around = to_corners(torch.cat([centre, size * self.zoom], dim=-1))
        warped = crop(x, around, self.side, points=2)  # (B, S, C, side, side)
        maps: Tensor = self.features(warped.flatten(0, 1))  # (B S, C', h, w)
        return maps.reshape(*regions.shape[:2], maps.shape[1:].numel())


@model(
    "rcnn",
    settings=RCNNSettings,
    sizes={
        "tiny": {"backbone": "small", "hidden": (128,), "regions": 64, "foreground": 0.35, "side": 32, "context": 4},
        "paper": {
            "backbone": "alexnet", "hidden": (4096, 4096), "dropout": 0.5, "regions": 128, "overlap": 0.3,
            "side": 227, "context": 16,
        },
    },
    paper="Girshick et al. 2014, Rich Feature Hierarchies for Accurate Object Detection and Semantic Segmentation",
    tasks=("detection",),
    per_sample_gradients=("vmap", "loop"),
    proposals=True,
    renames=(
        (r"^classifier\.1\.", "hidden.fc6."),
        (r"^classifier\.4\.", "hidden.fc7."),
    ),
    family="detection",
    notes="Slowest: the whole CNN runs for each of hundreds of proposals. Every region has the network's full "
    "resolution, so small objects are seen as large as big ones.",
    usual={"tiny": (3, 120, 160), "paper": (3, 375, 500)},
)  # fmt: skip
def build(settings: RCNNSettings, shape: Shape, outputs: int) -> nn.Module:
    """A `Detector` for images of any size."""
    return RCNN(settings, shape[0], outputs)
