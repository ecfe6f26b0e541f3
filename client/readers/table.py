"""Tables (the reader `csv`): rows of features, or rows that name images and their class or boxes.

The job's `data.shape` says which. One CSV file or a folder of them; how cells are read is described in `csvfile`.

| column                         | besides the job's features                                                       |
|--------------------------------|----------------------------------------------------------------------------------|
| `data.target`                  | the class; not read where the task wants none                                    |
| `data.text`                    | one or more columns that hold a text, for a job in tokens                        |
| `part`                         | train, validation (val, valid) or test; optional                                 |
| `site`                         | optional; else each of several files is one: `x.csv` and `processed.x.data` is x |
| `path` or `filename`           | an image, relative to the file or to `images/` or `JPEGImages/` beside it        |
| `xmin`, `ymin`, `xmax`, `ymax` | a box, in pixels counted from 0, a row each; four empty cells: no object         |
| `width`, `height`              | of the image on which boxes were drawn; optional                                 |
"""

from __future__ import annotations

import logging
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from client.readers.base import Reader, Store, Tolerance, Wanted, reader, spelling
from client.readers.boxes import Annotation, Box, decode
from client.readers.csvfile import Row, Table, read_tables
from client.readers.folders import PART_WORDS, named
from client.readers.images import load_image, open_picture
from client.readers.samples import Sample, fill, for_all, in_order
from client.readers.texts import Text, text_store, to_ids, tokenizer_of
from shared_models.errors import DataError

log = logging.getLogger("fedzoo.client")

PATHS = ("path", "filename")
SIDES = ("xmin", "ymin", "xmax", "ymax")
CLASSES = ("label", "class", "target")  # where `check` looks for classes, for it has no job to say


@dataclass(frozen=True)
class Feature:
    """A column's number, or, for `column=word`, 1 where the cell says the word and else 0."""

    column: str
    word: str = ""

    @staticmethod
    def of(text: str, table: Table) -> Feature:
        """By its name in the job; raises a DataError where the table has no such column."""
        column, _, word = spelling(text).partition("=")
        feature = Feature(column, word) if word and spelling(text) not in table.columns else Feature(spelling(text))
        table.require(feature.column)
        return feature

    def value(self, row: Row) -> float:
        """NaN where it is missing."""
        if not self.word:
            return row.number(self.column)
        text = row.cell(self.column)
        return float(_same(text, self.word)) if text else math.nan


@dataclass(frozen=True)
class Picture:
    """An image and all rows about it."""

    path: Path
    rows: list[Row]


@reader("csv")
class Csv(Reader):
    """Samples in the order of part and name: of the image, or of the file and the line."""

    targets = ("class", "boxes", "box", "none")

    def read(self, root: Path, wanted: Wanted) -> Store:
        """Features, texts or images, as the job says."""
        tables = [table.in_shared_words(wanted) for table in read_tables(root)]
        for table in tables:
            table.require(*([wanted.data.target] if wanted.target != "none" else []))
        kinds = {"features": _features, "tokens": _texts}
        return kinds.get(wanted.data.form, _images)(tables, wanted)

    def check(self, root: Path) -> dict[str, Any]:
        """Rows, missing cells per column, classes per part, sites; opens every image."""
        tables, bad = read_tables(root), Tolerance(sys.maxsize)
        missing: Counter[str] = Counter()
        classes: dict[str, Counter[str]] = {}
        sites: Counter[str] = Counter()

        def look(row: Row) -> None:
            cells = {column: row.cell(column) for column in row.column}
            part, site = own_part(row), own_site(row)
            if path := next((cells[c] for c in PATHS if c in cells), ""):
                open_picture(_path(row, path))
            missing.update({column: not text for column, text in cells.items()})
            if target := next((cells[c] for c in CLASSES if c in cells), ""):
                classes.setdefault(part or "all", Counter())[target] += 1
            sites.update([site] if site else [])

        rows = bad.each([row for table in tables for row in table.rows], look)
        counts = {part: dict(sorted(found.items())) for part, found in classes.items()}
        found = {"rows": len(rows), "classes": counts, "missing": dict(missing), "unreadable": bad.found}
        return found | ({"sites": dict(sites)} if sites else {})


