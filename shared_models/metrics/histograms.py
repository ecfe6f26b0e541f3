"""Histograms of scores: what stands for a ranking where predictions must stay at their site.

The bins are equally wide in the log-odds log(p / (1 - p)) of a score p, so that they do not run out near 0 and 1, where
the scores of a confident model lie. Bin b of n holds -16 + 32 b / n <= log-odds < -16 + 32 (b + 1) / n; the first and
the last one hold everything below and above, i.e. p < 1.1e-7 and p > 1 - 1.1e-7.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIMIT = 16.0  # log-odds at which the outer bins begin to hold everything
FEWEST = 16  # bins of any histogram


def score_bins(scores: Tensor, bins: int) -> Tensor:
    """The bin of each score in [0, 1], any shape -> int64 in [0, bins); a score that is no number is in the first."""
    odds = torch.logit(scores.double()).nan_to_num(nan=-LIMIT)
    return ((odds + LIMIT) * (bins / (2 * LIMIT))).clamp(0, bins - 1).long()


def bins_that_fit(histograms: int, most: int, room: int) -> int:
    """The largest power of two <= `most` with which so many int64 histograms take at most `room` bytes; 16 or more."""
    bins = most
    while bins > FEWEST and 8 * histograms * bins > room:
        bins //= 2
    return bins
