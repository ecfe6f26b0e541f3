"""Test images with what each paradigm's model says of them, for the report of a simulation.

Pictures exist in simulations alone, where one machine holds all data anyway; a node never makes or sends one.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import torch
from PIL import Image, ImageColor, ImageDraw
from torch import Tensor

from client.readers.base import Examples
from client.workbench import Workbench, determinism
from shared_models.job import Job
from shared_models.tasks.base import IGNORED, Target, make_task
from simulations.paradigms import Result
from simulations.partition import SitePopulation
from simulations.results import Picture

SHOWN = 3  # test images
SIDE = 256  # pixels of a picture's longer side, about
SURE = 0.5  # detections below this score are not drawn
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999")
"""Okabe and Ito's palette, told apart also by people who do not see all colours."""


def pictures(job: Job, sites: SitePopulation, result: Result, name: str) -> list[Picture]:
    """What the result's (first) model says of the first test images; nothing for tasks without a place in the image."""
    if not _drawable(job):
        return []
    model = next(iter(result.models))
    measured = result.statistics[model]
    examples = first_tests(sites)
    if measured:
        store = examples.store.normalised_by(*(torch.tensor(measured[key]) for key in ("mean", "std")))
        examples = Examples(store, examples.rows)
    bench = Workbench(job, start=result.models[model])
    bench.model.eval()
    with determinism(job.train.deterministic), torch.inference_mode():
        batch = examples.batch(torch.arange(len(examples)), bench.device)
        said = bench.task.predict(bench.task.forward(bench.model, batch), batch)
    return [Picture(paradigm=name, images=_draw(job, examples, said.cpu()))]


def with_truth(job: Job, sites: SitePopulation, drawn: Sequence[Picture]) -> list[Picture]:
    """The same, the annotation in front."""
    if not drawn:
        return []
    examples = first_tests(sites)
    return [Picture(paradigm="truth", images=_draw(job, examples, examples.y)), *drawn]


def colours(job: Job) -> dict[str, str]:
    """Label -> its colour in the pictures; empty for a mask's first label, whose pixels stay as they are."""
    target = make_task(job).target
    if not _drawable(job):
        return {}
    return {label: "" if target == "mask" and i == 0 else _colour(i, target) for i, label in enumerate(job.task.labels)}


def _colour(index: int, target: Target) -> str:
    return COLOURS[(index - (target == "mask")) % len(COLOURS)]


def _drawable(job: Job) -> bool:
    return make_task(job).target in ("mask", "box", "boxes")


def first_tests(sites: SitePopulation) -> Examples:
    """The first test image of each of the first sites, or more of the first where there are few sites."""
    tests = [sites.splits(name).test for name in sites.names[:SHOWN]]
    rows = [row for place in range(SHOWN) for test in tests for row in test.rows[place : place + 1].tolist()]
    return Examples(sites.store, torch.tensor(rows[:SHOWN]))


def _draw(job: Job, examples: Examples, marks: Tensor) -> list[str]:
    """One PNG for each example, its mask laid over it or its boxes drawn on it."""
    target = make_task(job).target
    found = []
    for x, mark in zip(examples.store.x[examples.rows], marks, strict=True):
        pixels = x.permute(1, 2, 0).numpy() if len(x) == 3 else x[0].numpy()
        image = Image.fromarray(pixels).convert("RGB")
        factor = max(1, round(SIDE / max(image.size)))
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        if target == "mask":
            image = _overlay(image, mark)
        else:
            _boxes(image, mark[None] if target == "box" else mark, target == "box")
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        found.append(base64.b64encode(buffer.getvalue()).decode())
    return found


def _overlay(image: Image.Image, mask: Tensor) -> Image.Image:
    """Class 1 and on in colour, half transparent; class 0 and ignored pixels as they are."""
    layer = Image.new("RGBA", (mask.shape[1], mask.shape[0]))
    shown = (ImageColor.getrgb(_colour(i, "mask")) for i in range(1, IGNORED))
    table = torch.tensor([(0, 0, 0, 0), *((*colour, 130) for colour in shown), (0, 0, 0, 0)])
    layer = Image.fromarray(table.to(torch.uint8)[mask.long()].numpy(), "RGBA")
    layer = layer.resize(image.size, Image.Resampling.NEAREST)
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def _boxes(image: Image.Image, rows: Tensor, plain: bool) -> None:
    pen = ImageDraw.Draw(image)
    width, height = image.size
    for row in rows.tolist():
        label, corners, score = (0, row, 1.0) if plain else (int(row[0]), row[1:5], row[5] if len(row) > 5 else 1.0)
        if label < 0 or score < SURE:
            continue
        x0, y0, x1, y1 = (c * side for c, side in zip(corners, (width, height, width, height), strict=True))
        if x1 > x0 and y1 > y0:
            pen.rectangle((x0, y0, x1, y1), outline=_colour(label, "boxes"), width=2)