def _features(tables: Sequence[Table], wanted: Wanted) -> Store:
    bad = Tolerance(wanted.skip_bad)
    samples = []
    dropped = 0
    for table in tables:
        features = [Feature.of(text, table) for text in wanted.data.features]

        def parse(row: Row, features: Sequence[Feature] = features) -> Sample[tuple[list[float], int]] | None:
            values = [feature.value(row) for feature in features]
            known = wanted.target == "none" or bool(row.cell(wanted.data.target))
            if wanted.data.missing == "drop" and not (known and all(map(math.isfinite, values))):
                return None
            label = _label(row, wanted)
            return Sample(f"{row.file.name}:{row.line:07d}", (values, label), own_part(row), own_site(row))

        good = [sample for _, sample in bad.each(table.rows, parse)]
        samples += [sample for sample in good if sample]
        dropped += good.count(None)
    log.info("%d rows; %d that lack a value are left out", len(samples), dropped)
    samples = in_order(samples)
    return Store(
        x=torch.tensor([s.about[0] for s in samples]).reshape(-1, len(wanted.data.features)),
        y=torch.tensor([s.about[1] for s in samples], dtype=torch.int64),
        names=[s.name for s in samples],
        data=wanted.data,
        parts=for_all([s.part for s in samples], "a part"),
        sites=for_all([s.site for s in samples], "a site"),
        skipped=bad.found,
    )


def _texts(tables: Sequence[Table], wanted: Wanted) -> Store:
    tokenizer, length, bad = tokenizer_of(wanted), wanted.data.shape[0], Tolerance(wanted.skip_bad)
    for table in tables:
        table.require(*wanted.data.text)

    def parse(row: Row) -> Sample[Text]:
        text = " ".join(filter(None, (row.text(column) for column in wanted.data.text)))
        if not text:
            raise DataError(f"{row.where} has no text", hint="Remove the line")
        about = Text(to_ids(text, tokenizer, length), torch.tensor(_label(row, wanted)))
        return Sample(f"{row.file.name}:{row.line:07d}", about, own_part(row), own_site(row))

    samples = [sample for _, sample in bad.each([row for table in tables for row in table.rows], parse)]
    return text_store(in_order(samples), lambda sample: sample.about, wanted, bad)


def _images(tables: Sequence[Table], wanted: Wanted) -> Store:
    bad, boxes = Tolerance(wanted.skip_bad), wanted.target in ("box", "boxes")
    pictures: dict[Path, Picture] = {}
    for table in tables:
        column = next((c for c in PATHS if c in table.columns), PATHS[0])
        table.require(column, *(SIDES if boxes else ()))

        def add(row: Row, column: str = column) -> None:
            path = _path(row, row.cell(column))
            about = pictures.setdefault(path, Picture(path, []))
            if about.rows and not boxes:
                raise DataError(f"{row.where} names {row.cell(column)!r} again", hint="Give each image one row")
            about.rows.append(row)

        bad.each(table.rows, add)

    def one(picture: Picture) -> Sample[Picture]:
        first = picture.rows[0]
        part, site = own_part(first), own_site(first)
        for row in picture.rows:
            if (own_part(row), own_site(row)) != (part, site):
                raise DataError(f"{row.where} has another part or site than line {first.line} of the same image")
        return Sample(picture.path.relative_to(first.file.parent).as_posix(), picture, part, site)

    def open_one(sample: Sample[Picture]) -> tuple[Tensor, Tensor]:
        path, rows = sample.about.path, sample.about.rows
        if not boxes:
            return load_image(path, wanted.data), torch.tensor(_label(rows[0], wanted))
        return decode(path, _annotation(rows, wanted), wanted, rows[0].where)

    samples = [sample for _, sample in bad.each(pictures.values(), one)]
    return fill(in_order(samples), open_one, wanted, bad)


def _annotation(rows: Sequence[Row], wanted: Wanted) -> Annotation:
    boxes = []
    for row in rows:
        if not any(row.cell(side) for side in SIDES):
            continue
        x0, y0, x1, y1 = (row.number(side) for side in SIDES)
        boxes.append(Box(_label(row, wanted), (x0, y0, x1, y1), row.where))
    first = rows[0]
    stated = all(side in first.column and first.cell(side) for side in ("width", "height"))
    return Annotation(boxes, (first.number("width"), first.number("height")) if stated else None)


def _label(row: Row, wanted: Wanted) -> int:
    if wanted.target == "none":
        return 0
    return wanted.index(row.cell(wanted.data.target), f"{row.where}, column '{wanted.data.target}',")


def _path(row: Row, name: str) -> Path:
    base = row.file.parent
    return named([base, base / "images", base / "JPEGImages"], name, row.where)


def own_part(row: Row) -> str:
    """The part that its owner has put it into, empty for none; raises a DataError where there is no such part."""
    if "part" not in row.column:
        return ""
    word = row.cell("part")
    if word.lower() not in PART_WORDS:
        raise DataError(f"{row.where} is of the part {word!r}", hint=f"Parts are {', '.join(PART_WORDS)}")
    return PART_WORDS[word.lower()]


def own_site(row: Row) -> str:
    """The site that the row or its file names, empty for none; raises a DataError where the column is empty."""
    if "site" not in row.column:
        return row.site
    site = row.cell("site")
    if not site:
        raise DataError(f"{row.where} has no site", hint="Fill the column 'site', or remove it")
    return site


def _same(a: str, b: str) -> bool:
    try:
        return float(a) == float(b)
    except ValueError:
        return spelling(a) == spelling(b)
