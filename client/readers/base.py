"""What a reader makes of private data: examples in memory as they lie, and their train, validation and test parts."""

from __future__ import annotations

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
from shared_models.schedule import stays
from shared_models.stream_part import StreamPart
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
        stream: what changes the examples from task to task.
    """

    data: DataPart
    labels: tuple[str, ...]
    target: Target = "class"
    aliases: Mapping[str, str] = field(default_factory=dict)
    skip_bad: int = 0
    values: Mapping[str, Mapping[str, Mapping[str, str]]] = field(default_factory=dict)
    proposals: int = 0
    stream: StreamPart = field(default_factory=StreamPart)

    @staticmethod
    def by(job: Job, local: Mapping[str, str] | None = None, **own: Any) -> Wanted:
        """What a job wants; `local` are a site's own aliases, which win over the job's, `own` its further fields."""
        task = make_task(job)
        aliases = {**task.settings.aliases, **(local or {})}
        proposals = job.data.proposals if models[job.model.name].proposals else 0
        fields = {"proposals": proposals, "stream": job.stream, **own}
        target = "class" if task.target == "none" and job.cuts_labels else task.target  # to tell the tasks apart
        return Wanted(job.data, job.task.labels, target, aliases, **fields)

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
        tasks: (N,) int64, the task of the stream that an example comes with, where that is not told by its class.
        holders: (names of sites, (N,) int64, whose example each is), where that is known.
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
    tasks: Tensor | None = None
    holders: tuple[Sequence[str], Tensor] | None = None
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

    def held_by(self, rows: Mapping[str, Tensor]) -> Store:
        """Itself with the site that holds each example, from the rows of each; -1 where none does."""
        whose = torch.full((len(self.names),), -1)
        for place, held in enumerate(rows.values()):
            whose[held] = place
        return replace(self, holders=(tuple(rows), whose))

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

    def prepare(
        self, raw: Batch, device: torch.device | None = None, change: Callable[[Batch], Batch] | None = None
    ) -> Batch:
        """Raw examples as they are trained on: changed, on `device`, normalised."""
        if change is not None:
            raw = change(raw)
        if device is not None and device.type != "cpu":
            raw = raw.pinned().to(device)
        return replace(raw, x=self.normalise(raw.x))

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

    def of_tasks(self, job: Job, tasks: Sequence[int], always: Sequence[int] = ()) -> Examples:
        """The examples that come with these tasks of the job's stream; all where there is none.

        Of a stream of classes also those of the classes that are there `always`.
        """
        return self if len(job.tasks) == 1 else Examples(self.store, self.rows[self._come_with(job, tasks, always)])

    def due(self, job: Job, period: int, *, so_far: bool = False) -> Examples:
        """The examples that are trained on in a period of the job's rounds: of the task that their site is at.

        Args:
            job: where all sites share one order, period t is that of task t.
            period: rounds of one task, counted from 0.
            so_far: with those of all periods before.
        """
        periods = range(period + 1) if so_far or stays(job) else (period,)
        if len(job.tasks) == 1 or job.stream.order == "shared":
            return self.of_tasks(job, periods)
        found, count = torch.zeros(len(self), dtype=torch.bool), len(job.tasks)
        for turn in range(count):
            found |= (self._groups(job) == turn) & self._come_with(job, [(p + turn) % count for p in periods])
        return Examples(self.store, self.rows[found])

    def _come_with(self, job: Job, tasks: Sequence[int], always: Sequence[int] = ()) -> Tensor:
        """Which of them come with these tasks, or are of these classes, (N,) bool."""
        if job.stream.kind == "sites":
            return torch.isin(self._groups(job), torch.tensor(tasks))
        if self.store.tasks is not None:
            return torch.isin(self.store.tasks[self.rows], torch.tensor(tasks))
        return torch.isin(self.y, torch.tensor([*always, *(c for task in tasks for c in job.tasks[task])]))

    def _groups(self, job: Job) -> Tensor:
        """The group of `stream.sites` that the site of each is in, (N,); -1: the job does not name it."""
        if self.store.holders is None:
            raise ConfigError(
                "the stream differs from site to site, and it is not known which site holds these examples",
                hint="`Store.held_by` says it",
            )
        names, whose = self.store.holders
        groups = torch.tensor([*(job.stream.groups.get(name, -1) for name in names), -1])
        return groups[whose[self.rows]]

    def batch(
        self, indices: Tensor, device: torch.device | None = None, change: Callable[[Batch], Batch] | None = None
    ) -> Batch:
        """x (B, *shape) float32, normalised, and their targets, on `device`; `change` sees the raw images before."""
        rows = self.rows[indices]
        if change is None and (device is None or device.type == "cpu") and self.store.inputs is not None:
            return self._take(self.store.inputs, rows)
        return self.store.prepare(self._take(self.store.x, rows), device, change)

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

    def normalised_by(self, mean: Tensor, std: Tensor) -> Splits:
        """The same examples, normalised by statistics that were measured at the sites."""
        store = self.train.store.normalised_by(mean, std)
        return Splits(*(Examples(store, getattr(self, part).rows) for part in PARTS))


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
