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
class Cost:
    """Of one unit, over the whole run.

    Attributes:
        unit: `sample` or `client`.
        each: what one round spends.
        epsilon: after each round.
        assumes: what has to hold for it.
    """

    unit: str
    delta: float
    accountant: str
    each: Spend
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
            f"noise multiplier {self.each.noise:.4g}, sampling rate {self.each.rate:.4g}, "
            f"{self.each.steps} {'step' if self.each.steps == 1 else 'steps'} a round, {count} rounds",
            *(f"assumes: {text}" for text in self.assumes),
            "epsilon after round " + ", ".join(f"{r}: {bound(self.epsilon[r - 1])}" for r in rounds),
        ]


def cost(job: Job, examples: int | None) -> Cost:
    """Work it out.

    Args:
        job: with `[privacy]`.
        examples: of one site, shared out evenly over the tasks of a stream; only for the sample as unit.

    Raises:
        ConfigError: the job has no privacy, or the number of examples is needed.
        PrivacyError: no noise meets the target.
    """
    part, rounds = job.privacy, job.federation.rounds
    if part.mode == "none":
        raise ConfigError(f"job '{job.name}' has no differential privacy", hint="Set privacy.mode, e.g. --set ...")
    terms = (part.mode, part.delta, part.accountant)
    if part.mode == "client":
        curve = [epsilon([client_spend(job, r)], part.delta, part.accountant) for r in range(1, rounds + 1)]
        return Cost(*terms, client_spend(job, 1), curve, assumptions(job))
    if not examples:
        raise ConfigError("epsilon per sample depends on a site's examples", hint="Say how many: --examples 600")
    tasks = len(job.tasks)
    counts = [examples * (t + 1) // tasks - examples * t // tasks for t in range(tasks)]
    spends = list(planned(job, counts).values())
    curve = [epsilon(spends[: r + 1], part.delta, part.accountant) for r in range(len(spends))]
    assumes = [
        f"the site has {examples} training examples, which is public, and takes part in every round",
        "each example is in a step on its own with that rate, drawn from the site's secret",
    ]
    return Cost(*terms, spends[0], curve, assumes)
