"""How a pool is dealt to simulated sites: `@partition` registers a way under its name, with the settings it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from client.readers.base import Store
from shared_models.errors import ConfigError
from shared_models.registry import Registry
from shared_models.simulation_part import SimulationPart

MAX_DRAWS = 1000


@dataclass(frozen=True)
class Pool:
    """What is dealt: examples, or what several examples were cut from, which stay together at one site.

    Attributes:
        names: n names.
        labels: (n,) class indices; empty where targets are no classes.
        rows: the store's rows of each, n arrays.
        sites: n names of the sites that the data themselves say, else empty.
    """

    names: Sequence[str]
    labels: np.ndarray
    rows: Sequence[np.ndarray]
    sites: Sequence[str]

    @staticmethod
    def of(store: Store) -> Pool:
        """The units of a store in the order of their first examples, whose label and site they have."""
        members: dict[str, list[int]] = {}
        for row, name in enumerate(store.together):
            members.setdefault(name, []).append(row)
        first = [held[0] for held in members.values()]
        return Pool(
            list(members),
            store.y[first].numpy() if store.y.dim() == 1 else np.empty(0, dtype=np.int64),
            [np.array(held) for held in members.values()],
            [store.sites[row] for row in first] if store.sites else (),
        )

    def __len__(self) -> int:
        return len(self.names)

    def examples(self, units: np.ndarray) -> np.ndarray:
        """The store's rows of some units, sorted."""
        return np.sort(np.concatenate([self.rows[unit] for unit in units])) if len(units) else np.empty(0, np.int64)

    def count(self, units: np.ndarray) -> int:
        """How many examples some units are."""
        return sum(len(self.rows[unit]) for unit in units)

    def by_label(self) -> list[np.ndarray]:
        """The units of each class that occurs, classes in order."""
        return [np.flatnonzero(self.labels == label) for label in np.unique(self.labels)]

    def require(self, sites: int, what: str = "sites") -> None:
        """Raise a ConfigError where there are more sites, or parts for them, than there is to deal."""
        if sites > len(self):
            raise ConfigError(f"{sites} {what} cannot share {len(self)} examples", hint="Lower simulation.sites")


Dealt: TypeAlias = Sequence[np.ndarray] | Mapping[str, np.ndarray]
"""The units of each site: of `site-1` to `site-N`, or by names of their own."""

Deal: TypeAlias = Callable[[Pool, SimulationPart, np.random.Generator], Dealt]


@dataclass(frozen=True)
class Way:
    """A registered way to deal.

    Attributes:
        deal: does it.
        settings: the keys of `[simulation]` that it reads, beside `sites` and `seed`; shown with its name.
    """

    deal: Deal
    settings: tuple[str, ...]


partitions: Registry[Way] = Registry("partition", "simulations.partitions")


def partition(name: str, *settings: str) -> Callable[[Deal], Deal]:
    """Decorator that registers a way to deal under a name."""

    def add(deal: Deal) -> Deal:
        partitions.register(name)(Way(deal, settings))
        return deal

    return add
