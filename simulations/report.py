"""A comparison as one self-contained HTML page, as a terminal table and as Markdown.

The page needs no network, script or font; its template is `templates/report.html.j2`, its drawings are `charts.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from shared_models.errors import RunError
from simulations import charts
from simulations.results import Cell, Comparison, parse
from simulations.statistics import backward_transfer, final_average, forgetting, summarize, verdicts

Given = Comparison | Mapping[str, Any]
NOTHING = "–"
SITE_LIMIT = 24  # more sites or classes than this would make the page unreadable; it says how many it leaves out
CLASS_LIMIT = 40
METRIC_LIMIT = 14


def write(comparison: Given, path: Path) -> Path:
    """Write the page and return its path.

    Raises:
        RunError: the comparison lacks something, or the file cannot be written.
    """
    page = _environment().get_template("report.html.j2").render(_view(parse(comparison)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RunError(f"the report cannot be written to {path}: {error.strerror}") from None
    return path


def tables(comparison: Given, width: int = 120) -> list[Table]:
    """The summary for a terminal, one row a paradigm; below 120 columns what was reached and what it cost apart.

    Raises:
        RunError: the comparison lacks something.
    """
    c = parse(comparison)
    head, rows = headers(c), [row(cell) for cell in c.cells]
    cuts = [range(len(head))] if width >= 120 else [range(4), (0, *range(4, len(head)))]
    found = []
    for number, columns in enumerate(cuts):
        shown = Table(title=Text(c.title) if number == 0 else None, title_justify="left")
        for i in columns:
            shown.add_column(Text(head[i]), justify="right" if i else "left", no_wrap=i == 0)
        for cells in rows:
            shown.add_row(*(Text(cells[i]) for i in columns))
        found.append(shown)
    head, rows = metric_table(c)
    if rows:
        shown = Table(title_justify="left")
        for i, name in enumerate(head):
            shown.add_column(Text(name), justify="right" if i else "left")
        for cells in rows:
            shown.add_row(*map(Text, cells))
        found.append(shown)
    return found


def as_markdown(comparison: Given) -> str:
    """The same tables for a README, with a line end after the last row of each.

    Raises:
        RunError: the comparison lacks something.
    """
    c = parse(comparison)
    said = _markdown(headers(c), [row(cell) for cell in c.cells])
    head, rows = metric_table(c)
    return f"{said}\n{_markdown(head, rows)}" if rows else said


def _markdown(head: list[str], body: list[list[str]]) -> str:
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "".join("| " + " | ".join(" ".join(v.replace("|", "\\|").split()) for v in r) + " |\n" for r in rows)


def headers(c: Comparison) -> list[str]:
    """The columns of the summary, the same for terminal, Markdown and page."""
    return [
        "paradigm",
        f"all sites' tests, {c.metric} %",
        f"own test, {c.metric} %",
        "forgetting, points",
        "samples",
        "sequential steps",
        "optimizer resets",
        "up / down, MB",
        "seconds",
    ]


def row(cell: Cell) -> list[str]:
    """One paradigm's figures under `headers`: mean ± sd over seeds; a failed cell gives its reason and nothing else."""
    if cell.error is not None:
        return [cell.name, f"failed: {cell.error}", *[NOTHING] * 7]
    b = cell.budget
    return [
        cell.name,
        spread(cell.all_sites),
        spread(cell.own_site),
        spread([forgetting(r) for r in cell.matrix]) if cell.matrix else NOTHING,
        f"{b.samples:,}",
        f"{b.sequential_steps:,}",
        f"{b.optimizer_resets:,}",
        f"{_megabytes(b.bytes_up)} / {_megabytes(b.bytes_down)}",
        f"{fmean(cell.seconds):,.1f}" if cell.seconds else NOTHING,
    ]


