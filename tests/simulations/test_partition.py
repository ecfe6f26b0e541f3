"""Splits of a pool over sites: everything once, seeded, pinned by a hash, and as skewed as alpha says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from client.readers.base import PARTS, Store
from client.readers.parts import part_of, split
from shared_models.errors import ConfigError, DataError, UnknownNameError
from shared_models.job_parts import DataPart
from shared_models.simulation_part import SimulationPart
from simulations.partition import SitePopulation, make_partition, site_names
from simulations.partitions.base import Pool, partition, partitions


def pool(count: int = 1000, classes: int = 10, sites: Sequence[str] = ()) -> Store:
    labels = torch.arange(count) % classes
    images = torch.zeros(count, 1, 1, 1, dtype=torch.uint8)
    return Store(images, labels, [f"{i:05d}" for i in range(count)], DataPart(shape=(1, 1, 1)), sites=sites)


def part(**keys: Any) -> SimulationPart:
    return SimulationPart(**keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"partition": "iid", "sites": 7},
        {"partition": "iid", "sites": 1},
        {"partition": "dirichlet", "sites": 7, "alpha": 0.3},
        {"partition": "dirichlet", "sites": 5, "alpha": 0.01, "min_examples": 1},
        {"partition": "dirichlet", "sites": 1, "alpha": 0.3},
        {"partition": "quantity", "sites": 7, "alpha": 0.5},
        {"partition": "shards", "sites": 7, "shards": 3},
        {"partition": "labels", "sites": 7, "classes": 3},
        {"partition": "labels", "sites": 23, "classes": 1},
    ],
)
def test_every_example_is_at_exactly_one_site(keys: dict[str, Any]) -> None:
    found = make_partition(pool(), part(**keys))
    assert list(found.rows) == site_names(keys["sites"])
    assert np.array_equal(np.sort(np.concatenate(list(found.rows.values()))), np.arange(1000))
    assert all(np.array_equal(rows, np.sort(rows)) for rows in found.rows.values())


def test_iid_sizes_differ_by_at_most_one() -> None:
    sizes = [len(rows) for rows in make_partition(pool(1000), part(partition="iid", sites=7)).rows.values()]
    assert sizes == [143] * 6 + [142]


def test_as_many_sites_as_examples_and_one_more() -> None:
    assert [len(rows) for rows in make_partition(pool(5), part(sites=5)).rows.values()] == [1] * 5
    with pytest.raises(ConfigError, match="6 sites cannot share 5 examples"):
        make_partition(pool(5), part(sites=6))


def test_site_names_sort_in_their_order() -> None:
    assert site_names(3) == ["site-1", "site-2", "site-3"]
    assert site_names(100)[:2] == ["site-001", "site-002"]
    assert sorted(site_names(100)) == site_names(100)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "quantity", "shards", "labels"])
def test_the_seed_alone_decides(kind: str) -> None:
    def hashed(**keys: Any) -> str:
        return make_partition(pool(), part(partition=kind, classes=4, **keys)).hash

    np.random.seed(5)
    first = hashed(seed=3)
    np.random.seed(6)
    assert hashed(seed=3) == first
    assert len({first, hashed(seed=4), hashed(seed=3, sites=4)}) == 3


def test_the_hash_covers_names_and_rows() -> None:
    found = make_partition(pool(20), part(partition="iid", sites=2))
    renamed = type(found)(found.kind, dict(zip(("x", "y"), found.rows.values(), strict=True)))
    one, two = found.rows.values()
    moved = type(found)(found.kind, {"site-1": np.append(one, two[0]), "site-2": two[1:]})
    narrow = type(found)(found.kind, {name: rows.astype(np.int32) for name, rows in found.rows.items()})
    assert len({found.hash, renamed.hash, moved.hash}) == 3
    assert narrow.hash == found.hash


def test_pinned_hashes() -> None:
    """A split that changes with a release would make old results incomparable; numpy guarantees these streams."""
    hashes = {
        "iid": make_partition(pool(), part(partition="iid", sites=3, seed=0)).hash,
        "dirichlet": make_partition(pool(), part(partition="dirichlet", sites=3, alpha=0.3, seed=0)).hash,
        "quantity": make_partition(pool(), part(partition="quantity", sites=3, alpha=0.3, seed=0)).hash,
        "shards": make_partition(pool(), part(partition="shards", sites=5, seed=0)).hash,
        "labels": make_partition(pool(), part(partition="labels", sites=5, seed=0)).hash,
    }
    assert hashes == {
        "iid": "dab167971a7442a4e94398449f67a1156aa426f899cfc3e05052b6409ea584c1",
        "dirichlet": "937d4cd432d801b769786ba75a9ef6b7d390dce6eedf4a8efcd11b345d02e0db",
        "quantity": "bb7dae60c09ff898debd190021191bb8c28a5137de9d3ab855cf2ecfb770e21c",
        "shards": "6790a550b0b5510508ce3cc624b586eeb0547aab564e587cd8e83785def982ec",
        "labels": "7b0c76c4655a30168427d9bfc423024be4e1e51c6a4625973bf1c08dee4296a7",
    }


@pytest.mark.parametrize("kind", ["dirichlet", "quantity"])
@pytest.mark.parametrize("minimum", [1, 50, 250])
def test_every_site_gets_the_minimum(kind: str, minimum: int) -> None:
    for seed in range(5):
        keys = {"partition": kind, "alpha": 0.3, "sites": 3, "min_examples": minimum, "seed": seed}
        assert min(len(rows) for rows in make_partition(pool(), part(**keys)).rows.values()) >= minimum


@pytest.mark.parametrize(
    "keys",
    [
        {"sites": 4, "min_examples": 251},  # more than there is
        {"sites": 5, "min_examples": 200, "alpha": 0.01},  # exactly what there is, which no draw gives
    ],
)
@pytest.mark.parametrize("kind", ["dirichlet", "quantity"])
def test_an_impossible_minimum_is_refused(kind: str, keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"gives every site {keys['min_examples']}.*min_examples"):
        make_partition(pool(), part(partition=kind, **keys))


def shares(alpha: float, seed: int, sites: int = 10) -> np.ndarray:
    """(sites, classes): the share of each class that lies at each site; 1000 examples a class."""
    store = pool(10_000)
    keys = {"partition": "dirichlet", "alpha": alpha, "sites": sites, "min_examples": 1, "seed": seed}
    rows = make_partition(store, part(**keys)).rows.values()
    return np.array([np.bincount(store.y.numpy()[r], minlength=10) for r in rows]) / 1000


def test_small_alpha_puts_each_class_at_few_sites_and_large_alpha_spreads_it() -> None:
    """For p ~ Dir(alpha) over K sites E[sum p_k^2] = (alpha + 1) / (K alpha + 1): 1 is one site, 1/K is even."""
    for alpha, tolerance in ((0.05, 0.12), (1.0, 0.03), (1000.0, 0.001)):
        seen = np.mean([(shares(alpha, seed) ** 2).sum(0) for seed in range(5)])
        assert seen == pytest.approx((alpha + 1) / (10 * alpha + 1), abs=tolerance)
    assert np.abs(shares(1000.0, 0) - 0.1).max() < 0.015  # sd of one share 0.003
    skewed = [shares(0.01, seed, sites=3).max(0) for seed in range(3)]
    assert np.mean(np.concatenate(skewed) > 0.9) > 0.9  # nearly every class has one home


def test_the_mean_share_is_even() -> None:
    """No site is favoured: over 40 draws of 10 classes, mean 1/3 with standard error below 0.02."""
    mean = np.mean([shares(0.5, seed, sites=3).mean(1) for seed in range(40)], axis=0)
    assert mean == pytest.approx(np.full(3, 1 / 3), abs=0.08)


# ---- skewed sizes ----------------------------------------------------------------------------------------------------
def sizes(**keys: Any) -> np.ndarray:
    rows = make_partition(pool(10_000), part(partition="quantity", min_examples=1, **keys)).rows.values()
    return np.array([len(held) for held in rows])


def test_quantity_skews_the_sizes_as_alpha_says() -> None:
    """For q ~ Dir(alpha) over K sites E[sum q_k^2] = (alpha + 1) / (K alpha + 1)."""
    for alpha, tolerance in ((0.5, 0.07), (1000.0, 0.001)):
        found = np.mean([((sizes(alpha=alpha, sites=10, seed=seed) / 10_000) ** 2).sum() for seed in range(10)])
        assert found == pytest.approx((alpha + 1) / (10 * alpha + 1), abs=tolerance)


def test_quantity_leaves_the_labels_even() -> None:
    """Every site of n examples has each of 10 labels n / 10 times, give or take five standard deviations."""
    store = pool(10_000)
    for rows in make_partition(store, part(partition="quantity", sites=5, min_examples=100)).rows.values():
        counts = np.bincount(store.y.numpy()[rows], minlength=10)
        assert np.abs(counts - len(rows) / 10).max() < 5 * (0.09 * len(rows)) ** 0.5


# ---- few labels at a site --------------------------------------------------------------------------------------------
def held(store: Store, **keys: Any) -> list[np.ndarray]:
    """Label counts of each site."""
    return [np.bincount(store.y.numpy()[r], minlength=10) for r in make_partition(store, part(**keys)).rows.values()]


def test_two_shards_of_one_label_each() -> None:
    """1000 examples of 10 labels in 50 sites x 2 shards of ten: each shard has one label, each site one or two."""
    found = held(pool(1000), partition="shards", sites=50, shards=2)
    assert [int(counts.sum()) for counts in found] == [20] * 50
    assert {tuple(sorted(counts[counts > 0])) for counts in found} == {(10, 10), (20,)}
    assert sum(found).tolist() == [100] * 10  # type: ignore[arg-type]
    assert len({tuple(np.flatnonzero(counts)) for counts in found}) > 10  # dealt, not in turn


def test_shards_that_do_not_fit_differ_by_one() -> None:
    """1003 examples in 21 shards are of 47 or 48; a site of 3 has 141 to 144, of six labels at most."""
    found = held(pool(1003), partition="shards", sites=7, shards=3)
    assert {int(counts.sum()) for counts in found} <= set(range(141, 145))
    assert max(np.count_nonzero(counts) for counts in found) <= 6


def test_a_shard_has_its_share_of_what_was_set_aside() -> None:
    """The owner's own parts lie one behind the other; sorted by label alone, a shard would be of one part."""
    parts = ["train"] * 600 + ["validation"] * 200 + ["test"] * 200
    store = Store(
        torch.zeros(1000, 1, 1, 1, dtype=torch.uint8), torch.arange(1000) % 10, [f"{i:05d}" for i in range(1000)],
        DataPart(shape=(1, 1, 1)), parts=parts,
    )  # fmt: skip
    sites = SitePopulation(store, make_partition(store, part(partition="shards", sites=5, shards=2)))
    assert all(min(found.values()) > 20 for found in sites.sizes().values())


