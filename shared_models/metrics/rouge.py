"""ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries): the mean F1.

One reference a text; words are runs of a-z and 0-9 in lower case, without stemming, as in the package `rouge-score`.
Any other character, also a letter as é or д, parts words: a text in another script has none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shared_models.metrics.ngrams import shared_ngrams

WORD = re.compile("[a-z0-9]+")
NAMES = ("rouge1", "rouge2", "rougeL")


def rouge_sums(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Tensor]:
    """`rouge_f1` (3,) float64, the F1 of ROUGE-1, -2 and -L added up over the texts; `rouge_texts` () int64."""
    scores = [text_scores(ours, theirs) for ours, theirs in zip(hypotheses, references, strict=True)]
    return {
        "rouge_f1": torch.tensor(scores, dtype=torch.float64).reshape(-1, len(NAMES)).sum(0),
        "rouge_texts": torch.tensor(len(scores)),
    }


def no_rouge() -> dict[str, Tensor]:
    """Sums of no texts."""
    return rouge_sums([], [])


def rouge(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """`rouge1`, `rouge2` and `rougeL`, the means over the texts, between 0 and 1; NaN of none."""
    return dict(zip(NAMES, (sums["rouge_f1"] / sums["rouge_texts"]).tolist(), strict=True))


def text_scores(hypothesis: str, reference: str) -> tuple[float, float, float]:
    """F1 of ROUGE-1, -2 and -L of one text: 2 matches / (n-grams of both), 0 where either has none."""
    ours, theirs = WORD.findall(hypothesis.lower()), WORD.findall(reference.lower())
    one, two = zip(*shared_ngrams(ours, theirs, 2), strict=True)
    return f1(*one), f1(*two), f1(longest_common_subsequence(ours, theirs), len(ours), len(theirs))


def f1(matches: int, found: int, wanted: int) -> float:
    """2 P R / (P + R) with P = matches / found and R = matches / wanted."""
    return 2 * matches / max(found + wanted, 1)


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """How many words stand in both in the same order, with others between them or not."""
    row = [0] * (len(b) + 1)  # of the words of `a` so far with the first j of `b`
    for word in a:
        above, row = row, [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
    return row[-1]
