"""What the detectors that classify regions share: sampling, pooling and coding of regions, and the head with its loss.

A region is a box x0, y0, x1, y1 as fractions of the image's width and height; one without area is padding. Class 0 is
the background and class k + 1 is label k, as in published weights. Every function treats each image on its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_models.boxes import PADDING, area, pairwise_iou, to_centres, to_corners
from shared_models.detection import best_boxes

SPREAD = (0.1, 0.1, 0.2, 0.2)  # about the standard deviations of t_x, t_y, t_w, t_h around a good proposal
LARGEST = math.log(1000 / 16)  # of t_w and t_h: no region grows more than that
IGNORED = -1  # the class of a region that is neither object nor background
TIE = 1e-5  # of an IoU: what differs by less is as near, whatever rounding says
GOLDEN = (math.sqrt(5) - 1) / 2


def encode(boxes: Tensor, regions: Tensor, spread: tuple[float, ...] = SPREAD) -> Tensor:
    """How a box lies beside a region (Girshick et al. 2014, eq. 6-9): (dx / w, dy / h, log w'/w, log h'/h) / spread.

    Args:
        boxes: (..., 4), what the region should have been.
        regions: (..., 4).
        spread: what each coordinate is divided by, so that all have about unit variance.
    """
    to, since = to_centres(boxes), to_centres(regions)
    size, before = to[..., 2:].clamp(min=1e-6), since[..., 2:].clamp(min=1e-6)
    shifts = torch.cat([(to[..., :2] - since[..., :2]) / before, torch.log(size / before)], dim=-1)
    return shifts / shifts.new_tensor(spread)


def decode(shifts: Tensor, regions: Tensor, spread: tuple[float, ...] = SPREAD) -> Tensor:
    """The inverse of `encode`, broadcasting: (..., 4) and (..., 4) -> (..., 4) boxes (eq. 1-4)."""
    move, grow = (shifts * shifts.new_tensor(spread)).split(2, dim=-1)
    since = to_centres(regions)
    centre = since[..., :2] + move * since[..., 2:]
    return to_corners(torch.cat([centre, since[..., 2:] * torch.exp(grow.clamp(max=LARGEST))], dim=-1))


@dataclass(frozen=True)
class Sampling:
    """Which regions of an image the loss sees.

    Attributes:
        count: at most so many.
        share: of them, at most, objects.
        foreground: IoU with a true box from which a region is an object.
        background: IoU from which, and below which, it is background.
        nearest: whether those nearest to a true box are objects too, however far they are (Ren et al. 2015, 3.1.2).
    """

    count: int
    share: float
    foreground: float
    background: tuple[float, float]
    nearest: bool = False


@dataclass(frozen=True)
class Chosen:
    """The regions that the loss sees, S of each image.

    Attributes:
        index: (B, S) which of the R regions.
        labels: (B, S) int64 class, 0 for background.
        targets: (B, S, 4) their true boxes, encoded; of no meaning for background.
        weights: (B, S) 1, or 0 where an image has fewer than S regions to choose from.
    """

    index: Tensor
    labels: Tensor
    targets: Tensor
    weights: Tensor


def label(regions: Tensor, y: Tensor, how: Sampling) -> tuple[Tensor, Tensor]:
    """The class of each region, by the true box that it overlaps most.

    Args:
        regions: (B, R, 4).
        y: (B, M, 5) class and box, class -1 pads.
        how: its three thresholds count here.

    Returns:
        (B, R) int64: 0 for background, k + 1 for label k, -1 for neither; (B, R, 4): that box.
    """
    y = torch.cat([y, y.new_full((len(y), 1, 5), PADDING)], dim=1)  # never empty
    overlaps = pairwise_iou(regions, y[..., 1:])  # (B, R, M + 1)
    overlap, which = overlaps.masked_fill((y[..., 0] < 0)[:, None], 0.0).max(dim=2)
    own = take(y, which)  # (B, R, 5)
    low, high = how.background
    foreground = (overlap >= how.foreground) & (overlap > 0)
    if how.nearest:
        nearest = overlaps.amax(dim=1, keepdim=True)  # (B, 1, M + 1)
        hit = (overlaps >= (1 - TIE) * nearest) & (nearest > 0) & (y[..., 0] >= 0)[:, None]
        foreground = foreground | hit.any(dim=2)
    background = (overlap >= low) & (overlap < high) & (area(regions) > 0)
    kinds = torch.where(foreground, own[..., 0].long() + 1, torch.where(background, 0, IGNORED))
    return kinds, own[..., 1:]


def choose(regions: Tensor, y: Tensor, how: Sampling, *, training: bool, spread: tuple[float, ...] = SPREAD) -> Chosen:
    """A random sample of an image's regions, objects first, filled up with background.

    The priorities are one draw of shape (B, R) from torch's global generator: what one image's are does not depend on
    what the others hold. Without `training` they are a fixed sequence, so that a measured loss repeats.

    Args:
        regions: (B, R, 4).
        y: (B, M, 5) class and box, class -1 pads.
        how: what is sampled.
        training: whether to draw.
        spread: see `encode`.
    """
    labels, boxes = label(regions, y, how)
    if training:
        priority = torch.rand(labels.shape, device=labels.device)
    else:
        priority = (torch.arange(labels.shape[1], device=labels.device) * GOLDEN % 1).expand(labels.shape)
    count = min(how.count, labels.shape[1])
    objects = torch.where(labels > 0, priority + 1, -1.0)
    last = objects.topk(min(math.ceil(how.share * how.count), count), dim=1).values[:, -1:]
    wanted = torch.where(objects >= last, objects, -1.0)  # (B, R): in [1, 2) where an object is taken, else -1
    value, index = torch.where(labels == 0, priority, wanted).topk(count, dim=1)
    targets = encode(take(boxes, index), take(regions, index), spread)
    return Chosen(index, take(labels, index).clamp(min=0), targets, (value >= 0).to(regions.dtype))


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows of each image: (B, R, ...) and (B, S) -> (B, S, ...)."""
    tail = values.shape[2:]
    return values.gather(1, index.reshape(*index.shape, *(1 for _ in tail)).expand(*index.shape, *tail))