@pytest.mark.parametrize(("sites", "classes"), [(10, 2), (23, 3), (5, 2), (4, 3), (3, 10), (12, 1)])
def test_every_site_holds_so_many_labels_and_every_label_is_held(sites: int, classes: int) -> None:
    found = held(pool(), partition="labels", sites=sites, classes=classes)
    assert [np.count_nonzero(counts) for counts in found] == [classes] * sites
    assert sum(found).tolist() == [100] * 10  # type: ignore[arg-type]
    for label in range(10):  # shared evenly by those that hold it
        shared = [counts[label] for counts in found if counts[label]]
        assert max(shared) - min(shared) <= 1
    if sites >= 10:
        assert all(counts[site % 10] for site, counts in enumerate(found))


def test_a_label_with_fewer_examples_than_sites_is_named() -> None:
    with pytest.raises(ConfigError, match="label 0 has 2 examples for 3 sites"):
        make_partition(pool(20), part(partition="labels", sites=30, classes=1))


def test_one_decorator_registers_a_split() -> None:
    @partition("first-and-rest", "smallest")
    def first_and_rest(pool: Pool, part: SimulationPart, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"first": np.array([0]), "rest": np.arange(1, len(pool))}

    try:
        found = make_partition(pool(6), part(partition="first-and-rest"))
    finally:
        del partitions._things["first-and-rest"]
    assert found.kind == "first-and-rest(smallest=1)"
    assert {name: rows.tolist() for name, rows in found.rows.items()} == {"first": [0], "rest": [1, 2, 3, 4, 5]}


