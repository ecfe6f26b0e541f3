"""What a comparison runs: which job each cell is, and how much work all of them are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from shared_models.errors import ConfigError
from shared_models.job import Job
from shared_models.job_parts import PrivacyPart
from shared_models.methods.base import make_method, overrides
from shared_models.methods.base import methods as known_methods
from shared_models.registry import nearest
from simulations.partition import SitePopulation
from simulations.results import Place, Time
from simulations.runs import Run

PLACES: tuple[Place, ...] = ("centralized", "federated", "isolated")
TIMES: tuple[Time, ...] = ("offline", "continual")
SHARED = ("buffer", "replay")  # keys of `[continual]` that mean the same for all methods
OFFLINE: tuple[tuple[Place, Time], ...] = tuple((place, "offline") for place in PLACES)


def variant(job: Job, place: Place, time: Time, seed: int) -> Job:
    """The job of one cell. A single site aggregates nothing, so every method is plain local training there.

    But one that solves instead of training (k-means, PCA) does so at a single site too. A job whose unit of privacy is
    the site has none at a place without other sites; its table says so.
    """
    changes: dict[str, Any] = {"place": place, "time": time, "seed": seed}
    if job.privacy.mode == "client" and place != "federated":  # no other site to be hidden among
        changes["privacy"] = PrivacyPart().model_dump()
    if place != "federated":  # a lone model has no other to be personal beside, and would be measured with half of it
        changes |= _alone(job, {})
        changes["stages"] = [
            {**stage.model_dump(), **_alone(step, stage.changes)}
            for stage, step in zip(job.stages, job.steps, strict=False)
        ]
    return job.replace(**changes)


def _alone(step: Job, stage: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What changes in a job, or in the tables of a stage, where a single site carries it out."""
    alone: dict[str, dict[str, Any]] = {"share": {"personal": []}, "federation": {"min_sites": 1}}
    if not overrides(make_method(step), "answer"):
        alone["method"] = {"name": "fedavg"}
    if step.whole is step:
        return alone
    kept = {"share": stage.get("share", {}), "federation": stage.get("federation", {}), "method": {}}
    return {table: {**kept[table], **keys} for table, keys in alone.items() if table in stage}


def plan(
    job: Job, sites: int, paradigms: Sequence[tuple[Place, Time]], seeds: Sequence[int], methods: Sequence[str] = ()
) -> list[list[Run]]:
    """The runs of a comparison: a list a cell, a run a seed. Offline there is nothing for a continual method to do.

    Other methods than the job's own take of its `[continual]` what all have in common, the size of the memory. All keep
    the same number of examples in all, at every place: a single client keeps as many as all sites together.

    Args:
        job: place, time, seed and continual method of it are replaced by the cells'.
        sites: how many there are.
        paradigms: (place, time) of each cell; a continual one becomes one for each method.
        seeds: of initialisation and order.
        methods: continual methods; by default the job's own.

    Raises:
        FedzooError: a method is unknown, or does not go with the job.
    """
    if methods and all(time == "offline" for _, time in paradigms):
        raise ConfigError(
            f"continual methods ({', '.join(methods)}) have nothing to do offline", hint="Add --time offline,continual"
        )
    cells = []
    for place, time in paradigms:
        for method in (
            (dict.fromkeys(methods) or (job.continual.name,)) if time == "continual" else (job.continual.name,)
        ):
            known = known_methods.get(method, "--continual").Settings.model_fields
            own = method == job.continual.name
            keys = {k: v for k, v in job.continual.keys.items() if own or (k in known and k in SHARED)}
            chosen = job.replace(continual={"name": method, **keys})
            cells.append([Run(with_memory(variant(chosen, place, time, seed), sites)) for seed in seeds])
    return cells


def with_memory(job: Job, sites: int) -> Job:
    """The same; where one client stands for all sites it keeps as many examples as they do together."""
    buffer = job.continual.keys.get("buffer")
    if job.place != "centralized" or not buffer:
        return job
    return job.replace(continual={**job.continual.model_dump(), "buffer": buffer * sites})


def as_paradigms(places_text: str, times_text: str) -> list[tuple[Place, Time]]:
    """`federated,isolated` and `offline,continual` -> every pair, offline first; raises ConfigError."""
    chosen = cast(list[Place], _choices(places_text, PLACES, "place"))
    return [(place, time) for time in cast(list[Time], _choices(times_text, TIMES, "time")) for place in chosen]


def _choices(text: str, known: Sequence[str], what: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown {what} '{name}'", hint=nearest(name, list(known)))
    return list(dict.fromkeys(names)) or list(known)


def count_rounds(sites: SitePopulation, planned: Sequence[Sequence[Run]]) -> int:
    """Rounds that these runs will make."""
    return sum(run.rounds(len(sites.names)) for cell in planned for run in cell)
