"""Learning without labels end to end: three sites with scikit-learn's digits, from the reader to the test figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from client.workbench import Benches
from shared_models.job import Job
from simulations.compare import load_sites
from simulations.paradigms import Result, Setting, paradigms

LABELS = [str(digit) for digit in range(10)]
STEPS: dict[str, Any] = {"optimizer": "adamw", "lr": 0.003, "batch_size": 32, "epochs": 2}


def run(place: str = "federated", **parts: Any) -> Result:
    job = Job.resolve({
        "name": "unsupervised", "place": place, "data": {"shape": [1, 8, 8], "normalise_by": "sites"},
        "simulation": {"reader": "digits", "sites": 3}, **parts,
    })  # fmt: skip
    return paradigms[place](Setting(job, load_sites(job, Path()), Benches(torch.device("cpu"))))


@pytest.mark.parametrize("model", [{"name": "autoencoder"}, {"name": "vae", "beta": 0.1}])
def test_a_digit_that_was_not_learnt_is_noticed(model: dict[str, Any]) -> None:
    task = {"name": "anomaly", "labels": LABELS, "anomalous": ["0"]}
    found = run(model=model, task=task, train=STEPS, federation={"rounds": 5})
    assert found.metrics["auroc"] > 0.9
    assert found.curve[-1]["loss"] < 0.7 * found.curve[0]["loss"]


def test_clusters_are_digits() -> None:
    task, method = {"name": "clustering", "labels": LABELS}, {"name": "lloyd"}
    found = run(model={"name": "kmeans"}, task=task, method=method, federation={"rounds": 15})
    assert found.metrics["nmi"] > 0.6
    assert found.curve[-1]["inertia"] < 0.65 * found.curve[0]["inertia"]


def test_principal_components_need_no_labels() -> None:
    job: dict[str, Any] = {
        "model": {"name": "pca"}, "task": {"name": "reconstruction"}, "method": {"name": "pca"},
        "federation": {"rounds": 1},
    }  # fmt: skip
    found, pooled, alone = (run(place, **job) for place in ("federated", "centralized", "isolated"))
    assert found.metrics["r2"] > 0.75
    assert found.metrics["mse"] == pytest.approx(pooled.metrics["mse"], rel=1e-4)
    assert alone.metrics["mse"] > found.metrics["mse"]
