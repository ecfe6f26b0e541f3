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
    "data": {"shape": [3, 120, 160], "mean": [0.7, 0.65, 0.7], "std": [0.2, 0.2, 0.15]},
    "task": {"name": "detection", "labels": ["RBC", "WBC", "Platelets"]},
}
ADAMW = {"optimizer": "adamw", "schedule": "cosine", "batch_size": 4}


@pytest.mark.parametrize(
    ("model", "settings", "parts", "steps", "lr", "metric", "least"),
    [
        ("patchwise", {}, MEMBRANES, 400, 0.003, "dice", 0.9),
        ("fcn", {}, MEMBRANES, 600, 0.003, "dice", 0.9),
        ("unet", {}, MEMBRANES, 300, 0.003, "dice", 0.9),
        ("segmenter", {}, MEMBRANES, 400, 0.002, "dice", 0.9),
        ("sam", {}, OBJECTS, 1200, 0.001, "dice", 0.9),
        ("sliding-window", {}, CELLS, 400, 0.002, "map50", 0.5),
        ("rcnn", {}, CELLS, 600, 0.002, "map50", 0.9),
        ("sppnet", {}, CELLS, 600, 0.002, "map50", 0.9),
        ("fast-rcnn", {}, CELLS, 600, 0.002, "map50", 0.9),
        ("faster-rcnn", {}, CELLS, 600, 0.002, "map50", 0.9),
        ("yolo", {}, CELLS, 600, 0.002, "map50", 0.9),
        ("detr", {}, CELLS, 1500, 0.001, "map50", 0.9),
    ],
)
def test_eight_real_images(
    real_data: Path, model: str, settings: dict[str, Any], parts: dict[str, Any], steps: int, lr: float,
    metric: str, least: float,
) -> None:  # fmt: skip
    job = Job.resolve({
        "name": "overfit", "model": {"name": model, **settings}, "train": {**ADAMW, "lr": lr}, **parts,
    })  # fmt: skip
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
