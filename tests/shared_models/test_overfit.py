"""Every detector learns eight real images by heart, with the trainer that nodes use.

Blood cells (BCCD) to an mAP50 of 0.9; the sliding window, which moves no box, to 0.5. Up to two minutes each on one
core: `pytest -m slow tests/shared_models/test_overfit.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from client.readers import read
from client.readers.base import Examples, Wanted
from client.trainer import evaluate, train
from client.workbench import Workbench, determinism
from shared_models.job import Job
from shared_models.messages import Budget, Instruction

pytestmark = [pytest.mark.slow, pytest.mark.data, pytest.mark.timeout(1800)]

CELLS: dict[str, Any] = {
    "data": {"shape": [3, 120, 160], "proposals": 600, "mean": [0.7, 0.65, 0.7], "std": [0.2, 0.2, 0.15]},
    "task": {"name": "detection", "labels": ["RBC", "WBC", "Platelets"]},
}
ADAMW = {"optimizer": "adamw", "weight_decay": 1e-4, "schedule": "cosine"}


@pytest.mark.parametrize(
    ("model", "steps", "settings", "least"),
    [
        ("sliding-window", 200, {"lr": 0.002, "batch_size": 8}, 0.5),
        ("rcnn", 600, {"lr": 0.002, "batch_size": 4}, 0.9),
        ("sppnet", 600, {"lr": 0.002, "batch_size": 4}, 0.9),
        ("fast-rcnn", 600, {"lr": 0.002, "batch_size": 4}, 0.9),
        ("faster-rcnn", 600, {"lr": 0.002, "batch_size": 4}, 0.9),
        ("yolo", 400, {"lr": 0.003, "batch_size": 8}, 0.9),
        ("detr", 800, {"lr": 0.001, "batch_size": 8, "clip": 1.0}, 0.9),
    ],
)
def test_eight_real_images(real_data: Path, model: str, steps: int, settings: dict[str, Any], least: float) -> None:
    job = Job.resolve({"name": "overfit", "model": {"name": model}, "train": {**ADAMW, **settings}, **CELLS})
    store = read("voc", real_data / "bccd" / "BCCD", Wanted.by(job))
    eight = Examples(store, torch.arange(8))
    bench = Workbench(job, torch.device("cpu"))
    with determinism(True):
        train(bench, eight, Instruction("train", "r", "s", job, "", budget=Budget(steps=steps)), [{}, {}])
        values = bench.task.values(evaluate(bench, eight))
    print(f"{model}: mAP50 {values['map50']:.3f} after {steps} steps")
    assert values["map50"] >= least
