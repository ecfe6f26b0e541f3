"""Sites that are at different tasks at one time: which, on how much, what ends when, and what is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import client.handler
from client.readers.base import Examples
from client.state import DiskState, State
from client.workbench import Benches
from server.coordinator import Coordinator
from server.events import Events
from shared_models.errors import ConfigError
from shared_models.job import Job
from shared_models.messages import Instruction
from shared_models.methods.ewc import EWC
from shared_models.tasks.base import Batch
from simulations.arrivals import settled
from simulations.compare import compare, load_sites
from simulations.engines.inprocess import InProcess
from simulations.paradigms import Result, Setting, paradigms
from simulations.partition import SitePopulation

Maker = Callable[..., Job]
THREE = ["site-1", "site-2", "site-3"]
TASKS = [{0, 1, 2}, {3, 4, 5, 6}, {7, 8, 9}]


@pytest.fixture
def job(make_job: Maker) -> Job:
    """Three tasks of two rounds; site 1 sees them in the order 0 1 2, site 2 in 1 2 0, site 3 in 2 0 1."""
    made = make_job(
        time="continual", train={"lr": 0.1, "batch_size": 32}, federation={"rounds": 6},
        stream={"tasks": 3, "order": "rotated"}, simulation={"partition": "iid", "sites": 3},
    )  # fmt: skip
    return settled(made, THREE)


@pytest.fixture
def sites(job: Job) -> SitePopulation:
    return load_sites(job, Path())


def carry_out(job: Job, sites: SitePopulation, place: str = "federated") -> Result:
    return paradigms[place](Setting(job.replace(place=place), sites, Benches()))


def same(a: Result, b: Result) -> bool:
    return all(torch.equal(t, b.models[name][n]) for name, model in a.models.items() for n, t in model.items())


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str, list[int]]]:
    """(round, site, sorted rows of the store) of every training."""
    found: list[tuple[int, str, list[int]]] = []
    real = client.handler.train

    def spy(bench: Any, data: Examples, instruction: Instruction, *rest: Any) -> Any:
        found.append((instruction.round, instruction.site, sorted(data.rows.tolist())))
        return real(bench, data, instruction, *rest)

    monkeypatch.setattr(client.handler, "train", spy)
    return found


def rows(sites: SitePopulation, site: str, task: int) -> list[int]:
    """A site's training rows of a task, by its classes alone."""
    own = sites.splits(site).train
    return sorted(r for r, y in zip(own.rows.tolist(), own.y.tolist(), strict=True) if y in TASKS[task])


ORDERS = {"site-1": (0, 1, 2), "site-2": (1, 2, 0), "site-3": (2, 0, 1)}


