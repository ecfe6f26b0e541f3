"""Gradient inversion: what a server that looks at single answers sees of a site's images, with and without privacy."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from client.readers.base import Examples, Splits
from client.workbench import Workbench, determinism
from shared_models.errors import ConfigError
from shared_models.job import Job
from shared_models.keys import generator, key
from simulations.attacks.contribution import Answer, answer_of, single_step
from simulations.attacks.drawing import png
from simulations.attacks.levels import Level, require_classifier
from simulations.attacks.reconstruct import Search, by_optimisation, entrance, from_linear, mse, paired, psnr, ssim
from simulations.attacks.results import Inversion, Inverted, Quality, facts
from simulations.paradigms import POOLED
from simulations.partition import SitePopulation
from simulations.runs import Listen

LINEAR = "first layer"
SEARCHED = "optimisation"


def attack(
    job: Job,
    level_jobs: Sequence[Level],
    sites: SitePopulation,
    *,
    images: int,
    batch: int,
    search: Search | None = None,
    command: str = "",
    listen: Listen | None = None,
) -> Inversion:
    """Reconstruct images of the first site from its answers at every level.

    Args:
        job: as it was given, for the report.
        level_jobs: the same at each level, at least one.
        sites: of the simulation.
        images: how many in all.
        batch: how many in one answer.
        search: how the optimiser looks.
        command: how to repeat it, for the report.
        listen: hears of every answer, the round of a run of its own.

    Raises:
        ConfigError: the job or the counts are nothing to attack.
        RunError: the site refused.
    """
    started = time.perf_counter()
    require(job, sites, images, batch)
    site, splits = attacked(job, sites)
    rows = choose(splits.train, images, job.seed)
    truth = pixels(Examples(splits.train.store, rows))
    found: list[Inverted] = []
    for level in level_jobs:
        step = single_step(level.job, batch, len(splits.train))
        answers = [answer_of(step, site, splits, part, i + 1) for i, part in enumerate(rows.split(batch))]
        found += _invert(level, answers, splits, rows.split(batch), truth, search or Search(), listen)
    mean = pixels(splits.validation).mean(dim=0)
    blind = _inverted("no answer", "mean image", 0.0, [0.0], mean.expand_as(truth), truth)
    return Inversion(
        facts=facts(job, f"{job.name}: gradient inversion", command, started),
        site=site,
        held=len(splits.train),
        batch=batch,
        labels=[job.task.labels[c] for c in splits.train.store.y[rows].tolist()],
        truth=[png(image) for image in truth],
        blind=blind,
        levels=found,
    )


def attacked(job: Job, sites: SitePopulation) -> tuple[str, Splits]:
    """The site whose answers are looked at, and its examples: the first, or the one that holds all data."""
    return (POOLED, sites.pooled()) if job.place == "centralized" else (sites.names[0], sites.splits(sites.names[0]))


def require(job: Job, sites: SitePopulation, images: int, batch: int) -> None:
    """Raise a ConfigError where there is nothing to reconstruct."""
    site, splits = attacked(job, sites)
    require_classifier(job, "inversion")
    if job.data.form != "image":
        raise ConfigError(
            f"the inversion attack reconstructs images, and data.shape = {list(job.data.shape)} is none",
            hint="Attack a job on images",
        )
    if images % batch:
        raise ConfigError(f"--images {images} are not whole answers of --batch {batch} images", hint="Give a multiple")
    if images > len(splits.train):
        raise ConfigError(
            f"--images {images}, but site '{site}' has {len(splits.train)} training images", hint="Give fewer"
        )


def choose(examples: Examples, count: int, seed: int) -> Tensor:
    """(count,) rows of the store, drawn so that every class has its turn before one comes again."""
    order = torch.randperm(len(examples), generator=generator(seed, "inversion")).tolist()
    turns: dict[int, int] = {}
    place: list[tuple[int, int, int]] = []
    for i in order:
        label = int(examples.y[i])
        place.append((turns.get(label, 0), len(place), i))
        turns[label] = turns.get(label, 0) + 1
    return examples.rows[torch.tensor([i for *_, i in sorted(place)[:count]])]


def pixels(examples: Examples) -> Tensor:
    """(N, C, H, W) from 0 to 1."""
    return examples.store.x[examples.rows].float() / examples.store.unit


def _invert(
    level: Level,
    answers: Sequence[Answer],
    splits: Splits,
    parts: Sequence[Tensor],
    truth: Tensor,
    search: Search,
    listen: Listen | None,
) -> list[Inverted]:
    """One entry for each way that can be gone."""
    job, store = answers[0].job, splits.train.store
    bench, (shift, scale) = Workbench(job), store.scale
    box = ((0.0 - shift) / scale, (store.unit - shift) / scale)
    layer = entrance(bench.model) if len(parts[0]) == 1 else None
    linear, searched, near = [], [], []

    def raw(x: Tensor) -> Tensor:
        return ((x.reshape(-1, *job.data.shape) * scale + shift) / store.unit).clamp(0, 1)

    for index, (answer, rows) in enumerate(zip(answers, parts, strict=True)):
        if layer is not None:
            linear.append(raw(from_linear(answer.gradient[f"{layer}.weight"], answer.gradient[f"{layer}.bias"])))
        bench.load(answer.down["model"], {})
        with determinism(job.train.deterministic):
            x, cosine = by_optimisation(
                bench, answer.gradient, store.y[rows], box, search, key(job.seed, "start", step=index)
            )
        searched.append(paired(raw(x), pixels(Examples(store, rows))))
        near.append(cosine)
        if listen is not None:
            listen(f"{level.name}, answer {index + 1} of {len(answers)}", job.seed, {"event": "round"})
    found = [_inverted(level.name, SEARCHED, answers[0].noise, near, torch.cat(searched), truth)]
    if linear:
        found.insert(0, _inverted(level.name, LINEAR, answers[0].noise, [], torch.cat(linear), truth))
    return found


def _inverted(
    level: str, way: str, noise: float, similarity: Sequence[float], images: Tensor, truth: Tensor
) -> Inverted:
    errors = [mse(a, b) for a, b in zip(images, truth, strict=True)]
    alike = [ssim(a, b) for a, b in zip(images, truth, strict=True)]
    quality = Quality(mse=errors, psnr=[psnr(e) for e in errors], ssim=alike)
    drawn = [png(image) for image in images]
    return Inverted(level=level, way=way, noise=noise, similarity=list(similarity), quality=quality, images=drawn)
