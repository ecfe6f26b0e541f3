"""What tests of the server share: jobs whose unit of privacy is the site, and a server that sites enroll with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from enrolling import Server

from shared_models.job import Job

MakeJob = Callable[..., Job]


@pytest.fixture
def client_job(make_job: MakeJob) -> MakeJob:
    def make(privacy: dict[str, Any] | None = None, **parts: Any) -> Job:
        part = {"mode": "client", "noise": 1.0, **(privacy or {})}
        return make_job(privacy=part, **{"method": {"name": "fedavg", "weighting": "uniform"}, **parts})

    return make


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path / "server")
    yield running
    running.stop()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder
