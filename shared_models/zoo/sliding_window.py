"""Sliding windows: the detector before regions and grids, a classifier that looks at every window of the image alone.

======  ==========  ====  ======  =======================  ============  ===================
size    channels    side  hidden  windows of a 3:4 image   M parameters  from
======  ==========  ====  ======  =======================  ============  ===================
tiny    16, 32, 64  16    64      1,985                    0.04          ours
======  ==========  ====  ======  =======================  ============  ===================

A detection is a window itself: no box is moved, and what overlaps is left to non-maximum suppression. Each window is
cut out, warped to a square and classified by itself, so an image costs as many passes of the network as it has windows,
although neighbours see nearly the same pixels. That waste is what later detectors took away: OverFeat (Sermanet et al.
2014) turns the fully connected layers into convolutions and runs the classifier once over the whole image, which gives
the scores of all windows of one scale; `rcnn` looks at proposed regions only; `yolo` at cells.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from shared_models.detection import Detector, best_boxes
from shared_models.models import ModelSettings, Shape, model
from shared_models.regions import Sampling, choose, crop, take

AT_ONCE = 1024  # windows in memory in evaluation

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]


class SlidingWindowSettings(ModelSettings):
    """The windows, the classifier, and what it learns from.

    Attributes:
        scales: side of a square window as a share of the image's shorter side.
        ratios: width / height of the windows, of the area of that square.
        step: how far a window moves, at most, as a share of its own width and height.
        side: of the square that each window is warped to, in pixels.
        channels: of each convolution; a 2x2 max pooling follows each.
        hidden: width of the fully connected layer.
        windows: how many of an image the loss sees in a training step.
        objects: share of them, at most, that show an object; the rest is background.
        foreground: IoU with a true box from which a window shows its object.
        background: IoU below which a window is background; those between are not used.
        detections: how many boxes an image has at most.
        overlap: IoU above which the lower score of one class goes.
        least: scores below it are no detection.
    """

    scales: Annotated[tuple[Fraction, ...], Field(min_length=1)]
    ratios: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    step: Fraction
    side: PositiveInt
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    hidden: PositiveInt
    windows: PositiveInt
    objects: Fraction = 0.5
    foreground: Fraction = 0.5
    background: Fraction = 0.3
    detections: PositiveInt = 100
    overlap: float = Field(0.3, ge=0.0, le=1.0)
    least: Fraction = 0.05

    @model_validator(mode="after")
    def _values_fit(self) -> SlidingWindowSettings:
        if self.background > self.foreground:
            raise ValueError(f"background {self.background} should be at most foreground {self.foreground}")
        if self.side >> len(self.channels) < 1:
            raise ValueError(
                f"side {self.side} should be at least {2 ** len(self.channels)} for that many convolutions"
            )
        return self


def slide(scales: tuple[float, ...], ratios: tuple[float, ...], step: float, height: int, width: int) -> Tensor:
    """Every window of an image of height x width pixels, as fractions of it: (R, 4) x0, y0, x1, y1.

    For each scale and ratio the windows stand evenly from edge to edge, no further apart than `step` of their side.
    """
    found = []
    for side in (scale * min(height, width) for scale in scales):
        for ratio in ratios:
            wide, high = min(side * ratio**0.5 / width, 1.0), min(side / ratio**0.5 / height, 1.0)
            x, y = (torch.linspace(0, 1 - size, _count(size, step)) for size in (wide, high))
            low = torch.cartesian_prod(y, x).flip(1)  # row by row
            found.append(torch.cat([low, low + torch.tensor([wide, high])], dim=1))
    return torch.cat(found).clamp(0, 1)


def _count(size: float, step: float) -> int:
    """How many windows of this size a line of length 1 takes."""
    return 1 + math.ceil((1 - size) / (step * size) - 1e-6)


class SlidingWindow(Detector):
    """A small CNN for K classes and background, and the windows it looks at."""

    windows: Tensor

    def __init__(self, settings: SlidingWindowSettings, shape: Shape, outputs: int) -> None:
        super().__init__()
        self.settings = settings
        windows = slide(settings.scales, settings.ratios, settings.step, shape[1], shape[2])
        self.register_buffer("windows", windows, persistent=False)
        layers: list[nn.Module] = []
        for before, after in pairwise((shape[0], *settings.channels)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(math.gcd(after, 8), after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers, nn.Flatten())
        last = settings.side >> len(settings.channels)
        self.hidden = nn.Sequential(nn.Linear(settings.channels[-1] * last**2, settings.hidden), nn.ReLU())
        self.head = nn.Linear(settings.hidden, outputs + 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.get_parameter("bias"))
        nn.init.normal_(self.head.weight, std=0.01)

    def classify(self, x: Tensor, regions: Tensor) -> Tensor:
        """(B, C, H, W) and (B, S, 4) -> (B, S, K + 1) scores, background first; each window by itself."""
        cut = crop(x, regions, self.settings.side, points=2)  # (B, S, C, side, side)
        scores = self.head(self.hidden(self.features(cut.flatten(0, 1))))  # (B S, K + 1)
        out: Tensor = scores.float().unflatten(0, cut.shape[:2])
        return out

    def forward(self, x: Tensor, y: Tensor, proposals: Tensor | None = None) -> dict[str, Tensor]:
        """See `Detector`. In training the true boxes join the windows; in evaluation all windows are looked at once."""
        settings = self.settings
        regions = self.windows.expand(len(x), -1, -1)  # (B, R, 4)
        if self.training:
            regions = torch.cat([regions, y[..., 1:]], dim=1)
        limits = Sampling(settings.windows, settings.objects, settings.foreground, (0.0, settings.background))
        chosen = choose(regions, y, limits, training=self.training)
        if self.training:
            scores = self.classify(x, take(regions, chosen.index))
            return {"loss": balanced(scores, chosen.labels, chosen.weights)}
        images = [
            torch.cat([self.classify(image, part) for part in windows.split(AT_ONCE, dim=1)], dim=1)
            for image, windows in zip(x[:, None], regions[:, None], strict=True)
        ]
        scores = torch.cat(images) if images else x.new_zeros(0, regions.shape[1], self.head.out_features)
        return {
            "loss": balanced(take(scores, chosen.index), chosen.labels, chosen.weights),
            "found": self.found(scores),
        }

    def found(self, scores: Tensor) -> Tensor:
        """(B, R, K + 1) scores of all windows -> (B, D, 6) those that stand out."""
        settings = self.settings
        chances = torch.softmax(scores, dim=-1)[..., 1:]
        kept = [
            best_boxes(self.windows, image, keep=settings.detections, overlap=settings.overlap, least=settings.least)
            for image in chances
        ]
        return torch.stack(kept) if kept else scores.new_zeros(0, settings.detections, 6)


def balanced(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Mean cross entropy of an image's object windows plus that of its background windows, (B,).

    Args:
        scores: (B, S, K + 1).
        labels: (B, S) int64, 0 for background.
        weights: (B, S) 1, or 0 for a window that does not count.
    """
    each = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none").unflatten(0, labels.shape)
    objects, background = weights * (labels > 0), weights * (labels == 0)
    return sum(
        ((each * part).sum(dim=1) / part.sum(dim=1).clamp(min=1) for part in (objects, background)),
        start=torch.zeros_like(each[:, 0]),
    )


@model(
    "sliding-window",
    settings=SlidingWindowSettings,
    sizes={
        "tiny": {
            "scales": (0.08, 0.14, 0.24, 0.42, 0.7), "ratios": (1.0,), "step": 0.38, "side": 16,
            "channels": (16, 32, 64), "hidden": 64, "windows": 64,
        },
    },
    paper="Sermanet et al. 2014, OverFeat: Integrated Recognition, Localization and Detection (the classifier alone)",
    tasks=("detection",),
    per_sample_gradients=("vmap", "loop"),
    family="detection",
    notes="The classical baseline: simple, very slow, for the whole network runs for each of thousands of windows, and "
    "no more exact than the grid of windows is fine.",
    usual={"tiny": (3, 120, 160)},
)  # fmt: skip
def build(settings: SlidingWindowSettings, shape: Shape, outputs: int) -> nn.Module:
    """A `Detector` for images of any size."""
    return SlidingWindow(settings, shape, outputs)
