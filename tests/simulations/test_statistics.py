"""The statistics against numbers worked out by hand and against scipy; the verdicts against their intervals."""

import math

import pytest
from scipy import stats

from shared_models.errors import RunError
from simulations.results import load, parse, save
from simulations.statistics import backward_transfer, final_average, forgetting, paired, summarize
from simulations.verdicts import verdicts

# After task 3: 0.2, 0.5, 0.9. Best of task 1: 0.9, of task 2: 0.8.
R = [[0.9, 0.1, 0.0], [0.6, 0.8, 0.1], [0.2, 0.5, 0.9]]


def comparison(cells, seeds=(0, 1, 2), sites=("a", "b")):
    filled = [{"per_site": {s: c.get("own_site", []) for s in sites}, **c} for c in cells]
    return {
        "title": "t", "created": "2026-01-02T03:04:05Z", "version": "0.1.0", "command": "fedzoo compare job.toml",
        "job": {}, "job_hash": "j", "fingerprint": "f", "partition": {"kind": "iid"}, "environment": {},
        "seeds": list(seeds), "sites": list(sites), "labels": ["x"], "cells": filled,
    }  # fmt: skip


def cell(place, all_sites, own_site=None, time="offline", **more):
    return {"place": place, "time": time, "all_sites": all_sites, "own_site": own_site or all_sites, **more}


def test_summary_of_one_two_three_by_hand():
    s = summarize([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)  # t(0.975, 2 degrees of freedom) from a printed table
    assert (s.n, s.mean, s.sd) == (3, 2.0, 1.0)
    assert s.low == pytest.approx(2 - half, abs=1e-9)
    assert s.high == pytest.approx(2 + half, abs=1e-9)


@pytest.mark.parametrize("values", [[0.81, 0.84], [0.7, 0.72, 0.69, 0.75, 0.71], [0.5, 0.5, 0.5001]])
def test_interval_equals_scipy(values):
    s = summarize(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=s.mean, scale=stats.sem(values))
    assert (s.low, s.high) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))


def test_paired_interval_equals_the_paired_t_test_of_scipy():
    a, b = [0.91, 0.88, 0.93, 0.90], [0.80, 0.79, 0.83, 0.78]
    d, oracle = paired(a, b), stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (d.low, d.high) == (pytest.approx(oracle.low), pytest.approx(oracle.high))
    assert d.mean == pytest.approx(0.105)


def test_pairs_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        paired([0.1, 0.2], [0.1])


def test_one_value_has_no_interval():
    s = summarize([0.5])
    assert (s.n, s.mean, s.sd, s.low, s.high) == (1, 0.5, None, None, None)


def test_continual_figures_by_hand():
    assert final_average(R) == pytest.approx((0.2 + 0.5 + 0.9) / 3)
    assert forgetting(R) == pytest.approx(((0.9 - 0.2) + (0.8 - 0.5)) / 2)
    assert backward_transfer(R) == pytest.approx(((0.2 - 0.9) + (0.5 - 0.8)) / 2)


def test_a_task_that_became_better_later_forgets_from_its_best_but_transfers_from_its_start():
    better = [[0.5, 0.0, 0.0], [0.9, 0.7, 0.0], [0.6, 0.7, 0.8]]
    assert forgetting(better) == pytest.approx(((0.9 - 0.6) + 0) / 2)
    assert backward_transfer(better) == pytest.approx((0.1 + 0) / 2)


def test_one_task_neither_forgets_nor_transfers():
    assert (final_average([[0.7]]), forgetting([[0.7]]), backward_transfer([[0.7]])) == (0.7, 0.0, 0.0)


def test_a_claim_gives_difference_interval_and_seeds():
    # differences 0.10, 0.12, 0.14: mean 12 points, sd 2, half width 4.3027 * 2 / sqrt(3) = 4.97
    c = comparison([cell("federated", [0.80, 0.82, 0.84]), cell("isolated", [0.70, 0.70, 0.70])])
    assert verdicts(c)[0] == (
        "Offline: federated is above isolated on all sites' tests by 12.0 points (95 % interval 7.0 to 17.0, 3 seeds)."
    )


def test_a_claim_from_the_other_side_keeps_the_interval_in_order():
    c = comparison([cell("federated", [0.70, 0.70, 0.70]), cell("centralized", [0.80, 0.82, 0.84])])
    assert verdicts(c) == [
        "Offline: federated is below centralized on all sites' tests by 12.0 points "
        "(95 % interval 7.0 to 17.0, 3 seeds)."
    ]


