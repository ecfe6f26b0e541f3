"""Train, validation and test: the owner's own split, or one that follows from the names of the examples."""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor

from client.readers.base import PARTS, Examples, Splits, Store
from shared_models.errors import DataError


def split(store: Store, rows: Tensor | None = None) -> Splits:
    """Cut rows (all by default) into train, validation and test.

    The owner's own split is taken where there is one. Otherwise a sample's part follows from the SHA-256 of its name,
    60 / 20 / 20 on average: it never changes when samples are added, and does not depend on a seed. With
    `data.parts = "blocks"` the first 60 % in the order of names (`natural`) are train, the next 20 % validation, the
    rest test. Tiles go by the name of their image. Of alternatives validation and test hold the first alone. Of train
    no more is kept than `data.train_share` says.

    Raises:
        DataError: a part would be empty.
    """
    rows = torch.arange(len(store.names)) if rows is None else rows
    if store.parts:
        parts = [store.parts[r] for r in rows.tolist()]
    elif store.data.parts == "blocks":
        names = sorted({store.together[r] for r in rows.tolist()}, key=natural)
        place = {name: i / len(names) for i, name in enumerate(names)}
        parts = [part_at(place[store.together[r]]) for r in rows.tolist()]
    else:
        parts = [part_of(store.together[r]) for r in rows.tolist()]
    if store.alternatives:
        first = {store.together[r]: r for r in reversed(rows.tolist())}
        kept = set(first.values())
        parts = [p if p == "train" or r in kept else "" for p, r in zip(parts, rows.tolist(), strict=True)]
    found = {p: Examples(store, rows[torch.tensor([q == p for q in parts], dtype=torch.bool)]) for p in PARTS}
    for part, examples in found.items():
        if not len(examples):
            raise DataError(
                f"no example for the {part} part among {len(rows)}",
                hint="Add examples, or give train, validation and test folders",
            )
    if store.data.train_share < 1:
        found["train"] = _some(found["train"], store.data.train_share)
    return Splits(**found)


def _some(examples: Examples, share: float) -> Examples:
    """A share of them on average, by the SHA-256 of their names: none of a smaller share is missing in a larger one.

    Raises:
        DataError: nothing would be left.
    """
    names = examples.store.together
    kept = torch.tensor([_chance(names[row]) < share for row in examples.rows.tolist()], dtype=torch.bool)
    if not kept.any():
        raise DataError(
            f"data.train_share = {share} leaves none of {len(examples)} training examples",
            hint="Set a larger share, or add examples",
        )
    return Examples(examples.store, examples.rows[kept])


def _chance(name: str) -> float:
    """A number in [0, 1) of a name, another one than that which decides its part."""
    return number_of(name, "train_share") / 2**48


def number_of(name: str, purpose: str) -> int:
    """A 48-bit number of a sample's name, another one for each purpose; it depends on nothing else."""
    digest = hashlib.sha256(f"{purpose}\0{name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big")


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """A key that sorts as a person counts: slice-9 before slice-10."""
    pieces = re.findall(r"[0-9]+|[^0-9]+", name)
    return tuple((int(piece), "") if piece.isdigit() and piece.isascii() else (-1, piece) for piece in pieces)


def part_of(name: str) -> str:
    """The part a sample belongs to when its owner gave none."""
    return part_at(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[0] / 256)


def part_at(place: float) -> str:
    """The part at a place from 0 to below 1: 60 / 20 / 20."""
    return "train" if place < 0.6 else "validation" if place < 0.8 else "test"
