"""Membership inference on models that the job itself trains: shadows, targets, and what can be said of them.

Every model is a whole run of the job over the in-process engine (same place, method, privacy, start), in which each
site trains on a part of its examples. The attacker knows what a server knows of a job, its seed, and so the start and
the order of batches, but not the sites' secrets: noise and Poisson sampling are drawn anew for each model. It questions
the final model only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from client.readers.base import Examples, Splits
from client.trainer import in_order
from client.workbench import Benches, Workbench, determinism
from shared_models.errors import ConfigError
from shared_models.job import Job
from shared_models.keys import generator
from shared_models.privacy import statement
from shared_models.tasks.base import make_task
from simulations.attacks.audit import auc, least_epsilon, most_auc, most_tpr, roc
from simulations.attacks.levels import Level, require_classifier
from simulations.attacks.lira import log_ratio, scaled_confidence
from simulations.attacks.results import Guessed, Membership, facts
from simulations.paradigms import Result, Setting, paradigms
from simulations.partition import SitePopulation
from simulations.runs import Listen
from simulations.statistics import summarize

FEWEST = 10  # candidates of a site
RATES = (0.01, 0.001)
POINTS = 400  # of a ROC curve that is kept


class Chosen(SitePopulation):
    """The same sites, which train on some of their examples only.

    Args:
        sites: with all of them.
        chosen: (N,) bool over the store.
    """

    def __init__(self, sites: SitePopulation, chosen: Tensor) -> None:
        super().__init__(sites.store, sites.partition, test=sites.test)
        self.chosen = chosen

    def own(self, name: str) -> Splits:
        """One site's parts; validation and test are whole."""
        whole = super().own(name)
        rows = whole.train.rows
        return Splits(Examples(self.store, rows[self.chosen[rows]]), whole.validation, whole.test)


@dataclass(frozen=True)
class Questioned:
    """Models of one job and their confidences.

    Attributes:
        phi: (K, C) of K models on C candidates.
        accuracy: K values of the headline.
        epsilon: the most that a site has spent in any of them; None without privacy.
    """

    phi: Tensor
    accuracy: Sequence[float]
    epsilon: float | None


def attack(
    job: Job,
    level_jobs: Sequence[Level],
    sites: SitePopulation,
    *,
    shadows: int,
    targets: int,
    command: str = "",
    listen: Listen | None = None,
) -> Membership:
    """Train shadows and targets at every level and guess who was in the targets.

    Args:
        job: as it was given, for the report.
        level_jobs: the same at each level, at least one.
        sites: whose training examples are the candidates.
        shadows: models that the attacker trains, each candidate in half of them; even.
        targets: models that are attacked, each candidate in by a fair coin.
        command: how to repeat it, for the report.
        listen: hears every event of every run.

    Raises:
        ConfigError: the job, the sites or the counts are nothing to attack.
    """
    started = time.perf_counter()
    require(job, sites, shadows, targets)
    candidates = sites.pooled().train
    drawn = torch.cat([halves(sites, shadows, job.seed), coins(sites, targets, job.seed)])
    seen = drawn[:, candidates.rows]
    members = seen[shadows:].numpy()
    found = []
    for level in level_jobs:
        asked = question(level, sites, drawn, candidates, listen)
        scores = log_ratio(asked.phi[shadows:], asked.phi[:shadows], seen[:shadows]).numpy()
        found.append(judge(level, asked, scores, members, shadows, job.privacy.delta))
    return Membership(
        facts=facts(job, f"{job.name}: membership inference", command, started),
        metric=make_task(job).headline,
        candidates=len(candidates),
        shadows=shadows,
        targets=targets,
        non_members=int((~members).sum()),
        delta=job.privacy.delta,
        levels=found,
    )


def require(job: Job, sites: SitePopulation, shadows: int, targets: int) -> None:
    """Raise a ConfigError where there is nothing to attack, or nothing could be said."""
    require_classifier(job, "membership")
    if shadows < 4 or shadows % 2:
        raise ConfigError(
            f"--shadows {shadows}: each candidate is in half of them, and a Gaussian needs two models on each side",
            hint="Give an even number from 4 on",
        )
    if targets < 2:
        raise ConfigError(f"--targets {targets}: an interval needs two target models", hint="Give 2 or more")
    for name in sites.names:
        if (held := len(sites.splits(name).train)) < FEWEST:
            raise ConfigError(
                f"site '{name}' has {held} training examples, and a model on half of them says nothing",
                hint=f"Lower simulation.sites, so that each has {FEWEST} at least",
            )


