"""CSV files as they lie: a byte order mark or none, commas, semicolons or tabs, and rows that know their line."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from client.readers.base import Wanted, spelling
from client.readers.folders import listed, read_text, shown
from shared_models.errors import DataError
from shared_models.registry import nearest

SUFFIXES = {".csv", ".tsv", ".data"}
DELIMITERS = ",;\t"
MISSING = {"", "?", "na", "nan"}  # in any case; not of a text, which may say so
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Row:
    """One line of a file.

    Attributes:
        file: that holds it.
        line: its number, from 1; of its last line where a cell holds line breaks.
        column: name -> place in `values`.
        values: the cells.
        site: the file's own name where there are several files.
    """

    file: Path
    line: int
    column: Mapping[str, int]
    values: Sequence[str]
    site: str = ""

    @property
    def where(self) -> str:
        """For messages."""
        return f"line {self.line} of {shown(self.file)}"

    def text(self, column: str) -> str:
        """What a cell says, whatever it is; raises a DataError where the line has other columns."""
        if len(self.values) != len(self.column):
            raise DataError(f"{self.where} has {len(self.values)} cells, the header {len(self.column)}")
        return self.values[self.column[spelling(column)]].strip()

    def cell(self, column: str) -> str:
        """The word in a cell, empty where it is missing; raises a DataError where the line has other columns."""
        text = self.text(column)
        return "" if text.lower() in MISSING else text

    def number(self, column: str) -> float:
        """The number in a cell, NaN where it is missing; raises a DataError where it is none that float32 holds."""
        text = self.cell(column)
        try:
            value = float(text.replace("_", "no digit")) if text else math.nan
        except ValueError:
            value = math.inf
        if text and not abs(value) <= LARGEST:
            raise DataError(f"{self.where}, column '{column}': {text!r} is no number")
        return value


@dataclass(frozen=True)
class Table:
    """One file: its columns, in order, and its rows."""

    file: Path
    columns: Sequence[str]
    rows: Sequence[Row]

    def in_shared_words(self, wanted: Wanted) -> Table:
        """The same table with each site's own words replaced by those that all sites share."""
        if not wanted.values:
            return self
        rows = []
        for row in self.rows:
            words = list(zip(self.columns, row.values, strict=False))  # a line with other columns is found out later
            site = dict(words).get("site", row.site).strip()
            shared = [wanted.shared(site, column, value.strip()) for column, value in words]
            rows.append(replace(row, values=[*shared, *row.values[len(shared) :]]))
        return replace(self, rows=rows)

    def require(self, *columns: str) -> None:
        """Raise a DataError where the file lacks a column."""
        for column in columns:
            if spelling(column) not in self.columns:
                raise DataError(
                    f"{shown(self.file)} has no column '{column}'",
                    hint=nearest(column, list(self.columns)),
                )


def read_tables(root: Path) -> list[Table]:
    """A file, or all CSV files of a folder; raises a DataError where there is none or one cannot be read."""
    if root.is_file():
        return [_table(root, "")]
    files = [path for path in listed(root) if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not files:
        raise DataError(f"no table in {shown(root)}", hint=f"Suffixes that count: {' '.join(sorted(SUFFIXES))}")
    return [_table(path, path.stem.removeprefix("processed.") if len(files) > 1 else "") for path in files]


def _table(file: Path, site: str) -> Table:
    text = read_text(file)
    header = next((line for line in text.splitlines() if line.strip()), "")
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(header), strict=True)
    found: list[tuple[int, list[str]]] = []
    try:
        found += ((lines.line_num, values) for values in lines if any(v.strip() for v in values))
    except csv.Error as error:
        raise DataError(f"{shown(file)} is no CSV at line {lines.line_num}: {error}", hint="Mend the line") from None
    if not found:
        raise DataError(f"{shown(file)} has no header", hint="Name the columns in the first line")
    columns = [spelling(name.strip()) for name in found[0][1]]
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise DataError(f"{shown(file)} has two columns '{twice[0]}'", hint="Rename one")
    column = {name: place for place, name in enumerate(columns)}
    return Table(file, columns, [Row(file, line, column, values, site) for line, values in found[1:]])


def _delimiter(header: str) -> str:
    """The one that cuts the header into most columns."""
    return max(DELIMITERS, key=lambda d: len(next(csv.reader([header], delimiter=d), [])))
