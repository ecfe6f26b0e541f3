"""What the round loop remembers while it runs, and what it leaves when it has ended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from shared_models.errors import RunError


@dataclass
class Totals:
    """What a run cost.

    Bytes: tensors of the training rounds, sums for normalisation, and what sites give when a task ends; those of
    metric sums are also told apart. Sequential steps add each round's slowest site.
    """

    rounds: int = 0
    samples: int = 0
    sequential_steps: int = 0
    optimizer_resets: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    bytes_metrics: int = 0  # of those that went up
    rejections: int = 0
    seconds: float = 0.0


@dataclass
class Progress:
    """All a run must remember beside its tensors; it is what a checkpoint's JSON holds.

    Attributes:
        round: the next round.
        curve: validation metrics of the model after each round, from the untrained one on.
        matrix: R[t][i], the headline metric on the test data of task i after task t.
        known: the same where the model is told the task, in a stream of classes (task-incremental).
        untrained: the headline metric on the test data of each task before any training.
        best: (headline on validation, round) of the best model so far, with `select = "best"`.
        privacy: what was spent so far, as `server.privacy` keeps it.
    """

    round: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    matrix: list[list[float]] = field(default_factory=list)
    known: list[list[float]] = field(default_factory=list)
    untrained: list[float] = field(default_factory=list)
    best: tuple[float, int] | None = None
    totals: Totals = field(default_factory=Totals)
    privacy: dict[str, Any] = field(default_factory=dict)

    def is_best(self, headline: str, score: float, round: int, larger: bool) -> bool:
        """Whether a round's headline on validation is the best so far, which is noted then.

        Raises:
            RunError: no round had one: it is a metric of the test alone, or validation is too small for it.
        """
        if math.isnan(score):
            if self.best is not None:
                return False
            raise RunError(
                f"federation.select = 'best' goes by {headline} on validation, where it is not measured",
                hint="Name another metric in task.headline, enlarge validation, or set federation.select = 'last'",
            )
        if self.best is not None and (score <= self.best[0] if larger else score >= self.best[0]):
            return False
        self.best = (score, round)
        return True


@dataclass(frozen=True)
class Outcome:
    """A finished run: the model, and its test metrics on each site's own data and on all sites' data together.

    `privacy` is what the run has spent, with all that gives an epsilon its meaning; empty without privacy.
    `statistics` are the mean and std that were measured at the sites, where the job wanted that; `stages` are the test
    metrics that earlier stages reached; `matrix`, `known` and `untrained` are those of `Progress`. The model holds also
    what it took over of an earlier stage and did not train.
    """

    model: Mapping[str, Tensor]
    fingerprint: str
    per_site: Mapping[str, Mapping[str, float]]
    all_sites: Mapping[str, float]
    curve: Sequence[Mapping[str, float]]
    matrix: Sequence[Sequence[float]]
    totals: Totals
    statistics: Mapping[str, Sequence[float]] = field(default_factory=dict)
    stages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    known: Sequence[Sequence[float]] = ()
    untrained: Sequence[float] = ()
    privacy: Mapping[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """As plain data, without the tensors."""
        return {k: v for k, v in asdict(replace(self, model={})).items() if k != "model"}
