"""What lies where: listings, the owner's parts, text files, and paths that one file names of another."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path

from client.readers.base import PARTS
from shared_models.errors import DataError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm"}
PART_WORDS = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation", "test": "test"}


def shown(path: Path) -> str:
    """A path for a message of one line: what cannot be printed, such as bytes that are no UTF-8, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))


def listed(folder: Path) -> list[Path]:
    """What lies in a folder, sorted, without what is hidden."""
    try:
        return sorted(path for path in folder.iterdir() if path.name[0] != ".")
    except OSError as error:
        raise DataError(
            f"{shown(folder)} cannot be listed: {error.strerror}", hint="Give this user the right to"
        ) from None


def image_files(folder: Path) -> list[Path]:
    """The images of a folder, by their suffix, sorted."""
    return [path for path in listed(folder) if path.suffix.lower() in SUFFIXES and path.is_file()]


def part_folders(root: Path) -> dict[str, Path]:
    """The owner's parts, `train`, `validation` (or `val`, `valid`) and `test` below a folder; {} where there is none.

    Raises:
        DataError: only some are there, or two for one part.
    """
    found: dict[str, Path] = {}
    for folder in listed(root):
        part = PART_WORDS.get(folder.name)
        if part and folder.is_dir():
            if part in found:
                raise DataError(f"{shown(root)} has both {found[part].name} and {folder.name}", hint="Merge them")
            found[part] = folder
    return {part: found[part] for part in PARTS} if all_or_none(found, shown(root)) else {}


def all_or_none(parts: Collection[str], where: str) -> bool:
    """Whether the owner has made parts; raises a DataError where only some of the three are there."""
    if parts and len(parts) < len(PARTS):
        there, missing = (", ".join(p for p in PARTS if (p in parts) == known) for known in (True, False))
        raise DataError(
            f"{where} has {there} but not {missing}",
            hint="Give all three, or none: then 60 / 20 / 20 are split by name",
        )
    return bool(parts)


def read_bytes(path: Path) -> bytes:
    """A whole file; raises a DataError that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be read: {error.strerror}", hint="Mend or remove the file") from None


def read_text(path: Path) -> str:
    """A whole UTF-8 file without its byte order mark; raises a DataError that names it, also where it is no text."""
    return as_text(read_bytes(path), path)


def as_text(raw: bytes, path: Path) -> str:
    """The text of a file's bytes, without a byte order mark; raises a DataError that names it where it is none."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{shown(path)} is not UTF-8 at byte {error.start}", hint="Save it as UTF-8") from None
    if found := re.search(r"[\x00-\x08\x0e-\x1f\x7f]", text):
        line = text.count("\n", 0, found.start()) + 1
        raise DataError(f"{shown(path)} is no text: line {line} holds {found[0]!r}", hint="Mend or remove the file")
    return text


def lines_of(text: str) -> list[str]:
    """A text's lines; nothing but a line feed ends one, for sentences may hold what Unicode calls a line's end."""
    return text.removesuffix("\n").split("\n") if text else []


def steps_of(name: str, where: str) -> list[str]:
    """The folders and the file of a relative path, written with either slash, that `where` names.

    Raises:
        DataError: it is empty, absolute or goes up, and so may lie outside the data.
    """
    steps = [step for step in re.split(r"[\\/]", name) if step not in ("", ".")]
    if not steps or ".." in steps or re.match(r"[\\/]|[A-Za-z]:[\\/]", name):
        raise DataError(
            f"{where} names {name!r}, which does not lie within its folder", hint="Name files relative to the data"
        )
    return steps


def named(folders: Sequence[Path], name: str, where: str) -> Path:
    """The file that `where` names, below the first of the folders that has it, however Unicode spells it.

    Links in the folders are followed, for their owner made them; a name cannot lead out of them by itself.

    Raises:
        DataError: the name may lie outside, or no folder has such a file.
    """
    relative = "/".join(steps_of(name, where))
    for folder in folders:
        for spelt in (relative, unicodedata.normalize("NFC", relative), unicodedata.normalize("NFD", relative)):
            if os.path.isfile(folder / spelt):  # unlike Path.is_file it says no to a name that no disk can hold
                return folder / spelt
    raise DataError(
        f"{where} names {name!r}, which is not in {' or '.join(map(shown, folders))}", hint="Add or rename the file"
    )
