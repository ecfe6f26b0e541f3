"""How well clusters agree with classes, from the table of how many examples are in both.

Tables of several sites are added, and the values are those of the pooled assignments.
"""

from __future__ import annotations

import torch
from torch import Tensor


def contingency(found: Tensor, truth: Tensor, clusters: int, classes: int) -> Tensor:
    """Examples in each cluster of each class, (clusters, classes) int64 on the CPU, from two (N,) of indices."""
    pairs = found.cpu() * classes + truth.cpu()
    return torch.bincount(pairs, minlength=clusters * classes).reshape(clusters, classes)


def normalized_mutual_information(table: Tensor) -> float:
    """I(clusters; classes) / mean of both entropies (Vinh et al. 2010, NMI_sum); 1 where both are one, NaN of none."""
    joint = table.double() / table.sum()
    rows, columns = joint.sum(1), joint.sum(0)
    entropies = -torch.special.xlogy(rows, rows).sum() - torch.special.xlogy(columns, columns).sum()
    if not entropies:
        return 1.0
    shared = (torch.special.xlogy(joint, joint) - torch.special.xlogy(joint, torch.outer(rows, columns))).sum()
    return float(2 * shared.clamp(min=0) / entropies)


def adjusted_rand_index(table: Tensor) -> float:
    """Pairs on which both agree, corrected for chance (Hubert & Arabie 1985, eq. 5): 0 at random, 1 at best.

    1 where both are one, or each example is alone in both; NaN of none.
    """
    counts = table.double()
    together, rows, columns, every = (_pairs(c) for c in (counts, counts.sum(1), counts.sum(0), counts.sum()))
    if not table.sum():
        return float("nan")
    if rows == columns == together:
        return 1.0
    expected = rows * columns / every
    return float((together - expected) / ((rows + columns) / 2 - expected))


def _pairs(counts: Tensor) -> Tensor:
    """n (n - 1) / 2, added up."""
    return (counts * (counts - 1) / 2).sum()
