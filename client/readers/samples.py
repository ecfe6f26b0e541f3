"""What a reader has found, decoded one by one into memory that is allocated once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from client.readers.base import PARTS, Examples, Reader, Store, Tolerance, Wanted, spelling
from client.readers.images import image_shape
from shared_models.boxes import pad_rows
from shared_models.errors import DataError
from shared_models.job_parts import DataPart
from shared_models.tasks.base import Target

A = TypeVar("A")


@dataclass(frozen=True)
class Sample(Generic[A]):
    """An example that is found and not yet decoded.

    Attributes:
        name: unique among all samples and the same in every reading.
        about: what the reader needs to decode it.
        part: of the owner's split; empty where there is none.
        site: empty where the data do not say.
        tiles: how many examples it is cut into; 0 where it is one and whole.
        group: name of what it was cut from; empty where it is whole.
    """

    name: str
    about: A
    part: str = ""
    site: str = ""
    tiles: int = 0
    group: str = ""

    def pieces(self) -> list[Sample[A]]:
        """The examples it is cut into, in order."""
        if not self.tiles:
            return [self]
        return [replace(self, name=f"{self.name}#{i}", tiles=0, group=self.name) for i in range(self.tiles)]


def fill(
    samples: Sequence[Sample[A]],
    decode: Callable[[Sample[A]], tuple[Tensor, Tensor]],
    wanted: Wanted,
    bad: Tolerance | None = None,
) -> Store:
    """Decode all samples, in their order.

    Args:
        samples: what is there.
        decode: one sample -> its image (C, H, W) uint8 and its target: class (), mask (H, W), box (4,), boxes (n, 5),
            tokens (T,), none: zero;
            of one in tiles, (tiles, C, H, W) and (tiles, H, W).
        wanted: preprocessing, form of the target, and how many bad samples may be passed over.
        bad: continues to count where the search has found some.

    Raises:
        DataError: too many cannot be decoded, or all of them do not fit into memory.
    """
    bad = bad or Tolerance(wanted.skip_bad)
    channels, height, width = image_shape(wanted.data)
    forms = {
        "class": ((), torch.int64),
        "mask": ((height, width), torch.uint8),
        "box": ((4,), torch.float32),
        "boxes": ((0,), torch.float32),  # of no fixed number: kept as rows
        "tokens": ((wanted.data.text_length,), torch.int64),
        "none": ((), torch.int64),
    }
    form, dtype = forms[wanted.target]
    count = sum(sample.tiles or 1 for sample in samples)
    x = _allocate((count, channels, height, width), torch.uint8)
    y = _allocate((count, *form), dtype)
    rows: list[Tensor] = []
    kept: list[Sample[A]] = []

    def one(sample: Sample[A]) -> None:
        image, target = decode(sample)
        here = slice(len(kept), len(kept) + (sample.tiles or 1))
        x[here] = image
        if wanted.target == "boxes":
            rows.append(target)
        else:
            y[here] = target
        kept.extend(sample.pieces())

    bad.each(samples, one)
    return Store(
        x=x[: len(kept)],
        y=pad_rows(rows, 5) if wanted.target == "boxes" else y[: len(kept)],
        names=[sample.name for sample in kept],
        data=wanted.data,
        parts=for_all([sample.part for sample in kept], "a part"),
        sites=for_all([sample.site for sample in kept], "a site"),
        skipped=bad.found,
        groups=for_all([sample.group for sample in kept], "a group"),
    )


def in_order(samples: Iterable[Sample[A]]) -> list[Sample[A]]:
    """By part, then name."""
    return sorted(samples, key=lambda s: (PARTS.index(s.part) if s.part else -1, s.name))


def for_all(words: Sequence[str], what: str) -> Sequence[str]:
    """One word for every example, or none at all; raises a DataError where only some have one."""
    given = sum(map(bool, words))
    if 0 < given < len(words):
        raise DataError(f"{given} of {len(words)} examples have {what}", hint="Give all of them one, or none")
    return words if given else ()


def numbered(number: int, wanted: Wanted, where: str) -> int:
    """The class of a number: what the number is an alias or label of, else the label with that index.

    Where some label is itself a number, no number is taken for an index: they could be confused.

    Raises:
        DataError: it stands for no class.
    """
    if wanted.knows(str(number)):
        return wanted.index(str(number), where)
    if 0 <= number < len(wanted.labels) and not any(label.isdecimal() for label in wanted.labels):
        return number
    raise DataError(
        f"{where} holds class {number}, which stands for none of the job's {len(wanted.labels)} labels",
        hint="Say what it stands for under [data.labels] in client.toml",
    )


@dataclass(frozen=True)
class Anything(Wanted):
    """Wants what is there: every word is a class, numbered as it comes."""

    words: dict[str, int] = field(default_factory=dict)

    def knows(self, word: str) -> bool:
        """Every word."""
        return True

    def index(self, word: str, where: str) -> int:
        """A new index for a new word."""
        return self.words.setdefault(spelling(word), len(self.words))

    def named(self, counts: Sequence[int]) -> dict[str, int]:
        """Word -> count of its index, numbers in their order before words."""
        order = sorted(self.words, key=lambda w: (not w.isdecimal(), int(w) if w.isdecimal() else 0, w))
        return {word: counts[self.words[word]] for word in order}


def anything(target: Target) -> Anything:
    """What `check` wants, which has no job: thumbnails and every class."""
    return Anything(DataPart(shape=(1, 8, 8)), labels=(), target=target, skip_bad=sys.maxsize)


def census(reader: Reader, root: Path, target: Target) -> dict[str, Any]:
    """What is there, without a job: everything is decoded once.

    Returns:
        `images`: how many can be used; `classes`: part (`all` where the owner has made none) -> word -> count as in
        `Examples.counts`; `unreadable`: a line for each that cannot be used.
    """
    wanted = anything(target)
    store = reader.read(root, wanted)
    found = store.parts or ["all"] * len(store.names)
    classes = {}
    for part in dict.fromkeys(found):
        rows = torch.tensor([i for i, p in enumerate(found) if p == part])
        classes[part] = wanted.named(Examples(store, rows).counts(len(wanted.words)))
    return {"images": len(store.names), "classes": classes, "unreadable": list(store.skipped)}


def _allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError:
        size = torch.Size(shape).numel() / 2**30
        raise DataError(
            f"{shape[0]} examples need {size:.1f} GiB of memory", hint="Use a smaller data.shape, or split the site"
        ) from None
