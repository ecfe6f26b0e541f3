"""Runs and their leases: a name each, one process at a time, and an end after too many without progress."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared_models.errors import DeploymentError
from shared_models.job import Job


def test_runs_are_named_and_leased_once(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    from server.runs import create_run, find_run, list_runs, renew_leases
    from shared_models.errors import CompatibilityError, ConfigError

    class Control:
        def __init__(self) -> None:
            self.state: dict[int, str] = {}
            self.stopped: list[int] = []

        def start_run(self, config: dict[str, Any]) -> int:
            self.state[len(self.state) + 1] = "running"
            return len(self.state)

        def runs(self) -> dict[int, str]:
            return self.state

        def stop_run(self, run: int) -> None:
            self.stopped.append(run)
            self.state[run] = "finished:stopped"

    control, job = Control(), make_job()
    run = create_run(tmp_path, job)
    assert create_run(tmp_path, job).id == f"{run.id}-2"
    assert run.job().hash == job.hash
    assert renew_leases(tmp_path, control, tmp_path) == [], "a run without a lease yet is left alone"  # type: ignore[arg-type]
    from server.runs import lease

    lease(run, control, tmp_path)  # type: ignore[arg-type]
    assert renew_leases(tmp_path, control, tmp_path) == []  # type: ignore[arg-type]
    run.write(state="running")
    with run.carried():
        assert renew_leases(tmp_path, control, tmp_path) == []  # type: ignore[arg-type]
    assert renew_leases(tmp_path, control, tmp_path) == [f"run {run.id} goes on from its checkpoint"]  # type: ignore[arg-type]
    assert control.stopped == [1]
    assert (run.status().lease, run.status().leases, run.status().state) == (2, 2, "submitted")
    for _ in range(3):
        control.state[run.status().lease] = "finished:failed"
        renew_leases(tmp_path, control, tmp_path)  # type: ignore[arg-type]
    control.state[run.status().lease] = "finished:failed"
    assert renew_leases(tmp_path, control, tmp_path) == [f"run {run.id} failed: its process ended 5 times"]  # type: ignore[arg-type]
    assert [r.id for r in list_runs(tmp_path)] == [run.id, f"{run.id}-2"]
    with pytest.raises(ConfigError, match="there is no run 'nothing'"):
        find_run(tmp_path, "nothing")
    with pytest.raises(ConfigError, match=r"there is no run '\.\./x'"):
        find_run(tmp_path, "../x")
    with pytest.raises(CompatibilityError, match="only a simulation can do"):
        create_run(tmp_path, job.replace(place="centralized"))


def test_a_status_is_not_overwritten_by_one_who_knows_less(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    """A ServerApp that ends just after the operator has stopped the run does not make it done again."""
    from concurrent.futures import ThreadPoolExecutor

    from server.runs import create_run

    run = create_run(tmp_path, make_job())
    run.write(state="running")
    run.write(state="stopped")
    assert run.write(only_from=("running",), state="done").state == "stopped"
    assert run.status().state == "stopped"

    def count(_: int) -> None:
        run.write(reason="x")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count, range(60)))
        list(pool.map(lambda n: run.write(leases=n) if n == 7 else run.write(lease=9), range(8)))
    assert (run.status().reason, run.status().leases, run.status().lease) == ("x", 7, 9)


def test_a_run_that_is_being_leased_is_not_leased_twice(
    tmp_path: Path, make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fedzoo run submit` and the server's own look at the runs happen in two processes."""
    from server import runs

    started: list[list[str]] = []

    class Control:
        def start_run(self, config: dict[str, Any]) -> int:
            if not started:  # the server looks just while the operator's command waits for SuperLink
                started.append(runs.renew_leases(tmp_path, self, tmp_path))  # type: ignore[arg-type]
            return 7

        def runs(self) -> dict[int, str]:
            return {7: "running"}

        def stop_run(self, run: int) -> None:
            raise AssertionError("nothing is to be stopped")

    control = Control()
    run = runs.create_run(tmp_path, make_job())
    runs.lease(run, control, tmp_path)  # type: ignore[arg-type]
    assert started == [[]]
    assert (run.status().lease, run.status().leases) == (7, 1)
    run.write(lease=0)  # its starter was killed
    monkeypatch.setattr(runs, "LEASING_SECONDS", -1.0)
    control.stop_run = lambda run: None  # type: ignore[method-assign]
    assert runs.renew_leases(tmp_path, control, tmp_path) == [f"run {run.id} goes on from its checkpoint"]  # type: ignore[arg-type]


def test_a_lease_that_cannot_be_had_changes_nothing(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    """SuperLink dies while a lost run is being leased: the run is still lost, and leased when SuperLink is back."""
    from server.runs import create_run, lease

    class Dead:
        def start_run(self, config: dict[str, Any]) -> int:
            raise DeploymentError("gone")

    run = create_run(tmp_path, make_job())
    run.write(state="running", lease=5, leases=1)
    with pytest.raises(DeploymentError):
        lease(run, Dead(), tmp_path)  # type: ignore[arg-type]
    assert (run.status().state, run.status().lease, run.status().leases) == ("running", 5, 1)


def test_leases_are_counted_from_the_last_progress(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    """Five reboots of a run that advances in between are no reason to give it up."""
    from server.checkpoint import write_checkpoint
    from server.runs import create_run, lease

    class Control:
        def start_run(self, config: dict[str, Any]) -> int:
            return 1

    run = create_run(tmp_path, make_job())
    for expected, reached in ((1, 0), (2, 0), (1, 4), (2, 4), (1, 5)):
        if reached:
            write_checkpoint(run.path / "checkpoint", {}, {"progress": {"round": reached}})
        assert lease(run, Control(), tmp_path).leases == expected  # type: ignore[arg-type]
