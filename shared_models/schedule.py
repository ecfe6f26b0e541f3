"""Who trains on what in a round, how much, and how a stage is called: known to both sides."""

from __future__ import annotations

import math
from collections.abc import Sequence

from shared_models.errors import RunError
from shared_models.job import Job
from shared_models.messages import Budget


def task_of(job: Job, round: int) -> int:
    """The task of a round: the rounds are shared out evenly over the stream, in order.

    Where sites have orders of their own (`stream.order`) it is the period of the round, in which each is at its task.
    """
    tasks, rounds = len(job.tasks), job.federation.rounds
    edges = [-(-t * rounds // tasks) for t in range(1, tasks + 1)]
    return next((t for t, edge in enumerate(edges) if round < edge), tasks)


def stays(job: Job) -> bool:
    """Whether sites that have joined a stream of sites go on training: that is what keeps all data (`joint`) too."""
    from shared_models.methods.base import methods

    if job.time == "offline" or job.stream.kind != "sites":
        return False
    return job.stream.stay or methods[job.continual.name].whole


def present(job: Job, population: Sequence[str], round: int) -> Sequence[str]:
    """The sites that train in a round, of those that are there: all of them but for a stream of sites.

    A site that the job does not name is the one client that stands for all.

    Raises:
        RunError: a federation has none of them.
    """
    if job.time == "offline" or job.stream.kind != "sites":
        return population
    task, stay = task_of(job, round), stays(job)
    found = [s for s in population if (group := job.stream.groups.get(s, task)) == task or (stay and group < task)]
    if not found and job.place == "federated":
        raise RunError(
            f"round {round}: none of the sites that train in it is there ({', '.join(job.stream.sites[task])})",
            hint="The run can be resumed from its checkpoint",
            code="sites-lost",
        )
    return found


def round_budget(job: Job, round: int, site: str = "") -> Budget:
    """What a selected site trains in a round.

    A stream makes the same number of rounds and of passes over every sample as the offline job: a round of a task that
    has R_t of the R rounds makes R / R_t times the epochs, on that task's data alone. A site that has joined and stays
    makes R / R_s times the epochs in each of the R_s rounds from then on.
    """
    if job.train.steps is not None:
        return Budget(steps=job.train.steps)
    rounds, task = job.federation.rounds, task_of(job, round)
    if len(job.tasks) == 1:
        own = rounds
    elif stays(job):
        own = sum(task_of(job, r) >= job.stream.groups.get(site, 0) for r in range(rounds))
    else:
        own = sum(task_of(job, r) == task for r in range(rounds))
    return Budget(epochs=job.train.epochs * rounds / own)


def count_steps(examples: int, batch_size: int, budget: Budget) -> int:
    """Optimizer steps that a budget makes on so many examples."""
    if budget.steps is not None:
        return budget.steps
    epochs, rest = divmod(count_samples(examples, batch_size, budget), examples)
    return epochs * math.ceil(examples / batch_size) + math.ceil(rest / batch_size)


def count_samples(examples: int, batch_size: int, budget: Budget) -> int:
    """Examples processed, counting repeats: `round(epochs * examples)`, at least one, or those of the steps."""
    if budget.steps is None:
        return max(1, round((budget.epochs or 0.0) * examples))
    epochs, rest = divmod(budget.steps, math.ceil(examples / batch_size))
    return epochs * examples + min(rest * batch_size, examples)


def stage_run(run: str, step: Job) -> str:
    """The id that names a stage's state and its booked rounds at the sites."""
    return f"{run}.{step.stage}" if step.whole.stages else run
