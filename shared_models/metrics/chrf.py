"""chrF2 of a corpus (Popović 2015, chrF: character n-gram F-score for automatic MT evaluation; beta = 2: 2016).

Characters without white space, case kept, one reference a text: sacrebleu's `chrF2` divided by 100. `CHRFScore` of
torchmetrics is another figure: the mean of six F-scores, where the paper has the F-score of two means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shared_models.metrics.ngrams import shared_ngrams

MOST = 6  # characters of the longest n-grams
BETA = 2  # recall counts so many times as much as precision


def chrf_sums(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Tensor]:
    """`chrf_ngrams` (3, 6) int64: for n = 1..6 the clipped matches, the hypotheses' n-grams, the references'.

    As in sacrebleu, n-grams of a hypothesis do not count where its reference is too short to have any.
    """
    pairs = zip(hypotheses, references, strict=True)
    counts = [shared_ngrams("".join(ours.split()), "".join(theirs.split()), MOST) for ours, theirs in pairs]
    matches, found, wanted = torch.tensor(counts, dtype=torch.int64).reshape(-1, 3, MOST).unbind(1)
    return {"chrf_ngrams": torch.stack([matches, found * (wanted > 0), wanted], dim=1).sum(0)}


def no_chrf() -> dict[str, Tensor]:
    """Sums of no texts."""
    return chrf_sums([], [])


def chrf(sums: Mapping[str, Tensor]) -> float:
    """(1 + beta^2) chrP chrR / (beta^2 chrP + chrR) (eq. 1 there), between 0 and 1.

    chrP and chrR are the means of precision and recall over those n that both sides have n-grams of.
    0 where no character matches, NaN where no reference has any.
    """
    counts = sums["chrf_ngrams"]
    if not counts[2].any():
        return math.nan
    matches, found, wanted = counts[:, (counts[1:] > 0).all(0)].double()
    if not matches.any():
        return 0.0
    precision, recall = float((matches / found).mean()), float((matches / wanted).mean())
    return (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)
