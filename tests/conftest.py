"""What several tests share: small jobs and small sites."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from client.readers.base import Examples, Splits, Store
from shared_models.job import Job
from shared_models.job_parts import DataPart

LABELS = [str(c) for c in range(10)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with real processes come first, for they take longest; those of a file share a server."""
    real = [item for item in items if item.get_closest_marker("deploy")]
    for item in real:
        item.add_marker(pytest.mark.xdist_group(item.path.stem))
    real.sort(key=lambda item: item.path, reverse=True)
    items[:] = [*real, *(item for item in items if not item.get_closest_marker("deploy"))]


@pytest.fixture
def make_job() -> Callable[..., Job]:
    """A job on 1x8x8 images with ten labels; parts are merged into it."""

    def make(**parts: Any) -> Job:
        data: dict[str, Any] = {
            "name": "test",
            "model": {"name": "mlp"},
            "task": {"labels": LABELS},
            "data": {"shape": [1, 8, 8]},
            "train": {"batch_size": 8, "lr": 0.1},
            "federation": {"rounds": 2, "wait": 0},
        }
        for name, part in parts.items():
            data[name] = {**data.get(name, {}), **part} if isinstance(part, dict) else part
        return Job.resolve(data)

    return make


@pytest.fixture
def make_splits() -> Callable[..., Splits]:
    """Random images of one site; `classes` are drawn from evenly."""

    def make(seed: int, count: int = 30, classes: int = 10, shape: tuple[int, int, int] = (1, 8, 8)) -> Splits:
        source = torch.Generator().manual_seed(seed)
        labels = torch.arange(2 * count) % classes
        prototypes = torch.randint(0, 256, (classes, *shape), generator=torch.Generator().manual_seed(99))
        noise = torch.randint(-60, 60, (2 * count, *shape), generator=source)
        images = (prototypes[labels] + noise).clamp(0, 255).to(torch.uint8)
        store = Store(images, labels, [f"{i:04d}" for i in range(2 * count)], DataPart(shape=shape))
        half = count // 2
        cuts = (torch.arange(count), torch.arange(count, count + half), torch.arange(count + half, 2 * count))
        return Splits(*(Examples(store, rows) for rows in cuts))

    return make


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; skips where FEDZOO_DATA is not set."""
    folder = os.environ.get("FEDZOO_DATA")
    if not folder:
        pytest.skip("FEDZOO_DATA is not set")
    return Path(folder)
