"""Streams through real nodes: the same matrix as in process, also where a node is killed between two tasks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from real_nodes import Federation, eventually, make_job, running, same_bits, write_hospital

from client.replay import MEMORY
from client.state import DiskState
from shared_models.job import Job
from simulations.compare import load_sites

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(400)]

JOINING = make_job(
    name="joining", time="continual", stream={"kind": "sites", "sites": [["site-2"], ["site-1"]], "stay": True},
    continual={"name": "ewc"}, federation={"rounds": 4, "min_sites": 2}, simulation={"partition": "iid", "sites": 2},
)  # fmt: skip
TURNED = make_job(
    name="turned", time="continual", stream={"order": "rotated", "sites": [["site-2"], ["site-1"]]},
    continual={"name": "er", "buffer": 20}, federation={"rounds": 4, "min_sites": 2},
    simulation={"partition": "iid", "sites": 2},
)  # fmt: skip


@pytest.mark.parametrize("method", ["der++", pytest.param("icarl", marks=pytest.mark.slow)])
def test_a_node_that_is_killed_between_tasks_remembers_the_first(tmp_path: Path, method: str) -> None:
    stream = make_job(
        name="stream", time="continual", stream={"tasks": 2}, continual={"name": method, "buffer": 40},
        federation={"rounds": 6, "min_sites": 2}, simulation={"partition": "iid", "sites": 2},
    )  # fmt: skip
    sites = load_sites(stream, tmp_path)
    victim = sites.names[1]
    jobs = [stream, JOINING, TURNED] if method == "der++" else [stream]
    with running(tmp_path, sites, write_hospital, "imagefolder", jobs) as found:
        run = found.submit(stream)
        eventually(lambda: any(e["event"] == "task" for e in found.events(run)), "the first task does not end")
        os.killpg(found.nodes[victim].process.pid, signal.SIGKILL)
        found.nodes[victim].stop()
        found.start(victim)
        events = found.finish(run)
        assert run.status().state == "done", run.status()
        expected = found.result(stream)
        require_own_schedules(found, jobs[1:])
    rows = [e for e in events if e["event"] == "task"]
    assert [e["test"] for e in rows] == expected.matrix
    assert [e["known"] for e in rows] == expected.known
    assert same_bits(run, dict(expected.models["model"]))
    (state,) = (tmp_path / "nodes" / victim).rglob(f"{victim}/{run.id}")
    kept = DiskState(state.parent.parent, victim).load(run.id)[method][MEMORY]
    assert len(kept["y"]) == 40
    assert {int(y) < 5 for y in kept["y"]} == {True, False}  # of both tasks


def require_own_schedules(found: Federation, jobs: list[Job]) -> None:
    """Sites that join, and sites in an order of their own, by their names: who trained, the matrix, and the bits."""
    sites = {"joining": [["site-2"]] * 2 + [["site-1", "site-2"]] * 2, "turned": [["site-1", "site-2"]] * 4}
    for job in jobs:
        run = found.submit(job)
        events = found.finish(run)
        assert run.status().state == "done", run.status()
        expected = found.result(job)
        assert [e["sites"] for e in events if e["event"] == "round"] == sites[job.name]
        assert [e["test"] for e in events if e["event"] == "task"] == expected.matrix
        assert same_bits(run, dict(expected.models["model"]))
