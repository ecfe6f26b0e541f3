"""What may be said after a comparison: means, intervals over seeds, and figures of continual learning.

Student's intervals describe the spread over seeds (initial weights, order of batches) and nothing else: neither the
split, the size of the test sets nor the number of intervals looked at is allowed for. The bootstrap describes the
spread over sites too, as if those at hand were drawn from many such sites.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
from scipy.stats import t as student

Matrix = Sequence[Sequence[float]]
LEVEL = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Summary:
    """n values, one a seed. `sd`, `low` and `high` are None where n = 1: one value has no spread."""

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None


def summarize(values: Sequence[float], level: float = LEVEL) -> Summary:
    """Mean, standard deviation (n - 1) and Student-t interval `mean +- t(n-1) sd / sqrt(n)`.

    Raises:
        ValueError: there are no values.
    """
    n, mean = len(values), fmean(values)
    if n == 1:
        return Summary(n, mean, None, None, None)
    sd = stdev(values)
    half = float(student.ppf((1 + level) / 2, n - 1)) * sd / math.sqrt(n)
    return Summary(n, mean, sd, mean - half, mean + half)


def paired(a: Sequence[float], b: Sequence[float], level: float = LEVEL) -> Summary:
    """The difference a - b seed by seed: both sides of a pair share what the seed decides.

    Raises:
        ValueError: the two have different lengths, or none.
    """
    return summarize([x - y for x, y in zip(a, b, strict=True)], level)


def bootstrap(values: Sequence[Sequence[float]], level: float = LEVEL) -> tuple[float, float]:
    """Interval of the mean of K rows of n values each, with other rows and other columns drawn: sites x seeds.

    Rows and columns are resampled with replacement, apart from each other, for all rows share a column's seed (the
    crossed or "pigeonhole" bootstrap, Owen 2007, section 3, which is conservative); the interval lies between the
    percentiles of 10,000 means. The draws are always the same.

    Raises:
        ValueError: fewer than two rows or columns: nothing could be drawn otherwise.
    """
    table = np.asarray(values, dtype=float)  # (K, n)
    if table.ndim != 2 or min(table.shape) < 2:
        raise ValueError(f"needs two rows and two columns at least, not {table.shape}")
    source = np.random.default_rng(0)
    means = np.empty(RESAMPLES)
    for b in range(RESAMPLES):
        rows, columns = (source.multinomial(size, [1 / size] * size) / size for size in table.shape)
        means[b] = rows @ table @ columns
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def final_average(r: Matrix) -> float:
    """`FAA = mean_i R[T,i]`: the metric after the last task, averaged over all T tasks (R: T x T)."""
    return fmean(r[-1])


def forgetting(r: Matrix, larger: bool = True) -> float:
    """`mean_{i<T}(max_t R[t,i] - R[T,i])`: how far each earlier task fell from its best (R: T x T; 0 where T = 1).

    Where a smaller value is better (`larger = False`) the best is the smallest: `mean_{i<T}(R[T,i] - min_t R[t,i])`.

    Chaudhry et al., "Riemannian Walk for Incremental Learning" (2018), with the last row among the t, as in Buzzega
    et al. (2020): never negative.
    """
    sign = 1 if larger else -1
    return fmean([max(sign * row[i] for row in r) - sign * r[-1][i] for i in range(len(r) - 1)] or [0.0])


def backward_transfer(r: Matrix, larger: bool = True) -> float:
    """`BWT = mean_{i<T}(R[T,i] - R[i,i])`: below 0 where later tasks spoilt earlier ones (R: T x T; 0 where T = 1).

    The sign is turned where a smaller value is better (`larger = False`), so that below 0 says the same.

    Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning" (2017), equation 3.
    """
    sign = 1 if larger else -1
    return fmean([sign * (r[-1][i] - r[i][i]) for i in range(len(r) - 1)] or [0.0])


def forward_transfer(r: Matrix, untrained: Sequence[float], larger: bool = True) -> float:
    """`FWT = mean_{i>1}(R[i-1,i] - b_i)`: what earlier tasks taught of one not yet seen (R: T x T; 0 where T = 1).

    `untrained` is b, the metric before any training, (T,). The sign is turned where a smaller value is better.

    Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning" (2017), equation 4.
    """
    sign = 1 if larger else -1
    return fmean([sign * (r[i - 1][i] - untrained[i]) for i in range(1, len(r))] or [0.0])
