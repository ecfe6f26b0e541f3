"""Every model that draws boxes or masks learns eight real images by heart, with the trainer that nodes use.

Blood cells (BCCD) to an mAP50 of 0.9; the sliding window, which moves no box, to 0.5. The corners of eight slices of
electron microscopy to a Dice of the membrane of 0.9. Up to two minutes each on one core, SAM five:
`pytest -m slow tests/shared_models/test_overfit.py`.
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
    "train": {"optimizer": "adamw", "weight_decay": 1e-4, "schedule": "cosine"},
}
MEMBRANES: dict[str, Any] = {
    "data": {"shape": [1, 128, 128], "tile": [128, 128], "std": [0.2]},
    "task": {
        "name": "segmentation", "labels": ["cell", "membrane"], "aliases": {"0": "membrane", "255": "cell"},
        "score": ["membrane"],
    },
    "train": {"optimizer": "adamw", "batch_size": 4, "schedule": "cosine"},
}  # fmt: skip
PROMPTS: dict[str, Any] = {
    "data": {"shape": [1, 96, 96], "tile": [192, 192]},
    "task": {
        "name": "promptable", "labels": ["membrane", "cell"], "aliases": {"0": "membrane", "255": "cell"},
        "smallest": 200, "alpha": 0.75,
    },
    "train": {"optimizer": "adamw", "schedule": "cosine", "warmup": 0.05, "clip": 1.0},
}  # fmt: skip


def learned(form: str, root: Path, job: Job, steps: int) -> dict[str, float]:
    """The values on eight images, one of each of the first eight files, after so many steps on the same."""
    store = read(form, root, Wanted.by(job))
    first = {name: row for row, name in reversed(list(enumerate(store.together)))}
    eight = Examples(store, torch.tensor(sorted(first.values())[:8]))
    bench = Workbench(job, torch.device("cpu"))
    with determinism(True):
        train(bench, eight, Instruction("train", "r", "s", job, "", budget=Budget(steps=steps)), [{}, {}])
        return bench.task.values(evaluate(bench, eight))


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
def test_boxes(real_data: Path, model: str, steps: int, settings: dict[str, Any], least: float) -> None:
    train = {**CELLS["train"], **settings}
    job = Job.resolve({"name": "overfit", "model": {"name": model}, **CELLS, "train": train})
    found = learned("voc", real_data / "bccd" / "BCCD", job, steps)["map50"]
    print(f"{model}: mAP50 {found:.3f} after {steps} steps")
    assert found >= least


@pytest.mark.parametrize(
    ("model", "steps", "settings"),
    [
        ("patchwise", 900, {"lr": 0.005, "batch_size": 2}),
        ("fcn", 400, {"lr": 0.005}),
        ("unet", 200, {"lr": 0.005}),
        ("segmenter", 250, {"lr": 0.004}),
    ],
)
def test_masks(real_data: Path, model: str, steps: int, settings: dict[str, Any]) -> None:
    train = {**MEMBRANES["train"], **settings}
    job = Job.resolve({"name": "overfit", "model": {"name": model}, **MEMBRANES, "train": train})
    found = learned("masks", real_data / "isbi2012_em" / "train", job, steps)["dice"]
    print(f"{model}: Dice {found:.3f} after {steps} steps")
    assert found >= 0.9


def test_prompts(real_data: Path) -> None:
    train = {**PROMPTS["train"], "lr": 0.001, "batch_size": 8}
    job = Job.resolve({"name": "overfit", "model": {"name": "sam"}, **PROMPTS, "train": train})
    found = learned("masks", real_data / "isbi2012_em" / "train", job, 1000)["dice"]
    print(f"sam: Dice {found:.3f} after 1000 steps")
    assert found >= 0.9
