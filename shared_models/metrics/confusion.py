"""The confusion matrix, and the overlaps of each class that follow from it."""

from __future__ import annotations

import torch
from torch import Tensor


def confusion(truth: Tensor, guess: Tensor, classes: int, ignored: int = -1) -> Tensor:
    """How often each class was taken for each.

    Args:
        truth: class indices of any shape and integer type, on any device.
        guess: the same shape.
        classes: C.
        ignored: a value of `truth` that counts nowhere.

    Returns:
        (C, C) int64 on the CPU, row = truth, column = guess.
    """
    pairs = (truth.long() * classes + guess)[truth != ignored]
    return torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes).cpu()


def dice(counts: Tensor) -> Tensor:
    """2 TP / (2 TP + FP + FN) of each class, which is its F1: (C, C) -> (C,), NaN where neither side has the class."""
    counts = counts.double()
    return 2 * counts.diag() / (counts.sum(0) + counts.sum(1))


def iou(counts: Tensor) -> Tensor:
    """TP / (TP + FP + FN), the Jaccard index of each class: (C, C) -> (C,), NaN where neither side has the class."""
    counts = counts.double()
    return counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())


def accuracy(counts: Tensor) -> Tensor:
    """The share that was taken for what it is, (); NaN of none."""
    counts = counts.double()
    return counts.diag().sum() / counts.sum()
