"""A comparison as one self-contained HTML page, without network, script or font.

Its template is `templates/report.html.j2`, its drawings are `charts.py`, its tables `tables.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup

from simulations import charts, pages
from simulations.joining import Gain, Joining, joinings
from simulations.measures import PERCENT, words
from simulations.results import Cell, Comparison, parse
from simulations.statistics import backward_transfer, final_average, forgetting, summarize
from simulations.tables import (
    SITE_LIMIT,
    Given,
    between,
    forward,
    gain_table,
    guarantees,
    headers,
    metric_table,
    private,
    row,
    site_table,
    spread,
)
from simulations.verdicts import verdicts

CLASS_LIMIT = 40


def write(comparison: Given, path: Path) -> Path:
    """Write the page and return its path.

    Raises:
        RunError: the comparison lacks something, or the file cannot be written.
    """
    return pages.write("report.html.j2", _view(parse(comparison)), path, "the report")


def _view(c: Comparison) -> dict[str, Any]:
    """Everything the template shows, in the order of the page."""
    done = [cell for cell in c.cells if cell.error is None]
    axis, unit = _axis(c, done), c.headline.unit
    return {
        "c": c,
        "metric": words(c.metric),
        "units": ("%", "points") if c.headline.percent else (unit, unit),
        "lower": c.headline.lower,
        "differences": _differences(c),
        "created": f"{c.created:%Y-%m-%d %H:%M %Z}".strip(),
        "verdicts": [sentence.split(": ", 1) for sentence in verdicts(c)],
        "pooled": c.demo or any(cell.place == "centralized" for cell in c.cells),
        "headers": headers(c),
        "rows": [row(cell, c.headline, private(c)) for cell in c.cells],
        "privacy": guarantees(c),
        "metrics": metric_table(c),
        "pictures": c.pictures,
        "quotes": c.quotes,
        "legend": [(cell.name, charts.swatch(_style(c, cell))) for cell in done],
        "overview": overview(c),
        "curves": _curves(c, done),
        "uncurved": not any(_points(cell, c.metric, 1) for cell in done),
        "sites": [(site, _tests(c, site), _site(c, i, site, axis)) for i, site in enumerate(c.sites[:SITE_LIMIT])],
        "weakest": site_table(c),
        "gains": _gains(c),
        "gain_table": gain_table(c),
        "sites_left_out": max(0, len(c.sites) - SITE_LIMIT),
        "matrices": _matrices(c, done),
        "partition": _partition(c),
        "budget": _budget(done),
        "settings": pages.flat(c.job),
    }


def _style(c: Comparison, cell: Cell) -> str:
    """How a paradigm is drawn: by place, time, and, where there are several, method."""
    number = c.methods.index(cell.method) if cell.time == "continual" else 0
    return f"{cell.place} {cell.time}" + (f" m{(number - 1) % 5 + 1}" if number else "")


def _differences(c: Comparison) -> str:
    """What the verdicts count in."""
    name, lower = words(c.metric), f"; {c.headline.lower}" if c.headline.lower else ""
    if c.headline.percent:
        return f"Points are percentage points of {name}{lower}."
    unit = f"Differences of {name} are in {c.headline.unit}" if c.headline.unit else f"Differences are those of {name}"
    return f"{unit}{lower}."


def overview(c: Comparison, prefix: str = "") -> list[tuple[str, Markup]]:
    """Two drawings: every paradigm on all sites' tests, and on the sites' own tests; `prefix` is that of their ids."""
    axis = _axis(c, [cell for cell in c.cells if cell.error is None])
    shown = (
        ("all", "all sites' tests", [_bar(c, cell, cell.all_sites) for cell in c.cells]),
        ("own", "each site's own test, mean of the sites", [_bar(c, cell, cell.own_site) for cell in c.cells]),
    )
    return [
        (title, charts.bars(prefix + key, f"{c.metric} on {title}, by paradigm", rows, axis))
        for key, title, rows in shown
    ]


def _axis(c: Comparison, done: Sequence[Cell]) -> charts.Axis:
    """One axis for all bars of the page, so that they can be held against one another."""
    beside = [v for cell in done for v in (cell.all_sites, cell.own_site, *cell.per_site.values())]
    found = [summarize(v) for v in (*beside, *(v for cell in done for v in cell.per_site_all.values()))]
    ends = [s.mean if c.headline.percent else s.mean + math.copysign(s.sd or 0, s.mean) for s in found]
    figures = [spread(values, c.headline) for values in beside]
    return charts.axis([c.headline.factor * end for end in ends], c.headline.unit, figures)


def _bar(c: Comparison, cell: Cell, values: Sequence[float], mark: Sequence[float] = ()) -> charts.Bar:
    style, factor = _style(c, cell), c.headline.factor
    if cell.error is not None:
        return charts.Bar(cell.name, style, None, None, "failed")
    s = summarize(values)
    sd, text = None if s.sd is None else factor * s.sd, spread(values, c.headline)
    return charts.Bar(cell.name, style, factor * s.mean, sd, text, factor * fmean(mark) if mark else None)


def _site(c: Comparison, index: int, site: str, axis: charts.Axis) -> Markup:
    """One site's own test, by paradigm; the diamond is the same model on all sites' tests."""
    rows = [_bar(c, cell, cell.per_site.get(site, []), cell.per_site_all.get(site, [])) for cell in c.cells]
    return charts.bars(f"site{index}", f"{c.metric} on the own test of {site}, by paradigm", rows, axis)


def _gains(c: Comparison) -> list[tuple[str, Markup]]:
    """What joining brings each site: a drawing for each time and continual method, all on one axis."""
    found, m = joinings(c), c.headline
    shown = [(j, [_gain(c, j, gain) for gain in j.gains[:SITE_LIMIT]]) for j in found]
    ends = [bar.value + side * (bar.sd or 0) for _, bars in shown for bar in bars for side in (-1, 1) if bar.value]
    marks = [bar.mark for _, bars in shown for bar in bars if bar.mark is not None]
    unit = "points" if m.percent else m.unit
    axis = charts.axis([*ends, *marks], unit, [bar.text for _, bars in shown for bar in bars])
    interval = "95 % interval over seeds"
    return [
        (j.name, charts.bars(f"gain{i}", f"gain of joining on each site's own test, {j.name}", bars, axis, interval))
        for i, (j, bars) in enumerate(shown)
    ]


def _gain(c: Comparison, j: Joining, gain: Gain) -> charts.Bar:
    m, own = c.headline, gain.own
    half = None if own.high is None else m.factor * (own.high - own.mean)
    text = between(own.mean, None, None, measure=m)
    return charts.Bar(gain.site, _style(c, j.joined), m.factor * own.mean, half, text, m.factor * gain.everywhere.mean)


def _tests(c: Comparison, site: str) -> int | None:
    """How many test examples the site has, where the partition tells."""
    return c.partition.sizes.get(site, {}).get("test")


def _curves(c: Comparison, done: Sequence[Cell]) -> list[tuple[str, Markup]]:
    """Metric and loss on validation data by round; a figure without a finite value is left out."""
    unit = ", ".join(filter(None, (c.headline.unit, c.headline.lower)))
    drawn = []
    for key, name, behind, scale in (
        (c.metric, pages.sentence(words(c.metric)), f" ({unit})" if unit else "", c.headline.factor),
        ("loss", "Loss", " (mean per example)", 1),
    ):
        series = [
            charts.Series(cell.name, _style(c, cell), points) for cell in done if (points := _points(cell, key, scale))
        ]
        if series:
            title = f"{name} on validation data"
            full = key == c.metric and c.headline.percent and all(p.high <= 100 for s in series for p in s.points)
            drawing = charts.lines(f"curve-{key}", title, series, "round", name + behind, 100 if full else None)
            drawn.append((title, drawing))
    return drawn


def _points(cell: Cell, key: str, scale: float) -> list[charts.Point]:
    """Mean, smallest and largest over the seeds that have a finite value for the round."""
    rounds: dict[float, list[float]] = {}
    for curve in cell.curves:
        for entry in curve:
            x, y = entry.get("round"), entry.get(key)
            if x is not None and y is not None and math.isfinite(y):
                rounds.setdefault(x, []).append(scale * y)
    return [charts.Point(x, fmean(ys), min(ys), max(ys)) for x, ys in sorted(rounds.items())]


def _matrices(c: Comparison, done: Sequence[Cell]) -> list[dict[str, Any]]:
    """The matrix of each continual cell, mean over seeds, and the figures derived from it.

    Every entry has a shade from 0 to 1: a percentage its own value, any other from the worst entry of the page to the
    best.
    """
    m = c.headline
    means = {
        cell.name: [[fmean(values) for values in zip(*rows, strict=True)] for rows in zip(*cell.matrix, strict=True)]
        for cell in done
        if cell.matrix
    }
    every = [0.0, 1.0] if m == PERCENT else [value for rows in means.values() for row in rows for value in row]
    low, high = min(every, default=0.0), max(every, default=0.0)
    worst, best = (low, high) if m.larger else (high, low)

    def entry(value: float) -> tuple[float, str]:
        shade = abs(value - worst) / abs(best - worst) if best != worst else 0.0
        return shade, f"{100 * value:.0f}" if m.percent else m.figure(value)

    return [
        {
            "name": cell.name,
            "rows": [[entry(value) for value in row] for row in means[cell.name]],
            "average": spread([final_average(r) for r in cell.matrix], m),
            "forgetting": spread([forgetting(r, m.larger) for r in cell.matrix], m),
            "transfer": spread([backward_transfer(r, m.larger) for r in cell.matrix], m),
            "forward": forward(cell, m),
            "known": spread([final_average(r) for r in cell.known], m) if cell.known else "",
            "buffer": cell.buffer,
        }
        for cell in done
        if cell.matrix
    ]


def _partition(c: Comparison) -> dict[str, Any]:
    """Training examples by class and site, and the size of each part; empty where a run does not know them."""
    known = [site for site in c.sites if site in c.partition.sites][:SITE_LIMIT]
    shown, rest = c.labels[:CLASS_LIMIT], c.labels[CLASS_LIMIT:]
    rows = []
    for site in known:
        parts = c.partition.sites[site]
        train = parts.get("train", {})
        counts = [train.get(label, 0) for label in shown] + ([sum(train.get(x, 0) for x in rest)] if rest else [])
        sizes = [c.partition.sizes.get(site, {}).get(part, 0) for part in ("train", "validation", "test")]
        rows.append((site, counts, sizes))
    most = max((count for _, counts, _ in rows for count in counts), default=0)
    return {"columns": [*shown, *([f"{len(rest)} more"] if rest else [])], "rows": rows, "most": max(most, 1)}


def _budget(done: Sequence[Cell]) -> str:
    """One sentence: whether every paradigm had the same budget."""
    samples = {cell.budget.samples for cell in done}
    if len(samples) > 1:
        return "The budgets differ (see the column “samples”): part of a difference may come from that."
    return f"Every paradigm processed {samples.pop():,} samples, summed over the sites." if samples else ""
