"""Splits drawn from a Dirichlet distribution: of each label over the sites, or of the sizes alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from shared_models.errors import ConfigError
from shared_models.simulation_part import SimulationPart
from simulations.partitions.base import MAX_DRAWS, Pool, partition


@partition("dirichlet", "alpha")
def dirichlet(pool: Pool, part: SimulationPart, rng: np.random.Generator) -> Sequence[np.ndarray]:
    """Per class, shares p ~ Dir(alpha) over the sites (Hsu et al. 2019; per class as in Li et al. 2022, NIID-Bench).

    Small alpha: each class sits at few sites. Large alpha: iid. The whole draw is repeated until every site has
    `min_examples`.

    Raises:
        ConfigError: no draw in 1000 does.
    """
    classes = pool.by_label()

    def draw() -> list[np.ndarray]:
        shares: list[list[np.ndarray]] = [[] for _ in range(part.sites)]
        for members in classes:
            cuts = _cuts(rng.dirichlet([part.alpha] * part.sites), len(members))
            for site, units in enumerate(np.split(rng.permutation(members), cuts)):
                shares[site].append(units)
        return [np.concatenate(units) for units in shares]

    return _until_enough(draw, pool, part, "Dirichlet")


@partition("quantity", "alpha")
def quantity(pool: Pool, part: SimulationPart, rng: np.random.Generator) -> Sequence[np.ndarray]:
    """Sizes n_k = q_k n with q ~ Dir(alpha) over the sites, examples at random (Li et al. 2022, NIID-Bench).

    The paper's beta is `alpha`. Every site has about the same share of each label. Small alpha: few sites hold nearly
    everything. Large alpha: iid. The draw is repeated until every site has `min_examples`.

    Raises:
        ConfigError: no draw in 1000 does.
    """
    order = rng.permutation(len(pool))

    def draw() -> list[np.ndarray]:
        return np.split(order, _cuts(rng.dirichlet([part.alpha] * part.sites), len(pool)))

    return _until_enough(draw, pool, part, "quantity")


def _cuts(shares: np.ndarray, count: int) -> np.ndarray:
    """Where a list of so many is cut into these shares."""
    found: np.ndarray = (np.cumsum(shares)[:-1] * count).astype(int)
    return found


def _until_enough(
    draw: Callable[[], Sequence[np.ndarray]], pool: Pool, part: SimulationPart, name: str
) -> Sequence[np.ndarray]:
    examples = sum(map(len, pool.rows))
    for _ in range(MAX_DRAWS if part.sites * part.min_examples <= examples else 0):
        dealt = draw()
        if min(map(pool.count, dealt)) >= part.min_examples:
            return dealt
    raise ConfigError(
        f"no {name}({part.alpha:g}) split of {examples} examples over {part.sites} sites gives every site "
        f"{part.min_examples}",
        hint="Lower simulation.min_examples or simulation.sites, or raise simulation.alpha",
    )