def halves(sites: SitePopulation, models: int, seed: int) -> Tensor:
    """(models, N) bool: at each site a random half and then the other half, so that every example is in half of all."""
    drawn = torch.zeros(models, len(sites.store.names), dtype=torch.bool)
    for name in sites.names:
        rows = sites.splits(name).train.rows
        for pair in range(models // 2):
            order = rows[torch.randperm(len(rows), generator=generator(seed, "shadow", site=name, step=pair))]
            drawn[2 * pair, order[: len(rows) // 2]] = True
            drawn[2 * pair + 1, order[len(rows) // 2 :]] = True
    return drawn


def coins(sites: SitePopulation, models: int, seed: int) -> Tensor:
    """(models, N) bool: each training example by a fair coin of its own."""
    drawn = torch.zeros(models, len(sites.store.names), dtype=torch.bool)
    for name in sites.names:
        rows = sites.splits(name).train.rows
        for model in range(models):
            tossed = torch.rand(len(rows), generator=generator(seed, "target", site=name, step=model)) < 0.5
            drawn[model, rows[tossed]] = True
    return drawn


def question(
    level: Level, sites: SitePopulation, drawn: Tensor, candidates: Examples, listen: Listen | None = None
) -> Questioned:
    """Train one model for each row of `drawn` and ask it about all candidates.

    Args:
        level: whose job is run.
        sites: that train.
        drawn: (K, N) bool over the store: who is in.
        candidates: C examples, whether in or not.
        listen: hears every event.
    """
    job, benches = level.job, Benches()
    phi, accuracy, spent = [], [], []
    for index, chosen in enumerate(drawn):
        name = f"{level.name}, model {index + 1} of {len(drawn)}"
        setting = Setting(
            job,
            Chosen(sites, chosen),
            benches,
            listener=(lambda e, n=name: listen(n, job.seed, e)) if listen else None,  # type: ignore[misc]
            draw=index + 1,
        )
        result = paradigms[job.place](setting)
        phi.append(confidences(job, result, candidates))
        accuracy.append(result.all_sites)
        spent += [e for e in result.privacy.get("epsilon", {}).values() if e is not None]
    return Questioned(torch.stack(phi), accuracy, max(spent, default=None))


@torch.inference_mode()
def confidences(job: Job, result: Result, candidates: Examples) -> Tensor:
    """phi of the result's model, (C,) float64."""
    ((name, model),) = result.models.items()
    if measured := result.statistics[name]:
        store = candidates.store.normalised_by(*(torch.tensor(measured[key]) for key in ("mean", "std")))
        candidates = Examples(store, candidates.rows)
    bench = Workbench(job, start=model)
    bench.model.eval()
    with determinism(job.train.deterministic):
        found = [
            scaled_confidence(bench.task.forward(bench.model, batch), batch.y) for batch in in_order(candidates, bench)
        ]
    return torch.cat(found).cpu()


def judge(
    level: Level, asked: Questioned, scores: np.ndarray, members: np.ndarray, shadows: int, delta: float
) -> Guessed:
    """Figures of one level, from (T, C) scores and memberships; what is proved of epsilon is so at `delta`."""
    part, curve = level.job.privacy, roc(scores, members)
    areas = [auc(s, m) for s, m in zip(scores, members, strict=True)]
    mean, epsilon = summarize(areas), asked.epsilon
    said = "no differential privacy"
    if epsilon is not None:
        said = statement(part.mode, epsilon, part.delta, part.accountant)
    allowed = None
    if epsilon is not None:
        allowed = {str(r): float(most_tpr(np.array(r), epsilon, part.delta)) for r in RATES}
    fpr, tpr = _thinned(curve.fpr, curve.tpr)
    return Guessed(
        level=level.name,
        epsilon=epsilon,
        statement=said,
        accuracy=list(asked.accuracy[shadows:]),
        auc=areas,
        low=mean.low if mean.low is not None else mean.mean,
        high=mean.high if mean.high is not None else mean.mean,
        most_auc=None if epsilon is None else most_auc(epsilon, part.delta),
        tpr={str(rate): curve.tpr_at(rate) for rate in RATES},
        most_tpr=allowed,
        least_epsilon=least_epsilon(scores, members, delta),
        fpr=fpr,
        hits=tpr,
    )


def _thinned(fpr: np.ndarray, tpr: np.ndarray) -> tuple[list[float], list[float]]:
    """So many points of the curve that a log-log drawing shows no difference: evenly in both logarithms."""
    if len(fpr) <= POINTS:
        return fpr.tolist(), tpr.tolist()
    wanted = np.geomspace(max(fpr[fpr > 0].min(), 1e-6), 1, POINTS - 2)
    kept = np.unique([0, *np.searchsorted(fpr, wanted, side="right") - 1, len(fpr) - 1])
    return fpr[kept].tolist(), tpr[kept].tolist()
