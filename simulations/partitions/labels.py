"""Splits in which a site holds few labels: shards of what is sorted by label, or a number of labels for each site."""

from __future__ import annotations

import numpy as np

from shared_models.errors import ConfigError
from shared_models.simulation_part import SimulationPart
from simulations.partitions.base import Pool, partition


@partition("shards", "shards")
def shards(pool: Pool, part: SimulationPart, rng: np.random.Generator) -> list[np.ndarray]:
    """Sorted by label and cut into sites x shards equal parts, of which each site gets `shards` (McMahan et al. 2017).

    The paper's "pathological" split of MNIST is 100 sites of 2 shards. All sites have the same size, but for one
    example a shard. A shard no larger than any label's examples holds at most two labels, and one where the labels'
    counts are multiples of its size: then a site has at most `shards` labels. Within a label the order is random, so
    that each shard has a share of what the data's owner set aside for validation and test.

    Raises:
        ConfigError: there are more shards than examples.
    """
    count = part.sites * part.shards
    pool.require(count, f"shards (simulation.sites x shards = {part.sites} x {part.shards})")
    order = rng.permutation(len(pool))
    cut = np.array_split(order[np.argsort(pool.labels[order], kind="stable")], count)
    return [np.concatenate([cut[i] for i in chosen]) for chosen in rng.permutation(count).reshape(part.sites, -1)]


@partition("labels", "classes")
def labels(pool: Pool, part: SimulationPart, rng: np.random.Generator) -> list[np.ndarray]:
    """Each site holds `classes` labels, and a label's examples are shared evenly by its sites (#C=k of NIID-Bench).

    As in Li et al. 2022: site i holds label i mod K, the others are drawn. Where there are fewer sites than labels,
    site i holds i, i + N, i + 2N, ..., so that no label is left out.

    Raises:
        ConfigError: a site cannot hold so many labels, they cannot hold all labels, or a label has too few examples.
    """
    classes, sites = pool.by_label(), part.sites
    if part.classes > len(classes):
        raise ConfigError(
            f"simulation.classes = {part.classes}, but the data have {len(classes)} labels",
            hint="Lower simulation.classes",
        )
    if sites * part.classes < len(classes):
        raise ConfigError(
            f"{sites} sites of {part.classes} labels cannot hold the {len(classes)} labels of the data",
            hint="Raise simulation.classes or simulation.sites",
        )
    holders: list[list[int]] = [[] for _ in classes]
    for site in range(sites):
        own = [site % len(classes)] if sites >= len(classes) else list(range(site, len(classes), sites))
        others = np.setdiff1d(np.arange(len(classes)), own)
        for label in (*own, *rng.permutation(others)[: part.classes - len(own)]):
            holders[label].append(site)
    held: list[list[np.ndarray]] = [[] for _ in range(sites)]
    for members, owners in zip(classes, holders, strict=True):
        if len(members) < len(owners):
            label = pool.labels[members[0]]
            raise ConfigError(
                f"label {label} has {len(members)} examples for {len(owners)} sites",
                hint="Lower simulation.sites or simulation.classes",
            )
        for site, units in zip(owners, np.array_split(rng.permutation(members), len(owners)), strict=True):
            held[site].append(units)
    return [np.concatenate(units) for units in held]
