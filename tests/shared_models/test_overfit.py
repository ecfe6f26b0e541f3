"""Every segmentation and detection model learns eight real images by heart, with the trainer that nodes use.

Membranes (ISBI 2012) to a Dice of 0.9, blood cells (BCCD) to an mAP50 of 0.9; the sliding window, which moves no box,
to 0.5. Minutes each on one core: `pytest -m slow tests/shared_models/test_overfit.py`.
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

MEMBRANES: dict[str, Any] = {
    "data": {"shape": [1, 128, 128], "mean": [0.5], "std": [0.2]},
    "task": {
        "name": "segmentation", "labels": ["cell", "membrane"], "score": ["membrane"],
        "aliases": {"0": "membrane", "255": "cell"},
    },
}  # fmt: skip
OBJECTS: dict[str, Any] = {
    "data": {"shape": [1, 96, 96], "mean": [0.5], "std": [0.2]},
    "task": {"name": "promptable", "labels": ["membrane", "cell"], "aliases": {"0": "membrane", "255": "cell"}},
}
CELLS: dict[str, Any] = {
    "data": {"shape": [3, 120, 160], "proposals": 600, "mean": [0.7, 0.65, 0.7], "std": [0.2, 0.2, 0.15]},
    "task": {"name": "detection", "labels": ["RBC", "WBC", "Platelets"]},
}
ADAMW = {"optimizer": "adamw", "weight_decay": 1e-4, "schedule": "cosine"}


@pytest.mark.parametrize(
    ("model", "parts", "steps", "settings", "metric", "least"),
    [
        ("patchwise", MEMBRANES, 550, {"lr": 0.005, "batch_size": 2}, "dice", 0.9),
        ("fcn", MEMBRANES, 300, {"lr": 0.005, "batch_size": 4}, "dice", 0.9),
        ("unet", MEMBRANES, 300, {"lr": 0.003, "batch_size": 4}, "dice", 0.9),
        ("segmenter", MEMBRANES, 250, {"lr": 0.004, "batch_size": 4}, "dice", 0.9),
        ("sam", OBJECTS, 1000, {"lr": 0.001, "batch_size": 8, "clip": 1.0}, "dice", 0.9),
        ("sliding-window", CELLS, 200, {"lr": 0.002, "batch_size": 8}, "map50", 0.5),
        ("rcnn", CELLS, 500, {"lr": 0.003, "batch_size": 8}, "map50", 0.9),
        ("sppnet", CELLS, 600, {"lr": 0.002, "batch_size": 8}, "map50", 0.9),
        ("fast-rcnn", CELLS, 600, {"lr": 0.002, "batch_size": 8}, "map50", 0.9),
        ("faster-rcnn", CELLS, 500, {"lr": 0.003, "batch_size": 8}, "map50", 0.9),
        ("yolo", CELLS, 400, {"lr": 0.003, "batch_size": 8}, "map50", 0.9),
        ("detr", CELLS, 800, {"lr": 0.001, "batch_size": 8, "clip": 1.0}, "map50", 0.9),
    ],
)
def test_eight_real_images(
    real_data: Path,
    model: str,
    parts: dict[str, Any],
    steps: int,
    settings: dict[str, Any],
    metric: str,
    least: float,
) -> None:
    job = Job.resolve({"name": "overfit", "model": {"name": model}, "train": {**ADAMW, **settings}, **parts})
    cells = parts is CELLS
    folder = real_data / ("bccd/BCCD" if cells else "isbi2012_em/train")
    store = read("voc" if cells else "masks", folder, Wanted.by(job))
    eight = Examples(store, torch.arange(8))
    bench = Workbench(job, torch.device("cpu"))
    with determinism(True):
        train(bench, eight, Instruction("train", "r", "s", job, "", budget=Budget(steps=steps)), [{}, {}])
        values = bench.task.values(evaluate(bench, eight))
    print(f"{model}: {metric} {values[metric]:.3f} after {steps} steps")
    assert values[metric] >= least
