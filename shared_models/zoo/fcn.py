"""Fully convolutional networks (Long et al. 2015): a classifier without its flattening, so that it answers everywhere.

========  ========  ======  =====  =======  ===========  =============================================
size      backbone  hidden  norm   dropout  parameters   from
========  ========  ======  =====  =======  ===========  =============================================
tiny      small     64      group  0        130,399      ours
paper     vgg16     4096    none   0.5      134,376,863  Long et al. 2015, FCN-8s
resnet50  resnet50  512     group  0.1      32,957,013   torchvision's FCN-ResNet50 (`norm = "batch"`)
========  ========  ======  =====  =======  ===========  =============================================

Parameters at three channels and the 21 classes of PASCAL VOC. The convolutions of torchvision's VGG-16
(`norm = "none"`, or `"batch"` for its VGG-16-BN), its ResNet-50 and its FCN-ResNet50 load as they are.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from shared_models.models import ModelSettings, Shape, model
from shared_models.zoo.resnet import Norm, ResNetFeatures, norm_layer


class FCNSettings(ModelSettings):
    """The network's form.

    Attributes:
        backbone: `small` and `vgg16` have skip connections; `resnet50` dilates its last two stages instead.
        hidden: channels of the layers between backbone and scores.
        norm: `group`, `batch` or `none`.
        dropout: after each of those layers.
    """

    backbone: Literal["small", "vgg16", "resnet50"]
    hidden: PositiveInt
    norm: Literal["group", "batch", "none"]
    dropout: float = Field(0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _a_resnet_has_norms(self) -> FCNSettings:
        if self.backbone == "resnet50" and self.norm == "none":
            raise ValueError("backbone 'resnet50' does not train without a norm")
        return self


class Blocks(NamedTuple):
    """A backbone of 3x3 convolutions, ReLUs and poolings.

    Attributes:
        widths: channels of each block, which a 2x2 max pooling ends.
        counts: convolutions of each block.
        kernel: side of the filters of the layer after the last pooling.
    """

    widths: tuple[int, ...]
    counts: tuple[int, ...]
    kernel: int


BLOCKS = {
    "small": Blocks((16, 32, 64), (2, 2, 2), 3),
    "vgg16": Blocks((64, 128, 256, 512, 512), (2, 2, 3, 3, 3), 7),
}


class SkipFCN(nn.Module):
    """Scores after each of the last three poolings, the coarser doubled and added to the finer (Figure 3).

    With five poolings, as in VGG-16, the finest of them is at stride 8: FCN-8s. Their sides are rounded up (and maps
    cropped after doubling), so any image fits; the paper pads it by 100 pixels for that. The two transposed
    convolutions start as bilinear interpolation and learn, the last interpolation stays, as in the paper.
    """

    def __init__(self, settings: FCNSettings, channels: int, outputs: int) -> None:
        super().__init__()
        widths, counts, kernel = BLOCKS[settings.backbone]
        layers: list[nn.Module] = []
        for width, count in zip(widths, counts, strict=True):
            for _ in range(count):
                layers += _convolution(channels, width, 3, settings.norm)
                channels = width
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.scale = 2 ** (len(widths) - 2)
        self.hidden = nn.Sequential(
            *_convolution(widths[-1], settings.hidden, kernel, settings.norm), nn.Dropout(settings.dropout),
            *_convolution(settings.hidden, settings.hidden, 1, settings.norm), nn.Dropout(settings.dropout),
        )  # fmt: skip
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.get_parameter("bias"))
        self.score = nn.Conv2d(settings.hidden, outputs, 1)
        self.skips = nn.ModuleList(nn.Conv2d(width, outputs, 1) for width in (widths[-2], widths[-3]))
        self.doubles = nn.ModuleList(
            nn.ConvTranspose2d(outputs, outputs, 4, 2, padding=1, bias=False) for _ in self.skips
        )
        for skip, double in zip(self.skips, self.doubles, strict=True):
            nn.init.zeros_(skip.get_parameter("weight"))  # "the net starts with unmodified predictions" (section 4.2)
            nn.init.zeros_(skip.get_parameter("bias"))
            bilinear_(double.get_parameter("weight"))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, outputs, H, W) logits."""
        height, width = x.shape[2:]
        pooled = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                pooled.append(x)
        y = self.score(self.hidden(x))  # (B, K, H/32, W/32) with VGG-16
        for skip, double, seen in zip(self.skips, self.doubles, (pooled[-2], pooled[-3]), strict=True):
            y = double(y)[..., : seen.shape[2], : seen.shape[3]] + skip(seen)  # (B, K, H/16, W/16), then H/8, W/8
        y = F.interpolate(y, scale_factor=self.scale, mode="bilinear", align_corners=False)
        return y[..., :height, :width]


