"""Which detections find a true box: greedily, best score first, as COCO's own evaluation does it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_models.boxes import PADDING, pairwise_iou

MOST = 100  # detections of one class in one image that count, the best ones


@dataclass(frozen=True)
class Matches:
    """Detections of B images, best first.

    Attributes:
        classes: (B, D) int64, -1 for rows that do not count.
        scores: (B, D).
        hits: (B, D, T) bool, whether it found a true box at each of T overlaps.
    """

    classes: Tensor
    scores: Tensor
    hits: Tensor


def match(found: Tensor, truth: Tensor, overlaps: Tensor) -> Matches:
    """Give each detection the free true box of its class and image that it covers best, if it covers it enough.

    In the order of their scores, at each overlap separately; a box that was found is not free any more, and of two that
    are covered alike the later one is taken. Detections of a class beyond the best 100 of an image do not count.

    Args:
        found: (B, D, 6) class, x0, y0, x1, y1, score; class -1 pads.
        truth: (B, M, 5) class, x0, y0, x1, y1; class -1 pads.
        overlaps: (T,) float64 IoU from which on a box counts as found.
    """
    order = found[..., 5].argsort(dim=1, descending=True, stable=True)
    found = found.take_along_dim(order[..., None], dim=1)
    truth = F.pad(truth, (0, 0, 1, 0), value=PADDING).flip(1)  # at least one row, and `max` takes the first of equals
    classes, scores = _best_of_each_class(found[..., 0]), found[..., 5]
    paired = (classes[..., None] == truth[:, None, :, 0]) & (classes >= 0)[..., None]  # (B, D, M)
    covered = pairwise_iou(found[..., 1:5].double(), truth[..., 1:].double()).where(paired, -1.0)

    (images, count, boxes), levels = covered.shape, len(overlaps)
    hits = torch.zeros(images, count, levels, dtype=torch.bool)
    free = torch.ones(images, levels, boxes, dtype=torch.bool)
    columns = torch.arange(boxes)
    for rank in range(count):
        best, box = covered[:, rank, None].where(free, -1.0).max(dim=2)  # (B, T)
        hits[:, rank] = best >= overlaps
        free &= ~(hits[:, rank, :, None] & (box[..., None] == columns))
    return Matches(classes.long(), scores, hits)


def _best_of_each_class(classes: Tensor) -> Tensor:
    """(B, D) classes, best first; those that stand behind 100 of their class become -1."""
    if classes.shape[1] <= MOST:
        return classes
    before = (classes[:, :, None] == classes[:, None, :]).tril(-1).sum(2)
    return classes.where(before < MOST, PADDING)
