"""The places of learning as one program: each paradigm is the round loop over other sites with an equal budget.

| place       | who trains                                   | who measures   |
|-------------|----------------------------------------------|----------------|
| federated   | the selected sites, aggregated by the method | every site     |
| isolated    | each site alone, when it would be selected   | every site     |
| centralized | one site that holds all data                 | every site     |

The budget is exact in samples: in every round, centralized processes as many as the federated cohort together, and
each isolated site as many as it would in the federation. Time is in the job: a continual job is a stream, whatever the
place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from client.private import simulated_secret
from client.readers.base import Splits
from client.workbench import Benches
from server.chain import run_stages, stage_folder
from server.coordinator import Coordinator
from server.events import Events, Listener
from server.outcome import Outcome, Totals
from server.selection import select
from shared_models.errors import ConfigError
from shared_models.job import Job
from shared_models.messages import Budget
from shared_models.registry import Registry
from shared_models.schedule import count_samples, present, round_budget, stage_run, task_of
from shared_models.tasks.base import make_task
from simulations.engines.inprocess import InProcess
from simulations.partition import SitePopulation

POOLED = "all-sites"


@dataclass(frozen=True)
class Result:
    """What one paradigm reached with one seed. Metrics are the task's headline.

    Attributes:
        all_sites: on all sites' tests together (isolated: mean over the sites' models).
        own_site: mean over sites of the metric on each site's own test.
        per_site: site -> on its own test.
        per_site_all: site -> its model on all sites' tests (the one shared model where there is only one).
        metrics: every metric of the task on all sites' tests together, and the headline's mean over the sites' tests,
            each of them counting alike (isolated: mean over the sites' models).
        curve: validation, one row a round (isolated: mean over the sites' curves).
        matrix: R[t][i] of a stream, else None.
        known: the same with the task known, where tasks are sets of classes; else None.
        untrained: the metric on each task before any training; None without a stream.
        models: name -> final weights; one entry, or one per isolated site.
        statistics: name -> mean and std that were measured at the sites, as for `models`; empty without.
        privacy: what was spent (`Outcome.privacy`); empty without privacy.
    """

    all_sites: float
    own_site: float
    per_site: Mapping[str, float]
    per_site_all: Mapping[str, float]
    metrics: Mapping[str, float]
    curve: Sequence[Mapping[str, float]]
    matrix: Sequence[Sequence[float]] | None
    known: Sequence[Sequence[float]] | None
    untrained: Sequence[float] | None
    totals: Totals
    fingerprint: str
    models: Mapping[str, Mapping[str, Any]]
    statistics: Mapping[str, Mapping[str, Sequence[float]]]
    privacy: Mapping[str, Any]


Paradigm = Callable[["Setting"], Result]
Budgets = Callable[["Setting"], Callable[[int, str], Budget | None]]
paradigms: Registry[Paradigm] = Registry("paradigm", "simulations.paradigms")


@dataclass(frozen=True)
class Setting:
    """What every paradigm is given: the job with its time and seed, the sites, and where to leave traces.

    Another `draw` is the same job with other secrets: other noise and sampling, the same start.
    """

    job: Job
    sites: SitePopulation
    benches: Benches
    run: str = "simulation"
    folder: Path | None = None
    listener: Listener | None = None
    draw: int = 0

    def require_measurable(self) -> None:
        """Raise a ConfigError where no site has test examples of some task of the stream."""
        for step in self.job.steps:
            sites = self.sites.at(step.stage)
            for task, classes in enumerate(step.tasks if len(step.tasks) > 1 else ()):
                if any(len(sites.splits(name).test.of_tasks(step, (task,))) for name in sites.names):
                    continue
                labels = ", ".join(step.task.labels[c] for c in classes)
                raise ConfigError(
                    f"no site has a test example of task {task} ({labels}), so nothing could be said about it",
                    hint="Lower stream.tasks, or give those labels examples",
                )

    def carry_out(self, names: Sequence[str], name: str = "", budget: Budgets | None = None) -> Outcome:
        """The round loop, or that of every stage, in which `names` train and every site measures.

        Args:
            names: of the sites that train.
            name: of the sub-folder for its traces.
            budget: the setting of one stage -> (round, site) -> its budget; by default the job's own.
        """
        self.require_measurable()
        folder = self.folder / name if self.folder and name else self.folder
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "job.toml").write_text(self.job.to_toml(), encoding="utf-8")
        events = Events(folder / "events.jsonl" if folder else None, self.listener)

        def round_loop(step: Job, start: Mapping[str, Tensor]) -> Coordinator:
            setting = replace(self, job=step, sites=self.sites.at(step.stage))
            return Coordinator(
                step,
                InProcess(names, setting.splits, self.benches, draw=self.draw),
                stage_run(self.run, step),
                folder=stage_folder(folder, step),
                events=events,
                evaluators=self.sites.names,
                start=start,
                budget=budget(setting) if budget else None,
                secret=simulated_secret(step, "", self.draw) if self.draw else None,
            )

        return run_stages(self.job, round_loop)

    def splits(self, name: str) -> Splits:
        """A site's examples, or everybody's for the pooled client."""
        return self.sites.pooled() if name == POOLED else self.sites.splits(name)

    def cohort(self, round: int) -> list[str]:
        """The sites that the federation selects in a round."""
        there = present(self.job, self.sites.names, round)
        return select(there, self.job.federation.fraction, self.job.seed, round)


def paradigm(name: str) -> Callable[[Paradigm], Paradigm]:
    """Decorator that registers a function Setting -> Result as a place."""
    return paradigms.register(name)


@paradigm("federated")
def federated(setting: Setting) -> Result:
    """The sites as the job says."""
    outcome = setting.carry_out(setting.sites.names)
    return _one_model(setting, outcome, outcome.totals)


@paradigm("centralized")
def centralized(setting: Setting) -> Result:
    """One client with everybody's data. Only a simulation can have it: in a real federation no one may pool them.

    Its bytes up are the pooled examples, sent once; no model travels.
    """

    def budget(step: Setting) -> Callable[[int, str], Budget | None]:
        pooled = step.sites.pooled()

        def of_round(round: int, site: str) -> Budget | None:
            if step.job.privacy.mode == "sample" and step.job.federation.fraction == 1:
                return round_budget(
                    step.job, round
                )  # the noise is found for the job's own budget, which is the same but for rounding
            task, size = task_of(step.job, round), step.job.train.batch_size
            held = {s: count for s in step.cohort(round) if (count := _held(step, step.splits(s), task))}
            samples = sum(count_samples(count, size, round_budget(step.job, round, s)) for s, count in held.items())
            return Budget(epochs=samples / _held(step, pooled, task)) if held else None

        return of_round

    outcome = setting.carry_out([POOLED], budget=budget)
    totals = outcome.totals
    held = (setting.sites.at(step.stage).pooled().train.nbytes for step in setting.job.steps)
    totals.bytes_up, totals.bytes_metrics, totals.bytes_down = max(held), 0, 0
    return _one_model(setting, outcome, totals)


@paradigm("isolated")
def isolated(setting: Setting) -> Result:
    """Each site alone: as many models as sites, nothing leaves anyone."""
    outcomes: dict[str, Outcome] = {}
    for name in setting.sites.names:

        def budget(step: Setting) -> Callable[[int, str], Budget | None]:
            return lambda round, site: round_budget(step.job, round, site) if site in step.cohort(round) else None

        outcomes[name] = setting.carry_out([name], name, budget)
    headline = _headline(setting)
    own = {name: o.per_site[name][headline] for name, o in outcomes.items()}
    everywhere = {name: o.all_sites[headline] for name, o in outcomes.items()}
    every = list(outcomes.values())
    return Result(
        all_sites=_mean(everywhere.values()),
        own_site=_mean(own.values()),
        per_site=own,
        per_site_all=everywhere,
        metrics={name: _mean(_metrics(setting, o)[name] for o in every) for name in _metrics(setting, every[0])},
        curve=_mean_curve([o.curve for o in every]),
        matrix=_mean_matrix([o.matrix for o in every]),
        known=_mean_matrix([o.known for o in every]),
        untrained=[_mean(values) for values in zip(*(o.untrained for o in every), strict=True)] or None,
        totals=_add([o.totals for o in every]),
        fingerprint=every[0].fingerprint,
        models={name: o.model for name, o in outcomes.items()},
        statistics={name: o.statistics for name, o in outcomes.items()},
        privacy=_side_by_side([o.privacy for o in every]),
    )


def _one_model(setting: Setting, outcome: Outcome, totals: Totals) -> Result:
    headline = _headline(setting)
    own = {name: values[headline] for name, values in outcome.per_site.items()}
    return Result(
        all_sites=outcome.all_sites[headline],
        own_site=_mean(own.values()),
        per_site=own,
        per_site_all=dict.fromkeys(own, outcome.all_sites[headline]),
        metrics=_metrics(setting, outcome),
        curve=outcome.curve,
        matrix=outcome.matrix or None,
        known=outcome.known or None,
        untrained=outcome.untrained or None,
        totals=totals,
        fingerprint=outcome.fingerprint,
        models={"model": outcome.model},
        statistics={"model": outcome.statistics},
        privacy=outcome.privacy,
    )


def _side_by_side(spent: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """What sites spent that never met: each its own; the statement is that of the one that spent most."""
    if not spent[0]:
        return {}
    most = max(spent, key=lambda one: max(one["epsilon"].values(), default=0.0))
    return {**most, "epsilon": {site: value for one in spent for site, value in one["epsilon"].items()}}


def _metrics(setting: Setting, outcome: Outcome) -> dict[str, float]:
    headline = _headline(setting)
    alike = _mean(values[headline] for values in outcome.per_site.values())
    earlier = {
        f"{headline}:{stage}": values[headline] for stage, values in outcome.stages.items() if headline in values
    }
    return {**outcome.all_sites, f"{headline}:mean of sites": alike, **earlier}


def _held(setting: Setting, splits: Splits, task: int) -> int:
    """Training examples that are there in the rounds of one task."""
    return len(splits.train.due(setting.job, task))


def _headline(setting: Setting) -> str:
    return make_task(setting.job.steps[-1]).headline


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _mean_curve(curves: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """Per round, the mean over the sites that have a value there."""
    rows: dict[float, list[Mapping[str, float]]] = {}
    for curve in curves:
        for row in curve:
            rows.setdefault(row["round"], []).append(row)
    return [{k: _mean(row[k] for row in rows[r]) for k in rows[r][0]} for r in sorted(rows)]


def _mean_matrix(matrices: Sequence[Sequence[Sequence[float]]]) -> list[list[float]] | None:
    if not matrices[0]:
        return None
    return [[_mean(values) for values in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]


def _add(totals: Sequence[Totals]) -> Totals:
    """Sites work side by side: samples and resets add up, sequential steps are the slowest site's."""
    return Totals(
        rounds=max(t.rounds for t in totals),
        samples=sum(t.samples for t in totals),
        sequential_steps=max(t.sequential_steps for t in totals),
        optimizer_resets=sum(t.optimizer_resets for t in totals),
        rejections=sum(t.rejections for t in totals),
        seconds=sum(t.seconds for t in totals),
    )
