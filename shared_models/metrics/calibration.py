"""Expected calibration error of the predicted class (Guo et al. 2017, On Calibration of Modern Neural Networks)."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15


def overconfidence(confidence: Tensor, hit: Tensor) -> Tensor:
    """Confidence minus hit, added up over the examples in each bin of confidence.

    Args:
        confidence: (N,) probability of the predicted class.
        hit: (N,) bool, whether that class is the true one.

    Returns:
        (16,) float64: 15 equally wide bins, closed below, and one for a confidence of exactly 1, as torchmetrics cuts.
    """
    edges = torch.linspace(0, 1, BINS + 1, device=confidence.device)
    bins = (torch.bucketize(confidence.float().nan_to_num(nan=0.0), edges, right=True) - 1).clamp(0, BINS)
    gaps = confidence.double() - hit.double()
    return torch.zeros(BINS + 1, dtype=torch.float64, device=gaps.device).index_add(0, bins, gaps)


def expected_calibration_error(gaps: Tensor, examples: Tensor) -> Tensor:
    """sum_b |B_b| / N * |acc(B_b) - conf(B_b)| (eq. 5 there), which is sum_b |gap_b| / N, (); NaN of no examples."""
    return gaps.abs().sum() / examples
