"""Even splits: at random, or in the order of names."""

from __future__ import annotations

import numpy as np

from client.readers.parts import natural
from shared_models.simulation_part import SimulationPart
from simulations.partitions.base import Pool, partition


@partition("iid")
def iid(pool: Pool, part: SimulationPart, rng: np.random.Generator) -> list[np.ndarray]:
    """A random split into parts whose sizes differ by at most one.

    Raises:
        ConfigError: there are more sites than examples.
    """
    pool.require(part.sites)
    return np.array_split(rng.permutation(len(pool)), part.sites)


@partition("blocks")
def blocks(pool: Pool, part: SimulationPart, rng: np.random.Generator) -> list[np.ndarray]:
    """Contiguous blocks in the order of names, sizes differing by at most one: slices of a volume stay together.

    Raises:
        ConfigError: there are more sites than examples.
    """
    pool.require(part.sites)
    order = np.array(sorted(range(len(pool)), key=lambda unit: natural(pool.names[unit])))
    return np.array_split(order, part.sites)
