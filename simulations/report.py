"""A comparison as one self-contained HTML page, as a terminal table and as Markdown.

The page needs no network, script or font; its template is `templates/report.html.j2`, its drawings are `charts.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from shared_models.privacy import bound
from simulations import charts, pages
from simulations.measures import PERCENT, Measure, words
from simulations.results import Cell, Comparison, parse
from simulations.statistics import backward_transfer, final_average, forgetting, forward_transfer, summarize
from simulations.verdicts import verdicts

Given = Comparison | Mapping[str, Any]
NOTHING = "–"
SITE_LIMIT = 24  # more sites or classes than this would make the page unreadable; it says how many it leaves out
CLASS_LIMIT = 40
METRIC_LIMIT = 14
PARADIGM_LIMIT = 8  # columns of paradigms in a table
SIMULATED = (
    "the noise of this simulation comes from the job's seed, so that it can be repeated: it shows what privacy costs "
    "and protects nobody"
)


def write(comparison: Given, path: Path) -> Path:
    """Write the page and return its path.

    Raises:
        RunError: the comparison lacks something, or the file cannot be written.
    """
    return pages.write("report.html.j2", _view(parse(comparison)), path, "the report")


def tables(comparison: Given, width: int = 120) -> list[Table]:
    """The summary for a terminal, one row a paradigm; below 120 columns what was reached and what it cost apart.

    Raises:
        RunError: the comparison lacks something.
    """
    c = parse(comparison)
    head, rows = headers(c), [row(cell, c.headline, private(c)) for cell in c.cells]
    cuts = [range(len(head))] if width >= 120 else [range(4), (0, *range(4, len(head)))]
    found = []
    for number, columns in enumerate(cuts):
        shown = Table(title=Text(c.title) if number == 0 else None, title_justify="left")
        for i in columns:
            shown.add_column(Text(head[i]), justify="right" if i else "left", no_wrap=i == 0)
        for cells in rows:
            shown.add_row(*(Text(cells[i]) for i in columns))
        found.append(shown)
    for head, rows in (metric_table(c), stream_table(c)):
        shown = Table(title_justify="left")
        for i, name in enumerate(head):
            shown.add_column(Text(name), justify="right" if i else "left", overflow="ellipsis" if i else "fold")
        for cells in rows:
            shown.add_row(*map(Text, cells))
        if rows:
            found.append(shown)
    return found


def as_markdown(comparison: Given) -> str:
    """The same tables for a README, with a line end after the last row of each.

    Raises:
        RunError: the comparison lacks something.
    """
    c = parse(comparison)
    summary = (headers(c), [row(cell, c.headline, private(c)) for cell in c.cells])
    return "\n".join(_markdown(head, rows) for head, rows in (summary, metric_table(c), stream_table(c)) if rows)


def _markdown(head: list[str], body: list[list[str]]) -> str:
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "".join("| " + " | ".join(" ".join(v.replace("|", "\\|").split()) for v in r) + " |\n" for r in rows)


def headers(c: Comparison) -> list[str]:
    """The columns of the summary, the same for terminal, Markdown and page."""
    unit = "points" if c.headline.percent else c.headline.unit
    return [
        "paradigm",
        f"all sites' tests, {c.headline.title(c.metric)}",
        f"own test, {c.headline.title(c.metric)}",
        f"forgetting, {unit}" if unit else "forgetting",
        "samples",
        "sequential steps",
        "optimizer resets",
        "up / down, MB",
        "seconds",
        *([_terms(c)] if private(c) else []),
    ]


def private(c: Comparison) -> bool:
    """Whether some paradigm was trained with differential privacy."""
    return any(cell.privacy for cell in c.cells)


def _terms(c: Comparison) -> str:
    """The head of the column of epsilons: they mean nothing without unit, neighbours and delta."""
    one = next(cell.privacy for cell in c.cells if cell.privacy)
    return f"epsilon (± one {one.unit}, delta {one.delta:g})"


def guarantees(c: Comparison) -> list[str]:
    """A sentence for each paradigm of a comparison with privacy; the epsilon of each site where they differ."""
    said = []
    for cell in c.cells if private(c) else ():
        if cell.error is None and cell.privacy is None:
            said.append(f"{cell.name}: trained without differential privacy")
        elif cell.privacy is not None:
            each = ", ".join(f"{s} {_epsilon(e)}" for s, e in list(cell.privacy.epsilon.items())[:SITE_LIMIT])
            more = f"; by site: {each}" if len(set(cell.privacy.epsilon.values())) > 1 else ""
            said.append(f"{cell.name}: {cell.privacy.statement}{more}")
    return [*said, SIMULATED] if said and c.environment else said


def _epsilon(value: float | None) -> str:
    return "infinite" if value is None else bound(value)


def row(cell: Cell, measure: Measure = PERCENT, private: bool = False) -> list[str]:
    """One paradigm's figures under `headers`: mean ± sd over seeds; a failed cell gives its reason and nothing else."""
    if cell.error is not None:
        return [cell.name, f"failed: {cell.error}", *[NOTHING] * (8 if private else 7)]
    b = cell.budget
    return [
        cell.name,
        spread(cell.all_sites, measure),
        spread(cell.own_site, measure),
        spread([forgetting(r, measure.larger) for r in cell.matrix], measure) if cell.matrix else NOTHING,
        f"{b.samples:,}",
        f"{b.sequential_steps:,}",
        f"{b.optimizer_resets:,}",
        f"{_megabytes(b.bytes_up)} / {_megabytes(b.bytes_down)}",
        f"{fmean(cell.seconds):,.1f}" if cell.seconds else NOTHING,
        *([_epsilon(cell.privacy.largest) if cell.privacy else "no privacy"] if private else []),
    ]


