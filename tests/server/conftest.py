"""What tests of the server share: jobs whose unit of privacy is the site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from shared_models.job import Job

MakeJob = Callable[..., Job]


@pytest.fixture
def client_job(make_job: MakeJob) -> MakeJob:
    def make(privacy: dict[str, Any] | None = None, **parts: Any) -> Job:
        part = {"mode": "client", "noise": 1.0, **(privacy or {})}
        return make_job(privacy=part, **{"method": {"name": "fedavg", "weighting": "uniform"}, **parts})

    return make
