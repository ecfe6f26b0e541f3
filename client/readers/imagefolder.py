"""Folders of images, one folder a class: `<root>/<class>/*.png`, or `<root>/{train,validation,test}/<class>/*.png`."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from client.readers.base import PARTS, Reader, Store, reader
from client.readers.images import SUFFIXES, load_image
from shared_models.errors import DataError
from shared_models.job import DataPart
from shared_models.registry import nearest


@reader("imagefolder")
class ImageFolder(Reader):
    """Hidden files, and files that are no image by their suffix, are passed over."""

    def read(self, root: Path, data: DataPart, labels: Sequence[str], mapping: Mapping[str, str]) -> Store:
        """Samples in the order of part, label list and file name, whatever the folders' order."""
        index = {_spelling(label): i for i, label in enumerate(labels)}
        mapping = {_spelling(theirs): ours for theirs, ours in mapping.items()}
        found: list[tuple[int, int, str, Path]] = []
        parts, folders = _folders(root)
        for part, folder in folders:
            label = _spelling(mapping.get(_spelling(folder.name), folder.name))
            if label not in index:
                raise DataError(
                    f"the class folder {folder} stands for '{label}', which is not a label of the job",
                    hint="Rename it, or map it under [data.labels] in client.toml; " + nearest(label, list(labels)),
                )
            found += [(PARTS.index(part), index[label], f.name, f) for f in _images(folder)]
        if not found:
            raise DataError(f"no image below {root}", hint=f"Suffixes that count: {' '.join(sorted(SUFFIXES))}")
        found.sort()
        images = torch.empty((len(found), *data.shape), dtype=torch.uint8)
        for i, (_, _, _, path) in enumerate(found):
            images[i] = load_image(path, data)
        return Store(
            images=images,
            labels=torch.tensor([row[1] for row in found]),
            names=[row[3].relative_to(root).as_posix() for row in found],
            parts=[PARTS[row[0]] for row in found] if parts else (),
            data=data,
        )

    def check(self, root: Path) -> dict[str, Any]:
        """Opens every image."""
        parts, folders = _folders(root)
        counts: dict[str, dict[str, int]] = {}
        unreadable = []
        for part, folder in folders:
            files = list(_images(folder))
            counts.setdefault(part if parts else "all", {})[folder.name] = len(files)
            for file in files:
                try:
                    load_image(file, DataPart(shape=(1, 8, 8)))
                except DataError as error:
                    unreadable.append(str(error))
        return {"images": sum(sum(c.values()) for c in counts.values()), "classes": counts, "unreadable": unreadable}


def _folders(root: Path) -> tuple[bool, list[tuple[str, Path]]]:
    """Whether the owner has split the data, and the class folders as (part, folder)."""
    if not root.is_dir():
        raise DataError(f"the data folder {root} does not exist", hint="Give a folder that holds one folder per class")
    parts = [part for part in PARTS if (root / part).is_dir()]
    if parts and len(parts) < len(PARTS):
        missing = ", ".join(p for p in PARTS if p not in parts)
        raise DataError(
            f"{root} has {', '.join(parts)} but not {missing}",
            hint="Give all three, or none: then 60 / 20 / 20 are split by file name",
        )
    bases = [(part, root / part) for part in parts] or [("train", root)]
    folders = [(part, f) for part, base in bases for f in _listed(base) if f.is_dir()]
    if not folders:
        raise DataError(f"{root} has no class folder", hint="Expected <folder>/<class>/<image files>")
    return bool(parts), folders


def _spelling(name: str) -> str:
    """One of the several ways in which Unicode spells the same word (a Mac's disk spells e-acute as two)."""
    return unicodedata.normalize("NFC", name)


def _images(folder: Path) -> Iterator[Path]:
    for path in _listed(folder):
        if path.is_file() and path.suffix.lower() in SUFFIXES:
            yield path


def _listed(folder: Path) -> list[Path]:
    """What lies in a folder, sorted, without what is hidden."""
    try:
        return sorted(path for path in folder.iterdir() if path.name[0] != ".")
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror}", hint="Give this user the right to") from None