def test_an_unknown_split() -> None:
    with pytest.raises(UnknownNameError, match=r"simulation.partition: unknown partition 'shard'.*'shards'"):
        make_partition(pool(6), part(partition="shard"))


# ---- by column -------------------------------------------------------------------------------------------------------
def test_by_column() -> None:
    found = make_partition(pool(6, sites=["b", "a", "b", "c", "a", "b"]), part(partition="column", sites=99))
    assert found.kind == "column"
    assert {name: rows.tolist() for name, rows in found.rows.items()} == {"a": [1, 4], "b": [0, 2, 5], "c": [3]}
    assert list(found.rows) == ["a", "b", "c"]


def test_by_column_without_a_column() -> None:
    with pytest.raises(ConfigError, match="needs data with a site column"):
        make_partition(pool(6), part(partition="column"))


# ---- the population --------------------------------------------------------------------------------------------------
def test_the_pool_is_exactly_the_union() -> None:
    sites = SitePopulation(pool(), make_partition(pool(), part(partition="dirichlet", alpha=0.3, sites=4)))
    pooled = sites.pooled()
    for name in PARTS:
        rows = [r for site in sites.names for r in getattr(sites.splits(site), name).rows.tolist()]
        assert getattr(pooled, name).rows.tolist() == sorted(rows)
        assert all(part_of(f"{r:05d}") == name for r in rows)
    assert sum(len(getattr(pooled, name)) for name in PARTS) == 1000


