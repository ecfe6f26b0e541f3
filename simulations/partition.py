"""Who holds which example: seeded splits of one pool over simulated sites, with a hash that pins them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from client.readers.base import PARTS, Examples, Splits, Store
from client.readers.parts import split
from shared_models.errors import DataError
from shared_models.keys import key
from shared_models.simulation_part import SimulationPart
from shared_models.tasks.base import Target
from simulations.features import Condition, conditions, skewed
from simulations.partitions.base import Pool, partitions


@dataclass(frozen=True)
class Partition:
    """Who holds what, and how it looks there.

    Attributes:
        kind: in words.
        rows: site name -> sorted row numbers of the pool; names are in their fixed order.
        conditions: site name -> what it does to its inputs; empty where it does nothing.
        seed: of the noise in them.
    """

    kind: str
    rows: Mapping[str, np.ndarray]
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    seed: int = 0

    @cached_property
    def hash(self) -> str:
        """SHA-256 of names, rows and conditions: two runs with the same hash trained on the same split."""
        digest = hashlib.sha256()
        for name, rows in self.rows.items():
            digest.update(f"{name}\x1f{len(rows)}\x1f".encode())
            digest.update(np.asarray(rows, dtype="<i8").tobytes())
        if self.conditions:
            found = {name: condition.chosen for name, condition in self.conditions.items()}
            digest.update(json.dumps([self.seed, found], sort_keys=True).encode())
        return digest.hexdigest()

    def seen(self, store: Store, target: Target) -> Store:
        """The store as its sites see it; `target` is the form of its targets."""
        return skewed(store, self.rows, self.conditions, target, self.seed)


def site_names(count: int) -> list[str]:
    """`site-1` .. `site-N`, padded so that they sort in order."""
    width = len(str(count))
    return [f"site-{k + 1:0{width}d}" for k in range(count)]


def make_partition(store: Store, part: SimulationPart) -> Partition:
    """Split the pool as `[simulation]` says.

    Raises:
        UnknownNameError: there is no such partition.
        ConfigError: the pool cannot be split so; see `simulations.partitions`.
    """
    way = partitions.get(part.partition, "simulation.partition")
    pool = Pool.of(store)
    dealt = way.deal(pool, part, np.random.default_rng(key(part.seed, "partition")))
    named = dealt if isinstance(dealt, Mapping) else dict(zip(site_names(part.sites), dealt, strict=True))
    settings = ", ".join(f"{name}={getattr(part, name):g}" for name in way.settings)
    kind = f"{part.partition}({settings})" if settings else part.partition
    rows = {name: pool.examples(units) for name, units in named.items()}
    if not part.features.chosen:
        return Partition(kind, rows)
    skew = ", ".join(f"{name}={value:g}" for name, value in part.features.chosen.items())
    found = conditions(part.features, list(rows), part.seed)
    return Partition(f"{kind}, features({skew})", rows, found, part.seed)


def same_sites(partition: Partition, store: Store, other: Store) -> Partition:
    """The partition of a store for another one, in which the same examples may stand in another order, by their names.

    Raises:
        DataError: an example is missing in one of the two.
    """
    row = {name: i for i, name in enumerate(other.names)}
    if row.keys() != set(store.names):
        raise DataError(
            f"two stages read different examples: {len(row)} and {len(store.names)}, or other names",
            hint="Stages need the same data; leave [stages.data] as it is but for how an example is prepared",
        )
    rows = {
        name: np.sort(np.array([row[store.names[i]] for i in held], dtype=np.int64))
        for name, held in partition.rows.items()
    }
    return replace(partition, rows=rows)


class SitePopulation:
    """The sites of a partition, each site's examples made when asked for.

    Args:
        store: all examples.
        partition: who holds which.
        earlier: the same sites for each stage but the last.
        test: see `SimulationPart`; with `shared` each site's test part is that of all sites, and an example that
            several of them measure counts once at each.
    """

    def __init__(
        self,
        store: Store,
        partition: Partition,
        earlier: Sequence[SitePopulation] = (),
        test: Literal["own", "shared"] = "own",
    ) -> None:
        self.store = store.held_by({name: torch.from_numpy(rows) for name, rows in partition.rows.items()})
        self.earlier = earlier
        self.partition = partition
        self.test = test
        self.names: Sequence[str] = list(partition.rows)
        self._splits: dict[str, Splits] = {}
        self._digests: dict[bool, str] = {}

    def digest(self, targets: bool = True) -> str:
        """SHA-256 of the examples: names, inputs and, with `targets`, what is wanted of them."""
        if targets not in self._digests:
            found = hashlib.sha256("\x1f".join(self.store.names).encode("utf-8", "surrogateescape"))
            for tensor in (self.store.x, self.store.y)[: 2 if targets else 1]:
                found.update(tensor.contiguous().numpy().tobytes())
            self._digests[targets] = found.hexdigest()
        return self._digests[targets]

    def splits(self, name: str) -> Splits:
        """One site's train, validation and test parts; raises DataError, which names the site, where one is empty."""
        own = self.own(name)
        return own if self.test == "own" else replace(own, test=self._pooled.test)

    def own(self, name: str) -> Splits:
        """The same with the site's own test part, whatever is measured on."""
        if name not in self._splits:
            try:
                self._splits[name] = split(self.store, torch.from_numpy(self.partition.rows[name]))
            except DataError as error:
                hint = "Lower simulation.sites or raise simulation.min_examples"
                raise DataError(f"site '{name}': {error.what}", hint=hint) from None
        return self._splits[name]

    def at(self, stage: int) -> SitePopulation:
        """The same sites with their examples as a stage of the job reads them; the last stage's are here."""
        return self.earlier[stage] if stage < len(self.earlier) else self

    def pooled(self) -> Splits:
        """All sites' examples as one, each once: what a centralized baseline would have."""
        return self._pooled

    @cached_property
    def _pooled(self) -> Splits:
        parts = [self.own(name) for name in self.names]
        return Splits(*(
            Examples(self.store, torch.cat([getattr(p, part).rows for p in parts]).sort().values)
            for part in PARTS
        ))  # fmt: skip

    def counts(self, classes: int) -> dict[str, dict[str, dict[int, int]]]:
        """Site -> part -> class index -> count, zeros left out; what is counted says `Examples.counts`."""
        return {
            name: {
                part: {c: n for c, n in enumerate(getattr(self.splits(name), part).counts(classes)) if n}
                for part in PARTS
            }
            for name in self.names
        }

    def sizes(self) -> dict[str, dict[str, int]]:
        """Site -> part -> examples."""
        return {name: {part: len(getattr(self.splits(name), part)) for part in PARTS} for name in self.names}
