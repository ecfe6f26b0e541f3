"""YOLO, the first one (Redmon et al. 2016): each cell of a grid says which object has its centre there and how it lies.

One network, one pass, no regions. For each cell it gives N boxes (x, y, sqrt(w), sqrt(h), confidence) and one
probability for each class; N = 2 in the paper, which calls it B.

======  ================  ================  ===========  ============  ===========================================
size    image             cells             hidden       M parameters  from
======  ================  ================  ===========  ============  ===========================================
tiny    any               of 8x8 pixels     -            0.1           ours, for images of about 64 to 200 pixels
paper   448x448           7x7, 64 pixels    4096         271.7         Redmon et al. 2016, Figure 3
======  ================  ================  ===========  ============  ===========================================

Parameters at 3 channels and 20 labels. `paper` has the 24 convolutions and two fully connected layers of Figure 3,
no normalisation and linear outputs; its authors trained the first 20 convolutions on ImageNet before, and
from random numbers it learns slowly. `tiny` stays convolutional up to its outputs, so the grid follows the image, and
ends with sigmoids.

A cell holds one object: of several with their centres in one cell the largest is learned and the others are not. Small
objects that stand close need small cells, i.e. `layers` with fewer strides and `maxpool`.
"""

from __future__ import annotations

import math
import re
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator
from torch import Tensor, nn

from shared_models.boxes import PADDING, area, iou, to_centres, to_corners
from shared_models.detection import Detector, best_boxes
from shared_models.errors import ConfigError
from shared_models.models import ModelSettings, Shape, model

POOL = "maxpool"  # 2x2, stride 2
LAYER = re.compile(r"(\d+)x\1x([1-9]\d*)(?:-s-([1-9]\d*))?")  # kernel, filters, stride
SLOPE = 0.1  # of the leaky rectifier (eq. 2)

TINY = "3x3x16-s-2 3x3x32-s-2 3x3x64-s-2 3x3x64 3x3x64 3x3x64"
FIGURE_3 = " ".join([
    "7x7x64-s-2 maxpool",
    "3x3x192 maxpool",
    "1x1x128 3x3x256 1x1x256 3x3x512 maxpool",
    *["1x1x256 3x3x512"] * 4, "1x1x512 3x3x1024 maxpool",
    *["1x1x512 3x3x1024"] * 2, "3x3x1024 3x3x1024-s-2",
    "3x3x1024 3x3x1024",
])  # fmt: skip


class YOLOSettings(ModelSettings):
    """The network and the weights of its loss.

    Attributes:
        layers: the convolutions in the words of the paper's Figure 3, e.g. `3x3x64-s-2 maxpool 1x1x32`: side, side,
            filters and stride, a leaky rectifier after each; `maxpool` is 2x2 with stride 2.
        norm: `group` normalisation after each convolution, or `none`.
        hidden: width of a fully connected layer before the outputs; 0: the outputs come from a 1x1 convolution.
        dropout: after the hidden layer.
        ends: what becomes of the outputs: `sigmoid`, or `linear`, nothing.
        boxes: of each cell (B in the paper).
        coordinates: weight of how the boxes lie (lambda_coord).
        nothing: weight of the confidence of boxes that are not responsible for any object (lambda_noobj).
        detections: how many boxes an image has at most.
        overlap: IoU above which the lower score of one class goes.
        least: scores below it are no detection.
    """

    layers: str
    norm: Literal["group", "none"]
    hidden: int = Field(ge=0)
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    ends: Literal["sigmoid", "linear"]
    boxes: PositiveInt = 2
    coordinates: NonNegativeFloat = 5.0
    nothing: NonNegativeFloat = 0.5
    detections: PositiveInt = 100
    overlap: float = Field(0.5, ge=0.0, le=1.0)
    least: float = Field(0.01, gt=0.0, le=1.0)

    @field_validator("layers")
    @classmethod
    def _layers_can_be_read(cls, layers: str) -> str:
        for word in layers.split():
            found = LAYER.fullmatch(word)
            if word != POOL and not (found and int(found[1]) % 2):
                raise ValueError(f"'{word}' is neither '{POOL}' nor a layer like '3x3x64' or '3x3x64-s-2' of odd side")
        if not any(word != POOL for word in layers.split()):
            raise ValueError("should have a convolution")
        return layers

    @property
    def stride(self) -> int:
        """Side of a cell in pixels."""
        return math.prod(2 if word == POOL else int(word.partition("-s-")[2] or 1) for word in self.layers.split())