class DilatedFCN(nn.Module):
    """ResNet-50 at stride 8, one more convolution, scores, interpolated: torchvision's, with its keys."""

    def __init__(self, settings: FCNSettings, channels: int, outputs: int) -> None:
        super().__init__()
        self.backbone = ResNetFeatures((3, 4, 6, 3), True, 64, "imagenet", settings.norm, channels, dilate_last=2)
        self.classifier = nn.Sequential(
            nn.Conv2d(self.backbone.widths[-1], settings.hidden, 3, padding=1, bias=False),
            norm_layer(settings.norm, settings.hidden),
            nn.ReLU(),
            nn.Dropout(settings.dropout),
            nn.Conv2d(settings.hidden, outputs, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, outputs, H, W) logits."""
        scores = self.classifier(self.backbone(x)[-1])  # (B, K, H/8, W/8)
        return F.interpolate(scores, x.shape[2:], mode="bilinear", align_corners=False)


def _convolution(before: int, after: int, kernel: int, norm: Norm) -> list[nn.Module]:
    """Convolution that keeps the side, norm if there is one, ReLU: numbered as in torchvision's VGG."""
    norms = [] if norm == "none" else [norm_layer(norm, after)]
    return [nn.Conv2d(before, after, kernel, padding=kernel // 2), *norms, nn.ReLU()]


def bilinear_(weight: Tensor) -> None:
    """Fill the weights (K, K, 4, 4) of a transposed convolution of stride 2 with bilinear interpolation, in place."""
    line = torch.tensor([0.25, 0.75, 0.75, 0.25], device=weight.device)
    with torch.no_grad():
        weight.copy_(torch.eye(len(weight), device=weight.device)[:, :, None, None] * line[:, None] * line)


@model(
    "fcn",
    settings=FCNSettings,
    sizes={
        "tiny": {"backbone": "small", "hidden": 64, "norm": "group"},
        "paper": {"backbone": "vgg16", "hidden": 4096, "norm": "none", "dropout": 0.5},
        "resnet50": {"backbone": "resnet50", "hidden": 512, "norm": "group", "dropout": 0.1},
    },
    paper="Long et al. 2015, Fully Convolutional Networks for Semantic Segmentation",
    tasks=("segmentation",),
    heads=("score.*", "skips.*", "doubles.*", "classifier.4.*"),
    renames=((r"^(conv1|bn1|layer\d)\.", r"backbone.\1."),),
    family="segmentation",
    notes="One pass of a classifier over the whole image, any size. Contours are coarse: what it says is finest at one "
    "eighth of the resolution, at one half with size 'tiny'.",
    usual={"tiny": (3, 64, 64), "paper": (3, 500, 500), "resnet50": (3, 520, 520)},
)
def build(settings: FCNSettings, shape: Shape, outputs: int) -> nn.Module:
    """(B, C, H, W) -> (B, outputs, H, W) logits, for images of any size."""
    form = DilatedFCN if settings.backbone == "resnet50" else SkipFCN
    return form(settings, shape[0], outputs)
