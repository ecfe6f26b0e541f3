"""The site's ledger: what every round of every job may have told about its data, booked before it happens."""

from __future__ import annotations

from typing import Protocol

from shared_models.errors import PrivacyError
from shared_models.privacy import Spend


class Ledger(Protocol):
    """Where a site books what its rounds spend."""

    def reserve(
        self,
        dataset: str,
        run: str,
        task: int,
        round: int,
        spend: Spend,
        delta: float,
        unit: str,
        *,
        digest: str,
        job: str = "",
    ) -> None:
        """Book a round; durable when this returns. The same round with the same digest again is the same entry.

        Raises:
            PrivacyError: beyond the site's cap, or the round was booked for another instruction or answered already.
        """

    def answered(self, run: str, task: int, round: int) -> None:
        """Say, before the reply leaves, that it is kept; nothing where the round was not booked."""


class MemoryLedger:
    """For simulated sites and tests: lives as long as the process, has no cap."""

    def __init__(self) -> None:
        self.booked: dict[tuple[str, int, int], tuple[str, Spend, float, str, str]] = {}

    def reserve(
        self,
        dataset: str,
        run: str,
        task: int,
        round: int,
        spend: Spend,
        delta: float,
        unit: str,
        *,
        digest: str,
        job: str = "",
    ) -> None:
        """Book it in memory."""
        entry = (dataset, spend, delta, unit, digest)
        if self.booked.setdefault((run, task, round), entry) != entry:
            raise PrivacyError(
                f"round {round} of run '{run}' was booked for another instruction, and its noise must not cover two "
                "different answers",
                hint="Ask the server's operator why the round was changed",
                code="privacy-altered",
            )

    def answered(self, run: str, task: int, round: int) -> None:
        """Nothing is repeated inside one process."""
