"""MedMNIST's files: one `.npz` of `{train,val,test}_images` and `{train,val,test}_labels`; the owner's parts are those.

Images are uint8, (N, H, W) grey or (N, H, W, 3) colour; labels are whole numbers, (N,) or (N, 1).
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from client.readers.base import Reader, Store, Wanted, reader
from client.readers.folders import PART_WORDS, listed, shown
from client.readers.images import to_tensor
from client.readers.samples import Sample, census, fill, numbered
from shared_models.errors import DataError

MAX_BYTES = 8 * 2**30  # of all arrays unpacked
ARRAYS = {part: (f"{part}_images", f"{part}_labels") for part in ("train", "val", "test")}


@reader("npz")
class Npz(Reader):
    """The root is the file, or a folder with exactly one. Arrays that hold Python objects are refused unread."""

    targets = ("class", "none")

    def read(self, root: Path, wanted: Wanted) -> Store:
        """Samples in the file's order, part by part."""
        path = npz_file(root)
        arrays = load(path)
        samples = []
        for part, (images, labels) in ARRAYS.items():
            _require_form(arrays[images], arrays[labels], f"{shown(path)}: {images}", labels)
            samples += [
                Sample(f"{part}/{i:07d}", (images, labels, i), PART_WORDS[part]) for i in range(len(arrays[images]))
            ]

        def decode(sample: Sample[tuple[str, str, int]]) -> tuple[Tensor, Tensor]:
            images, labels, i = sample.about
            label = 0
            if wanted.target == "class":
                label = numbered(int(arrays[labels].reshape(-1)[i]), wanted, f"{shown(path)}: {labels}[{i}]")
            return to_tensor(Image.fromarray(arrays[images][i]), wanted.data), torch.tensor(label)

        return fill(samples, decode, wanted)

    def check(self, root: Path) -> dict[str, Any]:
        """Counts the labels, as they stand, of every part."""
        return census(self, root, "class")


def load(path: Path, *choices: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of a file: the first of the choices that it has whole; MedMNIST's six where none are given.

    Raises:
        DataError: it is no such file, lacks an array, needs pickle, or would unpack to more than 8 GiB.
    """
    choices = choices or ([name for pair in ARRAYS.values() for name in pair],)
    try:
        with zipfile.ZipFile(path) as archive:
            there = {name.removesuffix(".npy"): name for name in archive.namelist()}
            wanted = max(choices, key=lambda names: (there.keys() >= set(names), not there.keys().isdisjoint(names)))
            if missing := [name for name in wanted if name not in there]:
                raise DataError(
                    f"{shown(path)} has no {', '.join(missing)}", hint=f"It has {', '.join(map(repr, there))}"
                )
            size = sum(_bytes(archive, there[name]) for name in wanted)
            if size > MAX_BYTES:
                raise DataError(
                    f"{shown(path)} unpacks to {size / 2**30:.1f} GiB, the limit is {MAX_BYTES / 2**30:g} GiB"
                )
            arrays = {}
            for name in wanted:
                with archive.open(there[name]) as member:
                    arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
            return arrays
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{shown(path)} cannot be read: {error}", hint="Expected what numpy.savez writes") from None


def npz_file(root: Path) -> Path:
    """The root, or the one `.npz` of a folder; raises a DataError where it has none or several."""
    if root.is_file():
        return root
    files = [path for path in listed(root) if path.suffix.lower() == ".npz" and path.is_file()]
    if len(files) != 1:
        raise DataError(f"{shown(root)} has {len(files)} .npz files", hint="Name the one to read")
    return files[0]


def _bytes(archive: zipfile.ZipFile, name: str) -> int:
    """Bytes of an array by its header or by the archive, whichever says more."""
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with archive.open(name) as member:
        version = np.lib.format.read_magic(member)
        if version not in headers:
            raise ValueError(f"{name} is of the .npy version {version}")
        shape, _, dtype = headers[version](member)
    return max(math.prod(shape) * dtype.itemsize, archive.getinfo(name).file_size)


def _require_form(images: np.ndarray, labels: np.ndarray, where: str, name: str) -> None:
    colour = images.ndim == 4 and images.shape[3] == 3
    if images.dtype != np.uint8 or not (images.ndim == 3 or colour) or 0 in images.shape[1:]:
        raise DataError(
            f"{where} is {images.dtype} of shape {images.shape}", hint="Expected uint8 (N, H, W) or (N, H, W, 3)"
        )
    count = len(images)
    if labels.dtype.kind not in "iu" or labels.shape not in ((count,), (count, 1)):
        raise DataError(
            f"{where} has {count} images, {name} is {labels.dtype} of shape {labels.shape}",
            hint=f"Expected whole numbers, ({count},) or ({count}, 1)",
        )
