"""What may be said after a comparison: means, intervals over seeds, and figures of continual learning.

Student's intervals describe the spread over seeds (initial weights, order of batches) and nothing else: neither the
split, the size of the test sets nor the number of intervals looked at is allowed for. `crossed`
describes the spread over sites too, as if those at hand were drawn from many such sites.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t as student

Matrix = Sequence[Sequence[float]]
LEVEL = 0.95
TIE = 1e-9  # differences closer than this are the same


@dataclass(frozen=True)
class Summary:
    """n values, one a seed. `sd`, `low` and `high` are None where n = 1: one value has no spread."""

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None

    @property
    def claims(self) -> bool:
        """Whether it may be said that the value is not 0: the interval excludes it, and the seeds do differ.

        Two or three seeds often tie on a small test; then there is no spread to judge by.
        """
        if self.low is None or self.high is None or self.high - self.low <= TIE:
            return False
        return not self.low <= 0 <= self.high


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


def crossed(values: Sequence[Sequence[float]], level: float = LEVEL) -> tuple[float, float]:
    """Interval of the mean of K rows of n values each, for other rows and other columns: sites x seeds.

    Rows and columns are taken as drawn (two crossed random effects): the variance of the mean is that of the rows'
    means / K plus that of the columns' means / n, which counts what is left to both of them twice, and t has
    min(K, n) - 1 degrees of freedom. So the interval is rather too wide than too narrow; a bootstrap of three sites
    and three seeds would be too narrow by far.

    Raises:
        ValueError: fewer than two rows or columns: there is no spread to judge by.
    """
    rows, columns = [fmean(row) for row in values], [fmean(column) for column in zip(*values, strict=True)]
    if min(len(rows), len(columns)) < 2:
        raise ValueError(f"needs two rows and two columns at least, not {len(rows)} and {len(columns)}")
    half = math.sqrt(stdev(rows) ** 2 / len(rows) + stdev(columns) ** 2 / len(columns))
    half *= float(student.ppf((1 + level) / 2, min(len(rows), len(columns)) - 1))
    return fmean(rows) - half, fmean(rows) + half


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