def test_a_pool_of_one_site_is_that_site() -> None:
    sites = SitePopulation(pool(), make_partition(pool(), part(partition="iid", sites=1)))
    for name in PARTS:
        assert torch.equal(getattr(sites.pooled(), name).rows, getattr(sites.splits("site-1"), name).rows)


def test_a_site_whose_part_would_be_empty_is_named() -> None:
    lonely = [i for i in range(100) if part_of(f"{i:05d}") == "train"][:3]
    column = ["small" if i in lonely else "large" for i in range(100)]
    sites = SitePopulation(pool(100), make_partition(pool(100, sites=column), part(partition="column")))
    assert len(sites.splits("large").train)
    with pytest.raises(DataError, match="site 'small': no example for the validation part among 3"):
        sites.splits("small")


def test_counts_for_the_report() -> None:
    """Class 1 occurs only at the first site; classes without an example are left out."""
    store = Store(
        torch.zeros(40, 1, 1, 1, dtype=torch.uint8), torch.tensor([0, 1] * 10 + [2] * 20),
        [f"{i:05d}" for i in range(40)], DataPart(shape=(1, 1, 1)), sites=["a"] * 20 + ["b"] * 20,
    )  # fmt: skip
    counts = SitePopulation(store, make_partition(store, part(partition="column"))).counts(10)
    assert {site: {c for part in parts.values() for c in part} for site, parts in counts.items()} == {
        "a": {0, 1},
        "b": {2},
    }
    for site, rows in {"a": range(20), "b": range(20, 40)}.items():
        for name in PARTS:
            mine = [i for i in rows if part_of(f"{i:05d}") == name]
            assert sum(counts[site][name].values()) == len(mine)
            assert all(n == sum(int(store.y[i]) == c for i in mine) for c, n in counts[site][name].items())


def test_blocks_are_contiguous_in_the_order_of_names() -> None:
    """Slices of one volume stay together, whatever the order in which they were read."""
    order = torch.randperm(11, generator=torch.Generator().manual_seed(3)).tolist()
    store = Store(
        torch.zeros(11, 1, 1, 1, dtype=torch.uint8), torch.zeros(11, dtype=torch.int64),
        [f"slice-{i}" for i in order], DataPart(shape=(1, 1, 1)),
    )  # fmt: skip
    rows = make_partition(store, part(partition="blocks", sites=3)).rows
    held = [sorted(order[r] for r in rows[name]) for name in rows]
    assert held == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def test_parts_in_blocks_follow_the_order_of_names() -> None:
    order = torch.randperm(10, generator=torch.Generator().manual_seed(4)).tolist()
    store = Store(
        torch.zeros(10, 1, 1, 1, dtype=torch.uint8), torch.zeros(10, dtype=torch.int64),
        [f"{i + 5}.png" for i in order], DataPart(shape=(1, 1, 1), parts="blocks"),
    )  # fmt: skip
    splits = split(store)
    held = [sorted(order[r] for r in getattr(splits, name).rows) for name in PARTS]
    assert held == [[0, 1, 2, 3, 4, 5], [6, 7], [8, 9]]


