"""Paradigms: equal budgets, who measures what, and the comparison that reports them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from client.workbench import Benches
from shared_models.errors import CompatibilityError, ConfigError, DeploymentError, UnknownNameError
from shared_models.job import Job
from simulations import results
from simulations.compare import compare, load_sites, read_pool, run_one
from simulations.paradigms import Setting, paradigms
from simulations.partition import SitePopulation
from simulations.plan import PLACES, TIMES, as_paradigms, count_rounds, plan, variant

Maker = Callable[..., Job]
EVERY = [(place, time) for time in TIMES for place in PLACES]
SIMULATION = {"partition": "dirichlet", "alpha": 0.3, "sites": 3}


@pytest.fixture(scope="module")
def sites() -> SitePopulation:
    job = Job.resolve({
        "name": "t", "model": {"name": "logistic"}, "task": {"labels": [str(c) for c in range(10)]},
        "data": {"shape": [1, 8, 8]}, "simulation": SIMULATION,
    })  # fmt: skip
    return load_sites(job, Path())


@pytest.fixture
def job(make_job: Maker) -> Job:
    return make_job(model={"name": "logistic"}, federation={"rounds": 4}, train={"batch_size": 32}, stream={"tasks": 2})


@pytest.mark.parametrize("time", ["offline", "continual"])
@pytest.mark.parametrize("fraction", [1.0, 0.34])
def test_every_place_processes_the_same_samples(job: Job, sites: SitePopulation, time: str, fraction: float) -> None:
    job = job.replace(time=time, federation={"fraction": fraction})
    found = {}
    for place in ("federated", "isolated", "centralized"):
        found[place] = paradigms[place](Setting(job.replace(place=place), sites, Benches(torch.device("cpu")))).totals
    expected = found["federated"].samples
    assert expected > 0
    assert found["isolated"].samples == expected
    assert abs(found["centralized"].samples - expected) <= job.federation.rounds  # one rounding a round
    assert found["isolated"].bytes_up == found["isolated"].bytes_down == found["centralized"].bytes_down == 0
    assert found["centralized"].bytes_up == sum(len(sites.splits(s).train) for s in sites.names) * 64
    assert found["centralized"].bytes_metrics == found["isolated"].bytes_metrics == 0
    if fraction == 1.0:  # three sites side by side against one after the other
        assert found["centralized"].sequential_steps > found["federated"].sequential_steps


def test_isolated_sites_are_each_trained_alone(job: Job, sites: SitePopulation) -> None:
    """Each isolated model is a federation of that one site, and each is measured at home and everywhere."""
    result = paradigms["isolated"](Setting(job, sites, Benches(torch.device("cpu"))))
    assert set(result.models) == set(sites.names)

    class Only(SitePopulation):
        def __init__(self, name: str) -> None:
            super().__init__(sites.store, sites.partition)
            self.names = [name]

    for name in sites.names:
        alone = paradigms["federated"](Setting(job, Only(name), Benches(torch.device("cpu"))))
        assert all(torch.equal(alone.models["model"][n], t) for n, t in result.models[name].items())
        assert alone.per_site[name] == result.per_site[name]
    assert result.own_site == pytest.approx(sum(result.per_site.values()) / 3)
    assert result.all_sites == pytest.approx(sum(result.per_site_all.values()) / 3)


def test_all_sites_accuracy_is_pooled_not_averaged(job: Job, sites: SitePopulation) -> None:
    result = paradigms["federated"](Setting(job, sites, Benches(torch.device("cpu"))))
    sizes = {name: len(sites.splits(name).test) for name in sites.names}
    pooled = sum(result.per_site[n] * sizes[n] for n in sizes) / sum(sizes.values())
    assert result.all_sites == pytest.approx(pooled)
    assert result.all_sites != pytest.approx(result.own_site, abs=1e-4)


def test_compare_runs_every_cell_and_leaves_its_traces(job: Job, sites: SitePopulation, tmp_path: Path) -> None:
    heard = []
    comparison = compare(job, sites, paradigms=EVERY, seeds=(0, 1), folder=tmp_path, listen=lambda *a: heard.append(a))
    assert [cell.name for cell in comparison.cells] == [
        f"{place}, {time}" for time in ("offline", "continual") for place in ("centralized", "federated", "isolated")
    ]
    assert all(cell.error is None and len(cell.all_sites) == 2 for cell in comparison.cells)
    assert all((cell.matrix is not None) == (cell.time == "continual") for cell in comparison.cells)
    assert comparison.partition.hash == sites.partition.hash
    rounds = sum(1 for _, _, event in heard if event["event"] == "round")
    assert rounds == count_rounds(sites, plan(job, 3, EVERY, (0, 1)))
    assert Job.load(tmp_path / "federated-offline-1" / "job.toml").seed == 1
    again = compare(job, sites, paradigms=[("federated", "offline")], seeds=(0, 1))
    assert again.cells[0].all_sites == comparison.cells[1].all_sites
    assert results.load(results.save(comparison, tmp_path / "c.json")) == comparison


def test_a_cell_that_fails_is_reported_and_the_others_go_on(job: Job, sites: SitePopulation) -> None:
    comparison = compare(job.replace(federation={"min_sites": 4}), sites, seeds=(0,))
    errors = {cell.place: cell.error for cell in comparison.cells}
    assert errors["centralized"] is None
    assert errors["isolated"] is None
    assert errors["federated"] is not None
    assert "4 sites are needed (federation.min_sites) and the simulation has 3" in errors["federated"]
    with pytest.raises(DeploymentError, match="4 sites are needed"):
        compare(job.replace(federation={"min_sites": 4}), sites, paradigms=[("federated", "offline")], seeds=(0,))


def test_one_run_reports_itself(job: Job, sites: SitePopulation, tmp_path: Path) -> None:
    comparison = run_one(job, sites, tmp_path, "fedzoo simulate x.toml")
    assert len(comparison.cells) == 1
    names = {p.name for p in tmp_path.iterdir()}
    assert {"job.toml", "events.jsonl", "checkpoint", "model.safetensors"} <= names


def test_the_run_of_real_nodes_reports_itself(job: Job, sites: SitePopulation, tmp_path: Path) -> None:
    """`result.json` as the ServerApp writes it becomes the same figures as the comparison in process."""
    from server.coordinator import Coordinator
    from simulations.engines.inprocess import InProcess

    engine = InProcess(sites.names, sites.splits, Benches(torch.device("cpu")))
    outcome = Coordinator(job, engine, "run", folder=tmp_path).run()
    (tmp_path / "result.json").write_text(json.dumps(outcome.document()))
    (tmp_path / "job.toml").write_text(job.to_toml())
    found = results.of_run(tmp_path)
    cell = found.cells[0]
    same = run_one(job, sites, tmp_path / "again", "")
    assert (found.metric, found.measures) == (same.metric, same.measures)
    assert (cell.all_sites, cell.own_site, cell.per_site) == (
        same.cells[0].all_sites,
        same.cells[0].own_site,
        same.cells[0].per_site,
    )
    assert cell.left == same.cells[0].left == "trained weights, 0.03 MB"  # 4 rounds, 3 sites, 650 weights
    assert cell.budget.bytes_up == same.cells[0].budget.bytes_up > 1_000_000  # with the sums of metrics


def test_methods_mean_nothing_where_nothing_is_aggregated(make_job: Maker) -> None:
    job = make_job(method={"name": "scaffold"})
    assert variant(job, "federated", "offline", 3).method.name == "scaffold"
    assert variant(job, "isolated", "offline", 3).method.name == "fedavg"
    assert variant(job, "centralized", "offline", 3).seed == 3
    distilled = make_job(method={"name": "dfkd"})
    places = [variant(distilled, place, "offline", 0).method.name for place in PLACES]
    assert places == ["fedavg", "dfkd", "fedavg"]
    with pytest.raises(CompatibilityError, match="isolated sites never aggregate"):
        job.replace(place="isolated")


def test_words_and_roots_that_cannot_be(make_job: Maker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert as_paradigms("federated, isolated", "offline") == [("federated", "offline"), ("isolated", "offline")]
    assert as_paradigms("", "") == EVERY
    with pytest.raises(ConfigError, match=r"unknown place 'centralised'.*did you mean 'centralized'"):
        as_paradigms("centralised", "offline")
    with pytest.raises(ConfigError, match="unknown time 'ofline'"):
        as_paradigms("federated", "ofline")
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(ConfigError, match="environment variable NOWHERE"):
        read_pool(make_job(simulation={"reader": "imagefolder", "root": "$NOWHERE/x"}), tmp_path)
    with pytest.raises(ConfigError, match=r"simulation.root is not set, and the reader 'imagefolder' needs a folder"):
        read_pool(make_job(simulation={"reader": "imagefolder"}), tmp_path)
    with pytest.raises(UnknownNameError, match="unknown reader 'digit'"):
        read_pool(make_job(simulation={"reader": "digit"}), tmp_path)


def test_baselines_have_no_personal_entries(make_job: Maker, sites: SitePopulation) -> None:
    """They would be measured at sites that never trained those entries, and lose for that alone."""
    job = make_job(model={"name": "mlp"}, share={"personal": ["head.*"]}, federation={"rounds": 6})
    plain = job.replace(share={"personal": []})
    cells = [("centralized", "offline"), ("isolated", "offline")]
    with_personal, without = (compare(j, sites, paradigms=cells, seeds=(0,)) for j in (job, plain))
    assert [c.all_sites for c in with_personal.cells] == [c.all_sites for c in without.cells]


def test_a_task_that_nobody_can_measure_is_refused_before_training(make_job: Maker, sites: SitePopulation) -> None:
    labels = [*(str(c) for c in range(10)), "never", "seen"]
    job = make_job(task={"labels": labels}, time="continual", stream={"tasks": 6}, federation={"rounds": 6})
    with pytest.raises(ConfigError, match=r"no site has a test example of task 5 \(never, seen\)"):
        paradigms["federated"](Setting(job, sites, Benches(torch.device("cpu"))))


@pytest.mark.parametrize("time", ["offline", "continual"])
def test_a_budget_in_steps_is_the_same_samples_too(make_job: Maker, sites: SitePopulation, time: str) -> None:
    job = make_job(
        model={"name": "logistic"}, time=time, stream={"tasks": 2}, federation={"rounds": 2},
        train={"steps": 5, "batch_size": 128},
    )  # fmt: skip
    totals = [
        paradigms[place](Setting(variant(job, place, time, 0), sites, Benches(torch.device("cpu")))).totals.samples
        for place in ("federated", "centralized", "isolated")
    ]
    assert totals[0] == totals[1] == totals[2]
