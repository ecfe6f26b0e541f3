"""The two frozen values between server and client: an Instruction goes down, a Contribution comes up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from shared_models.job import Job
from shared_models.sums import Groups

Kind = Literal["probe", "statistics", "train", "evaluate", "end_task"]
Part = Literal["validation", "test", "known"]

OK = "ok"


@dataclass(frozen=True)
class Budget:
    """How much one client trains in one round: passes over its data, or optimizer steps. Exactly one is set."""

    epochs: float | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Instruction:
    """What the server asks of one site.

    Attributes:
        kind: `probe` (would you, and with which model?), `statistics` (sums for normalisation), `train`, `evaluate`,
            or `end_task` (a stream moves on).
        run: id of the run; it names state on the node.
        site: the addressee.
        job: the resolved job, or its stage; the node hashes the whole of it itself and asks its own policy.
        fingerprint: of the server's model spec; a node whose own differs refuses.
        task: index of the task in the stream; where sites have orders of their own, of the period of the rounds.
        round: number of the round, from 0, over all tasks.
        rounds: number of rounds of the run, for schedules that do not restart.
        budget: of this round, for `train`.
        evaluate: (part, task) pairs on which the received model is measured before any training.
        groups: named tensors, e.g. `{"model": {...}}`; may be shared between the instructions of a round. A `probe`
            brings those start values of a later stage that stay at the node, as `start`.
        document: the server's fingerprint document, for `probe`, so that the node can name a difference.
        statistics: `mean` and `std` measured at the sites, (C,) or (F,) float32, where the job wants that; else empty.
    """

    kind: Kind
    run: str
    site: str
    job: Job
    fingerprint: str
    task: int = 0
    round: int = 0
    rounds: int = 1
    budget: Budget = Budget(epochs=1.0)
    evaluate: tuple[tuple[Part, int], ...] = ()
    groups: Groups = field(default_factory=dict)
    document: Mapping[str, object] = field(default_factory=dict)
    statistics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Contribution:
    """One site's answer.

    Attributes:
        kind, run, site, task, round: of the instruction it answers.
        code: `ok`, or the fixed word of why there is nothing to add.
        examples: training examples the site holds for this task: its weight.
        samples: examples processed, counting repeats.
        steps: optimizer steps made.
        halvings: how often batches were halved at the site because memory ran out.
        noise: noise multiplier of its steps under sample-level differential privacy, else 0.
        metrics: mergeable sums, `"<part>/<task>/<name>"` -> tensor; merged by addition.
        groups: named tensors up, e.g. `{"model": {...}}`.
        document: the node's fingerprint document, for `probe`.
    """

    kind: Kind
    run: str
    site: str
    task: int = 0
    round: int = 0
    code: str = OK
    examples: int = 0
    samples: int = 0
    steps: int = 0
    halvings: int = 0
    noise: float = 0.0
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    groups: Groups = field(default_factory=dict)
    document: Mapping[str, object] = field(default_factory=dict)


def refusal(instruction: Instruction, code: str) -> Contribution:
    """The answer that carries nothing but a code."""
    return Contribution(instruction.kind, instruction.run, instruction.site, instruction.task, instruction.round, code)


def payload_bytes(groups: Groups) -> int:
    """Bytes of all tensors, as they cross the network."""
    return sum(t.numel() * t.element_size() for tensors in groups.values() for t in tensors.values())
