"""BLEU of a corpus (Papineni et al. 2002, BLEU: a Method for Automatic Evaluation of Machine Translation).

One reference a text, words as sacrebleu's `13a` cuts them, no smoothing: sacrebleu's figure with `smooth_method="none"`
divided by 100, and torchmetrics' `SacreBLEUScore`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shared_models.metrics.ngrams import shared_ngrams

MOST = 4  # words of the longest n-grams
UNESCAPED = (("<skipped>", ""), ("-\n", ""), ("\n", " "), ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
APART = (
    (re.compile(r"([{-~[-` -&(-+:-@/])"), r" \1 "),  # ASCII's marks but ' , - .
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),  # a point or comma that is not behind a digit
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),  # or not in front of one
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),  # a dash behind a digit
)


def words_13a(text: str) -> list[str]:
    """The words and marks of a text, as NIST's mteval-v13a cuts it: `It's 1,000.` -> `It's`, `1,000`, `.`."""
    text = text.rstrip()
    for written, meant in UNESCAPED:
        text = text.replace(written, meant)
    text = f" {text} "
    for pattern, parts in APART:
        text = pattern.sub(parts, text)
    return text.split()


def bleu_sums(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Tensor]:
    """`bleu_ngrams` (3, 4) int64: for n = 1..4 the clipped matches, the hypotheses' n-grams, the references'."""
    pairs = zip(hypotheses, references, strict=True)
    counts = [shared_ngrams(words_13a(ours), words_13a(theirs), MOST) for ours, theirs in pairs]
    return {"bleu_ngrams": torch.tensor(counts, dtype=torch.int64).reshape(-1, 3, MOST).sum(0)}


def no_bleu() -> dict[str, Tensor]:
    """Sums of no texts."""
    return bleu_sums([], [])


def bleu(sums: Mapping[str, Tensor]) -> float:
    """BP * exp(1/4 sum_n log p_n) with BP = min(1, exp(1 - r / c)) (section 2.3 there), between 0 and 1.

    p_n is the share of the hypotheses' n-grams that match; c and r are the words of all hypotheses and all references.
    0 where no n-gram of some length matches, hence also where no hypothesis has four words; NaN where no reference has
    a word.
    """
    matches, found, wanted = sums["bleu_ngrams"].double()
    if not wanted[0]:
        return math.nan
    if not matches.all():
        return 0.0
    brevity = (1 - wanted[0] / found[0]).clamp(max=0)
    return float(((matches / found).log().mean() + brevity).exp())
