"""Streams whose tasks are sites that join: who trains when, on how much, what is measured, what methods do there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from client.state import DiskState, State
from client.workbench import Benches
from server.coordinator import Coordinator
from server.events import Events
from server.runs import create_run
from shared_models.errors import CompatibilityError, ConfigError, RunError
from shared_models.job import Job
from shared_models.messages import Contribution, Instruction
from shared_models.schedule import present, round_budget, task_of
from shared_models.spec import build_model
from simulations.arrivals import settled
from simulations.compare import compare, load_sites, run_one
from simulations.engines.inprocess import InProcess
from simulations.paradigms import Result, Setting, paradigms
from simulations.partition import SitePopulation
from simulations.privacy_cost import cost

Maker = Callable[..., Job]
FIVE = [f"site-{k}" for k in range(1, 6)]


@pytest.fixture
def job(make_job: Maker) -> Job:
    """Five sites of digits join in three tasks of two rounds each: sites 1 and 2, then 3, then 4 and 5."""
    made = make_job(
        time="continual", train={"lr": 0.1, "batch_size": 16}, federation={"rounds": 6},
        stream={"kind": "sites", "tasks": 3},
        simulation={"partition": "dirichlet", "alpha": 0.5, "sites": 5, "min_examples": 60},
    )  # fmt: skip
    return settled(made, FIVE)


@pytest.fixture(scope="module")
def sites() -> SitePopulation:
    plain = Job.resolve({
        "name": "t", "model": {"name": "mlp"}, "task": {"labels": [str(c) for c in range(10)]},
        "data": {"shape": [1, 8, 8]}, "stream": {"kind": "sites", "tasks": 3},
        "simulation": {"partition": "dirichlet", "alpha": 0.5, "sites": 5, "min_examples": 60},
    })  # fmt: skip
    return load_sites(plain, Path())


def carry_out(job: Job, sites: SitePopulation, place: str = "federated") -> tuple[Result, list[dict[str, Any]]]:
    heard: list[dict[str, Any]] = []
    alone = {"federation": {"min_sites": 1}} if place != "federated" else {}
    setting = Setting(job.replace(place=place, **alone), sites, Benches(), listener=heard.append)
    return paradigms[place](setting), heard


def same(a: Result, b: Result) -> bool:
    return all(torch.equal(t, b.models[name][n]) for name, model in a.models.items() for n, t in model.items())


def rounds(heard: list[dict[str, Any]]) -> list[tuple[int, list[str]]]:
    return [(e["round"], e["sites"]) for e in heard if e["event"] == "round"]


# ---- who trains when -------------------------------------------------------------------------------------------------
def test_only_those_who_have_just_joined_train(job: Job, sites: SitePopulation) -> None:
    assert job.stream.sites == (("site-1", "site-2"), ("site-3",), ("site-4", "site-5"))
    _, heard = carry_out(job, sites)
    first, second, third = (list(group) for group in job.stream.sites)
    assert rounds(heard) == [(0, first), (1, first), (2, second), (3, second), (4, third), (5, third)]
    assert [(e["task"], e["round"]) for e in heard if e["event"] == "task"] == [(0, 1), (1, 3), (2, 5)]


def test_or_those_who_have_joined_stay(job: Job, sites: SitePopulation) -> None:
    _, heard = carry_out(job.replace(stream={"stay": True}), sites)
    assert rounds(heard) == [(r, FIVE[: (2, 3, 5)[r // 2]]) for r in range(6)]


def test_a_fraction_is_one_of_those_who_are_there(job: Job, sites: SitePopulation) -> None:
    job = job.replace(federation={"fraction": 0.5})
    result, heard = carry_out(job, sites)
    chosen = rounds(heard)
    assert [len(names) for _, names in chosen] == [1] * 6
    assert all(names[0] in job.stream.sites[r // 2] for r, names in chosen)
    alone = carry_out(job, sites, "isolated")[1]
    assert sorted(rounds(alone)) == chosen
    assert abs(carry_out(job, sites, "centralized")[0].totals.samples - result.totals.samples) <= 6


def test_an_isolated_site_trains_in_its_own_rounds_and_one_client_with_who_is_there(
    job: Job, sites: SitePopulation
) -> None:
    _, alone = carry_out(job, sites, "isolated")
    assert rounds(alone) == [(2 * job.stream.groups[name] + r, [name]) for name in FIVE for r in (0, 1)]
    _, pooled = carry_out(job, sites, "centralized")
    held = {name: len(sites.splits(name).train) for name in FIVE}
    expected = [sum(held[name] for name in job.stream.sites[r // 2]) for r in range(6)]
    assert [e["examples"] for e in pooled if e["event"] == "round"] == [[count] for count in expected]


def test_the_model_is_handed_from_hospital_to_hospital(job: Job, sites: SitePopulation) -> None:
    """With one site a task the whole run is, bit for bit, what one site after the other does by hand."""
    chain = job.replace(stream={"tasks": 5, "sites": [[name] for name in FIVE]}, federation={"rounds": 5})
    result, _ = carry_out(chain, sites)
    engine = InProcess(FIVE, sites.splits, Benches())
    model, spec = build_model(chain)
    weights = {name: model.state_dict()[name].clone() for name in spec.sent}
    for round, name in enumerate(FIVE):
        asked = Instruction(
            "train", "by hand", name, chain, spec.fingerprint, task=round, round=round, rounds=5,
            budget=round_budget(chain, round, name), groups={"model": weights},
        )  # fmt: skip
        reply = engine.handler(name).handle(asked)
        weights = {n: t.clone() for n, t in reply.groups["model"].items()}
    assert all(torch.equal(result.models["model"][n], t) for n, t in weights.items())


# ---- what is measured ------------------------------------------------------------------------------------------------
def test_a_row_is_the_metric_on_the_tests_of_those_who_joined_in_each_task(job: Job, sites: SitePopulation) -> None:
    benches, found = Benches(), []

    def measure(event: dict[str, Any]) -> None:
        if event["event"] == "task":
            bench = benches(job, {})
            bench.load(dict(loop.state["model"]), {})
            bench.model.eval()
            right = {}
            for name in FIVE:
                test = sites.splits(name).test
                answers = bench.model(test.batch(torch.arange(len(test))).x).argmax(1)
                right[name] = (int((answers == test.y).sum()), len(test))
            found.append([
                sum(right[name][0] for name in group) / sum(right[name][1] for name in group)
                for group in job.stream.sites
            ])  # fmt: skip

    loop = Coordinator(job, InProcess(FIVE, sites.splits, Benches()), "run", events=Events(listener=measure))
    outcome = loop.run()
    assert len(found) == 3
    for row, expected in zip(outcome.matrix, found, strict=True):
        assert row == pytest.approx(expected, abs=1e-6)
    assert len({value for row in outcome.matrix for value in row}) > 3
    assert len(outcome.untrained) == 3
    assert not outcome.known, "every task has every label"


# ---- how much --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stay", [False, True])
def test_each_site_passes_as_often_over_its_data_as_offline(job: Job, sites: SitePopulation, stay: bool) -> None:
    """Two epochs in each of seven rounds are fourteen passes, in however many rounds a site is there."""
    job = job.replace(federation={"rounds": 7}, train={"epochs": 2.0}, stream={"stay": stay})
    result, heard = carry_out(job, sites)
    seen = dict.fromkeys(FIVE, 0)
    for event in heard:
        if event["event"] == "round":
            for name, samples in zip(event["sites"], event["samples"], strict=True):
                seen[name] += samples
    for name, samples in seen.items():
        assert abs(samples - 14 * len(sites.splits(name).train)) <= 7, name
    offline, _ = carry_out(job.replace(time="offline"), sites)
    assert abs(result.totals.samples - offline.totals.samples) <= 7 * len(FIVE)
    for place in ("centralized", "isolated"):
        other, _ = carry_out(job, sites, place)
        assert abs(other.totals.samples - result.totals.samples) <= 7 * len(FIVE), place


def test_the_budget_by_hand(job: Job) -> None:
    job = job.replace(federation={"rounds": 7}, train={"epochs": 1.0})  # of which 3, 2 and 2 are of a task each
    assert [task_of(job, r) for r in range(7)] == [0, 0, 0, 1, 1, 2, 2]
    assert [round_budget(job, r, "site-3").epochs for r in (2, 3, 5)] == [7 / 3, 7 / 2, 7 / 2]
    stay = job.replace(stream={"stay": True})
    assert [round_budget(stay, r, "site-1").epochs for r in (0, 6)] == [1.0, 1.0]
    assert [round_budget(stay, r, "site-3").epochs for r in (3, 6)] == [7 / 4, 7 / 4]
    assert round_budget(stay, 6, "site-5").epochs == 7 / 2


# ---- crashes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("last", [("round", 1), ("round", 3), ("task", 1)])
def test_a_run_that_is_cut_off_ends_with_the_same_bits(
    job: Job, sites: SitePopulation, tmp_path: Path, last: tuple[str, int]
) -> None:
    job = job.replace(stream={"stay": True}, continual={"name": "ewc"})

    class KilledError(Exception):
        pass

    def kill(event: dict[str, Any]) -> None:
        if armed and (event["event"], event.get("round")) == last:
            raise KilledError

    def loop(name: str, states: Callable[[str], State] | None = None) -> Coordinator:
        engine = InProcess(FIVE, sites.splits, Benches(), states)
        return Coordinator(job, engine, "run", folder=tmp_path / name, events=Events(listener=kill))

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    armed = False
    whole = loop("whole").run()
    armed = True
    with pytest.raises(KilledError):
        loop("cut", lambda name: DiskState(tmp_path / "sites", name)).run()
    armed = False
    again = loop("cut", lambda name: DiskState(tmp_path / "sites", name)).run()
    assert all(torch.equal(t, again.model[n]) for n, t in whole.model.items())
    assert again.matrix == whole.matrix
    assert again.totals.samples == whole.totals.samples


# ---- continual methods -----------------------------------------------------------------------------------------------
class Heard(InProcess):
    """Keeps what each instruction was answered with."""

    def __init__(self, sites: SitePopulation) -> None:
        super().__init__(FIVE, sites.splits, Benches())
        self.answers: list[tuple[str, int, str, str, int]] = []

    def run(self, instructions: Iterable[Instruction]) -> Iterator[Contribution]:
        for reply in super().run(instructions):
            self.answers.append((reply.kind, reply.task, reply.site, reply.code, reply.examples))
            yield reply


@pytest.mark.parametrize("stay", [False, True])
def test_a_task_ends_at_the_sites_that_have_just_trained(job: Job, sites: SitePopulation, stay: bool) -> None:
    engine = Heard(sites)
    Coordinator(job.replace(continual={"name": "ewc"}, stream={"stay": stay}), engine, "run").run()
    ended = [
        (task, site, size) for kind, task, site, code, size in engine.answers if kind == "end_task" and code == "ok"
    ]
    there = [[s for s in FIVE if (g := job.stream.groups[s]) == t or (stay and g < t)] for t in range(3)]
    assert ended == [(t, s, len(sites.splits(s).train)) for t in range(3) for s in there[t]]


def test_what_is_kept_at_a_site_that_has_left_helps_no_other(job: Job, sites: SitePopulation) -> None:
    """Federated, where each site trains in one task alone, methods that act from the second task on never act."""
    plain, _ = carry_out(job, sites)
    for name in ("ewc", "lwf", "si"):
        assert same(plain, carry_out(job.replace(continual={"name": name}), sites)[0]), name
    once, _ = carry_out(job, sites, "centralized")
    for name in ("ewc", "lwf", "er"):
        assert not same(once, carry_out(job.replace(continual={"name": name}), sites, "centralized")[0]), name
    staying = job.replace(stream={"stay": True})
    assert not same(carry_out(staying, sites)[0], carry_out(staying.replace(continual={"name": "ewc"}), sites)[0])


@pytest.mark.parametrize("place", ["federated", "isolated", "centralized"])
def test_to_keep_all_data_is_to_stay(job: Job, sites: SitePopulation, place: str) -> None:
    joint, _ = carry_out(job.replace(continual={"name": "joint"}), sites, place)
    stayed, _ = carry_out(job.replace(stream={"stay": True}), sites, place)
    assert same(joint, stayed)
    assert not same(joint, carry_out(job, sites, place)[0])


def test_a_comparison_names_its_sites_and_replay_helps_who_keeps_the_past(
    job: Job, sites: SitePopulation, tmp_path: Path
) -> None:
    unnamed = job.replace(
        stream={"sites": []}, federation={"rounds": 12}, continual={"name": "er", "buffer": 40},
        simulation={"partition": "labels", "classes": 2},
    )  # fmt: skip
    sites = load_sites(unnamed, Path())
    pairs: Any = [(place, "continual") for place in ("centralized", "federated", "isolated")]
    found = compare(unnamed, sites, paradigms=pairs, methods=["finetune", "er"], seeds=(0,), folder=tmp_path)
    assert not [cell.error for cell in found.cells if cell.error]
    assert found.job["stream"]["sites"] == [list(group) for group in job.stream.sites]
    plain, er = (found.cell("centralized", "continual", m) for m in ("finetune", "er"))
    assert plain
    assert er
    assert min(er.all_sites) > max(plain.all_sites)
    again = compare(unnamed, sites, paradigms=pairs, methods=["finetune", "er"], seeds=(0,), folder=tmp_path)
    assert [cell.matrix for cell in again.cells] == [cell.matrix for cell in found.cells]
    one = run_one(unnamed, sites, tmp_path / "one", "")
    federated = found.cell("federated", "continual", "er")
    assert federated
    assert one.cells[0].matrix == [federated.matrix[0]] if federated.matrix else False
    assert "site-3" in (tmp_path / "one" / "job.toml").read_text()


# ---- privacy ---------------------------------------------------------------------------------------------------------
def test_a_private_site_spends_in_its_own_rounds_alone(job: Job, sites: SitePopulation) -> None:
    private = job.replace(privacy={"mode": "sample", "epsilon": 8.0, "delta": 1e-3})
    result, heard = carry_out(private, sites)
    assert {round(value, 1) for value in result.privacy["epsilon"].values()} <= {7.9, 8.0}
    trained = {name: sum(e["event"] == "round" and name in e["sites"] for e in heard) for name in FIVE}
    assert set(trained.values()) == {2}
    assert len(cost(private, 100).epsilon) == 2, "of a site's own task"


# ---- what cannot be --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"stream": {"kind": "sites", "order": "rotated"}}, "'rotated' turns tasks that every site has"),
        ({"stream": {"kind": "sites", "amount": 1.0}}, "kind = 'sites' changes none"),
        ({"stream": {"stay": True}}, "stay belongs to kind = 'sites'"),
        ({"stream": {"sites": [["a"], ["b"]]}}, "sites means nothing with kind = 'classes'"),
        ({"stream": {"kind": "sites", "tasks": 3, "sites": [["a"], ["b"]]}}, "sites has 2 groups for 3 tasks"),
        ({"stream": {"kind": "sites", "sites": [["a"], []]}}, "group 1 of sites is empty"),
        ({"stream": {"kind": "sites", "sites": [["a", "b"], ["b"]]}}, "the site 'b' stands twice"),
        ({"time": "continual", "stream": {"kind": "sites"}}, "stream.tasks = 5 is more than federation.rounds = 2"),
    ],
)
def test_settings_that_cannot_be(make_job: Maker, parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_job(**parts)


def test_pairs_that_cannot_be(job: Job) -> None:
    with pytest.raises(CompatibilityError, match="control variate is the mean over all sites"):
        job.replace(method={"name": "scaffold"})
    clients = {"mode": "client", "noise": 1.0}
    with pytest.raises(CompatibilityError, match="says in which rounds it does"):
        job.replace(privacy=clients, method={"name": "fedavg", "weighting": "uniform"})
    with pytest.raises(CompatibilityError, match="finds the noise for one"):
        job.replace(privacy={"mode": "sample", "noise": 1.0}, stream={"stay": True})


def test_sites_that_are_not_there(job: Job) -> None:
    with pytest.raises(ConfigError, match="names 'site-5', which no site is called"):
        settled(job, FIVE[:4])
    with pytest.raises(ConfigError, match="does not name 'site-6'"):
        settled(job, [*FIVE, "site-6"])
    with pytest.raises(ConfigError, match="2 sites cannot join one after the other in as many tasks"):
        settled(job.replace(stream={"sites": []}), FIVE[:2])
    with pytest.raises(RunError, match=r"round 2: none of the sites that train in it is there \(site-3\)"):
        present(job, ["site-1", "site-4"], 2)
    assert list(present(job.replace(time="offline"), ["site-1"], 2)) == ["site-1"]


def test_a_server_is_told_who_trains_when(job: Job, tmp_path: Path) -> None:
    with pytest.raises(CompatibilityError, match=r"names 5 sites in stream.sites, .* federation.min_sites = 1. Set"):
        create_run(tmp_path, job)
    for part in ({"kind": "sites", "tasks": 3}, {"order": "rotated", "tasks": 3}):
        unnamed = Job.resolve({**job.model_dump(), "stream": part})
        with pytest.raises(CompatibilityError, match="does not say which site trains when"):
            create_run(tmp_path, unnamed)
        create_run(tmp_path, unnamed.replace(time="offline"))
    made = create_run(tmp_path, job.replace(federation={"min_sites": 5}))
    assert made.job().stream == job.stream


def test_groups_by_name_are_the_job_files(make_job: Maker, tmp_path: Path) -> None:
    made = make_job(
        time="continual",
        stream={"kind": "sites", "sites": [["north"], ["south", "west"]]},
        federation={"rounds": 4},
    )
    assert made.stream.tasks == 2
    (tmp_path / "job.toml").write_text(made.to_toml())
    again = Job.load(tmp_path / "job.toml")
    assert (again, again.hash) == (made, made.hash)
    assert json.loads(made.canonical)["stream"]["sites"] == [["north"], ["south", "west"]]
    assert replace(Instruction("probe", "r", "north", made, "")).job.stream.groups == {
        "north": 0,
        "south": 1,
        "west": 1,
    }
