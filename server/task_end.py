"""What the sites are asked when a task of a stream ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from torch import Tensor

from server.executor import Executor
from shared_models.errors import RunError
from shared_models.messages import Contribution, Instruction
from shared_models.nearest_mean import SUMS, merge
from shared_models.sums import Groups

ATTEMPTS = 3
PASSING = ("lost", "timeout", "flower-error-5", "flower-error-8")  # of the network or a process, not of the answer


def end_task(
    executor: Executor, base: Instruction, accept: Callable[[Contribution], bool]
) -> tuple[dict[str, Groups], set[str]]:
    """Ask everyone, those who were lost again once they are back.

    Args:
        executor: where the sites are.
        base: the instruction, without its addressee.
        accept: whether an answer is sound.

    Returns:
        Site -> the groups of its answer, of those who were accepted; and the sites whose answer was lost or rejected.
    """
    part, given, missed = base.job.federation, {}, set()
    asked = list(executor.population(part.min_sites, part.wait))
    for _ in range(ATTEMPTS):
        lost = []
        for reply in executor.run(replace(base, site=site) for site in asked):
            if accept(reply):
                given[reply.site] = reply.groups
            elif reply.code in PASSING:
                lost.append(reply.site)
            elif reply.code != "no-data":
                missed.add(reply.site)
        asked = lost
        if not asked:
            break
        executor.population(part.min_sites, part.wait)  # until they are back
    return given, missed | set(asked)


def class_means(given: Mapping[str, Groups], missed: Collection[str]) -> dict[str, Tensor]:
    """The means of all sites' exemplars, whatever the order of the answers; none where no site holds an exemplar yet.

    Raises:
        RunError: no site gave any, and some that were `missed` might have.
    """
    if not given and missed:
        raise RunError("no site gave the sums of its exemplars", hint="The events of the run name the codes")
    return merge(given[site][SUMS] for site in sorted(given)) if given else {}
