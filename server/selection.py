"""Which sites take part in a round: seeded, and at a cost that follows the cohort, never the population."""

from __future__ import annotations

from collections.abc import Sequence

from shared_models.keys import chooser


def select(population: Sequence[str], fraction: float, seed: int, round: int) -> list[str]:
    """`max(1, round(fraction * N))` distinct sites, in population order (McMahan et al. 2017, Algorithm 1).

    Args:
        population: known sites in a fixed order; only its length and the chosen places are read.
        fraction: C in (0, 1].
        seed: of the job; the choice is a function of (seed, round, population).
        round: number of the round.
    """
    count = max(1, int(fraction * len(population) + 0.5))
    if count >= len(population):
        return list(population)
    places = chooser(seed, "selection", round=round).sample(range(len(population)), count)
    return [population[place] for place in sorted(places)]
