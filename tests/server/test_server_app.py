"""The ServerApp's part: what it gives to the round loop of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import server.flower_app
from server.config import ServerFolder
from server.flower_app import _carry
from server.runs import create_run
from shared_models.errors import RunError
from shared_models.job import Job


@pytest.mark.parametrize(
    ("privacy", "wanted"),
    [({"mode": "client", "noise": 1.0}, True), ({"mode": "sample", "noise": 1.0}, False), ({"mode": "none"}, False)],
)
def test_where_a_site_is_hidden_the_noise_comes_from_the_runs_own_secret(
    make_job: Callable[..., Job],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    privacy: dict[str, Any],
    wanted: bool,
) -> None:
    """Without one the noise would follow from the job's seed, which every site knows."""
    given: list[bytes | None] = []

    def record(*_: object, secret: bytes | None, **__: object) -> None:
        given.append(secret)
        raise RunError("that is enough")

    monkeypatch.setattr(server.flower_app, "Coordinator", record)
    job = make_job(privacy=privacy, method={"name": "fedavg", "weighting": "uniform"})
    runs = [create_run(tmp_path, job) for _ in range(2)]
    for run in (*runs, *runs):
        run.write(state="running")
        _carry(run, ServerFolder(tmp_path), None)  # type: ignore[arg-type]
        assert run.status().reason == "that is enough"
    if not wanted:
        assert given == [None] * 4
        return
    assert given[:2] == given[2:], "a resumed run draws the same"
    assert given[0] != given[1]
    assert runs[0].secret.read_bytes() == given[0]
    assert runs[0].secret.stat().st_mode & 0o777 == 0o600


def test_when_a_run_is_done_nobody_can_draw_its_noise_again(
    make_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Done:
        def document(self) -> dict[str, Any]:
            return {}

    def carried(job: Job, make: Callable[..., object]) -> Done:
        make(job, {})
        assert run.secret.exists()
        return Done()

    monkeypatch.setattr(server.flower_app, "run_stages", carried)
    job = make_job(privacy={"mode": "client", "noise": 1.0}, method={"name": "fedavg", "weighting": "uniform"})
    run = create_run(tmp_path, job)
    run.write(state="running")
    _carry(run, ServerFolder(tmp_path), None)  # type: ignore[arg-type]
    assert run.status().state == "done"
    assert not run.secret.exists()
