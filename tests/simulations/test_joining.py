"""Which site gains by joining, against numbers worked out by hand."""

from __future__ import annotations

import math
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from scipy.stats import t as student

from shared_models.job import Job
from simulations.joining import joinings, worst
from simulations.leaving import left_sites
from simulations.report import write
from simulations.results import parse
from simulations.statistics import crossed, summarize
from simulations.tables import for_terminal, gain_table, site_table, stream_table
from simulations.verdicts import verdicts

ALONE = {"a": [0.50, 0.52, 0.54], "b": [0.90, 0.91, 0.92], "c": [0.70, 0.70, 0.70]}
JOINED = {"a": [0.60, 0.63, 0.66], "b": [0.80, 0.80, 0.80], "c": [0.65, 0.70, 0.75]}


def cell(place: str, per_site: dict[str, list[float]], everywhere: dict[str, list[float]], **more: Any) -> Any:
    seeds = range(len(per_site["a"]))
    own = [fmean(values[i] for values in per_site.values()) for i in seeds]
    return {
        "place": place, "time": "offline", "all_sites": own, "own_site": own, "per_site": per_site,
        "per_site_all": everywhere, "seconds": [1.0 for _ in seeds], **more,
    }  # fmt: skip


def comparison(*cells: Any, sites: tuple[str, ...] = ("a", "b", "c"), **more: Any) -> Any:
    return parse({
        "title": "t", "created": "2026-01-02T03:04:05Z", "version": "0.1.0", "command": "fedzoo compare job.toml",
        "job": {}, "job_hash": "j", "fingerprint": "f", "partition": {"kind": "iid"}, "environment": {},
        "seeds": list(range(len(cells[0]["all_sites"]))), "sites": list(sites), "labels": [], "cells": list(cells),
        **more,
    })  # fmt: skip


def pair(**more: Any) -> Any:
    shared = {site: [0.7, 0.7, 0.7] for site in JOINED}
    return comparison(
        cell("federated", JOINED, shared, left="trained weights, 1.20 MB"),
        cell("isolated", ALONE, {"a": [0.4, 0.5, 0.6], "b": [0.7, 0.7, 0.7], "c": [0.8, 0.8, 0.8]}, left="nothing"),
        **more,
    )


def test_each_site_s_gain_by_hand() -> None:
    (found,) = joinings(pair())
    gains = {gain.site: gain for gain in found.gains}
    assert gains["a"].own.mean == pytest.approx(0.11)  # 0.10, 0.11, 0.12
    half = float(student.ppf(0.975, 2)) * stdev([0.10, 0.11, 0.12]) / math.sqrt(3)
    assert (gains["a"].own.low, gains["a"].own.high) == (pytest.approx(0.11 - half), pytest.approx(0.11 + half))
    assert gains["a"].everywhere.mean == pytest.approx(0.2)
    assert {site: gain.claim for site, gain in gains.items()} == {"a": "gains", "b": "loses", "c": "open"}
    assert found.mean == pytest.approx((0.11 - 0.11 + 0.0) / 3)


def test_where_less_is_better_a_fall_is_a_gain() -> None:
    bits = {"unit": "bits", "factor": 1.0, "digits": 2, "larger": False}
    (found,) = joinings(pair(metric="bits", measures={"bits": bits}))
    assert {gain.site: gain.claim for gain in found.gains} == {"a": "loses", "b": "gains", "c": "open"}
    assert found.gains[0].own.mean == pytest.approx(-0.11)


def test_the_tables_and_the_sentence_say_so() -> None:
    c = pair()
    head, rows = gain_table(c)
    assert head == ["gain of joining, own test, points", "offline"]
    assert rows[0] == ["a", "+11.0 (8.5 to 13.5)"]
    assert rows[1] == ["b", "−11.0 (−13.5 to −8.5)"]
    assert rows[2][1].startswith("0.0 (")
    assert rows[3][0] == "mean of sites"
    assert site_table(c) == (
        ["paradigm", "worst site", "its own test, accuracy %", "what left the sites in a run"],
        [
            ["federated, offline", "a", "63.0 ± 3.0", "trained weights, 1.20 MB"],
            ["isolated, offline", "a", "52.0 ± 2.0", "nothing"],
        ],
    )
    (said,) = [line for line in verdicts(c) if "by joining" in line]
    assert "1 of 3 sites gains (a), 1 loses (b), and for 1 nothing can be claimed (c)" in said


