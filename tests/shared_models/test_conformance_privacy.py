"""What every model that claims sample-level privacy must do, at its size `tiny` and with every task it declares."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from client.per_sample import PerSample, choose
from client.private import add_clipped
from client.workbench import Workbench
from shared_models.job import Job
from shared_models.keys import keyed_global
from shared_models.models import models
from shared_models.tasks.base import Batch, tasks

CLIP = 0.5


def _conformance() -> ModuleType:
    """The jobs and batches of the conformance suite."""
    spec = importlib.util.spec_from_file_location("conformance", Path(__file__).with_name("test_conformance.py"))
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


conformance = _conformance()
CLAIMED = [
    (name, task) for name, task in conformance.PAIRS
    if models[name].per_sample_gradients and tasks[task].unit == "sample"
]  # fmt: skip


def a_bench(name: str, task: str, gradients: str = "auto") -> Workbench:
    job: Job = conformance.a_job(name, task)
    bench = Workbench(
        job.replace(privacy={"mode": "sample", "noise": 1.0, "gradients": gradients}), torch.device("cpu")
    )
    bench.to_training()
    return bench


@pytest.mark.parametrize(("name", "task"), CLAIMED)
def test_per_sample_gradients_equal_a_one_sample_loop(name: str, task: str) -> None:
    """By the way the node would take, which raises where the relative error is above a thousandth."""
    bench = a_bench(name, task)
    way = choose(bench, (), conformance.a_batch(bench.job, 2))
    assert way in models[name].per_sample_gradients


@pytest.mark.parametrize(("name", "task"), CLAIMED)
def test_one_example_more_moves_a_step_by_at_most_the_clip(name: str, task: str) -> None:
    """Three random neighbouring data sets; equal draws for the examples they share, as a coupling of both."""
    bench = a_bench(name, task)
    way, most = choose(bench, (), conformance.a_batch(bench.job, 2)), 0.0
    for seed in range(3):
        batch = conformance.a_batch(bench.job, 3, seed=10 + seed)
        sums = [clipped_sum(bench, way, part) for part in (batch, batch[:2])]
        most = max(most, float((sums[0] - sums[1]).norm()) / CLIP)
    assert 0 < most <= 1


def clipped_sum(bench: Workbench, way: str, batch: Batch) -> torch.Tensor:
    total = {n: torch.zeros_like(p) for n, p in bench.trained.items()}
    with keyed_global(4):
        add_clipped(total, PerSample(bench, (), way)(batch, randomness="same"), CLIP)
    return torch.cat([t.flatten().double() for t in total.values()])


@pytest.mark.parametrize("name", [n for n in models if "hooks" in models[n].per_sample_gradients])
def test_hooks_where_they_are_declared(name: str) -> None:
    task = next(t for n, t in CLAIMED if n == name)
    bench = a_bench(name, task, "hooks")
    assert choose(bench, (), conformance.a_batch(bench.job, 2)) == "hooks"
