"""The report of a simulation shows test images: what is drawn is what the annotation and the model say."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from client.readers.base import Store
from shared_models.job import Job
from simulations import report
from simulations.compare import compare, run_one
from simulations.partition import SitePopulation, make_partition
from simulations.pictures import COLOURS

AMBER = ImageColor.getrgb(COLOURS[0])


def a_job(model: str, task: dict[str, Any]) -> Job:
    return Job.resolve({
        "name": "pictures", "model": {"name": model}, "task": task, "data": {"shape": [1, 16, 16], "parts": "blocks"},
        "train": {"batch_size": 4}, "federation": {"rounds": 1, "min_sites": 2},
        "simulation": {"partition": "blocks", "sites": 2},
    })  # fmt: skip


def a_pool(job: Job, y: torch.Tensor) -> SitePopulation:
    x = torch.full((len(y), 1, 16, 16), 60, dtype=torch.uint8)
    store = Store(x, y, [f"{i}.png" for i in range(len(y))], job.data)
    return SitePopulation(store, make_partition(store, job.simulation))


def decoded(image: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB")).astype(int)


def test_masks_lie_over_their_images(tmp_path: Path) -> None:
    job = a_job("unet", {"name": "segmentation", "labels": ["tissue", "lesion"]})
    masks = torch.zeros(20, 16, 16, dtype=torch.uint8)
    masks[:, 4:8, 2:14] = 1
    masks[:, 12:, :] = 255
    found = compare(job, a_pool(job, masks), seeds=[0], folder=None)
    assert [p.paradigm for p in found.pictures] == ["truth", *(cell.name for cell in found.cells)]
    assert {len(p.images) for p in found.pictures} == {3}
    truth = decoded(found.pictures[0].images[0])
    side = len(truth) // 16
    small = truth[side // 2 :: side, side // 2 :: side]
    mixed = [60 + (c - 60) * 130 / 255 for c in AMBER]
    assert np.abs(small[4:8, 2:14] - mixed).max() < 2
    assert (small[:4] == 60).all()
    assert (small[12:] == 60).all(), "what counts nowhere is not coloured"
    assert found.colours == {"tissue": "", "lesion": COLOURS[0]}
    page = report.write(found, tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3 * len(found.pictures)
    assert "as annotated" in page
    assert "tissue (not coloured)" in page


def test_boxes_are_drawn_where_they_are(tmp_path: Path) -> None:
    job = a_job("yolo", {"name": "detection", "labels": ["cell"]}).replace(data={"shape": [1, 16, 16]})
    boxes = torch.tensor([[[0, 0.25, 0.25, 0.75, 0.5], [-1, 0, 0, 0, 0]]]).repeat(40, 1, 1)
    found = run_one(job.replace(data={"parts": "blocks"}), a_pool(job, boxes), tmp_path, "fedzoo simulate")
    drawn = decoded(found.pictures[0].images[0])
    rows, columns = np.nonzero((drawn == AMBER).all(axis=2))
    scale = len(drawn) / 16
    assert (columns.min() / scale, rows.min() / scale) == pytest.approx((4, 4), abs=0.2)
    assert (columns.max() / scale, rows.max() / scale) == pytest.approx((12, 8), abs=0.2)
    assert found.partition.counted == "boxes"
    assert sum(found.partition.sites["site-1"]["train"].values()) == found.partition.sizes["site-1"]["train"]


def test_a_class_has_no_place_in_the_image(tmp_path: Path) -> None:
    job = a_job("cnn", {"labels": ["no", "yes"]})
    found = run_one(job, a_pool(job, torch.arange(40) % 2), tmp_path, "fedzoo simulate")
    assert found.pictures == []
    assert "Test images" not in report.write(found, tmp_path / "report.html").read_text(encoding="utf-8")
