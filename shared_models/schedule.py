"""Which task a round belongs to, how much a site trains in it, and how a stage is called: known to both sides."""

from __future__ import annotations

from shared_models.job import Job
from shared_models.messages import Budget


def task_of(job: Job, round: int) -> int:
    """The task of a round: the rounds are shared out evenly over the stream, in order."""
    tasks, rounds = len(job.tasks), job.federation.rounds
    edges = [-(-t * rounds // tasks) for t in range(1, tasks + 1)]
    return next((t for t, edge in enumerate(edges) if round < edge), tasks)


def round_budget(job: Job, round: int) -> Budget:
    """What each selected site trains in a round.

    A stream makes the same number of rounds and of passes over every sample as the offline job: a round of a task that
    has R_t of the R rounds makes R / R_t times the epochs, on that task's data alone.
    """
    if job.train.steps is not None:
        return Budget(steps=job.train.steps)
    rounds = job.federation.rounds
    own = sum(task_of(job, r) == task_of(job, round) for r in range(rounds)) if len(job.tasks) > 1 else rounds
    return Budget(epochs=job.train.epochs * rounds / own)


def stage_run(run: str, step: Job) -> str:
    """The id that names a stage's state and its booked rounds at the sites."""
    return f"{run}.{step.stage}" if step.whole.stages else run
