"""What a reader makes of private data: examples in memory as they lie, and their train, validation and test parts."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from shared_models.errors import ConfigError, DataError
from shared_models.job import Job
from shared_models.job_parts import DataPart
from shared_models.models import models
from shared_models.registry import Registry, nearest
from shared_models.tasks.base import Batch, Target, make_task

KEPT_NORMALISED = 256 * 2**20  # bytes
PARTS = ("train", "validation", "test")

T = TypeVar("T")
I = TypeVar("I")  # noqa: E741


@dataclass(frozen=True)
class Wanted:
    """What a job wants from a site's data, and what the site itself says about them.

    Attributes:
        data: preprocessing.
        labels: the job's label list, which gives every class its index.
        target: what has to be there for every example; see `shared_models.tasks.base`.
        aliases: a word of the data -> the job's label it stands for.
        skip_bad: how many files or rows that cannot be used are passed over; one more is an error.
        values: site (empty for every site) -> column of a table -> its own word -> the word that all sites share.
        proposals: how many regions that may hold an object are proposed for every image; 0 for models without them.
    """

    data: DataPart
    labels: tuple[str, ...]
    target: Target = "class"
    aliases: Mapping[str, str] = field(default_factory=dict)
    skip_bad: int = 0
    values: Mapping[str, Mapping[str, Mapping[str, str]]] = field(default_factory=dict)
    proposals: int = 0

    @staticmethod
    def by(job: Job, local: Mapping[str, str] | None = None, **own: Any) -> Wanted:
        """What a job wants; `local` are a site's own aliases, which win over the job's, `own` its further fields."""
        task = make_task(job)
        aliases = {**task.settings.aliases, **(local or {})}
        proposals = job.data.proposals if models[job.model.name].proposals else 0
        return Wanted(job.data, job.task.labels, task.target, aliases, proposals=proposals, **own)

    def shared(self, site: str, column: str, word: str) -> str:
        """The word that all sites share for a site's own word in a column of a table."""
        own = self.values.get(site, self.values.get("", {}))
        return own.get(column, {}).get(word, word)

    @cached_property
    def _index(self) -> dict[str, int]:
        """Every word that stands for a class, in one spelling -> its index."""
        own = {spelling(label): i for i, label in enumerate(self.labels)}
        return own | {
            spelling(word): own[spelling(label)] for word, label in self.aliases.items() if spelling(label) in own
        }

    def knows(self, word: str) -> bool:
        """Whether a word of the data stands for a class of the job."""
        return spelling(word) in self._index

    def index(self, word: str, where: str) -> int:
        """The class index of a word of the data; `where` names the file, row or folder that holds it.

        Raises:
            DataError: it is no label of the job and stands for none.
        """
        found = self._index.get(spelling(word))
        if found is None:
            raise DataError(
                f"{where} stands for {self.aliases.get(word, word)!r}, which is not a label of the job",
                hint="Rename it, or map it under [data.labels] in client.toml; " + nearest(word, list(self.labels)),
            )
        return found


