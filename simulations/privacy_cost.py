"""What a job will spend of differential privacy, worked out before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from client.spending import planned
from shared_models.errors import ConfigError
from shared_models.job import Job
from shared_models.privacy import RELATIONS, Spend, assumptions, bound, client_spend, epsilon, statement

SHOWN = 10  # rounds whose epsilon is printed


@dataclass(frozen=True)
class Phase:
    """A training of the job: the only one, or a stage.

    Attributes:
        name: of the stage; empty where there are none.
        each: what one round spends.
        rounds: how many.
    """

    name: str
    each: Spend
    rounds: int

    def line(self) -> str:
        """For a person."""
        return (
            f"{f'stage {self.name}: ' if self.name else ''}noise multiplier {self.each.noise:.4g}, sampling rate "
            f"{self.each.rate:.4g}, {self.each.steps} {'step' if self.each.steps == 1 else 'steps'} a round, "
            f"{self.rounds} rounds"
        )


@dataclass(frozen=True)
class Cost:
    """Of one unit, over the whole run.

    Attributes:
        unit: `sample` or `client`.
        stages: one, or as many as the job has.
        epsilon: after each round, over all stages.
        assumes: what has to hold for it.
    """

    unit: str
    delta: float
    accountant: str
    stages: Sequence[Phase]
    epsilon: Sequence[float]
    assumes: Sequence[str]

    def document(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "neighbours": RELATIONS[self.unit]}

    def lines(self) -> list[str]:
        """For a person."""
        count = len(self.epsilon)
        rounds = sorted({1, count, *(round(count * i / SHOWN) for i in range(1, SHOWN + 1))} - {0})
        return [
            statement(self.unit, self.epsilon[-1], self.delta, self.accountant),
            *(phase.line() for phase in self.stages),
            *(f"assumes: {text}" for text in self.assumes),
            "epsilon after round " + ", ".join(f"{r}: {bound(self.epsilon[r - 1])}" for r in rounds),
        ]


def cost(job: Job, examples: int | None) -> Cost:
    """Work it out.

    Args:
        job: with `[privacy]`.
        examples: of one site, shared out evenly over the tasks of a stream, but all in one for a stream of sites; only
            for the sample as unit.

    Raises:
        ConfigError: the job has no privacy, or the number of examples is needed.
        PrivacyError: no noise meets the target.
    """
    part = job.privacy
    if part.mode == "none":
        raise ConfigError(f"job '{job.name}' has no differential privacy", hint="Set privacy.mode, e.g. --set ...")
    if part.mode == "sample" and not examples:
        raise ConfigError("epsilon per sample depends on a site's examples", hint="Say how many: --examples 600")
    before: list[Spend] = []
    curve: list[float] = []
    stages: list[Phase] = []
    for step in job.steps:
        spent = _so_far(step, examples or 0)
        curve += [epsilon([*before, *spends], part.delta, part.accountant) for spends in spent]
        before += spent[-1]
        name = job.stages[step.stage].name if job.stages else ""
        stages.append(Phase(name, spent[0][0], len(spent)))
    assumes = (
        [text for step in job.steps for text in assumptions(step)]
        if part.mode == "client"
        else [
            f"the site has {examples} training examples, which is public, and takes part in every round for which "
            "it has some",
            "each example is in a step on its own with that rate, drawn from the site's secret",
        ]
    )
    return Cost(part.mode, part.delta, part.accountant, stages, curve, list(dict.fromkeys(assumes)))


def _so_far(job: Job, examples: int) -> list[list[Spend]]:
    """What is spent after each round of one training."""
    if job.privacy.mode == "client":
        return [[client_spend(job, r)] for r in range(1, job.federation.rounds + 1)]
    tasks = len(job.tasks)
    counts = [examples * (t + 1) // tasks - examples * t // tasks for t in range(tasks)]
    if job.stream.kind == "sites" and tasks > 1:  # all of a site's are of the task in which it joins
        counts = [examples] + [0] * (tasks - 1)
    spends = list(planned(job, counts).values())
    return [spends[: r + 1] for r in range(len(spends))]