def test_nothing_is_claimed_where_the_interval_holds_zero():
    c = comparison([cell("federated", [0.80, 0.90, 0.70]), cell("isolated", [0.79, 0.70, 0.80])])
    assert verdicts(c)[0].startswith(
        "Offline: no difference between federated and isolated can be claimed on all sites' tests: 3.7 points"
    )


def test_one_seed_claims_nothing():
    c = comparison([cell("federated", [0.9], matrix=[R], time="continual"), cell("isolated", [0.5], time="continual")],
                   seeds=[7])  # fmt: skip
    said = verdicts(c)
    assert "measured 40.0 points above" in said[0]
    assert all("one seed" in s and "no interval" in s for s in said)


def test_without_a_federated_cell_the_two_baselines_are_compared():
    c = comparison([cell("centralized", [0.9, 0.91, 0.92]), cell("isolated", [0.5, 0.52, 0.52])])
    assert [s.split(" on ")[0] for s in verdicts(c)] == ["Offline: centralized is above isolated"]


def test_own_test_has_its_own_verdict():
    c = comparison([cell("federated", [0.8] * 3, [0.6, 0.62, 0.61]), cell("isolated", [0.5] * 3, [0.9, 0.91, 0.92])])
    assert "federated is below isolated on the sites' own tests by" in verdicts(c)[1]


def test_forgetting_is_claimed_only_above_zero():
    kept = [[[0.9, 0.0], [0.9 - fall, 0.8]] for fall in (0.0, 0.3, 0.0)]
    lost = [[[0.9, 0.0], [0.1 + more, 0.8]] for more in (0.0, 0.02, 0.04)]
    c = comparison([cell("federated", [0.5] * 3, time="continual", matrix=kept),
                    cell("centralized", [0.5] * 3, time="continual", matrix=lost)])  # fmt: skip
    said = verdicts(c)
    assert "Federated: no forgetting can be claimed: 10.0 points" in " ".join(said)
    # falls 0.80, 0.78, 0.76: mean 78 points, half width 4.97
    assert "Centralized: continual training forgets: earlier tasks end 78.0 points below their best " \
        "(95 % interval 73.0 to 83.0, 3 seeds)." in said  # fmt: skip


def test_unequal_budgets_failed_cells_and_rejections_are_said():
    c = comparison([
        cell("federated", [0.8, 0.81, 0.82], budget={"samples": 2000}, rejections=2),
        cell("isolated", [0.7, 0.71, 0.72], budget={"samples": 1500}),
        {"place": "centralized", "time": "offline", "error": "out of memory"},
    ])  # fmt: skip
    said = verdicts(c)
    assert said[0].endswith("The budgets differ: 2,000 samples against 1,500.")
    assert "Federated, offline: 2 contributions were rejected and did not count." in said
    assert "Centralized, offline: failed, so nothing is claimed about it (out of memory)." in said
    assert not any("centralized on" in s for s in said)


def test_results_survive_a_file(tmp_path):
    c = parse(comparison([cell("federated", [0.8, 0.81, 0.82], matrix=[R, R, R], time="continual")]))
    assert load(save(c, tmp_path / "deep" / "comparison.json")) == c


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [0, 1]}, "federated, offline: all_sites has 3 values for 2 seeds"),
        ({"sites": ["a", "z"]}, "per_site has"),
        ({"metric": 3}, "metric"),
        ({"surprise": 1}, "surprise"),
        ({"cells": [{"place": "nowhere", "time": "offline"}]}, "cells.0.place"),
        ({"cells": [{"place": "federated", "time": "offline", "all_sites": [math.nan]}]}, "a finite number"),
        ({"cells": [{"place": "federated", "time": "offline", "error": "x"}] * 2}, "appears twice"),
    ],
)
def test_a_wrong_comparison_names_the_place(change, message):
    with pytest.raises(RunError, match=message):
        parse({**comparison([cell("federated", [0.8, 0.81, 0.82])]), **change})


def test_matrices_must_be_square():
    with pytest.raises(RunError, match="T x T"):
        parse(comparison([cell("federated", [0.8] * 3, matrix=[[[0.1], [0.2]]] * 3)]))


def test_an_unreadable_file_is_one_line(tmp_path):
    with pytest.raises(RunError, match="cannot be read"):
        load(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(RunError, match="is not JSON"):
        load(tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(RunError, match=r"list\.json cannot be used"):
        load(tmp_path / "list.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        save(comparison([cell("federated", [0.8] * 3)]), tmp_path / "file" / "comparison.json")
