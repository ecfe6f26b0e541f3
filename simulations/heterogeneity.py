"""How far apart the sites of a partition are, in a few figures, counted on what they train on.

| figure                | definition                                      | range                            |
|-----------------------|-------------------------------------------------|----------------------------------|
| `total_variation`     | mean over sites of 1/2 sum_c abs(p_k(c) - p(c)) | 0, all like the pool, to below 1 |
| `jensen_shannon`      | mean over sites of JS(p_k, p), bits (Lin 1991)  | 0 to 1                           |
| `labels_per_site`     | mean number of labels that occur at a site      |                                  |
| `gini`                | sum_jk abs(n_j - n_k) / (2 K sum_k n_k)         | 0, equal sizes, to 1 - 1 / K     |
| `largest_to_smallest` | max n_k / min n_k                               | from 1                           |

p_k is the distribution of labels at site k, p that of all sites together, n_k the size of site k. Where nothing has a
label, the first three are None.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Heterogeneity:
    """The figures of the table above."""

    total_variation: float | None
    jensen_shannon: float | None
    labels_per_site: float | None
    gini: float
    largest_to_smallest: float


def measure(counts: np.ndarray, sizes: np.ndarray) -> Heterogeneity:
    """From (K, C) counts of labels, C = 1 where there are none to tell apart, and (K,) sizes, each above 0."""
    gini = np.abs(sizes[:, None] - sizes[None]).sum() / (2 * len(sizes) * sizes.sum())
    ratio = float(sizes.max() / sizes.min())
    held = counts[counts.sum(axis=1) > 0]  # a site without a single box has no distribution of them
    if counts.shape[1] < 2 or not len(held):
        return Heterogeneity(None, None, None, float(gini), ratio)
    pool = held.sum(axis=0) / held.sum()
    own = held / held.sum(axis=1, keepdims=True)
    middle = (own + pool) / 2
    jensen_shannon = (_kl(own, middle) + _kl(np.broadcast_to(pool, own.shape), middle)) / 2
    return Heterogeneity(
        float(np.abs(own - pool).sum(axis=1).mean() / 2),
        float(jensen_shannon.mean()),
        float((held > 0).sum(axis=1).mean()),
        float(gini),
        ratio,
    )


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """(K,) Kullback-Leibler divergences in bits; q is above 0 where p is."""
    ratio = np.divide(p, q, out=np.ones_like(q), where=p > 0)
    found: np.ndarray = (p * np.log2(ratio)).sum(axis=1)
    return found
