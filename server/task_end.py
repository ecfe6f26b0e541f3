"""What the sites are asked when a task of a stream ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from server.executor import Executor
from shared_models.errors import RunError
from shared_models.messages import Contribution, Instruction
from shared_models.nearest_mean import SUMS, merge
from shared_models.sums import Groups

ATTEMPTS = 3
PASSING = ("lost", "timeout", "flower-error-5", "flower-error-8")  # of the network or a process, not of the answer


def end_task(executor: Executor, base: Instruction, accept: Callable[[Contribution], bool]) -> dict[str, Groups]:
    """Ask everyone, those who were lost again once they are back.

    Args:
        executor: where the sites are.
        base: the instruction, without its addressee.
        accept: whether an answer is sound.

    Returns:
        Site -> the groups of its answer, of those who were accepted.
    """
    part, given = base.job.federation, {}
    asked = list(executor.population(part.min_sites, part.wait))
    for _ in range(ATTEMPTS):
        lost = []
        for reply in executor.run(replace(base, site=site) for site in asked):
            if accept(reply):
                given[reply.site] = reply.groups
            elif reply.code in PASSING:
                lost.append(reply.site)
        asked = lost
        if not asked:
            break
        executor.population(part.min_sites, part.wait)  # until they are back
    return given


def class_means(given: Mapping[str, Groups]) -> dict[str, Tensor]:
    """The means of all sites' exemplars, whatever the order of the answers.

    Raises:
        RunError: no site gave any.
    """
    if not given:
        raise RunError("no site gave the sums of its exemplars", hint="The events of the run name the codes")
    return merge(given[site][SUMS] for site in sorted(given))
