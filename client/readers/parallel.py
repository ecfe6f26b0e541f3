"""Parallel texts (the reader `parallel`): files with one sentence a line, line i of each in another language.

`<root>/<part>.<language>`, e.g. `train.en` and `train.de`, also packed (`.gz`); parts are `train`, `validation` (or
`val`, `valid`) and `test`; other files are passed over. The job says which: `data.text = ["en"]` is read and
`data.target = "de"` is what belongs to it. A task that has no target reads the first alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from client.readers.base import PARTS, Reader, Store, Tolerance, Wanted, reader
from client.readers.folders import PART_WORDS, all_or_none, lines_of, listed, shown
from client.readers.samples import Sample
from client.readers.texts import Text, read_plain, text_store, to_ids, tokenizer_of
from shared_models.errors import ConfigError, DataError


@dataclass(frozen=True)
class Line:
    """A sentence and its translation where that is wanted, and for messages where they stand."""

    texts: tuple[str, ...]
    where: str


@reader("parallel")
class Parallel(Reader):
    """Samples in the order of part and line; the target is as long as the text at most."""

    targets = ("tokens", "none")

    def read(self, root: Path, wanted: Wanted) -> Store:
        """Every pair's ids."""
        tokenizer, length, bad = tokenizer_of(wanted), wanted.data.shape[0], Tolerance(wanted.skip_bad)
        if len(wanted.data.text) != 1:
            raise ConfigError("data.text names the one language that is read", hint='E.g. text = ["en"]')
        languages = [*wanted.data.text, *([wanted.data.target] if wanted.target == "tokens" else [])]
        samples = [
            Sample(f"{part}/{number:07d}", line, part)
            for part, files in _parts(root, languages).items()
            for number, line in enumerate(_lines([files[language] for language in languages]), 1)
        ]

        def decode(sample: Sample[Line]) -> Text:
            line = sample.about
            if not all(line.texts):
                raise DataError(
                    f"{line.where} is empty{' on one side' * any(line.texts)}", hint="Remove the line from all files"
                )
            source, *target = (to_ids(text, tokenizer, length) for text in line.texts)
            return Text(source, target[0] if target else torch.tensor(0))

        return text_store(samples, decode, wanted, bad)

    def check(self, root: Path) -> dict[str, Any]:
        """Lines of every file; every file that cannot be read."""
        bad = Tolerance(sys.maxsize)
        texts = bad.each([path for files in _all(root).values() for path in files.values()], read_plain)
        return {"lines": {path.name: len(lines_of(text)) for path, text in texts}, "unreadable": bad.found}


def _parts(root: Path, languages: Sequence[str]) -> dict[str, dict[str, Path]]:
    found = {part: files for part, files in _all(root).items() if all(language in files for language in languages)}
    if not found:
        raise DataError(
            f"{shown(root)} has no files in {' and '.join(languages)}",
            hint=f"Expected e.g. {' and '.join(f'train.{language}' for language in languages)}; data.text and "
            "data.target name them",
        )
    all_or_none(found, shown(root))
    return {part: found[part] for part in PARTS}


def _all(root: Path) -> dict[str, dict[str, Path]]:
    """Part -> language -> file."""
    found: dict[str, dict[str, Path]] = {}
    for path in listed(root):
        word, _, language = path.name.removesuffix(".gz").partition(".")
        if word in PART_WORDS and language and path.is_file():
            files = found.setdefault(PART_WORDS[word], {})
            if language in files:
                raise DataError(f"{shown(root)} has both {files[language].name} and {path.name}", hint="Remove one")
            files[language] = path
    return found


def _lines(files: Sequence[Path]) -> list[Line]:
    columns = [lines_of(read_plain(path)) for path in files]
    if len(columns[0]) != len(columns[-1]):
        raise DataError(
            f"{shown(files[0])} has {len(columns[0])} lines and {shown(files[-1])} {len(columns[-1])}",
            hint="Line i of one has to be the translation of line i of the other",
        )
    names = " and ".join([shown(files[0]), *(path.name for path in files[1:])])
    rows = zip(*columns, strict=True)
    return [Line(tuple(text.strip() for text in row), f"line {i} of {names}") for i, row in enumerate(rows, 1)]
