"""Whole series in one `.npz`: `x` (N, T, C), or (N, T) for C = 1, and for classes `y` (N,), whole numbers.

Or the same for each of the owner's parts: `train_x`, `val_x`, `test_x` and `train_y`, `val_y`, `test_y`. NaN is a
missing number: with `data.missing = "drop"` its series is left out. Arrays that hold Python objects are refused unread.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from client.readers.base import Store, Tolerance, Wanted
from client.readers.folders import PART_WORDS, shown
from client.readers.npz import load, npz_file
from client.readers.samples import for_all, numbered
from shared_models.errors import DataError

log = logging.getLogger("fedzoo.client")

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Group:
    """The series of one part, or of the whole file.

    Attributes:
        part: empty where the owner has made none.
        where: for messages, by what comes before `x` or `y`.
        x: (N, T, C) float32, NaN where a number is missing, infinite where float32 cannot hold it.
        y: (N,) whole numbers, or None.
    """

    part: str
    where: str
    x: Tensor
    y: np.ndarray | None

    def require_finite(self, i: int) -> None:
        """Raise a DataError where a series holds a number that float32 cannot."""
        if self.x[i].isinf().any():
            raise DataError(f"{self.where}x[{i}] holds an infinite number", hint="Write NaN for a missing one")


def read_archive(root: Path, wanted: Wanted) -> Store:
    """Samples in the file's order, part by part; raises a DataError where it has other arrays than the job wants."""
    path = npz_file(root)
    bad, dropped = Tolerance(wanted.skip_bad), 0
    kept: list[tuple[Group, int, int]] = []
    for group in _groups(path, _choices("xy" if wanted.target == "class" else "x")):
        shape = tuple(group.x.shape[1:])
        if shape != wanted.data.shape:
            raise DataError(
                f"{group.where}x holds series of (T, C) = {shape}, the job wants {wanted.data.shape}",
                hint="data.shape says T and C",
            )

        def decode(i: int, group: Group = group) -> int:
            group.require_finite(i)
            if wanted.target == "none" or group.y is None:
                return 0
            return numbered(int(group.y[i]), wanted, f"{group.where}y[{i}]")

        good = bad.each(range(len(group.x)), decode)
        whole = [(group, i, y) for i, y in good if wanted.data.missing == "mean" or not group.x[i].isnan().any()]
        dropped += len(good) - len(whole)
        kept += whole
    log.info("%d series; %d that lack a number are left out", len(kept), dropped)
    if not kept:
        raise DataError(f"{shown(path)} gives no series", hint="data.missing = 'mean' keeps those that lack a number")
    return Store(
        x=torch.stack([group.x[i] for group, i, _ in kept]),
        y=torch.tensor([y for _, _, y in kept]),
        names=[f"{group.part}/{i:07d}" if group.part else f"{i:07d}" for group, i, _ in kept],
        data=wanted.data,
        parts=for_all([group.part for group, _, _ in kept], "a part"),
        skipped=bad.found,
    )


def check_archive(root: Path) -> dict[str, Any]:
    """Series, missing numbers and classes of every part; every series that cannot be used."""
    bad, found = Tolerance(sys.maxsize), {}
    classes: dict[str, dict[str, int]] = {}
    for group in _groups(npz_file(root), _choices("xy") + _choices("x")):
        part = group.part or "all"
        good = bad.each(range(len(group.x)), group.require_finite)
        missing = int(group.x.isnan().sum())
        found[part] = {"series": len(good), "shape": list(group.x.shape[1:]), "missing": missing}
        if group.y is not None:
            counts = Counter(int(group.y[i]) for i, _ in good)
            classes[part] = {str(label): counts[label] for label in sorted(counts)}
    return {"parts": found, "classes": classes, "unreadable": bad.found}


def _choices(letters: str) -> list[list[str]]:
    return [list(letters), [f"{part}_{letter}" for part in PARTS for letter in letters]]


def _groups(path: Path, choices: list[list[str]]) -> Iterator[Group]:
    arrays = load(path, *choices)
    for prefix in ("",) if "x" in arrays else [f"{part}_" for part in PARTS]:
        where, x, y = f"{shown(path)}: {prefix}", arrays[f"{prefix}x"], arrays.get(f"{prefix}y")
        if x.dtype.kind not in "fiu" or x.ndim not in (2, 3) or 0 in x.shape[1:]:
            raise DataError(f"{where}x is {x.dtype} of shape {x.shape}", hint="Expected numbers, (N, T, C) or (N, T)")
        if y is not None and (y.dtype.kind not in "iu" or y.shape not in ((len(x),), (len(x), 1))):
            raise DataError(
                f"{where}x has {len(x)} series, {prefix}y is {y.dtype} of shape {y.shape}",
                hint=f"Expected whole numbers, ({len(x)},)",
            )
        with np.errstate(over="ignore"):
            numbers = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
        yield Group(
            PART_WORDS[prefix[:-1]] if prefix else "",
            where,
            numbers if x.ndim == 3 else numbers[..., None],
            None if y is None else y.reshape(-1),
        )
