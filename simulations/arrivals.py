"""Which simulated site is in which group of a stream that differs from site to site."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from shared_models.errors import ConfigError
from shared_models.job import Job


def settled(job: Job, names: Sequence[str]) -> Job:
    """The job with `stream.sites` filled in: its sites in their order, dealt to T groups of nearly equal number.

    Args:
        job: one whose stream is the same at every site comes back as it is.
        names: of the simulated sites.

    Raises:
        ConfigError: the job names other sites than these, or there are fewer than tasks that need one.
    """
    part, count = job.stream, len(names)
    if not part.by_site:
        return job
    if part.sites:
        strange = sorted(part.groups.keys() - set(names))
        missing = sorted(set(names) - part.groups.keys())
        if strange or missing:
            what = f"names '{strange[0]}', which no site is called" if strange else f"does not name '{missing[0]}'"
            raise ConfigError(f"stream.sites {what}", hint=f"The sites are {', '.join(names)}")
        return job
    if part.kind == "sites" and count < part.tasks:
        raise ConfigError(
            f"stream.tasks = {part.tasks}, and {count} sites cannot join one after the other in as many tasks",
            hint="Lower stream.tasks or raise simulation.sites",
        )
    edges = [round(t * count / part.tasks) for t in range(part.tasks + 1)]
    groups = [list(names[a:b]) for a, b in pairwise(edges)]
    return job.replace(stream={"sites": groups})
