"""Where contributions come from: the round loop asks an executor and does not know whether sites are near or far."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from shared_models.messages import Contribution, Instruction


class Executor(Protocol):
    """Carries instructions to sites. It must not change a run's result."""

    def admit(self, probe: Callable[[str], Instruction], need: int, wait: float) -> None:
        """Before round 0: wait, at most `wait` seconds, until `need` sites answer their probe with the same model.

        Raises:
            DeploymentError: too few did; names who is missing and why.
        """

    def population(self, need: int, wait: float) -> Sequence[str]:
        """Sites that can be selected now, in a fixed order; raises DeploymentError where fewer than `need` come."""

    def run(self, instructions: Iterable[Instruction]) -> Iterator[Contribution]:
        """Exactly one answer per instruction, in any order; a lost one is answered with a code.

        An answer's tensors may be overwritten when the next one is asked for.
        """
