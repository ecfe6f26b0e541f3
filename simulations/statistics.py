"""What may be said after a comparison: means, intervals over seeds, and figures of continual learning.

The intervals describe the spread over seeds (initial weights, order of batches) and nothing else: neither the split,
the size of the test sets nor the number of intervals looked at is allowed for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, cast

from scipy.stats import t as student

from simulations.measures import Measure
from simulations.results import Cell, Comparison, Place, Time, parse

Matrix = Sequence[Sequence[float]]
LEVEL = 0.95
PLACES: tuple[Place, ...] = ("centralized", "isolated", "federated")


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


def verdicts(comparison: Comparison | Mapping[str, Any]) -> list[str]:
    """Plain sentences that claim no more than the 95 % intervals over seeds do.

    For each time and continual method: federated against isolated (all tests, own tests) and against centralized; what
    each continual cell forgot; each method against fine-tuning; continual against offline; then what went wrong. Where
    a smaller value is better they say so.
    """
    c = parse(comparison)
    said: list[str] = []
    for time, method in [("offline", ""), *(("continual", method) for method in c.methods)]:
        centralized, isolated, federated = (
            c.cell(p, cast(Time, time), method if time == "continual" else None)
            for p in ("centralized", "isolated", "federated")
        )
        prefix = f"{time.capitalize()}{f' ({method})' if len(c.methods) > 1 and method else ''}: "
        if federated and isolated:
            said += [prefix + _against(c, federated, isolated, own) for own in (False, True)]
        if federated and centralized:
            said.append(prefix + _against(c, federated, centralized))
        if centralized and isolated and not federated:
            said.append(prefix + _against(c, centralized, isolated))
    for cell in c.cells:
        if cell.time == "continual" and cell.matrix:
            said.append(f"{_of(c, cell).capitalize()}: {_forgot(c, cell.matrix)}")
    for place in PLACES:
        plain = c.cell(place, "continual", "finetune")
        for cell in c.cells:
            if plain and cell.place == place and cell.time == "continual" and cell is not plain and cell.error is None:
                said.append(f"{place.capitalize()}, continual: " + _against(c, cell, plain))
    offline = c.cell("federated", "offline")
    for cell in c.cells:
        if offline and (cell.place, cell.time) == ("federated", "continual") and cell.error is None:
            said.append("Federated: " + _against(c, cell, offline))
    for cell in c.cells:
        if cell.error is not None:
            said.append(f"{cell.name.capitalize()}: failed, so nothing is claimed about it ({cell.error}).")
        elif cell.rejections:
            noun = "contribution was" if cell.rejections == 1 else "contributions were"
            said.append(f"{cell.name.capitalize()}: {cell.rejections} {noun} rejected and did not count.")
    return said


def _against(c: Comparison, a: Cell, b: Cell, own: bool = False) -> str:
    """One sentence on the paired difference a - b."""
    left, right = str(a.place), str(b.place)
    if a.place == b.place:
        left, right = a.time, b.time
    if a.place == b.place and a.time == b.time:
        left, right = a.method, b.method
    elif a.place == b.place and len(c.methods) > 1:
        left = f"{left} ({a.method})"
    where = "the sites' own tests" if own else "all sites' tests"
    d = paired(a.own_site, b.own_site) if own else paired(a.all_sites, b.all_sites)
    measure, unit = c.headline, c.headline.step(c.metric)
    side = "above" if d.mean > 0 else "below"
    unequal = (
        f" The budgets differ: {a.budget.samples:,} samples against {b.budget.samples:,}."
        if a.budget.samples != b.budget.samples
        else ""
    )
    if d.low is None or d.high is None:
        lower = f" ({measure.lower})" if measure.lower else ""
        return (
            f"{left} measured {measure.figure(abs(d.mean))} {unit} {side} {right} on {where}{lower}, with one seed: "
            f"there is no interval and no difference can be claimed.{unequal}"
        )
    if d.low <= 0 <= d.high:
        lower = f"; {measure.lower}" if measure.lower else ""
        return (
            f"no difference between {left} and {right} can be claimed on {where}: {measure.figure(d.mean)} {unit} "
            f"({_interval(measure, d.low, d.high)}, {d.n} seeds{lower}).{unequal}"
        )
    low, high = sorted((abs(d.low), abs(d.high)))
    return (
        f"{left} is {side} {right} on {where} by {measure.figure(abs(d.mean))} {unit} "
        f"({_interval(measure, low, high)}, {d.n} seeds){measure.judged(d.mean)}.{unequal}"
    )


def _of(c: Comparison, cell: Cell) -> str:
    """The place, and the method where there are several."""
    return f"{cell.place} ({cell.method})" if len(c.methods) > 1 else cell.place


def _forgot(c: Comparison, matrices: Sequence[Matrix]) -> str:
    """One sentence on the forgetting of a continual cell."""
    measure, unit = c.headline, c.headline.step(c.metric)
    side = "below" if measure.larger else "above"
    f = summarize([forgetting(r, measure.larger) for r in matrices])
    lost = f"{measure.figure(f.mean)} {unit}"
    if f.low is None or f.high is None:
        return f"continual training lost {lost} on earlier tasks, with one seed: there is no interval."
    if f.low <= 0:
        return (
            f"no forgetting can be claimed: {lost} ({_interval(measure, f.low, f.high)}, {f.n} seeds) "
            f"{side} the best each earlier task had reached."
        )
    return (
        f"continual training forgets: earlier tasks end {lost} {side} their best "
        f"({_interval(measure, f.low, f.high)}, {f.n} seeds)."
    )


def _interval(measure: Measure, low: float, high: float) -> str:
    return f"95 % interval {measure.figure(low)} to {measure.figure(high)}"