def encode(y: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What each cell should say: the object whose centre lies in it, the largest of several.

    Args:
        y: (B, M, 5) class and box, class -1 pads.
        grid: rows and columns of the grid; G cells in all, row by row.

    Returns:
        (B, G) int64 class, -1 where there is no object; (B, G, 4) x and y inside the cell, sqrt(w), sqrt(h) of the
        image.
    """
    y = F.pad(y, (0, 0, 0, 1), value=PADDING)  # at least one row
    steps = y.new_tensor([grid[1], grid[0]])
    centre, size = to_centres(y[..., 1:]).split(2, dim=-1)  # (B, M, 2) each
    corner = torch.minimum((centre * steps).floor().clamp(min=0), steps - 1)  # column, row of the cell
    boxes = torch.cat([centre * steps - corner, size.clamp(min=0).sqrt()], dim=-1)  # (B, M, 4)
    cell = (corner[..., 1] * grid[1] + corner[..., 0]).long()  # (B, M)
    here = cell[:, None] == torch.arange(grid[0] * grid[1], device=y.device)[:, None]  # (B, G, M)
    here = here & (y[..., 0] >= 0)[:, None]
    largest, which = area(y[..., 1:])[:, None].where(here, -1.0).max(dim=2)  # (B, G)
    labels = y[..., 0].gather(1, which).where(largest >= 0, PADDING).long()
    return labels, boxes.gather(1, which[..., None].expand(-1, -1, 4))


def decode(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse: x and y inside each cell, sqrt(w), sqrt(h) -> corners, (B, G, N, 4) -> (B, G, N, 4)."""
    steps = boxes.new_tensor([grid[1], grid[0]])
    cell = torch.arange(grid[0] * grid[1], device=boxes.device)
    corner = torch.stack([cell % grid[1], cell // grid[1]], dim=1)[:, None]  # (G, 1, 2): column, row
    return to_corners(torch.cat([(corner + boxes[..., :2]) / steps, boxes[..., 2:].square()], dim=-1))


def yolo_loss(
    boxes: Tensor, classes: Tensor, y: Tensor, grid: tuple[int, int], coordinates: float = 5.0, nothing: float = 0.5
) -> Tensor:
    """Sum of squared errors over one image (Redmon et al. 2016, eq. 3).

    Of the boxes of a cell that holds an object the one with the highest IoU is responsible for it: that one learns how
    the object lies, and as its confidence the IoU; the confidence of every other box should be 0.

    Args:
        boxes: (B, G, N, 5) x, y, sqrt(w), sqrt(h), confidence of each cell's N boxes.
        classes: (B, G, K) probability of each class, given that there is an object.
        y: (B, M, 5) class and box, class -1 pads.
        grid: rows and columns.
        coordinates: lambda_coord.
        nothing: lambda_noobj.

    Returns:
        (B,).
    """
    labels, truth = encode(y, grid)
    truth = truth[:, :, None]  # (B, G, 1, 4)
    overlap = iou(decode(boxes[..., :4], grid), decode(truth, grid)).detach()  # (B, G, N)
    first = overlap.argmax(dim=2, keepdim=True) == torch.arange(boxes.shape[2], device=boxes.device)
    responsible = first & (labels >= 0)[..., None]  # (B, G, N)
    off = (boxes[..., :4] - truth).square().sum(dim=3)
    confidence = boxes[..., 4]
    held = coordinates * off + (confidence - overlap).square()
    each = torch.where(responsible, held, nothing * confidence.square())  # (B, G, N)
    wanted = labels[..., None] == torch.arange(classes.shape[2], device=boxes.device)  # (B, G, K)
    wrong = (classes - wanted.to(classes.dtype)).square().sum(dim=2) * (labels >= 0)  # (B, G)
    return each.sum(dim=(1, 2)) + wrong.sum(dim=1)


class YOLO(Detector):
    """Convolutions, a hidden layer where there is one, and the outputs of all cells."""

    def __init__(self, settings: YOLOSettings, shape: Shape, outputs: int) -> None:
        super().__init__()
        self.settings = settings
        self.grid = (shape[1] // settings.stride, shape[2] // settings.stride)
        self.features, width = _convolutions(settings, shape[0])
        numbers = 5 * settings.boxes + outputs  # of a cell
        self.hidden: nn.Module = nn.Identity()
        self.head: nn.Module = nn.Conv2d(width, numbers, 1)
        if settings.hidden:
            cells = math.prod(self.grid)
            self.hidden = nn.Sequential(
                nn.Flatten(),
                nn.Linear(width * cells, settings.hidden),
                nn.LeakyReLU(SLOPE),
                nn.Dropout(settings.dropout),
            )
            self.head = nn.Linear(settings.hidden, cells * numbers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, a=SLOPE)
                nn.init.zeros_(module.get_parameter("bias"))
        nn.init.normal_(self.head.get_parameter("weight"), std=0.01)

    def cells(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> (B, G, N, 5) boxes with their confidence, (B, G, K) classes; float32."""
        out = self.head(self.hidden(self.features(x))).float()
        if self.settings.ends == "sigmoid":
            out = out.sigmoid()
        cells = math.prod(self.grid)
        out = out.reshape(len(x), cells, -1) if self.settings.hidden else out.flatten(2).transpose(1, 2)
        split = 5 * self.settings.boxes
        return out[..., :split].unflatten(2, (-1, 5)), out[..., split:]

    def forward(self, x: Tensor, y: Tensor, proposals: Tensor | None = None) -> dict[str, Tensor]:
        """See `Detector`."""
        settings = self.settings
        boxes, classes = self.cells(x)
        outputs = {"loss": yolo_loss(boxes, classes, y, self.grid, settings.coordinates, settings.nothing)}
        if not self.training:
            outputs["found"] = self.found(boxes, classes)
        return outputs

    def found(self, boxes: Tensor, classes: Tensor) -> Tensor:
        """Boxes scored by confidence times probability of the class (eq. 1), without near duplicates: (B, D, 6)."""
        settings = self.settings
        scores = (boxes[..., 4:].clamp(0, 1) * classes[:, :, None].clamp(0, 1)).flatten(1, 2)  # (B, G N, K)
        corners = decode(boxes[..., :4], self.grid).flatten(1, 2)  # (B, G N, 4)
        kept = [
            best_boxes(*image, keep=settings.detections, overlap=settings.overlap, least=settings.least)
            for image in zip(corners, scores, strict=True)
        ]
        return torch.stack(kept)


def _convolutions(settings: YOLOSettings, channels: int) -> tuple[nn.Sequential, int]:
    """The layers, and how many channels come out."""
    layers: list[nn.Module] = []
    for word in settings.layers.split():
        found = LAYER.fullmatch(word)
        if found is None:
            layers.append(nn.MaxPool2d(2))
            continue
        kernel, filters, stride = (int(number or 1) for number in found.groups())
        layers.append(nn.Conv2d(channels, filters, kernel, stride, padding=kernel // 2))
        if settings.norm == "group":
            layers.append(nn.GroupNorm(math.gcd(filters, 8), filters))
        layers.append(nn.LeakyReLU(SLOPE))
        channels = filters
    return nn.Sequential(*layers), channels


@model(
    "yolo",
    settings=YOLOSettings,
    sizes={
        "tiny": {"layers": TINY, "norm": "group", "hidden": 0, "ends": "sigmoid"},
        "paper": {"layers": FIGURE_3, "norm": "none", "hidden": 4096, "dropout": 0.5, "ends": "linear"},
    },
    paper="Redmon et al. 2016, You Only Look Once: Unified, Real-Time Object Detection",
    tasks=("detection",),
    family="detection",
    notes="Fastest: one pass and no regions. It places boxes less exactly than detectors that look twice, and of "
    "objects with their centres in one cell it finds one.",
    usual={"tiny": (3, 120, 160), "paper": (3, 448, 448)},
)
def build(settings: YOLOSettings, shape: Shape, outputs: int) -> nn.Module:
    """A `Detector` for images whose sides are multiples of a cell's.

    Raises:
        ConfigError: they are not.
    """
    _, height, width = shape
    if height % settings.stride or width % settings.stride:
        raise ConfigError(
            f"model 'yolo' of size '{settings.size}' cannot cut an image of {height}x{width} pixels into cells of "
            f"{settings.stride}x{settings.stride}",
            hint=f"Set both sides to multiples of {settings.stride}, or take layers of another stride",
        )
    return YOLO(settings, shape, outputs)
