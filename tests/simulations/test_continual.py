"""Comparisons over time: what methods keep, what each must reach on digits, and how a comparison goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shared_models.errors import ConfigError, RunError, UnknownNameError
from shared_models.job import Job
from simulations import report, results
from simulations.compare import compare, load_sites
from simulations.partition import SitePopulation
from simulations.plan import plan
from simulations.statistics import final_average, forgetting, forward_transfer, summarize
from simulations.verdicts import verdicts

PAIRS = [("centralized", "continual"), ("federated", "continual")]


@pytest.fixture
def job(make_job: Callable[..., Job]) -> Job:
    return make_job(
        train={"lr": 0.05, "momentum": 0.9, "batch_size": 32}, federation={"rounds": 15},
        stream={"tasks": 5}, continual={"name": "er", "buffer": 60}, simulation={"partition": "iid", "sites": 2},
    )  # fmt: skip


@pytest.fixture
def sites(job: Job) -> SitePopulation:
    return load_sites(job, Path())


def test_methods_keep_equally_much_in_all(job: Job) -> None:
    cells = plan(job, 2, [("centralized", "offline"), *PAIRS], (0, 1), ["finetune", "er", "der++", "ewc"])
    assert [len(runs) for runs in cells] == [2] * 9
    names = [runs[0].cell for runs in cells]
    assert names[:3] == ["centralized, offline", "centralized, continual", "centralized, continual (er)"]
    kept = {runs[0].cell: runs[0].job.continual.keys.get("buffer") for runs in cells}
    assert kept["centralized, continual (der++)"] == 120
    assert kept["federated, continual (der++)"] == 60
    assert kept["federated, continual (ewc)"] is None
    assert len({run.name for runs in cells for run in runs}) == 18
    with pytest.raises(UnknownNameError, match="unknown method 'err'"):
        plan(job, 2, PAIRS, (0,), ["err"])
    with pytest.raises(ConfigError, match="have nothing to do offline"):
        plan(job, 2, [("federated", "offline")], (0,), ["er"])
    assert len(plan(job, 2, PAIRS[:1], (0,), ["er", "er"])) == 1
    strong = job.replace(continual={"name": "ewc", "strength": 7.0})
    (ewc,), (si,) = plan(strong, 2, PAIRS[1:], (0,), ["ewc", "si"])
    assert (ewc.job.continual.keys["strength"], si.job.continual.keys["strength"]) == (7.0, 0.5)


def test_replay_remembers_what_fine_tuning_forgets(job: Job, sites: SitePopulation, tmp_path: Path) -> None:
    """And the page says so, with what was kept and with the task known."""
    methods = ["finetune", "er", "der++", "icarl"]
    found = compare(job, sites, paradigms=PAIRS, methods=methods, seeds=(0, 1), folder=tmp_path)
    assert found.methods == methods
    for place in ("centralized", "federated"):
        plain, er, dark, exemplars = (found.cell(place, "continual", m) for m in methods)  # type: ignore[arg-type]
        assert None not in (plain, er, dark, exemplars)
        assert all(max(r[-1][:-1]) < 0.1 for r in plain.matrix)
        assert all(r[-1][-1] > 0.7 for r in plain.matrix)  # the last task alone
        assert all(forgetting(r) > 0.6 for r in plain.matrix)
        assert min(er.all_sites) > 0.7
        assert min(dark.all_sites) > 0.7
        assert min(exemplars.all_sites) > 0.7
        for cell in (er, exemplars):
            assert all(final_average(k) > final_average(r) for k, r in zip(cell.known, cell.matrix, strict=True))
            assert all(r[t][i] < 0.2 for r in cell.matrix for t in range(4) for i in range(t + 1, 5))  # not yet seen
        assert (plain.buffer, er.buffer, dark.buffer, exemplars.buffer) == (0, 120, 120, 120)
        assert abs(plain.budget.samples - er.budget.samples) == 0
    said = " ".join(verdicts(found))
    assert (
        "Federated, continual, against fine-tuning on all sites' tests, points (95 % intervals, 2 seeds): er " in said
    )
    assert "Continual, federated against centralized on all sites' tests" in said
    replayed = found.cell("federated", "continual", "er")
    lost = summarize([forgetting(r) for r in replayed.matrix])  # type: ignore[union-attr]
    shown = f"er {100 * lost.mean:.1f} ({100 * lost.low:.1f} to {100 * lost.high:.1f})".replace("-", "−")
    assert "Federated, continual, how far earlier tasks end below their best, points" in said
    assert shown in said
    page = report.write(found, tmp_path / "report.html").read_text()
    assert "120 examples kept in all" in page
    assert "forward transfer" in page
    assert results.parse(json.loads(found.model_dump_json())) == found


@pytest.mark.parametrize("place", ["centralized", "federated", "isolated"])
def test_what_a_method_learns_at_the_end_of_a_task_reaches_who_trains(
    job: Job, sites: SitePopulation, place: str
) -> None:
    """A single client stands for all sites in one place, and in another only one of them trains."""
    short = job.replace(federation={"rounds": 4}, stream={"tasks": 2})
    methods = ["finetune", "ewc", "lwf", "si", "icarl"]
    found = compare(short, sites, paradigms=[(place, "continual")], methods=methods, seeds=(0,))  # type: ignore[list-item]
    losses = {cell.method: cell.metrics["calibration"][0] for cell in found.cells}
    assert len(set(losses.values())) == 5, losses


def test_forward_transfer_by_hand() -> None:
    r = [[0.9, 0.3, 0.1], [0.5, 0.9, 0.5], [0.4, 0.6, 0.8]]
    assert forward_transfer(r, [0.1, 0.1, 0.2]) == pytest.approx(((0.3 - 0.1) + (0.5 - 0.2)) / 2)
    assert forward_transfer(r, [0.1, 0.1, 0.2], larger=False) == pytest.approx(-0.25)
    assert forward_transfer([[0.5]], [0.1]) == 0


def _spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from simulations import runs

    carried: list[str] = []
    real = runs.places["federated"]
    monkeypatch.setitem(runs.places._things, "federated", lambda s: carried.append(s.run) or real(s))
    return carried


def test_a_stopped_comparison_goes_on_and_ends_with_the_same_table(
    job: Job, sites: SitePopulation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried = _spied(monkeypatch)
    short = job.replace(federation={"rounds": 5})
    asked = {"paradigms": PAIRS[1:], "methods": ["finetune", "er"], "seeds": (0, 1)}
    whole = compare(short, sites, folder=tmp_path / "whole", **asked)  # type: ignore[arg-type]
    assert len(carried) == 4
    carried.clear()

    class KilledError(Exception):
        pass

    def kill(cell: str, seed: int, event: dict) -> None:
        if (cell, seed, event["event"], event.get("round")) == ("federated, continual (er)", 0, "round", 2):
            raise KilledError

    with pytest.raises(KilledError):
        compare(short, sites, folder=tmp_path / "two", listen=kill, **asked)  # type: ignore[arg-type]
    assert len(carried) == 3
    carried.clear()
    heard: list[tuple[str, int]] = []

    def count(cell: str, seed: int, event: dict) -> None:
        heard.extend([(event["event"], event.get("rounds", 1))] if event["event"] in ("found", "round") else [])

    again = compare(short, sites, folder=tmp_path / "two", listen=count, **asked)  # type: ignore[arg-type]
    assert carried == ["federated-continual-er-0", "federated-continual-er-1"]
    assert [what for what, _ in heard] == ["found"] * 2 + ["round"] * 10
    assert [rounds for what, rounds in heard if what == "found"] == [5, 5]  # which no progress bar waits for
    for a, b in zip(whole.cells, again.cells, strict=True):
        assert a.model_copy(update={"seconds": []}) == b.model_copy(update={"seconds": []})
    carried.clear()
    for other in (short.replace(train={"lr": 0.01}), short.replace(simulation={"test": "shared"})):
        with pytest.raises(RunError, match="holds a finished run of another job, other data or another split"):
            compare(other, sites, folder=tmp_path / "two", **asked)  # type: ignore[arg-type]
    changed = SitePopulation(replace(sites.store, y=sites.store.y.flip(0)), sites.partition)
    with pytest.raises(RunError, match="holds a finished run"):
        compare(short, changed, folder=tmp_path / "two", **asked)  # type: ignore[arg-type]
    assert not carried
    (tmp_path / "two" / "federated-continual-0" / "outcome.json").write_text("{")
    broken = compare(short, sites, folder=tmp_path / "two", **asked)  # type: ignore[arg-type]
    assert "federated-continual-0 holds a run that cannot be read" in str(broken.cells[0].error)
    assert broken.cells[1].error is None


def test_side_by_side_gives_the_same_figures(job: Job, sites: SitePopulation, tmp_path: Path) -> None:
    """Also where one of the cells fails."""
    short = job.replace(federation={"rounds": 5, "min_sites": 3, "wait": 0})
    heard: list[tuple[str, int, str]] = []
    asked = {"paradigms": PAIRS, "seeds": (0, 1)}
    one = compare(short, sites, **asked)  # type: ignore[arg-type]
    two = compare(
        short, sites, folder=tmp_path, processes=2, listen=lambda c, s, e: heard.append((c, s, e["event"])), **asked
    )  # type: ignore[arg-type]
    for a, b in zip(one.cells, two.cells, strict=True):
        assert a.model_copy(update={"seconds": []}) == b.model_copy(update={"seconds": []})
    assert sum(event == "round" for *_, event in heard) == 2 * 5
    assert [cell.error is None for cell in two.cells] == [True, False]
    assert "3 sites are needed" in str(two.cells[1].error)
