"""What a mechanism spends, the epsilon of many together, and the noise that a target asks for.

Everything is (epsilon, delta) differential privacy between neighbours that differ by one unit, added or removed. The
mechanism is the sampled Gaussian one: each unit is taken with probability q, the sum of what is taken, each at most C
long, gets noise of standard deviation sigma C. Composition is Opacus's: Renyi orders (Mironov et al. 2019) or privacy
loss random variables (Gopi et al. 2021).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from shared_models.errors import PrivacyError, Rejected
from shared_models.job import Job

Accountant = Literal["rdp", "prv"]
MAX_NOISE = 1e6
SHRINK = 1 - 1e-5  # of the clip: what rounding in float32 may add to a norm
PRV_LIMIT = 100.0  # of epsilon: PRV's grid grows with it, and what is above protects nobody
PRV_STEPS = 10**7  # which take a gigabyte already
RELATIONS = {"sample": "one training example added or removed", "client": "one site added or removed with all its data"}


@dataclass(frozen=True)
class Spend:
    """Some steps of the sampled Gaussian mechanism.

    Attributes:
        noise: the noise multiplier sigma, the noise's standard deviation divided by the clip.
        rate: the Poisson sampling rate q in (0, 1]; 1 without amplification.
        steps: how many.
    """

    noise: float
    rate: float
    steps: int


def sampling_rate(examples: int, samples: int, steps: int) -> float:
    """q, with which the expected number of examples processed in a round is exactly the budget's `samples`."""
    return min(1.0, samples / (steps * examples))


def merged(spends: Iterable[Spend]) -> list[Spend]:
    """The same, steps of one mechanism together."""
    steps: dict[tuple[float, float], int] = {}
    for s in spends:
        steps[s.noise, s.rate] = steps.get((s.noise, s.rate), 0) + s.steps
    return [Spend(noise, rate, count) for (noise, rate), count in steps.items() if count]


def epsilon(spends: Sequence[Spend], delta: float, accountant: Accountant = "rdp") -> float:
    """Epsilon at `delta` of all of them one after another; 0 for none, infinite where a step has no noise.

    With `prv`, one above 100 by Renyi orders, or of more than ten million steps, stays what these say: a bound too, and
    PRV's would take gigabytes.
    """
    found = merged(spends)
    if not found:
        return 0.0
    if any(s.noise == 0 for s in found):
        return math.inf
    return _epsilon(tuple(sorted(found, key=lambda s: (s.noise, s.rate))), delta, accountant)


def accounted(spends: Sequence[Spend], delta: float, accountant: Accountant = "rdp") -> float:
    """The same of what others say that they spent; raises Rejected("privacy") where the accountant cannot add it up."""
    try:
        return epsilon(spends, delta, accountant)
    except Exception as error:
        raise Rejected(f"the accountant cannot add up {spends[-1]}: {error}", code="privacy") from None


@lru_cache(maxsize=4096)
def _epsilon(spends: tuple[Spend, ...], delta: float, accountant: Accountant) -> float:
    import numpy as np
    from opacus.accountants.analysis.rdp import get_privacy_spent
    from opacus.accountants.rdp import RDPAccountant

    # that the best order is at the end of the range (the bound holds, if not the least), and the logarithm of 1 - q = 0
    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        warnings.filterwarnings("ignore", message="Optimal order is the")
        total = sum(_renyi(s.noise, s.rate) * s.steps for s in spends)
        found, _ = get_privacy_spent(orders=RDPAccountant.DEFAULT_ALPHAS, rdp=total, delta=delta)
        if accountant == "prv" and found <= PRV_LIMIT and sum(s.steps for s in spends) <= PRV_STEPS:
            from opacus.accountants import create_accountant

            book = create_accountant(mechanism=accountant)
            book.history = [(s.noise, s.rate, s.steps) for s in spends]
            found = book.get_epsilon(delta=delta)
    return math.inf if math.isnan(found) else max(0.0, float(found))


@lru_cache(maxsize=4096)
def _renyi(noise: float, rate: float) -> Any:
    """The Renyi divergence of one step, at each of Opacus's orders."""
    from opacus.accountants.analysis.rdp import compute_rdp
    from opacus.accountants.rdp import RDPAccountant

    return compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=RDPAccountant.DEFAULT_ALPHAS)


