"""What the tests of models and tasks share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The models here are small: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def weights_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of weights are looked for in the test's own folder."""
    monkeypatch.setenv("FEDZOO_WEIGHTS", str(tmp_path))


class InPlace(TorchDispatchMode):
    """Notes every operation that writes into one of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def in_place() -> type[InPlace]:
    """The class, for a `with` block."""
    return InPlace
