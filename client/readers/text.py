"""Plain text (the reader `text`): one `.txt` file or a folder of them, also packed (`.txt.gz`), in UTF-8.

`data.cut` says what an example is:

========  =====================================================================================================
lines     a line that is not empty; nothing but a line feed ends one
windows   as many tokens as the job's length holds; pieces of one file follow one another
roles     the same of all that one role says in a play, whose speeches are `NAME:` and the lines below it, set
          apart by empty lines; every role is a site
========  =====================================================================================================

Below a folder with `train`, `validation` and `test` these are the parts. Several files are several sites, by their
names. With `data.parts = "blocks"` windows of one file are cut in the order of the text, so that no test text lies
between two training texts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from client.readers.base import Reader, Store, Tolerance, Wanted, reader
from client.readers.folders import lines_of, listed, part_folders, shown
from client.readers.samples import Sample, in_order
from client.readers.texts import Text, read_plain, text_store, to_ids, tokenizer_of, windows
from shared_models.errors import DataError

SUFFIXES = (".txt", ".text", ".txt.gz", ".text.gz")
SUFFIX = re.compile(r"\.te?xt(\.gz)?$", re.IGNORECASE)
ROLE = re.compile(r"([^\n:]{1,60}):[^\S\n]*\n")


@reader("text")
class PlainText(Reader):
    """Samples in the order of part, file and place in the file."""

    targets = ("none",)

    def read(self, root: Path, wanted: Wanted) -> Store:
        """Every example's ids; there is no target."""
        tokenizer, length, bad = tokenizer_of(wanted), wanted.data.shape[0], Tolerance(wanted.skip_bad)
        files = _files(root)
        samples: list[Sample[Tensor]] = []
        for part, path in files:
            name = path.name if root.is_file() else path.relative_to(root).as_posix()
            text = bad.each([path], read_plain)
            for _, whole in text:
                for site, inner, said in _texts(whole, wanted.data.cut):
                    place = site or (SUFFIX.sub("", path.name) if len(files) > 1 else "")
                    if wanted.data.cut == "lines":
                        pieces: Iterator[Tensor] = iter([to_ids(said, tokenizer, length)])
                    else:
                        pieces = windows(said, tokenizer, length)
                    samples += [Sample(f"{name}#{inner}{i:07d}", ids, part, place) for i, ids in enumerate(pieces)]
        none, lines = torch.tensor(0), wanted.data.cut == "lines"
        return text_store(in_order(samples), lambda sample: Text(sample.about, none), wanted, bad, lines)

    def check(self, root: Path) -> dict[str, Any]:
        """Files, lines that are not empty and characters; every file that cannot be read."""
        bad = Tolerance(sys.maxsize)
        texts = [text for _, text in bad.each([path for _, path in _files(root)], read_plain)]
        lines = sum(bool(line.strip()) for text in texts for line in lines_of(text))
        return {"files": len(texts), "lines": lines, "characters": sum(map(len, texts)), "unreadable": bad.found}


def _texts(whole: str, cut: str) -> Iterator[tuple[str, str, str]]:
    """(site, place within the file, text) of what is one example, or is cut into windows."""
    if cut == "windows":
        yield "", "", whole
    elif cut == "lines":
        for number, line in enumerate(lines_of(whole), 1):
            if line.strip():
                yield "", f"{number:07d}.", line.strip()
    else:
        said: dict[str, list[str]] = {}
        for speech in re.split(r"\n\s*\n", whole):
            if found := ROLE.match(speech.lstrip()):
                said.setdefault(found[1].strip(), []).append(speech.lstrip()[found.end() :].strip())
        for role, speeches in said.items():
            if any(speeches):
                yield role, f"{role}.", "\n\n".join(speeches) + "\n"


def _files(root: Path) -> list[tuple[str, Path]]:
    """(part, file), sorted."""
    if root.is_file():
        return [("", root)]
    parts = part_folders(root) or {"": root}
    found = [
        (part, path) for part, base in parts.items() for path in listed(base)
        if path.is_file() and path.name.lower().endswith(SUFFIXES)
    ]  # fmt: skip
    if not found:
        raise DataError(f"no text in {shown(root)}", hint=f"Suffixes that count: {' '.join(SUFFIXES)}")
    return found
