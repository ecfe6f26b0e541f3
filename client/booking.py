"""The order in which a round spends: booked, drawn, trained, its answer kept, noted as answered, and then sent.

Stopped before the answer is kept, the round never left: it is done again, with the same noise, for the same entry.
Stopped after that, the kept answer is sent again as it is. So for each entry one answer leaves at most.
"""

from __future__ import annotations

from client.ledger import Ledger
from client.policy import privacy_mode
from shared_models.messages import Instruction
from shared_models.privacy import Spend
from shared_models.wire import digest


class Bookings:
    """What the rounds of one site book.

    Args:
        ledger: where.
        dataset: the name of the data set that its jobs read.
    """

    def __init__(self, ledger: Ledger, dataset: str) -> None:
        self.ledger = ledger
        self.dataset = dataset
        self._open: set[tuple[str, int, int]] = set()

    def reserve(self, instruction: Instruction, spend: Spend, delta: float, unit: str) -> None:
        """Book what a round will spend, before anything of it is drawn.

        Raises:
            PrivacyError: as `Ledger.reserve`; nothing may be drawn then.
        """
        run, task, round = key = _key(instruction)
        name, asked = instruction.job.name, digest(instruction)
        self.ledger.reserve(self.dataset, run, task, round, spend, delta, unit, digest=asked, job=name)
        self._open.add(key)

    def answered(self, instruction: Instruction) -> None:
        """Say that the answer is kept and may leave now; nothing for a round that booked nothing.

        Raises:
            PrivacyError: the ledger cannot be written; the answer must not leave yet.
        """
        key = _key(instruction)
        if instruction.kind == "train" and (key in self._open or privacy_mode(instruction.job) != "none"):
            self.ledger.answered(*key)
            self._open.discard(key)


def _key(instruction: Instruction) -> tuple[str, int, int]:
    return instruction.run, instruction.task, instruction.round
