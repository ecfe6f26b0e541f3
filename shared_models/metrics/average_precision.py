"""Average precision (COCO) from score histograms of the detections that are right and of those that are wrong."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RECALLS = torch.from_numpy(np.linspace(0.0, 1.0, 101))  # the points at which COCO reads the curve


def average_precision(hits: Tensor, misses: Tensor, truths: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest AP that detections with these histograms can have.

    AP is the mean over the recalls r = 0, .01, ..., 1 of the best precision at a recall >= r, 0 where r is not reached.
    It depends on the order of the detections, which the histograms give but within a bin. It falls when a miss moves
    before a hit, so it is lowest with the misses of every bin first and highest with the hits first. Both are the exact
    AP where no bin holds a hit and a miss.

    Args:
        hits: (..., bins) detections that found a box, in ascending order of score.
        misses: (..., bins) detections that did not.
        truths: (...) true boxes.

    Returns:
        Two tensors (...) float64, NaN where there are no true boxes.
    """
    hits, misses = hits.flip(-1).double(), misses.flip(-1).double()
    found = hits.cumsum(-1)
    wrong = misses.cumsum(-1)
    bins = torch.searchsorted(found.contiguous(), _needed(truths).contiguous())  # (..., 101), where r is reached
    low, high = (_at(found / (found + w), bins).where(truths > 0, torch.nan) for w in (wrong, wrong - misses))
    return low, high


def _needed(truths: Tensor) -> Tensor:
    """How many boxes must be found, at least one, for each recall: the smallest k with k / truths >= r, (..., 101).

    k / truths is rounded as in COCO's code: r = .35 of 100 boxes are 36, for 35 / 100 < np.linspace(0, 1, 101)[35].
    """
    boxes = truths.double().clamp(min=1)[..., None]
    guess = (RECALLS * boxes).round()
    tries = torch.stack([guess - 1, guess, guess + 1], dim=-1)
    enough = tries / boxes[..., None] >= RECALLS[:, None]
    return tries.where(enough, torch.inf).amin(-1).clamp(min=1)


def _at(precision: Tensor, bins: Tensor) -> Tensor:
    """Mean of the best precision from each of these bins on, 0 beyond the last, (..., bins) x (..., 101) -> (...)."""
    best = precision.nan_to_num(nan=0.0).flip(-1).cummax(-1).values.flip(-1)
    return F.pad(best, (0, 1)).gather(-1, bins).mean(-1)
