"""What the rounds of a job spend of a site's data, by the job alone and the number of the site's training examples."""

from __future__ import annotations

import math
from collections.abc import Sequence

from shared_models.errors import PrivacyError
from shared_models.job import Job
from shared_models.messages import Budget
from shared_models.privacy import Spend, client_spend, epsilon, find_noise, sampling_rate
from shared_models.schedule import count_samples, count_steps, round_budget, task_of


def planned(job: Job, counts: Sequence[int]) -> dict[int, Spend]:
    """Round -> what it spends as the job is written; without rounds of tasks of which the site has no example.

    Args:
        job: with privacy.
        counts: the site's training examples, task by task of the stream.

    Raises:
        PrivacyError: delta is too large for so many examples, or no noise meets the target.
    """
    part = job.privacy
    held = {r: counts[task_of(job, r)] for r in range(job.federation.rounds) if counts[task_of(job, r)]}
    if part.mode == "client":
        # a site knows that it takes part: the chance that it would not have been asked hides nothing in its own book
        noise = client_spend(job, 1).noise
        share = math.sqrt(job.federation.min_sites) if part.noise_by == "clients" else 1.0
        return dict.fromkeys(held, Spend(noise / share, 1.0, 1))  # it can vouch for its own part of the noise alone
    if sum(counts) and part.delta >= 1 / sum(counts) and part.noise != 0:
        raise PrivacyError(
            f"privacy.delta = {part.delta:g} is not below 1/{sum(counts)}, one by the number of training examples: it "
            "would allow to publish one of them",
            hint="Lower privacy.delta",
            code="delta",
        )
    found = {r: _mechanism(job, count, round_budget(job, r)) for r, count in held.items()}
    noise = _noise(job, list(found.values()))
    return {r: Spend(noise, rate, steps) for r, (rate, steps) in found.items()}


def round_spend(job: Job, round: int, budget: Budget, counts: Sequence[int]) -> Spend:
    """What one round spends, with a budget that may differ from the job's own where a simulation shares it out.

    Raises:
        PrivacyError: the job has no such round, more is asked than the target allows, or as `planned`.
    """
    if not 0 <= round < job.federation.rounds:
        raise PrivacyError(
            f"round {round} is asked for, and job '{job.name}' has rounds 0 to {job.federation.rounds - 1}",
            hint="Nothing was trained; ask the server's operator",
            code="beyond-job",
        )
    as_written = planned(job, counts)[round]
    if job.privacy.mode == "client" or budget == round_budget(job, round):
        return as_written
    asked = Spend(as_written.noise, *_mechanism(job, counts[task_of(job, round)], budget))
    delta = job.privacy.delta
    if job.privacy.noise is None and epsilon([asked], delta) > epsilon([as_written], delta):
        raise PrivacyError(
            f"round {round} asks for more training than the job says, and the target epsilon covers no more",
            hint="Give privacy.noise instead of privacy.epsilon, or ask the server's operator",
            code="beyond-job",
        )
    return asked


def _noise(job: Job, rounds: Sequence[tuple[float, int]]) -> float:
    """The noise multiplier of a site, from (rate, steps) of all rounds of the run."""
    part = job.privacy
    if part.noise is not None:
        return part.noise
    steps: dict[float, int] = {}
    for rate, count in rounds:
        steps[rate] = steps.get(rate, 0) + count
    return find_noise(tuple(sorted(steps.items())), part.epsilon, part.delta, part.accountant)


def _mechanism(job: Job, held: int, budget: Budget) -> tuple[float, int]:
    """(rate, steps) of a round's DP-SGD."""
    size = job.train.batch_size
    steps = count_steps(held, size, budget)
    return sampling_rate(held, count_samples(held, size, budget), steps), steps
