"""The natural split: who the data themselves say an example comes from."""

from __future__ import annotations

import numpy as np

from shared_models.errors import ConfigError
from shared_models.simulation_part import SimulationPart
from simulations.partitions.base import Pool, partition


@partition("column")
def column(pool: Pool, part: SimulationPart, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One site per value of the column that the reader gave, in sorted order; those with fewer examples are left out.

    A speaker (Shakespeare) or a writer as in LEAF (Caldas et al. 2018), a hospital as in FLamby (Ogier du Terrail et
    al. 2022).

    Raises:
        ConfigError: there is no such column, or no site has enough.
    """
    if not pool.sites:
        raise ConfigError(
            "simulation.partition = 'column' needs data with a site column", hint="Use 'iid' or 'dirichlet' instead"
        )
    names = np.asarray(pool.sites)
    units = {str(name): np.flatnonzero(names == name) for name in sorted(set(pool.sites))}
    sizes = {name: pool.count(held) for name, held in units.items()}
    kept = {name: held for name, held in units.items() if sizes[name] >= part.smallest}
    if not kept:
        raise ConfigError(
            f"none of {len(units)} sites has {part.smallest} examples, the most is {max(sizes.values())}",
            hint="Lower simulation.smallest",
        )
    return kept