def test_each_site_is_at_its_own_task(
    job: Job, sites: SitePopulation, trained: list[tuple[int, str, list[int]]]
) -> None:
    assert job.stream.sites == (("site-1",), ("site-2",), ("site-3",))
    result = carry_out(job, sites)
    assert trained == [(r, s, rows(sites, s, ORDERS[s][r // 2])) for r in range(6) for s in THREE]
    offline = carry_out(job.replace(time="offline"), sites)
    assert abs(result.totals.samples - offline.totals.samples) <= 6 * len(THREE)
    assert result.untrained is None, "no task is new to all sites at one time"


def test_alone_or_as_one_client_they_have_the_same_data_at_the_same_time(
    job: Job, sites: SitePopulation, trained: list[tuple[int, str, list[int]]]
) -> None:
    together = carry_out(job, sites)
    trained.clear()
    alone = carry_out(job, sites, "isolated")
    assert trained == [(r, s, rows(sites, s, ORDERS[s][r // 2])) for s in THREE for r in range(6)]
    trained.clear()
    pooled = carry_out(job, sites, "centralized")
    expected = [sorted(row for s in THREE for row in rows(sites, s, ORDERS[s][r // 2])) for r in range(6)]
    assert [found for _, _, found in trained] == expected
    assert {together.totals.samples, alone.totals.samples} == {together.totals.samples}
    assert abs(pooled.totals.samples - together.totals.samples) <= 6 * len(THREE)


def test_domains_turn_as_classes_do(job: Job, trained: list[tuple[int, str, list[int]]]) -> None:
    job = job.replace(stream={"kind": "drift"})
    sites = load_sites(job, Path())
    carry_out(job, sites)
    tasks = sites.store.tasks
    assert tasks is not None
    assert all({int(tasks[r]) for r in found} == {ORDERS[s][round // 2]} for round, s, found in trained)
    assert sum(len(found) for round, _, found in trained if round % 2) == sum(len(sites.splits(s).train) for s in THREE)


def test_sites_of_one_group_are_a_stream_in_step(job: Job, sites: SitePopulation) -> None:
    """All at turn 0: bit for bit what `shared` gives, and its matrix."""
    shared = job.replace(stream={"order": "shared", "sites": []}, continual={"name": "er", "buffer": 30})
    turned = shared.replace(stream={"order": "rotated", "sites": [THREE, [], []]})
    a, b = carry_out(shared, sites), carry_out(turned, sites)
    assert same(a, b)
    assert a.matrix == b.matrix
    assert not same(a, carry_out(job.replace(continual={"name": "er", "buffer": 30}), sites))


def test_a_site_hears_the_end_of_the_task_that_it_was_at(
    job: Job, sites: SitePopulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[set[int]] = []
    real = EWC.end_task

    def spy(self: Any, model: Any, task: Any, batches: Iterable[Batch], kept: Any) -> Any:
        held = list(batches)
        ended.append({int(y) for batch in held for y in batch.y})
        return real(self, model, task, held, kept)

    monkeypatch.setattr(EWC, "end_task", spy)
    carry_out(job.replace(continual={"name": "ewc"}), sites)
    assert ended == [TASKS[ORDERS[site][period]] for period in range(3) for site in THREE]


def test_a_row_is_the_model_after_a_period_on_the_test_of_each_task_at_all_sites(
    job: Job, sites: SitePopulation
) -> None:
    benches, found = Benches(), []

    def measure(event: dict[str, Any]) -> None:
        if event["event"] == "task":
            bench = benches(job, {})
            bench.load(dict(loop.state["model"]), {})
            bench.model.eval()
            tests = [sites.splits(site).test for site in THREE]
            right, y = [], torch.cat([test.y for test in tests])
            right = torch.cat([bench.model(t.batch(torch.arange(len(t))).x).argmax(1) for t in tests]) == y
            found.append([right[torch.isin(y, torch.tensor(sorted(task)))].float().mean().item() for task in TASKS])

    loop = Coordinator(job, InProcess(THREE, sites.splits, Benches()), "run", events=Events(listener=measure))
    outcome = loop.run()
    assert len(found) == 3
    for row, expected in zip(outcome.matrix, found, strict=True):
        assert row == pytest.approx(expected, abs=1e-6)
    assert len(outcome.known) == 3


def test_to_keep_all_data_is_to_keep_what_the_site_has_seen(
    job: Job, sites: SitePopulation, trained: list[tuple[int, str, list[int]]]
) -> None:
    carry_out(job.replace(continual={"name": "joint"}), sites)
    assert trained == [
        (r, s, sorted(row for t in ORDERS[s][: r // 2 + 1] for row in rows(sites, s, t)))
        for r in range(6)
        for s in THREE
    ]


def test_a_run_that_is_cut_off_ends_with_the_same_bits(job: Job, sites: SitePopulation, tmp_path: Path) -> None:
    job = job.replace(continual={"name": "er", "buffer": 30})

    class KilledError(Exception):
        pass

    def kill(event: dict[str, Any]) -> None:
        if armed and (event["event"], event.get("round")) == ("round", 3):
            raise KilledError

    def loop(name: str, states: Callable[[str], State] | None = None) -> Coordinator:
        (tmp_path / name).mkdir(exist_ok=True)
        engine = InProcess(THREE, sites.splits, Benches(), states)
        return Coordinator(job, engine, "run", folder=tmp_path / name, events=Events(listener=kill))

    armed = False
    whole = loop("whole").run()
    armed = True
    with pytest.raises(KilledError):
        loop("cut", lambda name: DiskState(tmp_path / "sites", name)).run()
    armed = False
    again = loop("cut", lambda name: DiskState(tmp_path / "sites", name)).run()
    assert all(torch.equal(t, again.model[n]) for n, t in whole.model.items())
    assert again.matrix == whole.matrix


def test_fewer_sites_than_tasks_begin_far_apart(make_job: Maker) -> None:
    made = make_job(time="continual", stream={"tasks": 5, "order": "rotated"}, federation={"rounds": 5})
    assert settled(made, THREE).stream.groups == {"site-1": 0, "site-2": 2, "site-3": 4}
    assert settled(make_job(), THREE) == make_job()
    with pytest.raises(ConfigError, match="does not name 'site-2'"):
        settled(made.replace(stream={"sites": [["site-1"], [], [], [], ["site-3"]]}), THREE)


def test_a_comparison_of_schedules(job: Job, sites: SitePopulation) -> None:
    """All labels are there at any time, though at no one site: the shared model keeps more of them."""
    pairs: Any = [("federated", "continual"), ("isolated", "continual")]
    job = job.replace(federation={"rounds": 12})
    turned = compare(job.replace(stream={"sites": []}), sites, paradigms=pairs, seeds=(0,))
    shared = compare(job.replace(stream={"order": "shared", "sites": []}), sites, paradigms=pairs, seeds=(0,))
    assert [cell.error for cell in (*turned.cells, *shared.cells)] == [None] * 4
    assert turned.job["stream"]["sites"] == [["site-1"], ["site-2"], ["site-3"]]
    assert turned.cells[0].all_sites[0] > shared.cells[0].all_sites[0] + 0.2
    assert turned.cells[1].budget.samples == shared.cells[1].budget.samples
