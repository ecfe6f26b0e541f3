"""What a comparison says in plain words: no more than the intervals over seeds do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from simulations.joining import Claim, Joining, joinings
from simulations.measures import Measure
from simulations.results import Cell, Comparison, Place, Time, parse
from simulations.statistics import TIE, Matrix, forgetting, paired, summarize

CLAIMS: tuple[Claim, ...] = ("gains", "loses", "open")
NAMED = 6  # sites that a sentence names
PLACES: tuple[Place, ...] = ("centralized", "isolated", "federated")


def verdicts(comparison: Comparison | Mapping[str, Any]) -> list[str]:
    """Plain sentences that claim no more than the 95 % intervals over seeds do.

    For each time: federated against isolated (all tests, own tests) and against centralized; what each continual cell
    forgot; continual against offline. Of several continual methods one sentence names all: each against fine-tuning at
    its place, and federated against the other places. Then what went wrong. They say where a smaller value is better.
    """
    c = parse(comparison)
    said = _places(c, "offline")
    if len(c.methods) > 1:
        said += _by_method(c)
    else:
        said += _places(c, "continual")
        for cell in c.cells:
            if cell.time == "continual" and cell.matrix:
                said.append(f"{cell.place.capitalize()}: {_forgot(c, cell.matrix)}")
        offline, continual = c.cell("federated", "offline"), c.cell("federated", "continual")
        if offline and continual:
            said.append("Federated: " + _against(c, continual, offline))
    for cell in c.cells:
        if cell.error is not None:
            said.append(f"{cell.name.capitalize()}: failed, so nothing is claimed about it ({cell.error}).")
        elif cell.rejections:
            noun = "contribution was" if cell.rejections == 1 else "contributions were"
            said.append(f"{cell.name.capitalize()}: {cell.rejections} {noun} rejected and did not count.")
    return said


def _places(c: Comparison, time: Time) -> list[str]:
    """The places of one time against each other."""
    centralized, isolated, federated = (c.cell(place, time) for place in PLACES)
    said, prefix = [], f"{time.capitalize()}: "
    if federated and isolated:
        said += [prefix + _against(c, federated, isolated, own) for own in (False, True)]
        said += [prefix + _joined(c, j) for j in joinings(c) if j.joined is federated and len(c.seeds) > 1]
    if federated and centralized:
        said.append(prefix + _against(c, federated, centralized))
    if centralized and isolated and not federated:
        said.append(prefix + _against(c, centralized, isolated))
    return said


def _joined(c: Comparison, j: Joining) -> str:
    """One sentence on which sites gain by joining, as their own tests show; of many sites it says how many."""
    gains, loses, unsettled = (j.sites(claim) for claim in CLAIMS)

    def named(sites: Sequence[str]) -> str:
        return f" ({', '.join(sites)})" if 0 < len(sites) <= NAMED else ""

    low, high = j.spread or (0.0, 0.0)
    first = f"{len(gains)} of {len(j.gains)} sites {'gains' if len(gains) == 1 else 'gain'}{named(gains)}"
    m, what = c.headline, c.headline.step(c.metric)
    return (
        f"by joining, on their own tests, {first}, {len(loses)} {'loses' if len(loses) == 1 else 'lose'}"
        f"{named(loses)}, and for {len(unsettled)} nothing can be "
        f"claimed{named(unsettled)} (95 % intervals, {len(c.seeds)} seeds). Mean gain {m.figure(j.mean)} {what}, "
        f"{m.figure(low)} to {m.figure(high)} for such sites and seeds (95 % interval over both)."
    )


def _by_method(c: Comparison) -> list[str]:
    """Several continual methods: each against fine-tuning, and the places against each other."""
    said = []
    for place in PLACES:
        plain = c.cell(place, "continual", "finetune")
        others = [m for m in c.methods if m != "finetune"]
        if plain:
            pairs = [(m, cell, plain) for m in others if (cell := c.cell(place, "continual", m))]
            said += together(c, f"{place.capitalize()}, continual, against fine-tuning", pairs)
        said += _forgot_by_method(c, place)
    for place in ("isolated", "centralized"):
        found = [(m, c.cell("federated", "continual", m), c.cell(place, "continual", m)) for m in c.methods]
        said += together(c, f"Continual, federated against {place}", [(m, a, b) for m, a, b in found if a and b])
    return said


def _forgot_by_method(c: Comparison, place: Place) -> list[str]:
    """One sentence on what each method forgot at a place; none where nothing was measured."""
    m, lost = c.headline, []
    for method in c.methods:
        cell = c.cell(place, "continual", method)
        if cell and cell.matrix:
            f = summarize([forgetting(r, m.larger) for r in cell.matrix])
            interval = "" if f.low is None or f.high is None else f" ({m.figure(f.low)} to {m.figure(f.high)})"
            lost.append(f"{method} {m.figure(f.mean)}{interval}")
    side = "below" if m.larger else "above"
    seeds = f"95 % intervals, {len(c.seeds)} seeds" if len(c.seeds) > 1 else "one seed"
    step = m.step(c.metric)
    return [f"{place.capitalize()}, continual, how far earlier tasks end {side} their best, {step} ({seeds}): "
            f"{', '.join(lost)}."] if lost else []  # fmt: skip


def together(c: Comparison, what: str, pairs: Sequence[tuple[str, Cell, Cell]]) -> list[str]:
    """One sentence on the paired differences of several methods, those that can be claimed first; none for no pair."""
    if not pairs:
        return []
    measure, seeds = c.headline, len(c.seeds)
    claimed: list[str] = []
    open_: list[str] = []
    for method, a, b in pairs:
        d = paired(a.all_sites, b.all_sites)
        if d.low is None or d.high is None:
            open_.append(f"{method} {measure.figure(d.mean)}")
        else:
            shown = f"{method} {measure.figure(d.mean)} ({measure.figure(d.low)} to {measure.figure(d.high)})"
            (claimed if d.claims else open_).append(shown)
    lower = f"; {measure.lower}" if measure.lower else ""
    unit = f"all sites' tests, {measure.step(c.metric)}"
    if seeds == 1:
        return [f"{what} on {unit}, with one seed{lower}: {', '.join(open_)}; no difference can be claimed."]
    parts = [", ".join(claimed), f"no difference can be claimed for {', '.join(open_)}" if open_ else ""]
    return [f"{what} on {unit} (95 % intervals, {seeds} seeds{lower}): {'; '.join(filter(None, parts))}."]


def _against(c: Comparison, a: Cell, b: Cell, own: bool = False) -> str:
    """One sentence on the paired difference a - b."""
    left, right = (a.place, b.place) if a.place != b.place else (a.time, b.time)
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
    if not d.claims:
        lower = f"; {measure.lower}" if measure.lower else ""
        tie = " The seeds tie, which is no spread to judge by." if d.high - d.low <= TIE and d.mean else ""
        return (
            f"no difference between {left} and {right} can be claimed on {where}: {measure.figure(d.mean)} {unit} "
            f"({_interval(measure, d.low, d.high)}, {d.n} seeds{lower}).{tie}{unequal}"
        )
    low, high = sorted((abs(d.low), abs(d.high)))
    return (
        f"{left} is {side} {right} on {where} by {measure.figure(abs(d.mean))} {unit} "
        f"({_interval(measure, low, high)}, {d.n} seeds){measure.judged(d.mean)}.{unequal}"
    )


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