class Tolerance:
    """Counts what cannot be used; up to `limit` are passed over.

    Attributes:
        found: a line for each, for the site's own eyes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.found: list[str] = []

    def each(self, items: Iterable[I], decode: Callable[[I], T]) -> list[tuple[I, T]]:
        """(item, decoded) of those that can be decoded, in order.

        Raises:
            DataError: more than `limit` cannot, over all calls.
        """
        good = []
        for item in items:
            try:
                good.append((item, decode(item)))
            except DataError as error:
                self.found.append(str(error))
                if len(self.found) > self.limit:
                    if not self.limit:
                        raise
                    raise DataError(
                        f"{len(self.found)} files or rows cannot be used and {self.limit} may be skipped; "
                        "the last: " + error.what,
                        hint="All so far: " + "; ".join(self.found),
                    ) from None
        return good


@dataclass(frozen=True)
class Store:
    """All examples a reader found, decoded once.

    Attributes:
        x: images (N, C, H, W) uint8, features (N, F) or series (N, T, C) float32, NaN where one is missing, or tokens
            (N, T) int32, 0 behind the end.
        y: N targets; see `shared_models.tasks.base`.
        names: N stable names, unique within the store; they never leave the site.
        data: the job's preprocessing.
        parts: N of `train`, `validation`, `test` where the data's owner has split them, else empty.
        sites: N site names where the data carry such a column, else empty.
        skipped: a line for each file or row that was passed over.
        proposals: (N, R, 4) float32 regions for models that need them.
        groups: N names of what the examples were cut from where they are tiles, else empty; examples of one group stay
            together, at one site and in one part.
        alternatives: whether the examples of one group are one input with several targets, any of which is right, such
            as an image and its captions; validation and test then hold the first of each group alone.
        statistics: (mean, std) measured at the sites, each (C,) or (F,), in units of `x / 255` for images.
    """

    x: Tensor
    y: Tensor
    names: Sequence[str]
    data: DataPart
    parts: Sequence[str] = ()
    sites: Sequence[str] = ()
    skipped: Sequence[str] = ()
    proposals: Tensor | None = None
    groups: Sequence[str] = ()
    alternatives: bool = False
    statistics: tuple[Tensor, Tensor] | None = None

    @property
    def together(self) -> Sequence[str]:
        """N names, equal where examples must stay together."""
        return self.groups or self.names

    @property
    def unit(self) -> float:
        """What the raw numbers are divided by before normalisation: 255 for images."""
        return 255.0 if self.x.dtype == torch.uint8 else 1.0

    @cached_property
    def scale(self) -> tuple[Tensor, Tensor]:
        """(unit mean, unit std), each (C, 1, 1) or (1, 1, 1), or (F,) or (1,): normalisation in two operations.

        Raises:
            ConfigError: the job wants them measured at the sites and they have not been.
        """
        if self.statistics is None and self.data.normalise_by == "sites":
            raise ConfigError(
                "data.normalise_by = 'sites': nothing was measured yet", hint="Run the job: its first round does it"
            )
        found = self.statistics or (torch.tensor(self.data.mean), torch.tensor(self.data.std))
        tail = (-1, 1, 1) if self.x.dtype == torch.uint8 else (-1,)
        return tuple(v.float().reshape(tail) * self.unit for v in found)  # type: ignore[return-value]

    def normalised_by(self, mean: Tensor, std: Tensor) -> Store:
        """Itself with measured statistics; the last one made is kept, for it is asked for in every round."""
        last: Store | None = self.__dict__.get("_last")
        if last is None or not all(map(torch.equal, last.statistics or (), (mean, std))):
            last = self.__dict__["_last"] = replace(self, statistics=(mean.cpu(), std.cpu()))
        return last

    @cached_property
    def inputs(self) -> Tensor | None:
        """All examples normalised, float32, where they fit into 256 MiB; else each batch is normalised."""
        if self.x.dtype != torch.int32 and 4 * self.x.numel() > KEPT_NORMALISED:
            return None
        return self.normalise(self.x)

    def normalise(self, x: Tensor) -> Tensor:
        """Raw numbers -> float32 `(x / unit - mean) / std`, on their device; a missing feature becomes the mean, 0.

        Tokens stay what they are, int64.
        """
        if self.x.dtype == torch.int32:
            return x.long()
        shift, scale = (t.to(x.device, non_blocking=True) for t in self.scale)
        normal = x.float().clone() if x.dtype == torch.float32 else x.float()
        normal.sub_(shift).div_(scale)
        return normal if self.x.dtype == torch.uint8 else normal.nan_to_num_(nan=0.0)


@dataclass(frozen=True)
class Examples:
    """Some rows of a store, in order; a view, not a copy."""

    store: Store
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def y(self) -> Tensor:
        """Their targets."""
        return self.store.y[self.rows]

    def of_classes(self, classes: Sequence[int]) -> Examples:
        """The examples of these classes: one task of a class-incremental stream."""
        return Examples(self.store, self.rows[torch.isin(self.y, torch.tensor(classes))])

    def batch(
        self, indices: Tensor, device: torch.device | None = None, change: Callable[[Batch], Batch] | None = None
    ) -> Batch:
        """x (B, *shape) float32, normalised, and their targets, on `device`; `change` sees the raw images before."""
        rows = self.rows[indices]
        on_gpu = device is not None and device.type != "cpu"
        if change is None and not on_gpu and self.store.inputs is not None:
            return self._take(self.store.inputs, rows)
        raw = self._take(self.store.x, rows)
        if change is not None:
            raw = change(raw)
        if on_gpu:
            assert device is not None
            raw = raw.pinned().to(device)
        return replace(raw, x=self.store.normalise(raw.x))

    def _take(self, x: Tensor, rows: Tensor) -> Batch:
        regions = self.store.proposals
        return Batch(x[rows], self.store.y[rows], None if regions is None else regions[rows])

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded examples."""
        return len(self) * int(self.store.x[0].numel()) * self.store.x.element_size() if len(self.store.x) else 0

    def counts(self, classes: int) -> list[int]:
        """Per class: examples of it (`class`), images that show it (`mask`), boxes of it (`boxes`); `box`: examples."""
        y = self.y
        if y.dim() == 1:
            return torch.bincount(y, minlength=classes).tolist()[: max(classes, 1)]
        if y.dtype == torch.uint8:
            return [int((y == c).flatten(1).any(1).sum()) for c in range(classes)]
        if y.dim() == 3:
            return [int((y[..., 0] == c).sum()) for c in range(classes)]
        return [len(self)] + [0] * (classes - 1)  # a box, or tokens


@dataclass(frozen=True)
class Splits:
    """The three parts every reader gives. Choices are made on validation; test is only measured."""

    train: Examples
    validation: Examples
    test: Examples

    def of_classes(self, classes: Sequence[int]) -> Splits:
        """The three parts of one task of a stream."""
        return Splits(*(getattr(self, part).of_classes(classes) for part in PARTS))

    def normalised_by(self, mean: Tensor, std: Tensor) -> Splits:
        """The same examples, normalised by statistics that were measured at the sites."""
        store = self.train.store.normalised_by(mean, std)
        return Splits(*(Examples(store, getattr(self, part).rows) for part in PARTS))


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
    digest = hashlib.sha256(b"train_share\0" + name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


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


def spelling(word: str) -> str:
    """One of the several ways in which Unicode spells the same word (a Mac's disk spells e-acute as two)."""
    return unicodedata.normalize("NFC", word)


class Reader(ABC):
    """Reads one format of private data as it lies.

    Attributes:
        targets: what it can give for every example.
        needs_root: whether it reads a folder or file; one that brings its own data does not.
    """

    targets: ClassVar[tuple[Target, ...]] = ("class",)
    needs_root: ClassVar[bool] = True

    @abstractmethod
    def read(self, root: Path, wanted: Wanted) -> Store:
        """Decode everything below `root` that the job wants.

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