def crop(features: Tensor, regions: Tensor, side: int, points: int = 1) -> Tensor:
    """Every region resampled to side x side bins: RoIAlign (He et al. 2017) as two products of matrices.

    Bilinear interpolation is separable, so a region is A F B^T with a row of A (B) for each bin. Other than
    torchvision's `roi_align`, which gives the same numbers, this has a `vmap` rule, and its gradient on a GPU is
    the same in every run; it costs more arithmetic, less than the layers around it.

    Args:
        features: (B, C, H, W); what lies outside counts as 0.
        regions: (B, S, 4).
        side: bins of a row and of a column.
        points: samples per side of a bin, of which a bin is the mean.

    Returns:
        (B, S, C, side, side).
    """
    b, c, h, w = features.shape
    down = _interpolation(regions[..., 1], regions[..., 3], h, side, points).to(features.dtype)  # (B, S, side, H)
    right = _interpolation(regions[..., 0], regions[..., 2], w, side, points).to(features.dtype)  # (B, S, side, W)
    rows = down.flatten(1, 2) @ features.transpose(1, 2).flatten(2)  # (B, S side, C W)
    bins: Tensor = rows.reshape(b, -1, side * c, w) @ right.transpose(2, 3)  # (B, S, side C, side)
    return bins.reshape(b, -1, side, c, side).transpose(2, 3)


def _interpolation(low: Tensor, high: Tensor, size: int, side: int, points: int) -> Tensor:
    """(B, S) ends in [0, 1] -> (B, S, side, size): the weight of each pixel of a line in each bin."""
    steps = (torch.arange(side * points, dtype=low.dtype, device=low.device) + 0.5) / (side * points)
    places = (low[..., None] + (high - low)[..., None] * steps) * size - 0.5  # pixel i has its centre at i
    inside = (places >= -1) & (places <= size)
    pixels = torch.arange(size, device=low.device)
    weights = (1 - (places.clamp(0, size - 1)[..., None] - pixels).abs()).clamp(min=0) * inside[..., None]
    return weights.reshape(*low.shape, side, points, size).mean(dim=3)


class TwoBranches(nn.Module):
    """Scores of all classes and, for each class, how the box should move (Girshick 2015, section 2.1).

    (..., D) -> (..., K + 1) and (..., K + 1, 4) for K labels; of the background's own box nothing is asked. Started
    as in the paper, at standard deviations of 0.01 and 0.001. The keys are torchvision's.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(width, outputs + 1)
        self.bbox_pred = nn.Linear(width, 4 * (outputs + 1))
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and encoded boxes, float32 whatever precision came before."""
        return self.cls_score(x).float(), self.bbox_pred(x).float().unflatten(-1, (-1, 4))


def region_loss(scores: Tensor, shifts: Tensor, chosen: Chosen) -> Tensor:
    """Multi-task loss (Girshick 2015, eq. 1-3): mean over an image's sampled regions of -log p_u + [u >= 1] L_loc.

    Args:
        scores: (B, S, K + 1).
        shifts: (B, S, K + 1, 4).
        chosen: the S regions' classes u, targets and weights.

    Returns:
        (B,), 0 for an image without any region.
    """
    labels = chosen.labels
    classes = -torch.log_softmax(scores, dim=-1).gather(2, labels[..., None]).squeeze(2)  # (B, S)
    own = shifts.gather(2, labels[..., None, None].expand(-1, -1, 1, 4)).squeeze(2)  # (B, S, 4)
    boxes = F.smooth_l1_loss(own, chosen.targets, reduction="none").sum(dim=2) * (labels > 0)
    return ((classes + boxes) * chosen.weights).sum(dim=1) / chosen.weights.sum(dim=1).clamp(min=1)


def detections(regions: Tensor, scores: Tensor, shifts: Tensor, *, keep: int, overlap: float, least: float) -> Tensor:
    """What `Detector` calls `found`: (B, R, 4), (B, R, K + 1) and (B, R, K + 1, 4) -> (B, keep, 6)."""
    there = (area(regions) > 0)[..., None]
    chances = torch.softmax(scores, dim=-1)[..., 1:] * there  # (B, R, K)
    boxes = decode(shifts[..., 1:, :], regions[:, :, None])  # (B, R, K, 4)
    found = [best_boxes(*image, keep=keep, overlap=overlap, least=least) for image in zip(boxes, chances, strict=True)]
    return torch.stack(found)
