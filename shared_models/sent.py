"""What a job has its sites send that is made of their examples; metric sums and counts, sent by every job, aside."""

from __future__ import annotations

from typing import Literal

from shared_models.compat_privacy import herds
from shared_models.job import Job
from shared_models.methods.base import make_method, overrides

Sent = Literal["trained weights", "sums over examples", "sums of the inputs by channel", "sums of exemplars' features"]


def sent(job: Job) -> list[Sent]:
    """Each kind once, those of all stages."""
    found: list[Sent] = []
    for step in job.steps:
        found.append("sums over examples" if overrides(make_method(step), "answer") else "trained weights")
        if step.data.normalise_by == "sites":
            found.append("sums of the inputs by channel")
        if herds(step):
            found.append("sums of exemplars' features")
    return list(dict.fromkeys(found))
