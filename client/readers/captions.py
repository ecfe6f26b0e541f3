"""Images and their captions (the reader `captions`).

========================================  ==========================================================================
`<root>/captions.txt` or `captions.csv`   a table with the columns `image` and `caption`, a caption a row
`<root>`, a `.jsonl` file, or the folder  an object a line with the keys `image` and `caption`, which may be a list of
of exactly one                            texts
========================================  ==========================================================================

`image` may also be called `file_name` or `path`, `caption` may be `text`; `part` and `site` may stand beside them as in
a table of the reader `csv`. A key that is null is as if it were left out. Images lie in `images/` or `Images/` beside
the file, or beside it.

The first `data.captions` captions of an image are examples, all others are passed over. Each is kept with a copy of
the image: N images of C x H x W pixels take N * captions * C * H * W bytes. They stay together, at one site and in one
part, and where a model is measured an image counts once, with its first caption (`Store.alternatives`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from client.readers.base import Reader, Store, Tolerance, Wanted, reader
from client.readers.csvfile import Row, Table, read_tables
from client.readers.folders import listed, named, read_text, shown
from client.readers.images import load_image, open_picture
from client.readers.samples import Sample, fill, in_order
from client.readers.table import own_part, own_site
from client.readers.texts import say_cut, to_ids
from shared_models.errors import ConfigError, DataError
from shared_models.tokens import make_tokenizer

FILES = ("captions.txt", "captions.csv")
FOLDERS = ("images", "Images", "")
IMAGE = ("image", "file_name", "path")
CAPTION = ("caption", "text")
OWN = ("part", "site")


@dataclass(frozen=True)
class Picture:
    """An image and what is said of it, in the order of the file."""

    path: Path
    captions: Sequence[str]


@reader("captions")
class Captions(Reader):
    """Samples in the order of part and of the image's path, then of an image's captions in the file."""

    targets = ("tokens",)

    def read(self, root: Path, wanted: Wanted) -> Store:
        """Images and the ids of their captions."""
        if wanted.data.form != "image-text":
            raise ConfigError(
                f"these data are images with texts, and [data] describes {wanted.data.form} of shape "
                f"{list(wanted.data.shape)}",
                hint="E.g. shape = [3, 64, 64], tokenizer = 'bytes' and text_length = 96",
            )
        tokenizer, most, bad = make_tokenizer(wanted.data.tokenizer), wanted.data.captions, Tolerance(wanted.skip_bad)

        def decode(sample: Sample[Picture]) -> tuple[Tensor, Tensor]:
            image = load_image(sample.about.path, wanted.data)
            ids = [to_ids(caption, tokenizer, wanted.data.text_length) for caption in sample.about.captions]
            return (image.expand(len(ids), -1, -1, -1), torch.stack(ids)) if sample.tiles else (image, ids[0])

        store = fill(in_order(_samples(root, wanted, most, bad)), decode, wanted, bad)
        say_cut(store.y)
        return replace(store, alternatives=most > 1)

    def check(self, root: Path) -> dict[str, Any]:
        """Images and captions; opens every image."""
        bad = Tolerance(sys.maxsize)
        samples = _samples(root, None, sys.maxsize, bad)
        good = [sample for sample, _ in bad.each(samples, lambda sample: open_picture(sample.about.path))]
        captions = sum(len(sample.about.captions) for sample in good)
        return {"images": len(good), "captions": captions, "unreadable": bad.found}


def _samples(root: Path, wanted: Wanted | None, most: int, bad: Tolerance) -> list[Sample[Picture]]:
    """Every image with at most `most` captions; those of one are told apart where there may be several."""
    file = _file(root)
    table = _objects(file, bad) if file.suffix.lower() == ".jsonl" else read_tables(file)[0]
    if wanted is not None:
        table = table.in_shared_words(wanted)
    image, caption = (next((name for name in names if name in table.columns), names[0]) for names in (IMAGE, CAPTION))
    table.require(image, caption)
    folders = [file.parent / folder for folder in FOLDERS]
    found: dict[Path, list[Row]] = {}

    def add(row: Row) -> None:
        if not row.text(caption):
            raise DataError(f"{row.where} has no caption", hint="Write one, or remove the line")
        found.setdefault(named(folders, row.cell(image), row.where), []).append(row)

    def one(path: Path) -> Sample[Picture]:
        first, *others = found[path]
        part, site = own_part(first), own_site(first)
        for row in others:
            if (own_part(row), own_site(row)) != (part, site):
                raise DataError(f"{row.where} has another part or site than line {first.line} of the same image")
        captions = [row.text(caption) for row in found[path][:most]]
        name = path.relative_to(file.parent).as_posix()
        return Sample(name, Picture(path, captions), part, site, tiles=len(captions) if most > 1 else 0)

    bad.each(table.rows, add)
    samples = [sample for _, sample in bad.each(found, one)]
    if not samples:
        raise DataError(f"{shown(file)} has no caption of an image", hint="Each row names an image and its caption")
    return samples


def _file(root: Path) -> Path:
    if not root.is_dir():
        return root
    found = [root / name for name in FILES if (root / name).is_file()]
    found = found or [path for path in listed(root) if path.suffix.lower() == ".jsonl" and path.is_file()]
    if len(found) != 1:
        raise DataError(
            f"{shown(root)} holds {len(found) or 'no'} file{'s' * (len(found) != 1)} of captions",
            hint="Expected captions.txt, captions.csv or exactly one .jsonl file",
        )
    return found[0]


def _objects(file: Path, bad: Tolerance) -> Table:
    """A file of JSON lines as a table, a caption a row."""

    def rows(numbered: tuple[int, str]) -> list[Row]:
        number, line = numbered
        where = f"line {number} of {shown(file)}"
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is no JSON: {error}", hint="Write one object a line") from None
        told = {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else {}
        image, said = (next((told[name] for name in names if name in told), None) for names in (IMAGE, CAPTION))
        captions = [said] if isinstance(said, str) else said
        if not (isinstance(image, str) and isinstance(captions, list) and all(isinstance(c, str) for c in captions)):
            raise DataError(
                f"{where} has no image and caption", hint="Each object needs the keys 'image' and 'caption'"
            )
        own = {name: str(told[name]) for name in OWN if name in told}
        column = {name: place for place, name in enumerate((IMAGE[0], CAPTION[0], *own))}
        return [Row(file, number, column, [image, caption, *own.values()]) for caption in captions or [""]]

    lines = [(number, line) for number, line in enumerate(read_text(file).split("\n"), 1) if line.strip()]
    found = [row for _, made in bad.each(lines, rows) for row in made]
    return Table(file, [IMAGE[0], CAPTION[0]], found)
