"""Pauses that grow: short while something is likely to happen, long when nothing has happened for a while."""

from __future__ import annotations


class Pace:
    """The length of the next pause.

    With `growth` g the pauses sum up to about (pause - first) / (g - 1), so at g = 1.02 the next pause is never more
    than 2 % of the time already waited plus `first`; at g = 2 it is the usual exponential back-off.

    Args:
        first: seconds of the first pause.
        longest: seconds no pause exceeds.
        growth: factor from one pause to the next, above 1.
    """

    def __init__(self, first: float, longest: float, growth: float = 2.0) -> None:
        self.first = first
        self.longest = longest
        self.growth = growth
        self._pause = first

    def next(self) -> float:
        """Seconds to pause now; the one after will be longer."""
        pause = self._pause
        self._pause = min(pause * self.growth, self.longest)
        return pause

    def reset(self) -> None:
        """Start again with the first pause: something has happened."""
        self._pause = self.first
