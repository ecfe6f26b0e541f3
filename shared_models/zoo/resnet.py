"""ResNets (He et al. 2016) with torchvision's state-dict keys, so that its weights load with `norm = "batch"`.

The default norm is GroupNorm (Wu & He 2018), whose statistics belong to one sample: nothing to average between sites,
no sample seen through another. No operation is in place, so hooks and `torch.func` work.

========  ======  =====  ========  =========================================
model     size    width  stem      parameters
========  ======  =====  ========  =========================================
resnet18  tiny    16     cifar     701,178 at one channel, 10 out
resnet18  cifar   64     cifar     11,173,962 at three channels, 10 out
resnet18  paper   64     imagenet  11,689,512 at three channels, 1000 out
resnet50  tiny    8      cifar     375,762 at three channels, 10 out
resnet50  cifar   64     cifar     23,520,842 at three channels, 10 out
resnet50  paper   64     imagenet  25,557,032 at three channels, 1000 out
========  ======  =====  ========  =========================================

`ResNetFeatures` is the same network without its head, for models that look at its feature maps.
"""

from __future__ import annotations

import math
from itertools import accumulate
from operator import mul
from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from shared_models.models import ModelSettings, Shape, model

Norm = Literal["group", "batch", "frozen", "none"]
Stem = Literal["imagenet", "cifar"]
Layers = tuple[int, int, int, int]


class ResNetSettings(ModelSettings):
    """The network's form.

    Attributes:
        width: channels after the stem, a multiple of 8; doubles in each of the three later stages.
        stem: `imagenet` (7x7 stride 2, then 3x3 max pooling stride 2) or `cifar` (3x3 stride 1, no pooling).
        norm: `group` or `batch`.
    """

    width: int = Field(gt=0, multiple_of=8)
    stem: Stem
    norm: Literal["group", "batch"] = "group"


