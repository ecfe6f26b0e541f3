"""Folders of images, one folder a class: `<root>/<class>/*.png`, or `<root>/{train,validation,test}/<class>/*.png`.

A task that wants no classes takes the images however they lie below these.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from client.readers.base import PARTS, Reader, Store, Tolerance, Wanted, reader
from client.readers.folders import SUFFIXES, image_files, listed, part_folders, shown
from client.readers.images import load_image
from client.readers.samples import Sample, census, fill, in_order
from shared_models.errors import DataError


@reader("imagefolder")
class ImageFolder(Reader):
    """Hidden files, and files that are no image by their suffix, are passed over; `val` and `valid` are validation."""

    targets = ("class", "none")

    def read(self, root: Path, wanted: Wanted) -> Store:
        """Samples in the order of part, label list and file name, whatever the folders' order."""
        if not root.is_dir():
            raise DataError(f"{shown(root)} is no folder", hint="Give a folder that holds one folder per class")
        bases = part_folders(root) or {"": root}
        if wanted.target == "none":
            return _unlabelled(root, bases, wanted)
        folders = [(part, folder) for part, base in bases.items() for folder in listed(base) if folder.is_dir()]
        if not folders:
            raise DataError(f"{shown(root)} has no class folder", hint="Expected <folder>/<class>/<image files>")
        found: list[tuple[int, int, str, Path]] = []
        for part, folder in folders:
            label = wanted.index(folder.name, f"the class folder {shown(folder)}")
            order = PARTS.index(part) if part else -1
            found += [(order, label, path.name, path) for path in image_files(folder)]
        if not found:
            raise DataError(f"no image below {shown(root)}", hint=f"Suffixes that count: {' '.join(sorted(SUFFIXES))}")
        samples = [
            Sample(path.relative_to(root).as_posix(), (path, label), PARTS[order] if order >= 0 else "")
            for order, label, _, path in sorted(found)
        ]

        def decode(sample: Sample[tuple[Path, int]]) -> tuple[Tensor, Tensor]:
            path, label = sample.about
            return load_image(path, wanted.data), torch.tensor(label)

        return fill(samples, decode, wanted)

    def check(self, root: Path) -> dict[str, Any]:
        """Opens every image."""
        return census(self, root, "class")


def _unlabelled(root: Path, bases: Mapping[str, Path], wanted: Wanted) -> Store:
    """Every image below the parts, at any depth; what the folders are called is not read."""
    found = [(part, path) for part, base in bases.items() for path in _below(base)]
    if not found:
        raise DataError(f"no image below {shown(root)}", hint=f"Suffixes that count: {' '.join(sorted(SUFFIXES))}")
    samples = in_order(Sample(path.relative_to(root).as_posix(), path, part) for part, path in found)
    bad = Tolerance(wanted.skip_bad)
    return fill(samples, lambda sample: (load_image(sample.about, wanted.data), torch.tensor(0)), wanted, bad)


def _below(folder: Path) -> list[Path]:
    deeper = [path for inner in listed(folder) if inner.is_dir() for path in _below(inner)]
    return image_files(folder) + deeper