@lru_cache(maxsize=1024)
def find_noise(steps: tuple[tuple[float, int], ...], target: float, delta: float, accountant: Accountant) -> float:
    """The noise multiplier with which these (rate, steps) together stay at or below epsilon `target`.

    By bisection, as Opacus's `get_noise_multiplier`: the epsilon that is reached is less than 0.01 (or a hundredth of
    the target, if that is less) below it.

    Raises:
        PrivacyError: no noise is enough.
    """

    def reached(noise: float) -> float:
        return epsilon([Spend(noise, rate, count) for rate, count in steps], delta, accountant)

    low, high, tolerance = 0.0, 10.0, min(0.01, target / 100)
    found = math.inf
    while found > target:
        high *= 2
        if high > MAX_NOISE:
            raise PrivacyError(
                f"no noise gives epsilon {target:g} at delta {delta:g}", hint="Raise privacy.epsilon or privacy.delta"
            )
        found = reached(high)
    while target - found > tolerance and high - low > 1e-9 * high:
        middle = (low + high) / 2
        value = reached(middle)
        if value <= target:
            high, found = middle, value
        else:
            low = middle
    return high


# ---- a site as the unit ----------------------------------------------------------------------------------------------
def turns(job: Job) -> int:
    """Rounds in which every site has its turn once, with `mechanism = "ftrl"`: the leaves of one tree."""
    return math.ceil(1 / job.federation.fraction - 1e-9)


def levels(job: Job) -> int:
    """Nodes of a tree that one leaf is part of."""
    return turns(job).bit_length()


def client_steps(job: Job, rounds: int) -> tuple[float, int]:
    """(rate, steps) of the mechanism that hides a site, after so many rounds.

    A site that is taken by chance, unknown to others, counts with that chance as its rate. In turn, it is part of each
    tree once, and a tree is one step.
    """
    if job.privacy.mechanism == "ftrl":
        return 1.0, math.ceil(rounds / turns(job))
    return job.federation.fraction, rounds


def client_noise(job: Job) -> float:
    """The multiplier of the noise in each round (of each node of a tree), from the job alone."""
    part = job.privacy
    scale = math.sqrt(levels(job)) if part.mechanism == "ftrl" else 1.0
    if part.noise is not None:
        return part.noise
    steps = (client_steps(job, job.federation.rounds),)
    return scale * find_noise(steps, part.epsilon, part.delta, part.accountant)


def client_spend(job: Job, rounds: int) -> Spend:
    """What a site has spent after so many rounds. The leaf of a tree changes `levels` nodes, each by the clip."""
    rate, steps = client_steps(job, rounds)
    scale = math.sqrt(levels(job)) if job.privacy.mechanism == "ftrl" else 1.0
    return Spend(client_noise(job) / scale, rate, steps)


def assumptions(job: Job) -> list[str]:
    """What has to hold for that epsilon; where a site's own ledger cannot count on it, that is said."""
    part, fraction = job.privacy, job.federation.fraction
    if part.noise_by == "clients":
        trust = (
            f"{job.federation.min_sites} or more sites add their shares of the noise, and only their sum is seen, by "
            "one who added none (a site's own ledger counts its share alone)"
        )
    else:
        trust = "the server is trusted with the updates and adds the noise"
    if part.mechanism == "ftrl":
        turn = f"every site has its turn once in {turns(job)} rounds ({levels(job)} nodes of a tree); no sampling"
    elif fraction < 1:
        turn = (
            f"each site takes part by chance ({fraction:g}), and who did is known to the server alone (a site's own "
            "ledger counts its rounds without that chance)"
        )
    else:
        turn = "every site takes part in every round; no amplification by sampling"
    return [trust, turn]


# ---- how it is said --------------------------------------------------------------------------------------------------
def bound(value: float) -> str:
    """Three significant digits, rounded up: what is shown is never less than what was spent."""
    return _short(value, lambda scaled: math.ceil(scaled * (1 - 1e-12)))


def rest(value: float) -> str:
    """Three significant digits, rounded down: what is shown is never more than what is left."""
    return _short(value, lambda scaled: math.floor(scaled * (1 + 1e-12)))


def _short(value: float, whole: Callable[[float], int]) -> str:
    if math.isinf(value):
        return "infinite"
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 2
    text = f"{whole(value * 10.0**digits) / 10.0**digits:.{max(digits, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def statement(unit: str, value: float | None, delta: float, accountant: str) -> str:
    """A guarantee in words: never without unit, epsilon, delta and neighbours."""
    if value is None or not math.isfinite(value):
        return f"no differential privacy (unit {unit}: the noise is 0)"
    return (
        f"epsilon {bound(value)} at delta {delta:g}, unit {unit}, neighbours: {RELATIONS[unit]} "
        f"({accountant.upper()} accountant)"
    )
