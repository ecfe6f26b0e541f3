"""What a mechanism spends, and the epsilon of many of them together."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Accountant = Literal["rdp", "prv"]


@dataclass(frozen=True)
class Spend:
    """Some steps of the sampled Gaussian mechanism.

    Attributes:
        noise: the noise multiplier sigma, the noise's standard deviation divided by the clip.
        rate: the Poisson sampling rate q in (0, 1].
        steps: how many.
    """

    noise: float
    rate: float
    steps: int


def epsilon(spends: Sequence[Spend], delta: float, accountant: Accountant = "rdp") -> float:
    """Epsilon at `delta` of all of them one after another, by Opacus's accountant; 0 for none."""
    from opacus.accountants import create_accountant

    if not spends:
        return 0.0
    book = create_accountant(mechanism=accountant)
    book.history = [(s.noise, s.rate, s.steps) for s in spends]
    with warnings.catch_warnings():  # that the best order is at the end of the range: the bound holds, if not the least
        warnings.filterwarnings("ignore", message="Optimal order is the")
        return max(0.0, float(book.get_epsilon(delta=delta)))