def metric_table(c: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the second table: every metric on all sites' tests, a column for each paradigm that was run.

    Many paradigms are the rows instead. A metric that is not defined for some seed is left open. Nothing where the task
    has one metric only. The unit stands in the head where all are percentages, else in each row's name.
    """
    done = [cell for cell in c.cells if cell.error is None]
    if len(c.metrics) < 2 or not done:
        return [], []
    names, rows = _metric_names(c), []
    percent = all(c.measure(name) == PERCENT for name in names)
    for name in names:
        measure = c.measure(name)
        found = [[v for v in cell.metrics.get(name, []) if v is not None and math.isfinite(v)] for cell in done]
        shown = (spread(v, measure) if len(v) == len(c.seeds) else NOTHING for v in found)
        rows.append([name if percent else measure.title(name), *shown])
    head = ["all sites' tests, %" if percent else "all sites' tests", *(cell.name for cell in done)]
    if len(done) > PARADIGM_LIMIT:
        head, *rows = map(list, zip(head, *rows, strict=True))
    return head, rows


def stream_table(c: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the third table: what each continual paradigm knows after the last task, and its figures."""
    done = [cell for cell in c.cells if cell.error is None and cell.matrix]
    if not done:
        return [], []
    m = c.headline
    count = len((done[0].matrix or [[]])[0])
    title = m.title(c.metric)
    head = [f"after the last task, {title}", *(f"task {i + 1}" for i in range(count)), "mean", "with the task known",
            "backward transfer", "forward transfer", "examples kept"]  # fmt: skip
    rows = []
    for cell in done:
        last = [r[-1] for r in cell.matrix or ()]
        rows.append([
            cell.name,
            *(spread([values[i] for values in last], m) for i in range(count)),
            spread([final_average(r) for r in cell.matrix or ()], m),
            spread([final_average(r) for r in cell.known], m) if cell.known else NOTHING,
            spread([backward_transfer(r, m.larger) for r in cell.matrix or ()], m),
            _forward(cell, m) or NOTHING,
            f"{cell.buffer:,}" if cell.buffer else NOTHING,
        ])  # fmt: skip
    return head, rows


def _metric_names(c: Comparison) -> list[str]:
    """Those of the task, then those of single labels, e.g. `dice:membrane`."""
    known = {name: None for cell in c.cells for name in cell.metrics if name in c.metrics or ":" in name}
    return [*(n for n in c.metrics if n in known), *(n for n in known if n not in c.metrics)][:METRIC_LIMIT]


def spread(values: Sequence[float], measure: Measure = PERCENT) -> str:
    """Fractions as percent: `84.2 ± 1.3` (mean and sd over seeds), `84.2` for one seed; others as `measure` says."""
    s = summarize(values)
    mean = measure.figure(s.mean)
    return mean if s.sd is None else f"{mean} ± {measure.figure(s.sd)}"


def _megabytes(count: int) -> str:
    """10^6 bytes, with a digit that says something also for a small model."""
    size = count / 1e6
    return f"{size:,.0f}" if size >= 100 or size == 0 else f"{size:.1f}" if size >= 1 else f"{size:.2g}"


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
        "overview": _overview(c, axis),
        "curves": _curves(c, done),
        "uncurved": not any(_points(cell, c.metric, 1) for cell in done),
        "sites": [(site, _tests(c, site), _site(c, i, site, axis)) for i, site in enumerate(c.sites[:SITE_LIMIT])],
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


def _overview(c: Comparison, axis: charts.Axis) -> list[tuple[str, Markup]]:
    """Two drawings: every paradigm on all sites' tests, and on the sites' own tests."""
    shown = (
        ("all", "all sites' tests", [_bar(c, cell, cell.all_sites) for cell in c.cells]),
        ("own", "each site's own test, mean of the sites", [_bar(c, cell, cell.own_site) for cell in c.cells]),
    )
    return [(title, charts.bars(key, f"{c.metric} on {title}, by paradigm", rows, axis)) for key, title, rows in shown]


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
            "forward": _forward(cell, m),
            "known": spread([final_average(r) for r in cell.known], m) if cell.known else "",
            "buffer": cell.buffer,
        }
        for cell in done
        if cell.matrix
    ]


def _forward(cell: Cell, m: Measure) -> str:
    if not cell.matrix or not cell.untrained:
        return ""
    pairs = zip(cell.matrix, cell.untrained, strict=True)
    return spread([forward_transfer(r, before, m.larger) for r, before in pairs], m)


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
