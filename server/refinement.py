"""What a method does at the server with the model itself, once a round is aggregated."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from shared_models.determinism import determinism
from shared_models.job import Job
from shared_models.methods.base import Method, overrides
from shared_models.sums import Groups


def make_refinement(job: Job, method: Method, model: nn.Module) -> Callable[[Groups, int], Groups]:
    """(state, round) -> the state that the checkpoint keeps and the next round starts from.

    Args:
        job: the job, or the stage of one.
        method: its federated method; one without `refine` changes nothing and holds no model in memory.
        model: as it is built for the job, in the method's hands from here on.
    """
    if not overrides(method, "refine"):
        return lambda state, round: state

    def refine(state: Groups, round: int) -> Groups:
        with determinism(job.train.deterministic):
            return method.refine(state, model, job, round)

    return refine
