"""ResNet-18 (He et al. 2016) with torchvision's state-dict keys, so that its weights load with `norm = "batch"`.

The default norm is GroupNorm (Wu & He 2018), whose statistics belong to one sample: nothing to average between sites,
no sample seen through another. No operation is in place, so hooks and `torch.func` work.

======  =====  ========  ==========================================
size    width  stem      parameters
======  =====  ========  ==========================================
tiny    16     cifar     701,178 at one channel, 10 out
cifar   64     cifar     11,173,962 at three channels, 10 out
paper   64     imagenet  11,689,512 at three channels, 1000 out
======  =====  ========  ==========================================
"""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from shared_models.models import ModelSettings, Shape, model

Norm = Literal["group", "batch"]


class ResNetSettings(ModelSettings):
    """The network's form.

    Attributes:
        width: channels after the stem, a multiple of 8; doubles in each of the three later stages.
        stem: `imagenet` (7x7 stride 2, then 3x3 max pooling stride 2) or `cifar` (3x3 stride 1, no pooling).
        norm: `group` or `batch`.
    """

    width: int = Field(gt=0, multiple_of=8)
    stem: Literal["imagenet", "cifar"]
    norm: Norm = "group"


def norm_layer(kind: Norm, channels: int) -> nn.Module:
    """BatchNorm, or GroupNorm with 16 channels a group (8 where 16 does not divide; Wu & He 2018, Table 3)."""
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(channels // math.gcd(channels, 16), channels)


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)): (B, C, H, W) -> (B, C', H/stride, W/stride)."""

    def __init__(self, before: int, after: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1 = norm_layer(norm, after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = norm_layer(norm, after)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False),
                norm_layer(norm, after),
            )

    def forward(self, x: Tensor) -> Tensor:
        """The residual function plus the shortcut."""
        residual = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(residual)) + self.downsample(x))


class ResNet18(nn.Module):
    """Stem, four stages of two basic blocks, global average, linear head `fc`."""

    def __init__(self, settings: ResNetSettings, channels: int, outputs: int) -> None:
        super().__init__()
        width, norm = settings.width, settings.norm
        if settings.stem == "imagenet":
            self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = norm_layer(norm, width)
        self.layer1 = self._stage(width, width, 1, norm)
        self.layer2 = self._stage(width, 2 * width, 2, norm)
        self.layer3 = self._stage(2 * width, 4 * width, 2, norm)
        self.layer4 = self._stage(4 * width, 8 * width, 2, norm)
        self.fc = nn.Linear(8 * width, outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al. 2015, as in torchvision
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(before: int, after: int, stride: int, norm: Norm) -> nn.Sequential:
        return nn.Sequential(BasicBlock(before, after, stride, norm), BasicBlock(after, after, 1, norm))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, outputs) scores."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))  # (B, w, H, W), or a quarter of each side
        x = self.layer2(self.layer1(x))  # (B, 2w, H/2, W/2)
        x = self.layer4(self.layer3(x))  # (B, 8w, H/8, W/8)
        scores: Tensor = self.fc(x.mean(dim=(2, 3)))  # (B, outputs)
        return scores


@model(
    "resnet18",
    settings=ResNetSettings,
    sizes={
        "tiny": {"width": 16, "stem": "cifar"},
        "cifar": {"width": 64, "stem": "cifar"},
        "paper": {"width": 64, "stem": "imagenet"},
    },
    paper="He et al. 2016, Deep Residual Learning for Image Recognition",
)
def build(settings: ResNetSettings, shape: Shape, outputs: int) -> nn.Module:
    """(B, C, H, W) -> (B, outputs) scores, for images of any size."""
    return ResNet18(settings, shape[0], outputs)