def test_where_nothing_is_gained_the_page_is_drawn(tmp_path: Any) -> None:
    c = comparison(cell("federated", ALONE, ALONE), cell("isolated", ALONE, ALONE))
    page = write(c, tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count(">0.0</text>") == 3


def test_of_one_seed_nothing_is_claimed() -> None:
    one = [{site: values[:1] for site, values in found.items()} for found in (JOINED, ALONE)]
    c = comparison(*(cell(place, found, found) for place, found in zip(("federated", "isolated"), one, strict=True)))
    (found,) = joinings(c)
    assert [gain.claim for gain in found.gains] == ["open"] * 3
    assert found.spread is None
    assert gain_table(c)[1][0] == ["a", "+10.0"]
    assert not [line for line in verdicts(c) if "by joining" in line]


def test_the_worst_site_is_the_one_with_the_largest_loss_where_less_is_better() -> None:
    c = pair()
    assert worst(c.cells[0])[0] == "a"
    assert worst(c.cells[0], larger=False) == ("b", JOINED["b"])


def test_the_interval_over_sites_and_seeds_by_hand() -> None:
    """Rows' means 2, 4, 9 and columns' means 4, 6: the variances of both over their numbers, and t with one degree."""
    low, high = crossed([[1.0, 3.0], [3.0, 5.0], [8.0, 10.0]])
    half = 12.706204736432095 * math.sqrt(13 / 3 + 2 / 2)  # t(0.975, 1) from a printed table
    assert (low, high) == (pytest.approx(5 - half), pytest.approx(5 + half))
    with pytest.raises(ValueError, match="two rows and two columns"):
        crossed([[0.1, 0.2]])


@pytest.mark.parametrize(
    ("sites", "seeds", "between", "within"), [(3, 3, 1.0, 0.2), (4, 3, 0.5, 0.5), (30, 3, 0.0, 1.0)]
)
def test_the_interval_covers_the_truth_also_with_few_sites_and_seeds(
    sites: int, seeds: int, between: float, within: float
) -> None:
    source, hits, runs = np.random.default_rng(0), 0, 1000
    for _ in range(runs):
        table = between * source.normal(size=(sites, 1)) + within * source.normal(size=(1, seeds))
        low, high = crossed((table + 0.3 * source.normal(size=(sites, seeds))).tolist())
        hits += low <= 0 <= high
    assert hits / runs > 0.93  # 0.95 but for chance: three standard errors of 1,000 are 0.02


def test_seeds_that_tie_claim_nothing() -> None:
    """On a small test all seeds may differ by one example, the same one; then there is no spread to judge by."""
    tied = summarize([2 / 15, 2 / 15, 2 / 15])
    assert not tied.claims
    assert summarize([0.13, 0.14, 0.15]).claims
    everywhere = {site: [0.5, 0.5, 0.5] for site in ALONE}
    joined = {**ALONE, "a": [value + 0.1 for value in ALONE["a"]]}
    c = comparison(cell("federated", joined, everywhere), cell("isolated", ALONE, everywhere))
    assert joinings(c)[0].gains[0].claim == "open"
    assert (
        "no difference between federated and isolated can be claimed on the sites' own tests: 3.3 points"
        in " ".join(verdicts(c))
    )
    assert "The seeds tie" in " ".join(verdicts(c))


ICARL: dict[str, Any] = {
    "time": "continual",
    "stream": {"tasks": 2},
    "continual": {"name": "icarl", "buffer": 20},
}
LLOYD: dict[str, Any] = {"model": {"name": "kmeans"}, "task": {"name": "clustering"}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"place": "isolated"}, "nothing"),
        ({"place": "centralized"}, "all training examples, 2.50 MB"),
        ({}, "trained weights, 2.50 MB"),
        (
            {
                "privacy": {"mode": "client", "noise": 1.0, "noise_by": "clients"},
                "method": {"name": "fedavg", "weighting": "uniform"},
            },
            "trained weights, 2.50 MB, each with its share of the noise",
        ),
        ({"privacy": {"mode": "sample", "noise": 1.0}}, "trained weights, 2.50 MB, trained with noise"),
        ({"privacy": {"mode": "sample", "epsilon": 3.0}}, "trained weights, 2.50 MB, trained with noise"),
        ({"privacy": {"mode": "sample", "noise": 0.0}}, "trained weights, 2.50 MB"),
        (
            {"privacy": {"mode": "client", "noise": 0.0}, "method": {"name": "fedavg", "weighting": "uniform"}},
            "trained weights, 2.50 MB",
        ),
        (ICARL, "trained weights and sums of exemplars' features, 2.50 MB"),
        ({**ICARL, "time": "offline"}, "trained weights, 2.50 MB"),
        ({**ICARL, "place": "isolated"}, "nothing"),
        ({**ICARL, "place": "centralized"}, "all training examples, 2.50 MB"),
        (
            {**ICARL, "data": {"normalise_by": "sites"}},
            "trained weights, sums of the inputs by channel and sums of exemplars' features, 2.50 MB",
        ),
        ({**LLOYD, "method": {"name": "lloyd"}}, "sums over examples, 2.50 MB"),
        (
            {**LLOYD, "stages": [{"name": "found", "method": {"name": "lloyd"}}, {"name": "tuned"}]},
            "sums over examples and trained weights, 2.50 MB",
        ),
    ],
)
def test_what_left_the_sites(make_job: Any, changes: dict[str, Any], said: str) -> None:
    job: Job = make_job(**changes)
    assert left_sites(job, 2_500_000) == said


def test_a_narrow_terminal_turns_a_table_of_few_streams() -> None:
    matrix = [[[0.9, 0.1], [0.4, 0.8]]] * 3
    c = comparison(cell("federated", ALONE, ALONE, matrix=matrix) | {"time": "continual", "method": "er"})
    wide, narrow = (for_terminal(c, width)[-1] for width in (120, 80))
    columns = len(stream_table(c)[0])
    assert [(len(t.columns), t.row_count) for t in (wide, narrow)] == [(columns, 1), (2, columns - 1)]
