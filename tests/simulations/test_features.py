"""Feature skew: every site sees through its own instrument, in all three parts, the same each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from client.readers.base import PARTS, Store
from shared_models.job import Job
from shared_models.job_parts import DataPart
from shared_models.simulation_part import FeaturesPart, SimulationPart
from shared_models.tasks.base import IGNORED, Target
from simulations.compare import load_sites
from simulations.features import Condition, conditions, skewed
from simulations.partition import Partition, SitePopulation, make_partition, same_sites


def images(x: Tensor, y: Tensor | None = None) -> Store:
    y = torch.zeros(len(x), dtype=torch.int64) if y is None else y
    return Store(x, y, [f"{i:05d}" for i in range(len(x))], DataPart(shape=tuple(x.shape[1:])))


def grey(count: int = 400, value: int = 128) -> Store:
    return images(torch.full((count, 1, 8, 8), value, dtype=torch.uint8))


def part(sites: int = 4, seed: int = 0, **features: float) -> SimulationPart:
    return SimulationPart(sites=sites, seed=seed, features=FeaturesPart(**features))


def sites_of(store: Store, wanted: SimulationPart, target: Target = "class") -> SitePopulation:
    found = make_partition(store, wanted)
    return SitePopulation(found.seen(store, target), found)


def seen(store: Store, condition: Condition, target: Target = "class") -> Store:
    return skewed(store, {"a": np.arange(len(store.names))}, {"a": condition}, target, 0)


def test_noise_has_the_stated_standard_deviation_in_every_part() -> None:
    """Site i of 4 with sigma 0.2: 0.05, 0.1, 0.15 and 0.2 of the range; 3-sigma bounds of an estimate, and rounding."""
    sites = sites_of(grey(2000), part(noise=0.2))
    for i, name in enumerate(sites.names, 1):
        for which in PARTS:
            x = getattr(sites.splits(name), which)
            values = sites.store.x[x.rows].double() / 255 - 128 / 255
            sd, count = 0.2 * i / 4, values.numel()
            assert values.std() == pytest.approx(sd, rel=3 / (2 * count) ** 0.5 + 0.002)
            assert values.mean() == pytest.approx(0, abs=4 * sd / count**0.5)


def test_a_site_differs_from_another_and_a_seed_from_another_but_not_from_itself() -> None:
    wanted = {"noise": 0.1, "rotation": 20.0, "blur": 1.0, "contrast": 0.3, "brightness": 0.1}
    source = torch.randint(0, 256, (1, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    store = images(source.repeat(60, 1, 1, 1))
    first, again, other = (sites_of(store, part(seed=seed, **wanted)) for seed in (3, 3, 4))
    assert torch.equal(first.store.x, again.store.x)
    assert first.partition.hash == again.partition.hash
    assert not torch.equal(first.store.x, other.store.x)
    assert len({tuple(c.chosen.items()) for c in first.partition.conditions.values()}) == 4
    assert torch.equal(store.x, source.repeat(60, 1, 1, 1))  # the pool itself is as it was


@pytest.mark.parametrize("setting", ["noise", "rotation", "blur", "contrast", "brightness"])
def test_each_setting_changes_training_validation_and_test(setting: str) -> None:
    noise = torch.randint(0, 256, (200, 3, 9, 9), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    sites = sites_of(images(noise), part(seed=2, **{setting: {"rotation": 30.0, "blur": 3.0}.get(setting, 0.5)}))
    for name in sites.names:
        for which in PARTS:
            rows = getattr(sites.splits(name), which).rows
            assert not torch.equal(sites.store.x[rows], noise[rows])


def test_the_pool_of_a_centralized_baseline_is_what_the_sites_see() -> None:
    sites = sites_of(grey(), part(noise=0.2))
    for which in PARTS:
        pooled = getattr(sites.pooled(), which)
        parts = [getattr(sites.splits(name), which) for name in sites.names]
        own = {int(row): sites.store.x[row] for examples in parts for row in examples.rows}
        assert sorted(own) == pooled.rows.tolist()
        wanted = torch.stack([own[row] for row in sorted(own)]).float() / 127.5 - 1
        assert torch.allclose(pooled.batch(torch.arange(len(pooled))).x, wanted, atol=1e-6)


def test_what_each_transform_does_by_hand() -> None:
    x = torch.tensor([[[[0, 100], [100, 200]]]], dtype=torch.uint8)
    assert seen(images(x), Condition(brightness=0.2)).x.flatten().tolist() == [51, 151, 151, 251]
    assert seen(images(x), Condition(contrast=0.5)).x.flatten().tolist() == [50, 100, 100, 150]
    assert seen(images(x), Condition(contrast=2.0)).x.flatten().tolist() == [0, 100, 100, 255]  # cut off, not wrapped
    assert seen(images(x), Condition(rotation=90.0)).x.flatten().tolist() == [100, 200, 0, 100]


def test_blur_is_a_gaussian_of_that_width() -> None:
    x = torch.zeros(1, 1, 31, 31, dtype=torch.uint8)
    x[0, 0, 15, 15] = 255
    row = seen(images(x), Condition(blur=1.0)).x[0, 0, 15].double() / 255
    steps = torch.arange(31) - 15.0
    wanted = torch.exp(-(steps**2) / 2)
    assert torch.allclose(row, (wanted / wanted.sum() * (wanted / wanted.sum())[15]).double(), atol=0.5 / 255 + 1e-4)


def test_a_mask_and_a_box_turn_with_their_image() -> None:
    x = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    x[0, 0, 0, 1] = 200
    mask = (x[:, 0] > 0).to(torch.uint8)
    turned = seen(images(x, mask), Condition(rotation=90.0), "mask")
    assert torch.equal(turned.y, (turned.x[:, 0] > 0).to(torch.uint8))
    assert turned.y.sum() == 1
    slanted = seen(images(x, mask), Condition(rotation=45.0), "mask")
    assert (slanted.y == IGNORED).any()  # what came in from beyond the edge counts nowhere
    box = torch.tensor([[0.25, 0.0, 0.5, 0.25]])
    moved = seen(images(x, box), Condition(rotation=90.0), "box")
    (row,), (column,) = torch.nonzero(moved.x[0, 0], as_tuple=True)
    assert moved.y[0].tolist() == [column / 4, row / 4, (column + 1) / 4, (row + 1) / 4]


def test_features_get_noise_in_units_of_their_column_and_what_is_missing_stays_missing() -> None:
    source = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 3, generator=source) * torch.tensor([1.0, 100.0, 0.0]) + 7
    x[5, 0] = torch.nan
    store = Store(
        x,
        torch.zeros(4000, dtype=torch.int64),
        [f"{i:05d}" for i in range(4000)],
        DataPart(shape=(3,), features=("a", "b", "c")),
    )
    change = (seen(store, Condition(noise=0.5)).x - x).double()
    known = torch.arange(4000) != 5
    assert change[known].std(dim=0).tolist() == pytest.approx([0.5, 50.0, 0.0], rel=0.06)
    assert change[5].isnan().tolist() == [True, False, False]


def test_the_levels_are_within_their_bounds_and_a_site_keeps_its_own() -> None:
    wanted = FeaturesPart(noise=0.3, rotation=15, blur=2, contrast=0.4, brightness=0.2)
    names = [f"h{i}" for i in range(200)]
    found = conditions(wanted, names, 0)
    for value, low, high in (("rotation", -15, 15), ("blur", 0, 2), ("contrast", 0.6, 1.4), ("brightness", -0.2, 0.2)):
        every = np.array([getattr(c, value) for c in found.values()])
        assert low <= every.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < every.max() <= high
    assert [c.noise for c in found.values()] == pytest.approx([0.3 * i / 200 for i in range(1, 201)])
    alone = conditions(FeaturesPart(rotation=15), ["h7"], 0)["h7"]
    assert alone.rotation == found["h7"].rotation
    assert alone.chosen == {"rotation": alone.rotation}


def test_no_feature_skew_is_the_store_itself_and_the_old_hash() -> None:
    store = grey()
    plain, none = make_partition(store, part()), make_partition(store, SimulationPart(sites=4))
    assert plain.seen(store, "class") is store
    assert plain.hash == none.hash
    assert plain.kind == "iid"


@pytest.mark.parametrize("keys", [{"noise": 0.2}, {"noise": 0.1, "blur": 1.0}, {"rotation": 5.0}])
def test_the_hash_covers_features(keys: dict[str, Any]) -> None:
    store = grey()
    plain, first = make_partition(store, part(noise=0.1)), make_partition(store, part(**keys))
    assert plain.hash != first.hash
    assert plain.rows.keys() == first.rows.keys()
    assert all(np.array_equal(plain.rows[name], first.rows[name]) for name in plain.rows)
    reseeded = Partition(first.kind, first.rows, first.conditions, first.seed + 1)
    assert reseeded.hash != first.hash
    assert first.kind.startswith("iid, features(")


def test_another_order_of_the_same_examples_gets_the_same_noise() -> None:
    """A stage may read the examples in another order; an example looks the same in both."""
    store, order = grey(50), torch.randperm(50, generator=torch.Generator().manual_seed(2))
    other = Store(store.x[order], store.y[order], [store.names[i] for i in order.tolist()], store.data)
    found = make_partition(store, part(noise=0.2, blur=1.0))
    assert torch.equal(same_sites(found, store, other).seen(other, "class").x, found.seen(store, "class").x[order])


def test_a_job_is_trained_on_what_its_sites_see_in_every_stage() -> None:
    stages = [{"name": "pretext", "task": {"name": "rotation", "labels": []}}, {"name": "probe"}]
    plain, wanted = (
        Job.resolve({
            "name": "t", "model": {"name": "cnn"}, "task": {"labels": [str(c) for c in range(10)]},
            "data": {"shape": [1, 8, 8]}, "stages": stages, "simulation": {"features": features},
        })
        for features in ({}, {"brightness": 0.5})
    )  # fmt: skip
    before, sites = load_sites(plain, Path()), load_sites(wanted, Path())
    assert plain.hash == wanted.hash  # what a site would approve is the same job
    for stage in (0, 1):
        for name, condition in sites.partition.conditions.items():
            for which in PARTS:
                was, now = (getattr(found.at(stage).splits(name), which) for found in (before, sites))
                assert torch.equal(was.rows, now.rows)
                shifted = was.store.x[was.rows].double() + 255 * condition.brightness
                assert (now.store.x[now.rows] - shifted.clamp(0, 255)).abs().max() <= 0.51
