"""A headline that is no fraction of 1, and of which a smaller one is better, is shown and spoken of as what it is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared_models.errors import RunError
from shared_models.job import Job
from shared_models.tasks.base import Measure as Declared
from shared_models.tasks.base import make_task
from shared_models.tasks.classification import Classification
from simulations import charts, results
from simulations.compare import compare, load_sites, run_one
from simulations.measures import PERCENT, Measure, measures_of
from simulations.report import write
from simulations.results import parse
from simulations.statistics import backward_transfer, final_average, forgetting
from simulations.tables import as_markdown, headers, metric_table, row, spread
from simulations.verdicts import verdicts

Maker = Callable[..., Job]
BITS: dict[str, Any] = {"unit": "bits", "factor": 1.0, "digits": 2, "larger": False}
PLAIN: dict[str, Any] = {"unit": "", "factor": 1.0, "digits": 1, "larger": False}
# After task 2 of 3 the first has become worse, after task 3 both: bests 1.0 and 1.5, ends 1.6 and 1.9.
R = [[1.0, 4.0, 4.0], [1.4, 1.5, 4.0], [1.6, 1.9, 1.2]]


def cell(place: str, all_sites: list[float], time: str = "offline", **more: Any) -> dict[str, Any]:
    sites = dict.fromkeys(("a", "b"), all_sites)
    own = {"own_site": all_sites, "per_site": sites, "per_site_all": sites}
    return {"place": place, "time": time, "all_sites": all_sites, **own, **more}


def comparison(*cells: dict[str, Any], measure: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    metric = "bits_per_character"
    seeds = list(range(len(cells[0]["all_sites"])))
    return {
        "title": "t", "created": "2026-01-02T03:04:05Z", "version": "0.1.0", "command": "fedzoo compare job.toml",
        "job": {}, "job_hash": "j", "fingerprint": "f", "partition": {"kind": "iid"}, "environment": {},
        "seeds": seeds, "sites": ["a", "b"], "labels": [], "cells": list(cells), "metric": metric,
        "metrics": [metric], "measures": {metric: measure or BITS}, **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("measure", "title", "step", "figure"),
    [
        (PERCENT, "mse %", "points", "1,234.6"),
        (Measure(larger=False), "mse % (lower is better)", "points", "1,234.6"),
        (Measure(**BITS), "mse, bits (lower is better)", "bits", "12.35"),
        (Measure(unit="dB", factor=1.0, digits=0), "mse, dB", "dB", "12"),
        (Measure(**PLAIN), "mse (lower is better)", "mse", "12.3"),
        (Measure(unit="", factor=0.5, digits=3), "mse", "mse", "6.173"),
    ],
)
def test_unit_and_direction_in_words(measure: Measure, title: str, step: str, figure: str) -> None:
    assert (measure.title("mse"), measure.step("mse"), measure.figure(12.3456)) == (title, step, figure)
    assert measure.figure(-1e-9).lstrip("0.") == "", "a rounded zero has no sign"
    assert measure.figure(-12.3456) == "−" + figure


@pytest.mark.parametrize("wrong", [{"factor": 0}, {"factor": -1.0}, {"digits": -1}, {"better": True}])
def test_what_a_measure_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(RunError, match=r"measures\.bits_per_character"):
        parse(comparison(cell("federated", [1.0]), measure={**BITS, **wrong}))


def test_a_file_without_measures_means_percent(tmp_path: Path) -> None:
    old = comparison(cell("federated", [0.8, 0.9]))
    del old["measures"]
    (tmp_path / "c.json").write_text(json.dumps(old))
    c = results.load(tmp_path / "c.json")
    assert c.measure("bits_per_character") == c.measure("whatever:mean of sites") == PERCENT
    assert headers(c)[1:4] == ["all sites' tests, bits_per_character %", "own test, bits_per_character %",
                               "forgetting, points"]  # fmt: skip
    assert row(c.cells[0])[1] == "85.0 ± 7.1"


def test_values_are_kept_raw_and_unbounded(tmp_path: Path) -> None:
    c = parse(comparison(cell("federated", [-3.25, 1e6], matrix=[[[7.5]], [[-2.0]]])))
    raw = json.loads(results.save(c, tmp_path / "c.json").read_text())
    assert raw["cells"][0]["all_sites"] == [-3.25, 1e6]
    assert raw["measures"] == {"bits_per_character": BITS}
    assert results.load(tmp_path / "c.json") == c


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_a_headline_without_a_value_is_no_result(value: Any) -> None:
    for wrong in (cell("federated", [value]), cell("federated", [1.0], matrix=[[[value]]])):
        with pytest.raises(RunError, match="number"):
            parse(comparison(wrong))


def test_the_table_names_the_unit_and_the_direction() -> None:
    c = parse(comparison(cell("federated", [1.234, 1.254]), cell("isolated", [2.0, 2.5])))
    assert headers(c)[1:4] == [
        "all sites' tests, bits_per_character, bits (lower is better)",
        "own test, bits_per_character, bits (lower is better)",
        "forgetting, bits",
    ]
    assert row(c.cells[0], c.measure(c.metric))[1:4] == ["1.24 ± 0.01", "1.24 ± 0.01", "–"]
    assert "| federated, offline | 1.24 ± 0.01 | 1.24 ± 0.01 | – |" in as_markdown(c)
    assert spread([1234.5], Measure(**PLAIN)) == "1,234.5"
    plain = parse(comparison(cell("federated", [1.0]), measure=PLAIN))
    assert headers(plain)[3] == "forgetting"


def test_rows_of_the_second_table_have_their_own_units() -> None:
    shown = {"bits_per_character": [2.0], "accuracy": [0.5], "perplexity": [4.0], "bleu": [None],
             "bits_per_character:mean of sites": [2.5]}  # fmt: skip
    measures = {"bits_per_character": BITS, "perplexity": PLAIN}
    c = parse(comparison(cell("federated", [2.0], metrics=shown), measures=measures,
                         metrics=["bits_per_character", "accuracy", "perplexity", "bleu"]))  # fmt: skip
    assert metric_table(c) == (
        ["all sites' tests", "federated, offline"],
        [
            ["bits_per_character, bits (lower is better)", "2.00"],
            ["accuracy %", "50.0"],
            ["perplexity (lower is better)", "4.0"],
            ["bleu %", "–"],
            ["bits_per_character:mean of sites, bits (lower is better)", "2.50"],
        ],
    )
    percent = parse({**c.model_dump(), "measures": {}})
    assert metric_table(percent)[0][0] == "all sites' tests, %"
    assert [r[0] for r in metric_table(percent)[1]][:2] == ["bits_per_character", "accuracy"]


def test_a_claim_says_better_or_worse_where_lower_is_better() -> None:
    # differences -0.30, -0.20, -0.10: mean -0.20, sd 0.1, half width 4.3027 * 0.1 / sqrt(3) = 0.25; the others a tenth
    less = cell("federated", [1.70, 1.80, 1.90])
    close = comparison(less, cell("isolated", [2.0, 2.0, 2.0]))
    assert verdicts(close)[0] == (
        "Offline: no difference between federated and isolated can be claimed on all sites' tests: −0.20 bits "
        "(95 % interval −0.45 to 0.05, 3 seeds; lower is better)."
    )
    better = comparison(cell("federated", [1.78, 1.80, 1.82]), cell("isolated", [2.0, 2.0, 2.0]))
    assert verdicts(better)[0] == (
        "Offline: federated is below isolated on all sites' tests by 0.20 bits "
        "(95 % interval 0.15 to 0.25, 3 seeds), which is better."
    )
    worse = comparison(cell("federated", [2.22, 2.20, 2.18]), cell("centralized", [2.0, 2.0, 2.0]))
    assert verdicts(worse) == [
        "Offline: federated is above centralized on all sites' tests by 0.20 bits "
        "(95 % interval 0.15 to 0.25, 3 seeds), which is worse."
    ]
    alone = comparison(cell("federated", [2.5]), cell("isolated", [2.0]), measure=PLAIN)
    assert verdicts(alone)[0] == (
        "Offline: federated measured 0.5 bits per character above isolated on all sites' tests (lower is better), "
        "with one seed: there is no interval and no difference can be claimed."
    )


def test_a_larger_one_in_its_own_unit_needs_no_such_word() -> None:
    c = comparison(cell("federated", [21.9, 22.0, 22.1]), cell("isolated", [20.0] * 3),
                   measure={"unit": "dB", "factor": 1.0, "digits": 1})  # fmt: skip
    assert verdicts(c)[0].endswith("by 2.0 dB (95 % interval 1.8 to 2.2, 3 seeds).")


def test_forgetting_is_counted_from_the_smallest_by_hand() -> None:
    assert final_average(R) == pytest.approx((1.6 + 1.9 + 1.2) / 3)
    assert forgetting(R, larger=False) == pytest.approx((0.6 + 0.4) / 2)
    assert backward_transfer(R, larger=False) == pytest.approx((-0.6 - 0.4) / 2), "below 0: later tasks spoilt it"
    kept = [[1.0, 2.0], [0.8, 1.5]]
    assert forgetting(kept, larger=False) == 0.0
    assert backward_transfer(kept, larger=False) == pytest.approx(0.2)
    negated = [[-v for v in values] for values in R]
    assert forgetting(negated) == pytest.approx(forgetting(R, larger=False))
    assert backward_transfer(negated) == pytest.approx(backward_transfer(R, larger=False))


def test_forgetting_in_words_and_in_the_table() -> None:
    three = [[[1.0, 3.0], [1.0 + rise, 2.0]] for rise in (0.78, 0.80, 0.82)]
    c = parse(comparison(cell("federated", [1.0] * 3, time="continual", matrix=three)))
    assert verdicts(c) == [
        "Federated: continual training forgets: earlier tasks end 0.80 bits above their best "
        "(95 % interval 0.75 to 0.85, 3 seeds)."
    ]
    assert row(c.cells[0], c.measure(c.metric))[3] == "0.80 ± 0.02"
    unsure = [[[1.0, 3.0], [1.0 + rise, 2.0]] for rise in (0.0, 0.3, 0.0)]
    c = parse(comparison(cell("federated", [1.0] * 3, time="continual", matrix=unsure)))
    assert "3 seeds) above the best each earlier task had reached." in verdicts(c)[0]


def test_the_matrix_is_strong_where_it_is_good(tmp_path: Path) -> None:
    c = comparison(cell("federated", [1.5], time="continual", matrix=[[[1.0, 3.0], [2.0, 1.0]]]))
    page = write(c, tmp_path / "r.html").read_text(encoding="utf-8")
    cells = re.findall(r'<td class="heat" style="--v:([\d.]+)">([\d.]+)</td>', page)
    assert cells == [("1.000", "1.00"), ("0.000", "3.00"), ("0.500", "2.00"), ("1.000", "1.00")]
    assert "Final average 1.50 bits · forgetting 1.00 bits · backward transfer −1.00 bits" in page
    assert "bits per character in bits on task i" in page


def test_the_page_of_such_a_headline_speaks_of_no_percent(tmp_path: Path) -> None:
    curve = [[{"round": r, "bits_per_character": 6.0 / r, "loss": 4.0 / r} for r in range(1, 5)]] * 2
    c = comparison(cell("federated", [1.7, 1.71], curves=curve), cell("isolated", [2.0, 2.02], curves=curve))
    page = write(c, tmp_path / "r.html").read_text(encoding="utf-8")
    shown = page.partition("<body>")[2]
    assert "ercent" not in shown
    assert "%" not in re.sub(r"95(&nbsp;|\s)%", "", shown)
    assert "Bits per character in bits: lower is better." in shown
    assert "Bits per character on all sites&#39; tests</h3>" in shown
    assert "Bits per character (bits, lower is better)" in shown  # of the curve's axis
    assert "Differences of bits per character are in bits; lower is better." in shown
    assert "0 classes" not in shown
    assert "2.01 ± 0.01" in shown


def test_a_metric_that_validation_does_not_measure_has_no_curve(tmp_path: Path) -> None:
    """A text is written for the test part alone: the curve has no value of it, or none at all."""
    curve = [[{"round": 0, "bits_per_character": None, "loss": 4.0}, {"round": 1, "loss": 2.0}]]
    page = write(comparison(cell("federated", [1.7], curves=curve)), tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Loss on validation data" in page
    assert "Bits per character on validation data" not in page
    assert "bits per character has no value on validation data" in page


def test_all_bars_of_a_page_share_one_axis(tmp_path: Path) -> None:
    c = comparison(cell("federated", [1.0, 1.2]), cell("isolated", [38.0, 40.0]))
    page = write(c, tmp_path / "r.html").read_text(encoding="utf-8")
    drawings = re.findall(r'<svg class="chart".*?</svg>', page)
    *bars, gain = drawings
    assert len(bars) == 4  # two of all sites, two sites
    assert {tuple(re.findall(r'class="tick mid"[^>]*>([^<]+)<', d)) for d in bars} == {("0", "20", "40", "60")}
    assert "gain of joining" in gain
    assert re.findall(r'class="value"[^>]*>([^<]+)<', gain) == ["+37.90", "+37.90"]  # fewer bits are better


def test_bars_end_where_their_values_are_also_below_zero() -> None:
    axis = charts.axis([-2.0, 4.0], "bits")
    rows = [charts.Bar("x", "federated offline", v, None, str(v)) for v in (4.0, -2.0)]
    drawn = charts.bars("k", "t", rows, axis)
    at = dict(zip(re.findall(r'class="tick mid"[^>]*>([^<]+)<', drawn),
                  map(float, re.findall(r'class="grid" d="M([\d.]+)', drawn)), strict=True))  # fmt: skip
    (up, wide), (down, narrow) = (
        (float(x), float(w)) for x, w in re.findall(r'class="bar[^>]* x="([\d.]+)"[^>]* width="([\d.]+)"', drawn)
    )
    assert (up, up + wide) == pytest.approx((at["0"], at["4"]), abs=0.11)
    assert (down, down + narrow) == pytest.approx((at["−2"], at["0"]), abs=0.11)
    assert ">bits</text>" in drawn


def test_a_curve_below_zero_stays_within_its_axes() -> None:
    points = [charts.Point(1, -3, -3.5, -2), charts.Point(2, 1, 1, 1)]
    drawn = charts.lines("k", "t", [charts.Series("x", "federated offline", points)], "round", "y")
    heights = [float(y) for y in re.findall(r'class="grid" d="M[\d.]+ ([\d.]+)', drawn)]
    curve = [float(p.split()[1]) for p in re.search(r'class="line[^>]* d="M([^"]+)"', drawn)[1].split("L")]  # type: ignore[index]
    assert min(heights) <= min(curve) < max(curve) <= max(heights)


def test_room_for_a_long_figure() -> None:
    def left_of(text: str) -> float:
        drawn = charts.bars(
            "k", "t", [charts.Bar("x", "federated offline", 1.0, None, text)], charts.axis([1.0], "", [text])
        )
        return float(re.search(r'class="value" x="([\d.]+)"', drawn)[1])  # type: ignore[index]

    assert left_of("12,345.6 ± 1,234.5") < left_of("1.234 ± 0.001") < left_of("1.2 ± 0.1")


def test_percent_above_100_lengthens_the_axis() -> None:
    assert charts.axis([0.0, 99.9], "%").ticks == (0, 50, 100)
    assert charts.axis([0.0, 180.0], "%").ticks[-1] >= 180


@pytest.fixture
def job(make_job: Maker) -> Job:
    return make_job(
        model={"name": "logistic"}, task={"headline": "calibration"}, federation={"rounds": 1, "min_sites": 2},
        simulation={"partition": "iid", "sites": 2},
    )  # fmt: skip


def test_a_comparison_carries_what_the_task_declares(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Classification, "measures", {"calibration": Declared("", 1.0, 3, larger=False)})
    expected = Measure(unit="", factor=1.0, digits=3, larger=False)
    found = measures_of(make_task(job))
    assert found == {"accuracy": PERCENT, "macro_f1": PERCENT, "auroc": PERCENT, "calibration": expected}
    sites = load_sites(job, Path())
    both = (compare(job, sites, paradigms=[("federated", "offline")], seeds=(0,)), run_one(job, sites, tmp_path, "x"))
    for c in both:
        assert c.measures == found
        assert json.loads(c.model_dump_json())["measures"]["calibration"]["larger"] is False
        assert "all sites' tests, calibration (lower is better)" in headers(c)


def test_a_headline_that_is_no_number_fails_the_cell(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = Classification.values

    def broken(self: Classification, sums: Any) -> dict[str, float]:
        return {**values(self, sums), "calibration": float("inf")}

    monkeypatch.setattr(Classification, "values", broken)
    sites = load_sites(job, Path())
    with pytest.raises(RunError, match="'calibration' is no finite number on the tests of all sites"):
        run_one(job, sites, tmp_path, "x")
    with pytest.raises(RunError, match="'calibration' is no finite number"):
        compare(job, sites, paradigms=[("federated", "offline")], seeds=(0,))
