"""n-grams that two texts share, which BLEU, chrF and ROUGE all count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def ngrams(symbols: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each run of n symbols (words, or the characters of a string) occurs."""
    return Counter(zip(*(symbols[start:] for start in range(n)), strict=False))


def shared_ngrams(hypothesis: Sequence[str], reference: Sequence[str], most: int) -> list[list[int]]:
    """Counts for n = 1..most: those of both, of the hypothesis, and of the reference, three lists.

    An n-gram of the hypothesis is found in the reference at most as often as it stands there ("clipped").
    """
    pairs = [(ngrams(hypothesis, n), ngrams(reference, n)) for n in range(1, most + 1)]
    return [
        [(ours & theirs).total() for ours, theirs in pairs],
        [ours.total() for ours, _ in pairs],
        [theirs.total() for _, theirs in pairs],
    ]
