"""A stream through real nodes: the same matrix as in process, also where a node is killed between two tasks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from real_nodes import eventually, make_job, running, same_bits, write_hospital

from client.replay import MEMORY
from client.state import DiskState
from simulations.compare import load_sites

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(400)]


@pytest.mark.parametrize("method", ["der++", "icarl"])
def test_a_node_that_is_killed_between_tasks_remembers_the_first(tmp_path: Path, method: str) -> None:
    stream = make_job(
        name="stream", time="continual", stream={"tasks": 2}, continual={"name": method, "buffer": 40},
        federation={"rounds": 6, "min_sites": 2}, simulation={"partition": "iid", "sites": 2},
    )  # fmt: skip
    sites = load_sites(stream, tmp_path)
    victim = sites.names[1]
    with running(tmp_path, sites, write_hospital, "imagefolder", [stream]) as found:
        run = found.submit(stream)
        eventually(lambda: any(e["event"] == "task" for e in found.events(run)), "the first task does not end")
        os.killpg(found.nodes[victim].process.pid, signal.SIGKILL)
        found.nodes[victim].stop()
        found.start(victim)
        events = found.finish(run)
        assert run.status().state == "done", run.status()
        expected = found.result(stream)
    rows = [e for e in events if e["event"] == "task"]
    assert [e["test"] for e in rows] == expected.matrix
    assert [e["known"] for e in rows] == expected.known
    assert same_bits(run, dict(expected.models["model"]))
    (state,) = (tmp_path / "nodes" / victim).rglob(f"{victim}/{run.id}")
    kept = DiskState(state.parent.parent, victim).load(run.id)[method][MEMORY]
    assert len(kept["y"]) == 40
    assert {int(y) < 5 for y in kept["y"]} == {True, False}  # of both tasks
