"""How good an attack is (ROC, AUC, TPR at a low FPR), what (epsilon, delta) allows, and what it proves of epsilon."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom, rankdata

FEWEST = 10  # non-members that a false-positive rate must allow, so that it is measured and not guessed
LEVEL = 0.95
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # of all examples that are guessed at
PRECISION = 1e-3  # of a bound of epsilon
MOST = 50.0


@dataclass(frozen=True)
class Curve:
    """An ROC curve: rates at every threshold, from (0, 0) to (1, 1), both rising."""

    fpr: np.ndarray
    tpr: np.ndarray
    negatives: int

    def tpr_at(self, level: float) -> float | None:
        """The largest TPR whose FPR is not above `level`; None where it would rest on fewer than 10 non-members."""
        if level * self.negatives < FEWEST:
            return None
        return float(self.tpr[self.fpr <= level + 1e-12].max())


def roc(scores: np.ndarray, members: np.ndarray) -> Curve:
    """Of any number of scores, higher for members; equal ones are passed together."""
    order = np.argsort(-scores.ravel(), kind="stable")
    ranked, truth = scores.ravel()[order], members.ravel()[order]
    ends = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    hits, misses = np.cumsum(truth)[ends], np.cumsum(~truth)[ends]
    return Curve(np.append(0.0, misses / misses[-1]), np.append(0.0, hits / hits[-1]), int(misses[-1]))


def auc(scores: np.ndarray, members: np.ndarray) -> float:
    """The chance that a member scores higher than a non-member, ties half (Mann and Whitney's U by ranks)."""
    ranks, count = rankdata(scores), int(members.sum())
    return float((ranks[members].sum() - count * (count + 1) / 2) / (count * (len(scores) - count)))


# ---- what the guarantee allows ---------------------------------------------------------------------------------------
def most_tpr(fpr: np.ndarray, epsilon: float, delta: float) -> np.ndarray:
    """The TPR that no attack exceeds (Kairouz et al. 2015, from both directions of the definition):

    `TPR <= e^eps FPR + delta` and `1 - FPR <= e^eps (1 - TPR) + delta`.
    """
    if epsilon > MOST:
        return np.ones_like(fpr)
    rising = math.exp(epsilon) * fpr + delta
    falling = 1 - math.exp(-epsilon) * (1 - fpr - delta)
    return np.minimum(np.minimum(rising, falling), 1.0)


def most_auc(epsilon: float, delta: float) -> float:
    """The area under that curve: `1 - (1 - delta)^2 / (1 + e^eps)`."""
    return 1 - (1 - delta) ** 2 / (1 + math.exp(min(epsilon, MOST)))


# ---- what an attack proves -------------------------------------------------------------------------------------------
def least_epsilon(scores: np.ndarray, members: np.ndarray, delta: float) -> float:
    """A lower bound of epsilon at `delta`, 95 %: no smaller one explains how often the attack guesses right.

    It guesses at the examples with the highest and the lowest scores and leaves the others. How many it guesses at is
    chosen on the first half of the targets, and the bound is that of the others (Steinke et al. 2023, "Privacy Auditing
    with One (1) Training Run", theorem 5.2: examples of one model do not count as independent trials, as in
    Clopper-Pearson's interval of TPR and FPR; what is needed is that each was a member by a fair coin of its own).

    Args:
        scores: (T, N) log-ratios of N examples under T targets, at least two.
        members: (T, N) bool, each by a fair coin.
        delta: of the guarantee.
    """
    half, size = len(scores) // 2, scores.shape[1]

    def cut(share: float, rows: slice) -> int:
        return math.ceil(share * scores[rows].size)

    tuned, tested = slice(0, half), slice(half, None)
    best, chosen = 0.0, (SHARES[-1], 0.0)
    for high in SHARES:
        for low in (0.0, *SHARES):
            right, guesses = _guess(scores[tuned], members[tuned], cut(high, tuned), cut(low, tuned))
            found = least_of_guesses(half * size, guesses, right, delta)
            if found > best:
                best, chosen = found, (high, low)
    right, guesses = _guess(scores[tested], members[tested], cut(chosen[0], tested), cut(chosen[1], tested))
    return least_of_guesses((len(scores) - half) * size, guesses, right, delta)


def _guess(scores: np.ndarray, members: np.ndarray, high: int, low: int) -> tuple[int, int]:
    """(right, all) guesses: members among the `high` highest, non-members among the `low` lowest."""
    order = np.argsort(scores.ravel(), kind="stable")
    truth = members.ravel()[order]
    return int(truth[len(truth) - high :].sum() + (~truth[:low]).sum()), high + low


def least_of_guesses(coins: int, guesses: int, right: int, delta: float) -> float:
    """The smallest epsilon that is not refuted at 95 % by `right` of `guesses` about `coins` fair coins; 0 for none.

    Steinke et al. 2023: of r guesses, v or more are right with a probability of at most
    `P[B >= v] + 2 m delta max_i P[v > B >= v - i] / i`, where B ~ Binomial(r, e^eps / (1 + e^eps)).
    """
    low, high = 0.0, MOST
    if _chance(coins, guesses, right, low, delta) > 1 - LEVEL:
        return 0.0
    while high - low > PRECISION:
        middle = (low + high) / 2
        if _chance(coins, guesses, right, middle, delta) > 1 - LEVEL:
            high = middle
        else:
            low = middle
    return low


def _chance(coins: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    q = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(right - 1, guesses, q))
    if not delta or not right:
        return beta
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, q))
    return min(1.0, beta + 2 * coins * delta * float((below / np.arange(1, right + 1)).max()))
