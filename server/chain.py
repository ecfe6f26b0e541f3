"""A job's stages one after another: the round loop of each, from what the one before left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

from server.coordinator import Coordinator
from server.outcome import Outcome, Totals
from shared_models.job import Job
from shared_models.privacy import Spend
from shared_models.spec import carried


def run_stages(job: Job, make: Callable[[Job, Mapping[str, Tensor]], Coordinator]) -> Outcome:
    """Every stage to its end; a job without stages is one.

    A stage that was finished before a crash is not trained again: its round loop finds the checkpoint of its last
    round, and only measures.

    Args:
        job: the whole job.
        make: (stage, start values) -> the round loop of that stage.

    Returns:
        The outcome of the last stage, with what all of them cost and what each of them reached.

    Raises:
        RunError, DeploymentError: as `Coordinator.run`.
    """
    start: dict[str, Tensor] = {}
    totals = Totals()
    reached: dict[str, Mapping[str, float]] = {}
    spent: Mapping[str, Sequence[Spend]] = {}
    for index, step in enumerate(job.steps):
        loop = make(step, start)
        loop.privacy.earlier = spent
        outcome = loop.run()
        spent = loop.privacy.spends()
        totals = added(totals, outcome.totals)
        if index + 1 < len(job.steps):
            reached[job.stages[index].name] = outcome.all_sites
            start = carried(step, job.steps[index + 1], outcome.model)
    return replace(outcome, totals=totals, stages=reached)


def stage_folder(folder: Path | None, step: Job) -> Path | None:
    """Where a stage leaves its traces: the run's own folder for the last one."""
    if folder is None or step.stage == len(step.whole.steps) - 1:
        return folder
    path = folder / "stages" / step.whole.stages[step.stage].name
    path.mkdir(parents=True, exist_ok=True)
    return path


def added(a: Totals, b: Totals) -> Totals:
    """What two trainings one after another cost."""
    return Totals(**{name: value + getattr(b, name) for name, value in asdict(a).items()})
