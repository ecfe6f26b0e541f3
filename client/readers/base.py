"""What a reader makes of private data: examples in memory as they lie, and their train, validation and test parts."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from shared_models.errors import DataError
from shared_models.job import DataPart
from shared_models.registry import Registry
from shared_models.tasks.base import Batch

KEPT_NORMALISED = 256 * 2**20  # bytes
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Store:
    """All examples a reader found, decoded once.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64, indices into the job's label list.
        names: N stable names, unique within the store; they never leave the site.
        parts: N of `train`, `validation`, `test` where the data's owner has split them, else empty.
        sites: N site names where the data carry such a column, else empty.
        data: the job's preprocessing.
    """

    images: Tensor
    labels: Tensor
    names: Sequence[str]
    data: DataPart
    parts: Sequence[str] = ()
    sites: Sequence[str] = ()

    @cached_property
    def scale(self) -> tuple[Tensor, Tensor]:
        """(255 mean, 255 std), each (C, 1, 1) or (1, 1, 1): normalisation of raw bytes in two operations."""
        return tuple(torch.tensor(v).float().reshape(-1, 1, 1) * 255 for v in (self.data.mean, self.data.std))  # type: ignore[return-value]

    @cached_property
    def inputs(self) -> Tensor | None:
        """All images normalised, (N, C, H, W) float32, where they fit into 256 MiB; else each batch is normalised."""
        if 4 * self.images.numel() > KEPT_NORMALISED:
            return None
        shift, scale = self.scale
        return self.images.float().sub_(shift).div_(scale)


@dataclass(frozen=True)
class Examples:
    """Some rows of a store, in order; a view, not a copy."""

    store: Store
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def labels(self) -> Tensor:
        """(N,) int64."""
        return self.store.labels[self.rows]

    def of_classes(self, classes: Sequence[int]) -> Examples:
        """The examples of these classes: one task of a class-incremental stream."""
        return Examples(self.store, self.rows[torch.isin(self.labels, torch.tensor(classes))])

    def batch(self, indices: Tensor, device: torch.device | None = None) -> Batch:
        """x (B, C, H, W) float32, `(bytes / 255 - mean) / std`, and y (B,) int64, on `device`."""
        rows = self.rows[indices]
        on_gpu = device is not None and device.type != "cpu"
        if not on_gpu and self.store.inputs is not None:
            return Batch(self.store.inputs[rows], self.store.labels[rows])
        shift, scale = self.store.scale
        x, y = self.store.images[rows], self.store.labels[rows]
        if on_gpu:
            x, y, shift, scale = (t.to(device, non_blocking=True) for t in (x, y, shift, scale))
        return Batch(x.float().sub_(shift).div_(scale), y)

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded examples."""
        return len(self) * int(self.store.images[0].numel()) if len(self.store.images) else 0


@dataclass(frozen=True)
class Splits:
    """The three parts every reader gives. Choices are made on validation; test is only measured."""

    train: Examples
    validation: Examples
    test: Examples

    def of_classes(self, classes: Sequence[int]) -> Splits:
        """The three parts of one task of a stream."""
        return Splits(*(getattr(self, part).of_classes(classes) for part in PARTS))


def split(store: Store, rows: Tensor | None = None) -> Splits:
    """Cut rows (all by default) into train, validation and test.

    The owner's own split is taken where there is one. Otherwise a sample's part follows from the SHA-256 of its name,
    60 / 20 / 20 on average: it never changes when samples are added, and does not depend on a seed.

    Raises:
        DataError: a part would be empty.
    """
    rows = torch.arange(len(store.labels)) if rows is None else rows
    parts = [store.parts[r] if store.parts else part_of(store.names[r]) for r in rows.tolist()]
    found = {p: Examples(store, rows[torch.tensor([q == p for q in parts], dtype=torch.bool)]) for p in PARTS}
    for part, examples in found.items():
        if not len(examples):
            raise DataError(
                f"no example for the {part} part among {len(rows)}",
                hint="Add examples, or give train, validation and test folders",
            )
    return Splits(**found)


def part_of(name: str) -> str:
    """The part a sample belongs to when its owner gave none."""
    bucket = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[0] / 256
    return "train" if bucket < 0.6 else "validation" if bucket < 0.8 else "test"


class Reader(ABC):
    """Reads one format of private data as it lies; one that brings its own has `needs_root = False`."""

    needs_root: ClassVar[bool] = True

    @abstractmethod
    def read(self, root: Path, data: DataPart, labels: Sequence[str], mapping: Mapping[str, str]) -> Store:
        """Decode everything below `root`.

        Args:
            root: the folder.
            data: preprocessing.
            labels: the job's label list, which gives every class its index.
            mapping: local class name -> the job's label, where they differ.

        Raises:
            DataError: names what is wrong and where; stays on the node.
        """

    @abstractmethod
    def check(self, root: Path) -> dict[str, Any]:
        """What is there, without a job: counts per part and class, and every unreadable file; raises DataError."""


readers: Registry[type[Reader]] = Registry("reader", "client.readers")


def reader(name: str) -> Any:
    """Decorator that registers a Reader class under a name."""
    return readers.register(name)
