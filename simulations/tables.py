"""The tables of a comparison: for the terminal, as Markdown, and for the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.table import Table
from rich.text import Text

from shared_models.privacy import bound
from simulations.joining import joinings, worst
from simulations.measures import PERCENT, Measure
from simulations.results import Cell, Comparison, parse
from simulations.statistics import Summary, backward_transfer, final_average, forgetting, forward_transfer, summarize

Given = Comparison | Mapping[str, Any]
NOTHING = "–"
METRIC_LIMIT = 14
PARADIGM_LIMIT = 8  # columns of paradigms in a table
TURNED = 3  # columns of paradigms that a narrow terminal has room for
SITE_LIMIT = 24  # more sites than this would make a page unreadable; it says how many it leaves out
SIMULATED = (
    "the noise of this simulation comes from the job's seed, so that it can be repeated: it shows what privacy costs "
    "and protects nobody"
)


def for_terminal(comparison: Given, width: int = 120) -> list[Table]:
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
    streams = stream_table(c)
    if width < 120 and 0 < len(streams[1]) <= TURNED:
        head, *rows = map(list, zip(streams[0], *streams[1], strict=True))
        streams = head, rows
    for head, rows in (metric_table(c), site_table(c), gain_table(c), streams):
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
    return "\n".join(
        markdown(head, rows)
        for head, rows in (summary, metric_table(c), site_table(c), gain_table(c), stream_table(c))
        if rows
    )


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A table in Markdown, with a line end after its last row."""
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


def site_table(c: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows: what each paradigm does for the site that it serves worst, and what left the sites for it."""
    done = [cell for cell in c.cells if cell.error is None and cell.per_site]
    if len(c.sites) < 2 or not done:
        return [], []
    m, rows = c.headline, []
    for cell in done:
        site, values = worst(cell, m.larger)
        rows.append([cell.name, site, spread(values, m), cell.left or NOTHING])
    head = ["paradigm", "worst site", f"its own test, {m.title(c.metric)}", "what left the sites in a run"]
    if not any(cell.left for cell in done):  # written by an earlier version
        head, rows = head[:-1], [values[:-1] for values in rows]
    return head, rows


def gain_table(c: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows: what joining brings each site on its own test, with the interval over seeds; then their mean,
    with the interval over sites and seeds.

    A column for each time and continual method that was run both federated and isolated; nothing where none was.
    """
    found = joinings(c)
    if not found:
        return [], []
    m = c.headline
    rows = [[site, *(gained(j.gains[i].own, m) for j in found)] for i, site in enumerate(c.sites[:SITE_LIMIT])]
    means = [between(j.mean, *(j.spread or (None, None)), measure=m) for j in found]
    unit = f", {m.step(c.metric)}" if m.percent or m.unit else ""
    return [f"gain of joining, own test{unit}", *(j.name for j in found)], [*rows, ["mean of sites", *means]]


def gained(gain: Summary, m: Measure) -> str:
    """`+3.2 (1.0 to 5.4)`."""
    return between(gain.mean, gain.low, gain.high, measure=m)


def between(mean: float, low: float | None, high: float | None, *, measure: Measure) -> str:
    """A signed figure with its interval, where there is one."""
    shown = measure.figure(mean)
    sign = "+" if mean > 0 and shown.strip("0.,") else ""
    interval = "" if low is None or high is None else f" ({measure.figure(low)} to {measure.figure(high)})"
    return f"{sign}{shown}{interval}"


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
            forward(cell, m) or NOTHING,
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


def forward(cell: Cell, m: Measure) -> str:
    """Forward transfer over seeds; empty where it is not known."""
    if not cell.matrix or not cell.untrained:
        return ""
    pairs = zip(cell.matrix, cell.untrained, strict=True)
    return spread([forward_transfer(r, before, m.larger) for r, before in pairs], m)
