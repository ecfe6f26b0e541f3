"""Who holds which example: seeded splits of one pool over simulated sites, with a hash that pins them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from client.readers.base import PARTS, Examples, Splits, Store
from client.readers.parts import natural, split
from shared_models.errors import ConfigError, DataError
from shared_models.job_parts import SimulationPart
from shared_models.keys import key

MAX_DRAWS = 1000


@dataclass(frozen=True)
class Partition:
    """Site name -> sorted row numbers of the pool; names are in their fixed order."""

    kind: str
    rows: Mapping[str, np.ndarray]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of names and rows: two runs with the same hash trained on the same split."""
        digest = hashlib.sha256()
        for name, rows in self.rows.items():
            digest.update(f"{name}\x1f{len(rows)}\x1f".encode())
            digest.update(np.asarray(rows, dtype="<i8").tobytes())
        return digest.hexdigest()


def site_names(count: int) -> list[str]:
    """`site-1` .. `site-N`, padded so that they sort in order."""
    width = len(str(count))
    return [f"site-{k + 1:0{width}d}" for k in range(count)]


def make_partition(store: Store, part: SimulationPart) -> Partition:
    """Split the pool as `[simulation]` says.

    Raises:
        ConfigError: the pool has no site column, or no draw gives every site its minimum.
    """
    if part.partition == "column":
        return by_column(store, part.smallest)
    names = site_names(part.sites)
    rng = np.random.default_rng(key(part.seed, "partition"))
    if part.partition == "dirichlet":
        rows = dirichlet(store.y.numpy(), part.sites, part.alpha, part.min_examples, rng)
        return Partition(f"dirichlet(alpha={part.alpha:g})", dict(zip(names, rows, strict=True)))
    members: dict[str, list[int]] = {}
    for row, name in enumerate(store.together):
        members.setdefault(name, []).append(row)
    held = list(members.values())
    cut = blocks(list(members), part.sites) if part.partition == "blocks" else iid(len(held), part.sites, rng)
    rows = [np.sort(np.concatenate([held[i] for i in chosen])) for chosen in cut]
    return Partition(part.partition, dict(zip(names, rows, strict=True)))


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
    return Partition(partition.kind, rows)


def by_column(store: Store, least: int = 1) -> Partition:
    """One site per value of the column that the reader gave, in sorted order; those with fewer examples are left out.

    Raises:
        ConfigError: there is no such column, or no site has enough.
    """
    if not store.sites:
        raise ConfigError(
            "simulation.partition = 'column' needs data with a site column", hint="Use 'iid' or 'dirichlet' instead"
        )
    column = np.asarray(store.sites)
    rows = {str(name): np.flatnonzero(column == name) for name in sorted(set(store.sites))}
    kept = {name: held for name, held in rows.items() if len(held) >= least}
    if not kept:
        raise ConfigError(
            f"none of {len(rows)} sites has {least} examples, the most is {max(map(len, rows.values()))}",
            hint="Lower simulation.smallest",
        )
    return Partition("column", kept)


def blocks(names: Sequence[str], sites: int) -> list[np.ndarray]:
    """Contiguous blocks in the order of names, sizes differing by at most one: slices of a volume stay together.

    Raises:
        ConfigError: there are more sites than examples.
    """
    _require_enough(len(names), sites)
    order = np.array(sorted(range(len(names)), key=lambda row: natural(names[row])))
    return [np.sort(rows) for rows in np.array_split(order, sites)]


def _require_enough(examples: int, sites: int) -> None:
    if sites > examples:
        raise ConfigError(f"{sites} sites cannot share {examples} examples", hint="Lower simulation.sites")


def iid(examples: int, sites: int, rng: np.random.Generator) -> list[np.ndarray]:
    """A random split into parts whose sizes differ by at most one.

    Raises:
        ConfigError: there are more sites than examples.
    """
    _require_enough(examples, sites)
    return [np.sort(rows) for rows in np.array_split(rng.permutation(examples), sites)]


def dirichlet(
    labels: np.ndarray, sites: int, alpha: float, min_examples: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Per class, shares p ~ Dir(alpha) over the sites (Hsu et al. 2019; per class as in Li et al. 2022, NIID-Bench).

    Small alpha: each class sits at few sites. Large alpha: iid. The whole draw is repeated until every site has
    `min_examples`.

    Raises:
        ConfigError: no draw in 1000 does.
    """
    classes = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    for _ in range(MAX_DRAWS if sites * min_examples <= len(labels) else 0):
        shares: list[list[np.ndarray]] = [[] for _ in range(sites)]
        for members in classes:
            cuts = (np.cumsum(rng.dirichlet([alpha] * sites))[:-1] * len(members)).astype(int)
            for site, rows in enumerate(np.split(rng.permutation(members), cuts)):
                shares[site].append(rows)
        split_rows = [np.sort(np.concatenate(rows)) for rows in shares]
        if min(len(rows) for rows in split_rows) >= min_examples:
            return split_rows
    raise ConfigError(
        f"no Dirichlet({alpha:g}) split of {len(labels)} examples over {sites} sites gives every site {min_examples}",
        hint="Lower simulation.min_examples or simulation.sites, or raise simulation.alpha",
    )


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
        self.store = store
        self.earlier = earlier
        self.partition = partition
        self.test = test
        self.names: Sequence[str] = list(partition.rows)
        self._splits: dict[str, Splits] = {}

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