def metric_table(c: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the second table: every metric on all sites' tests, a column for each paradigm that was run.

    A metric that is not defined for some seed is left open. Nothing where the task has one metric only.
    """
    done = [cell for cell in c.cells if cell.error is None]
    if len(c.metrics) < 2 or not done:
        return [], []
    rows = []
    for name in _metric_names(c):
        found = [[v for v in cell.metrics.get(name, []) if v is not None] for cell in done]
        rows.append([name, *(spread(v) if len(v) == len(c.seeds) else NOTHING for v in found)])
    return ["all sites' tests, %", *(cell.name for cell in done)], rows


def _metric_names(c: Comparison) -> list[str]:
    """Those of the task, then those of single labels, e.g. `dice:membrane`."""
    known = {name: None for cell in c.cells for name in cell.metrics if name in c.metrics or ":" in name}
    return [*(n for n in c.metrics if n in known), *(n for n in known if n not in c.metrics)][:METRIC_LIMIT]


def spread(values: Sequence[float]) -> str:
    """Fractions as percent: `84.2 ± 1.3` (mean and sd over seeds), `84.2` for one seed."""
    s = summarize(values)
    mean = f"{100 * s.mean:z.1f}".replace("-", "−")
    return mean if s.sd is None else f"{mean} ± {100 * s.sd:.1f}"


def _megabytes(count: int) -> str:
    """10^6 bytes, with a digit that says something also for a small model."""
    size = count / 1e6
    return f"{size:,.0f}" if size >= 100 or size == 0 else f"{size:.1f}" if size >= 1 else f"{size:.2g}"


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("simulations", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _view(c: Comparison) -> dict[str, Any]:
    """Everything the template shows, in the order of the page."""
    done = [cell for cell in c.cells if cell.error is None]
    return {
        "c": c,
        "created": f"{c.created:%Y-%m-%d %H:%M %Z}".strip(),
        "verdicts": [sentence.split(": ", 1) for sentence in verdicts(c)],
        "pooled": c.demo or any(cell.place == "centralized" for cell in c.cells),
        "headers": headers(c),
        "rows": [row(cell) for cell in c.cells],
        "metrics": metric_table(c),
        "pictures": c.pictures,
        "legend": [(cell.name, charts.swatch(f"{cell.place} {cell.time}")) for cell in done],
        "overview": _overview(c),
        "curves": _curves(c, done),
        "sites": [(site, _tests(c, site), _site(c, i, site)) for i, site in enumerate(c.sites[:SITE_LIMIT])],
        "sites_left_out": max(0, len(c.sites) - SITE_LIMIT),
        "matrices": [_matrix(cell) for cell in done if cell.matrix],
        "partition": _partition(c),
        "budget": _budget(done),
        "settings": _flat(c.job),
    }


def _overview(c: Comparison) -> list[tuple[str, Markup]]:
    """Two drawings: every paradigm on all sites' tests, and on the sites' own tests."""
    shown = (
        ("all", "all sites' tests", [_bar(cell, cell.all_sites) for cell in c.cells]),
        ("own", "each site's own test, mean of the sites", [_bar(cell, cell.own_site) for cell in c.cells]),
    )
    return [(title, charts.bars(key, f"{c.metric} on {title}, by paradigm", rows)) for key, title, rows in shown]


def _bar(cell: Cell, values: Sequence[float], mark: Sequence[float] = ()) -> charts.Bar:
    style = f"{cell.place} {cell.time}"
    if cell.error is not None:
        return charts.Bar(cell.name, style, None, None, "failed")
    s = summarize(values)
    sd = None if s.sd is None else 100 * s.sd
    return charts.Bar(cell.name, style, 100 * s.mean, sd, spread(values), 100 * fmean(mark) if mark else None)


def _site(c: Comparison, index: int, site: str) -> Markup:
    """One site's own test, by paradigm; the diamond is the same model on all sites' tests."""
    rows = [_bar(cell, cell.per_site.get(site, []), cell.per_site_all.get(site, [])) for cell in c.cells]
    return charts.bars(f"site{index}", f"{c.metric} on the own test of {site}, by paradigm", rows)


def _tests(c: Comparison, site: str) -> int | None:
    """How many test examples the site has, where the partition tells."""
    return c.partition.sizes.get(site, {}).get("test")


def _curves(c: Comparison, done: Sequence[Cell]) -> list[tuple[str, Markup]]:
    """Metric and loss on validation data by round; a figure without a finite value is left out."""
    drawn = []
    for key, name, unit, scale in (
        (c.metric, c.metric.capitalize(), "%", 100),
        ("loss", "Loss", "mean per example", 1),
    ):
        series = [
            charts.Series(cell.name, f"{cell.place} {cell.time}", points)
            for cell in done
            if (points := _points(cell, key, scale))
        ]
        if series:
            title = f"{name} on validation data"
            top = 100 if scale == 100 else None
            drawn.append((title, charts.lines(f"curve-{key}", title, series, "round", f"{name} ({unit})", top)))
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


def _matrix(cell: Cell) -> dict[str, Any]:
    """The accuracy matrix of one continual cell, mean over seeds in percent, and the figures derived from it."""
    matrices = cell.matrix or []
    size = range(len(matrices[0]))
    return {
        "name": cell.name,
        "rows": [[fmean(r[t][i] for r in matrices) for i in size] for t in size],
        "average": spread([final_average(r) for r in matrices]),
        "forgetting": spread([forgetting(r) for r in matrices]),
        "transfer": spread([backward_transfer(r) for r in matrices]),
    }


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


def _flat(job: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The resolved job as dotted names and values, in the form `--set` takes them."""
    settings: list[tuple[str, str]] = []
    for key, value in job.items():
        if isinstance(value, Mapping) and value:
            settings += _flat(value, f"{prefix}{key}.")
        else:
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            settings.append((f"{prefix}{key}", shown))
    return settings