def norm_layer(kind: Norm, channels: int) -> nn.Module:
    """GroupNorm with 16 channels a group (8 where 16 does not divide; Wu & He 2018, Table 3), or BatchNorm.

    In a `frozen` BatchNorm nothing trains or moves: for a backbone whose weights are loaded. `none` is the identity.
    """
    if kind == "none":
        return nn.Identity()
    if kind == "group":
        return nn.GroupNorm(channels // math.gcd(channels, 16), channels)
    made: nn.Module = nn.BatchNorm2d(channels) if kind == "batch" else FrozenBatchNorm2d(channels)
    return made


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)): (B, C, H, W) -> (B, width, H/stride, W/stride).

    Args:
        before: channels of x.
        width: channels of both 3x3 convolutions.
        stride: of the first convolution.
        norm: see `norm_layer`.
        dilation: of both convolutions.
    """

    expansion: ClassVar[int] = 1  # channels of the result, in widths

    def __init__(self, before: int, width: int, stride: int, norm: Norm, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn1 = norm_layer(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = norm_layer(norm, width)
        self.downsample = _shortcut(before, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """The residual function plus the shortcut."""
        residual = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(residual)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions plus the shortcut: (B, C, H, W) -> (B, 4 width, H/stride, W/stride).

    The stride is that of the 3x3 convolution, as in torchvision; the paper's is that of the first.

    Args:
        before: channels of x.
        width: channels of the 3x3 convolution.
        stride: of the 3x3 convolution.
        norm: see `norm_layer`.
        dilation: of the 3x3 convolution.
    """

    expansion: ClassVar[int] = 4

    def __init__(self, before: int, width: int, stride: int, norm: Norm, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.bn1 = norm_layer(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = norm_layer(norm, width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = norm_layer(norm, 4 * width)
        self.downsample = _shortcut(before, 4 * width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """The residual function plus the shortcut."""
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = F.relu(self.bn2(self.conv2(residual)))
        return F.relu(self.bn3(self.conv3(residual)) + self.downsample(x))


def _shortcut(before: int, after: int, stride: int, norm: Norm) -> nn.Module:
    """The identity, or a 1x1 convolution where the shape changes."""
    if stride == 1 and before == after:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), norm_layer(norm, after))


class Trunk(nn.Module):
    """Stem and four stages under torchvision's keys; arguments and attributes as `ResNetFeatures`."""

    def __init__(
        self,
        layers: Layers,
        bottleneck: bool,
        width: int,
        stem: Stem,
        norm: Norm,
        channels: int,
        dilate_last: int = 0,
    ) -> None:
        super().__init__()
        block = Bottleneck if bottleneck else BasicBlock
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = norm_layer(norm, width)
        self.widths = tuple(block.expansion * width * 2**i for i in range(4))
        dilations = [2 ** max(0, i + dilate_last - 3) for i in range(4)]
        strides = [2 if i and dilations[i] == 1 else 1 for i in range(4)]
        self.strides = tuple(accumulate(strides, mul, initial=4 if stem == "imagenet" else 1))[1:]
        for i, before in enumerate((width, *self.widths[:3])):
            # the first block still dilates as the stage before it, as in torchvision
            blocks = [block(before, width * 2**i, strides[i], norm, dilations[max(i - 1, 0)])]
            blocks += [block(self.widths[i], width * 2**i, 1, norm, dilations[i]) for _ in range(1, layers[i])]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al. 2015, as in torchvision
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stages(self, x: Tensor) -> list[Tensor]:
        """The feature map of each stage."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        maps = []
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
            maps.append(x)
        return maps


class ResNetFeatures(Trunk):
    """(B, C, H, W) -> the feature maps of the four stages, (B, widths[i], H / strides[i], W / strides[i]), rounded up.

    Args:
        layers: blocks of each stage, e.g. (2, 2, 2, 2) for ResNet-18 and (3, 4, 6, 3) for ResNet-34 and ResNet-50.
        bottleneck: whether the blocks are bottlenecks (ResNet-50 and deeper).
        width: channels after the stem.
        stem: `imagenet`, stride 4, or `cifar`, stride 1.
        norm: see `norm_layer`.
        channels: of the image.
        dilate_last: how many of the last stages, at most 3, keep the resolution and dilate instead
            (Chen et al. 2017, DeepLab).

    Attributes:
        widths: channels of the four feature maps.
        strides: pixels of the image per step of each feature map.
    """

    def forward(self, x: Tensor) -> list[Tensor]:
        """The feature map of each stage."""
        return self.stages(x)


class ResNet(Trunk):
    """The last feature map, its global average and a linear head `fc`; `top` as in `shared_models.backbone`."""

    top: ClassVar[tuple[str, ...]] = ("fc",)

    def __init__(self, layers: Layers, bottleneck: bool, settings: ResNetSettings, channels: int, outputs: int) -> None:
        super().__init__(layers, bottleneck, settings.width, settings.stem, settings.norm, channels)
        self.fc = nn.Linear(self.widths[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, outputs) scores."""
        scores: Tensor = self.fc(self.maps(x).mean(dim=(2, 3)))
        return scores

    def maps(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, widths[-1], H / strides[-1], W / strides[-1]), the feature map of the last stage."""
        return self.stages(x)[-1]


TASKS = ("classification", "localization", "rotation", "jigsaw", "colorization", "masked-autoencoding")
USUAL = {"tiny": (3, 32, 32), "cifar": (3, 32, 32), "paper": (3, 224, 224)}


@model(
    "resnet18",
    settings=ResNetSettings,
    sizes={
        "tiny": {"width": 16, "stem": "cifar"},
        "cifar": {"width": 64, "stem": "cifar"},
        "paper": {"width": 64, "stem": "imagenet"},
    },
    paper="He et al. 2016, Deep Residual Learning for Image Recognition",
    tasks=TASKS,
    heads=("fc.*",),
    usual=USUAL,
)
def build(settings: ResNetSettings, shape: Shape, outputs: int) -> nn.Module:
    """(B, C, H, W) -> (B, outputs) scores, for images of any size."""
    return ResNet((2, 2, 2, 2), False, settings, shape[0], outputs)


@model(
    "resnet50",
    settings=ResNetSettings,
    sizes={
        "tiny": {"width": 8, "stem": "cifar"},
        "cifar": {"width": 64, "stem": "cifar"},
        "paper": {"width": 64, "stem": "imagenet"},
    },
    paper="He et al. 2016, Deep Residual Learning for Image Recognition",
    tasks=TASKS,
    heads=("fc.*",),
    usual=USUAL,
)
def build50(settings: ResNetSettings, shape: Shape, outputs: int) -> nn.Module:
    """(B, C, H, W) -> (B, outputs) scores, for images of any size."""
    return ResNet((3, 4, 6, 3), True, settings, shape[0], outputs)
