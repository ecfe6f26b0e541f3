"""Area under the ROC curve, one class against the rest, from score histograms of the two sides."""

from __future__ import annotations

import torch
from torch import Tensor

from shared_models.metrics.histograms import score_bins


def roc_histograms(probabilities: Tensor, truth: Tensor, bins: int) -> Tensor:
    """For each class the scores of the examples that are not of it, and of those that are.

    Args:
        probabilities: (N, C), those of one example sum to 1.
        truth: (N,) int64 class indices.
        bins: of each histogram.

    Returns:
        (C, 2, bins) int64.
    """
    classes = probabilities.shape[1]
    columns = torch.arange(classes, device=truth.device)
    histogram = 2 * columns + (truth[:, None] == columns)  # (N, C)
    cells = histogram * bins + score_bins(probabilities, bins)
    return torch.bincount(cells.flatten(), minlength=classes * 2 * bins).reshape(classes, 2, bins)


def auroc(histograms: Tensor) -> Tensor:
    """P(score of a positive > that of a negative), where a pair that shares a bin counts one half.

    Args:
        histograms: (C, 2, bins), negatives and positives.

    Returns:
        (C,) float64, NaN for a class without positives or without negatives.
    """
    negatives, positives = histograms.double().unbind(-2)
    below = negatives.cumsum(-1) - negatives
    return (positives * (below + negatives / 2)).sum(-1) / (positives.sum(-1) * negatives.sum(-1))


def auroc_error(histograms: Tensor) -> Tensor:
    """How far `auroc` may be from that of the exact scores: sum_b P_b N_b / (2 P N), (C, 2, bins) -> (C,).

    Pairs of different bins are ranked rightly; one that shares a bin is worth between 0 and 1 and counted as one half.
    """
    negatives, positives = histograms.double().unbind(-2)
    return (positives * negatives).sum(-1) / (2 * positives.sum(-1) * negatives.sum(-1))