@pytest.mark.parametrize("kind", ["blocks", "iid"])
@pytest.mark.parametrize("parts", ["blocks", "hash"])
def test_tiles_of_one_image_stay_together(kind: str, parts: str) -> None:
    """30 images of 2 to 4 tiles each, over 3 sites of ten images and their three parts."""
    images = [f"slice-{i}" for i in range(30) for _ in range(2 + i % 3)]
    count = len(images)
    store = Store(
        torch.zeros(count, 1, 1, 1, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64),
        [f"{name}#{i}" for i, name in enumerate(images)], DataPart(shape=(1, 1, 1), parts=parts), groups=images,
    )  # fmt: skip
    population = SitePopulation(store, make_partition(store, part(partition=kind, sites=3)))
    place: dict[str, set[tuple[str, str]]] = {}
    for site in population.names:
        for name in PARTS:
            for row in getattr(population.splits(site), name).rows.tolist():
                place.setdefault(images[row], set()).add((site, name))
    assert [len(places) for places in place.values()] == [1] * 30
    assert [len({n for n, p in place.items() if p & {(s, q) for q in PARTS}}) for s in population.names] == [10, 10, 10]
    if parts == "blocks":
        for site in population.names:
            assert [len({n for n, p in place.items() if p == {(site, q)}}) for q in PARTS] == [6, 2, 2]


# ---- tests that all sites share --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["iid", "dirichlet", "blocks"])
def test_a_shared_test_is_everybodys_and_nothing_else_is_shared(kind: str) -> None:
    partition = make_partition(pool(), part(partition=kind, sites=4))
    own, shared = SitePopulation(pool(), partition), SitePopulation(pool(), partition, test="shared")
    every = sorted(row for name in own.names for row in own.splits(name).test.rows.tolist())
    assert len(every) > 2 * max(len(own.splits(name).test) for name in own.names)
    for name in own.names:
        assert shared.splits(name).test.rows.tolist() == every
        for which in ("train", "validation"):
            assert torch.equal(getattr(shared.splits(name), which).rows, getattr(own.splits(name), which).rows)
        held = torch.cat([shared.splits(name).train.rows, shared.splits(name).validation.rows])
        assert not torch.isin(held, shared.splits(name).test.rows).any()
    assert shared.sizes()["site-1"]["test"] == len(every)


def test_what_is_pooled_has_a_shared_test_once() -> None:
    partition = make_partition(pool(), part(partition="iid", sites=4))
    own, shared = (SitePopulation(pool(), partition, test=test).pooled() for test in ("own", "shared"))
    assert all(torch.equal(getattr(own, name).rows, getattr(shared, name).rows) for name in PARTS)


@pytest.mark.parametrize("kind", ["dirichlet", "quantity", "shards", "labels"])
def test_what_belongs_together_stays_together(kind: str) -> None:
    """100 series of 2 to 4 windows each, of one class: no split parts them."""
    series = [f"{i:03d}" for i in range(100) for _ in range(2 + i % 3)]
    store = Store(
        torch.zeros(len(series), 1, 1, 1, dtype=torch.uint8), torch.tensor([int(name) % 10 for name in series]),
        [f"{name}#{i}" for i, name in enumerate(series)], DataPart(shape=(1, 1, 1)), groups=series,
    )  # fmt: skip
    rows = make_partition(store, part(partition=kind, sites=5)).rows
    assert np.array_equal(np.sort(np.concatenate(list(rows.values()))), np.arange(len(series)))
    homes = [{series[row] for row in held} for held in rows.values()]
    assert sum(map(len, homes)) == 100


def test_alternatives_stay_together_and_are_tested_once() -> None:
    """30 images with three captions each: a site's training examples come in threes, the shared test once an image."""
    images = [f"{i:02d}" for i in range(30) for _ in range(3)]
    store = Store(
        torch.zeros(90, 1, 1, 1, dtype=torch.uint8), torch.zeros(90, dtype=torch.int64),
        [f"{name}#{i % 3}" for i, name in enumerate(images)], DataPart(shape=(1, 1, 1)),
        groups=images, alternatives=True,
    )  # fmt: skip
    sites = SitePopulation(store, make_partition(store, part(partition="iid", sites=2)), test="shared")
    tested = [images[row] for row in sites.splits("site-1").test.rows.tolist()]
    assert tested == sorted(name for name in set(images) if part_of(name) == "test")
    homes: dict[str, set[str]] = {}
    for site in sites.names:
        trained = [images[row] for row in sites.splits(site).train.rows.tolist()]
        assert all(trained.count(name) == 3 for name in trained)
        for name in trained:
            homes.setdefault(name, set()).add(site)
    assert all(len(home) == 1 for home in homes.values())
