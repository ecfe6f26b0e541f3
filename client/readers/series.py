"""Series (the reader `series`): tables with a row for each step of time, or an archive of whole series.

**Tables.** One CSV file or a folder of them; `data.features` names the C numbers of a step, as for the reader `csv`.
The rows of a file are one series, or one for each site that it names; time runs as they lie. An example is a window of
T rows that follow one another, and one begins every `data.stride` rows.

| column        | besides the job's features                                                                     |
|---------------|------------------------------------------------------------------------------------------------|
| `time`        | optional: a number, or date and time as ISO 8601 writes them, later in every row of a series   |
| `site`        | optional; else each of several files is one                                                    |
| `part`        | train, validation (val, valid) or test; optional                                               |
| `data.target` | the class; not read where the task wants none                                                  |

Left out, and counted in the log, are windows with a row that cannot be used, of two classes or parts or of no class,
and, with `data.missing = "drop"`, those that lack a number. The distance in time of two rows is not looked at.

With `data.parts = "blocks"` every series is cut in time: the first 60 % of its windows are train, the next 20 %
validation, the rest test, and what reaches into the next part is left out. With `hash` a window's part follows from its
name, so its neighbours in time may be in another part; where windows overlap that is refused.

**Archives.** One `.npz`, see `client.readers.series_npz`.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from client.readers.base import Reader, Store, Tolerance, Wanted, reader
from client.readers.csvfile import Row, Table, read_tables
from client.readers.folders import listed, shown
from client.readers.samples import for_all
from client.readers.series_npz import check_archive, read_archive
from client.readers.table import CLASSES, Feature, own_part, own_site
from client.readers.windows import NO_CLASS, Series, Step, cut
from shared_models.errors import ConfigError, DataError

log = logging.getLogger("fedzoo.client")

TIME = "time"


@reader("series")
class SeriesReader(Reader):
    """Windows in the order of file, site and time, or series in the order of the archive."""

    targets = ("class", "none")

    def read(self, root: Path, wanted: Wanted) -> Store:
        """Every window, or every series of the archive; raises a DataError where there is none."""
        if wanted.data.form != "series":
            raise ConfigError(
                f"these data are series, and [data] describes {wanted.data.form} of shape {list(wanted.data.shape)}",
                hint="E.g. shape = [96, 7] for 96 steps of 7 numbers each",
            )
        return read_archive(root, wanted) if _is_archive(root) else _windows(root, wanted)

    def check(self, root: Path) -> dict[str, Any]:
        """Steps of every series, missing cells per column, classes per part; every row that cannot be used."""
        if _is_archive(root):
            return check_archive(root)
        bad = Tolerance(sys.maxsize)
        missing: Counter[str] = Counter()
        classes: dict[str, Counter[str]] = {}
        steps: dict[str, int] = {}

        def look(row: Row) -> Step:
            cells = {column: row.cell(column) for column in row.column}
            missing.update({column: not text for column, text in cells.items()})
            if word := next((cells[c] for c in CLASSES if c in cells), ""):
                classes.setdefault(own_part(row) or "all", Counter())[word] += 1
            return Step(())

        for table in read_tables(root):
            for site, series in _series(table, look, bad).items():
                name = f"{table.file.name}, site {site}" if "site" in table.columns else table.file.name
                steps[name] = len(series.steps) - series.steps.count(None)
        counts = {part: dict(sorted(found.items())) for part, found in classes.items()}
        return {"steps": steps, "classes": counts, "missing": dict(missing), "unreadable": bad.found}


def _windows(root: Path, wanted: Wanted) -> Store:
    bad, left_out, longest = Tolerance(wanted.skip_bad), Counter[str](), 0
    if not wanted.data.features:
        raise ConfigError("data.features names no column of these tables", hint="Name one for each number of a step")
    found, names, sites = [], [], []
    for table in read_tables(root):
        for site, series in _series(table.in_shared_words(wanted), _decoder(table, wanted), bad).items():
            longest = max(longest, len(series.steps))
            windows = cut(series, wanted.data, left_out)
            found.append(windows)
            names += [f"{table.file.name}:{line:07d}" for line in windows.lines]
            sites += [site] * len(windows.lines)
    missed = ", ".join(f"{count} {why}" for why, count in left_out.items() if count) or "none"
    log.info("%d windows; left out: %s", len(names), missed)
    if not names:
        raise DataError(
            f"{shown(root)} gives no window of {wanted.data.shape[0]} steps, its longest series has {longest}; "
            f"left out: {missed}",
            hint="A smaller T in data.shape needs fewer steps",
        )
    return Store(
        x=torch.cat([windows.x for windows in found]),
        y=torch.cat([windows.y for windows in found]),
        names=names,
        data=wanted.data,
        parts=for_all([part for windows in found for part in windows.parts], "a part"),
        sites=for_all(sites, "a site"),
        skipped=bad.found,
    )


def _decoder(table: Table, wanted: Wanted) -> Callable[[Row], Step]:
    features = [Feature.of(text, table) for text in wanted.data.features]
    column = wanted.data.target
    table.require(*([column] if wanted.target == "class" else []))

    def decode(row: Row) -> Step:
        label = 0
        if wanted.target == "class":
            word = row.cell(column)
            label = wanted.index(word, f"{row.where}, column '{column}',") if word else NO_CLASS
        return Step([feature.value(row) for feature in features], label, own_part(row))

    return decode


def _series(table: Table, decode: Callable[[Row], Step], bad: Tolerance) -> dict[str, Series]:
    """Site -> its series of a file; a row that cannot be used is a gap in each of them."""
    found: dict[str, Series] = {}
    latest: dict[str, float] = {}

    def add(row: Row) -> None:
        site = own_site(row)
        now = _moment(row)
        if now <= latest.get(site, -math.inf):
            raise DataError(
                f"{row.where}, column '{TIME}': {row.cell(TIME)!r} is not later than the row before",
                hint="Sort the rows by time",
            )
        latest[site] = now
        found.setdefault(site, Series()).append(decode(row), row.line)

    for row in table.rows:
        if not bad.each([row], add):
            for series in found.values():
                series.append(None, row.line)
    return found


def _moment(row: Row) -> float:
    """When a row was, in seconds or in the column's own unit; NaN where there is no such column."""
    if TIME not in row.column:
        return math.nan
    text = row.cell(TIME)
    for read in (float, _timestamp):
        try:
            now = read(text)
        except (ValueError, OverflowError):
            continue
        if math.isfinite(now):
            return now
    raise DataError(
        f"{row.where}, column '{TIME}': {text!r} is neither a number nor a date and time",
        hint="Write it like 2024-05-31 18:00",
    )


def _timestamp(text: str) -> float:
    when = datetime.fromisoformat(text)
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def _is_archive(root: Path) -> bool:
    files = [root] if root.is_file() else listed(root)
    return any(path.suffix.lower() == ".npz" for path in files)
