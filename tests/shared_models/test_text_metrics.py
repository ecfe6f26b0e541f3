"""BLEU, chrF and ROUGE from sums: numbers worked out by hand, and sacrebleu and torchmetrics on the pooled texts."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.text import rouge_score, sacre_bleu_score
from torchmetrics.text import CHRFScore

from shared_models.metrics.bleu import bleu, bleu_sums, no_bleu, words_13a
from shared_models.metrics.chrf import chrf, chrf_sums, no_chrf
from shared_models.metrics.rouge import longest_common_subsequence, no_rouge, rouge, rouge_sums, text_scores
from shared_models.tasks.base import add_sums

Sums = Callable[[Sequence[str], Sequence[str]], dict[str, Tensor]]
METRICS: list[tuple[Sums, Callable[[], dict[str, Tensor]], Callable[[Mapping[str, Tensor]], Any]]] = [
    (bleu_sums, no_bleu, bleu),
    (chrf_sums, no_chrf, chrf),
    (rouge_sums, no_rouge, rouge),
]
TEXT = """
the cat sat on a mat , and it's 3.5 1,000 (well-known) AT&amp;T U.S. naïve Äpfel Привет 東京 🎉 x-ray 7-9 ...
"""
WORDS = TEXT.split()
ODD = ["", " ", "a", "...", "é", "\t\n", "one.", "-", "10-\n20", "<skipped> x", "a\u00a0b", "🎉 e\u0301", "The the THE"]


def drawn(count: int, seed: int, longest: int = 20) -> tuple[list[str], list[str]]:
    """References, and hypotheses with some of their words replaced, left out, or written twice."""
    source = random.Random(seed)
    references = [source.choices(WORDS, k=source.randint(1, longest)) for _ in range(count)]
    changes: list[Callable[[str], list[str]]] = [
        *[lambda word: [word]] * 7,
        lambda _: [source.choice(WORDS)],
        lambda _: [],
        lambda word: [word, word],
    ]
    hypotheses = [[w for word in text for w in source.choice(changes)(word)] for text in references]
    return [" ".join(text) for text in hypotheses], [" ".join(text) for text in references]


def with_odd_ones(seed: int) -> tuple[list[str], list[str]]:
    """The same with empty texts, marks alone, and white space of all kinds, each against each."""
    hypotheses, references = drawn(40, seed)
    return hypotheses + [text for text in ODD for _ in ODD], references + ODD * len(ODD)


def test_clipped_matches_are_those_of_the_paper() -> None:
    """Papineni et al.'s example 2: seven times "the", of which the reference has two."""
    counts = bleu_sums(["the the the the the the the"], ["the cat is on the mat"])["bleu_ngrams"]
    assert counts.tolist() == [[2, 0, 0, 0], [7, 6, 5, 4], [6, 5, 4, 3]]


def test_bleu_by_hand() -> None:
    """4/5, 3/4, 2/3 and 1/2 of the n-grams match: their product is 1/5; five words where six are wanted."""
    assert bleu(bleu_sums(["a b c d e"], ["a b c d f g"])) == pytest.approx(0.2**0.25 * math.exp(-1 / 5))
    assert bleu(bleu_sums(["a b c d f g"], ["a b c d e"])) == pytest.approx((4 * 3 * 2 * 1 / (6 * 5 * 4 * 3)) ** 0.25)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's 1,000.5 km, not 2.", "It's 1,000.5 km , not 2 ."),
        ("(well-known) 7-9 [x]{y}", "( well-known ) 7 - 9 [ x ] { y }"),
        ("He said: &quot;R&amp;D &lt; 3%!&quot;", 'He said : " R & D < 3 % ! "'),
        ("new-\nline\nand <skipped>more...", "newline and more . . ."),
        ("Äpfel, 東京。 « naïve » 🎉", "Äpfel , 東京。 « naïve » 🎉"),
        ("  \n ", ""),
        ("2.b,3 don't-\n", "2 . b , 3 don't-"),  # nothing follows the line's end, so the dash stays
        (r"a`b\c_d~e|f@g/h+i", r"a ` b \ c _ d ~ e | f @ g / h + i"),
    ],
)
def test_words_of_13a(text: str, words: str) -> None:
    assert words_13a(text) == words.split()


def test_bleu_equals_torchmetrics() -> None:
    for seed in range(5):
        hypotheses, references = drawn(60, seed)
        theirs = sacre_bleu_score(hypotheses, [[text] for text in references], tokenize="13a")
        assert bleu(bleu_sums(hypotheses, references)) == pytest.approx(float(theirs), rel=1e-5)
        assert 0.2 < theirs < 0.9


def test_bleu_and_chrf_equal_sacrebleu() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="the reference for BLEU and chrF")
    for seed in range(5):
        for hypotheses, references in (drawn(60, seed), with_odd_ones(seed), drawn(8, seed, longest=3)):
            theirs = sacrebleu.corpus_bleu(hypotheses, [references], smooth_method="none", force=True)
            assert bleu(bleu_sums(hypotheses, references)) == pytest.approx(theirs.score / 100, rel=1e-9)
            theirs = sacrebleu.corpus_chrf(hypotheses, [references])
            assert chrf(chrf_sums(hypotheses, references)) == pytest.approx(theirs.score / 100, rel=1e-9)


def test_chrf_by_hand() -> None:
    """All of "ab" is in "abc", which has three characters and two pairs: P = 1, R = (2/3 + 1/2) / 2 = 7/12."""
    counts = chrf_sums(["a b"], ["ab\tc"])["chrf_ngrams"]
    assert counts.tolist() == [[2, 1, 0, 0, 0, 0], [2, 1, 0, 0, 0, 0], [3, 2, 1, 0, 0, 0]]
    assert chrf({"chrf_ngrams": counts}) == pytest.approx(5 * 7 / 12 / (4 + 7 / 12))
    counts = chrf_sums(["abc"], ["ab"])["chrf_ngrams"]  # a reference without triples: those of the hypothesis are free
    assert counts.tolist() == [[2, 1, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [2, 1, 0, 0, 0, 0]]


def test_chrf_counts_are_those_of_torchmetrics() -> None:
    """Its score has another formula, its totals are the same where texts have six characters and share one."""
    pairs = [
        (ours, theirs)
        for ours, theirs in zip(*drawn(60, seed=1), strict=True)
        if min(len("".join(text.split())) for text in (ours, theirs)) >= 6 and set(ours) & set(theirs) - {" "}
    ]
    metric = CHRFScore(n_word_order=0)
    metric.update([ours for ours, _ in pairs], [[theirs] for _, theirs in pairs])
    for row, side in enumerate(("matching", "preds", "target")):
        totals = [int(getattr(metric, f"total_{side}_char_{n}_grams")) for n in range(1, 7)]
        assert chrf_sums(*zip(*pairs, strict=True))["chrf_ngrams"][row].tolist() == totals
    assert len(pairs) > 40


def test_rouge_by_hand() -> None:
    """Lin's example (section 3.1): the longest common subsequences are "police the gunman" and "the gunman"."""
    reference = "Police killed the gunman."
    assert text_scores("police kill the gunman", reference) == (3 / 4, 1 / 3, 3 / 4)
    assert text_scores("the gunman kill police", reference) == (3 / 4, 1 / 3, 2 / 4)
    both = rouge(rouge_sums(["police kill the gunman", "the gunman kill police"], [reference] * 2))
    assert both == pytest.approx({"rouge1": 3 / 4, "rouge2": 1 / 3, "rougeL": 5 / 8})
    assert text_scores("Wi-Fi: 5 GHz!", "wi fi 5") == pytest.approx((2 * 3 / 7, 2 * 2 / 5, 2 * 3 / 7))
    assert text_scores("naïve", "na ve") == (1.0, 1.0, 1.0)  # letters beyond a-z part words
    assert text_scores("Привет", "Привет") == (0.0, 0.0, 0.0)


def test_rouge_equals_torchmetrics() -> None:
    for seed in range(3):
        hypotheses, references = with_odd_ones(seed)
        theirs = rouge_score(hypotheses, [[text] for text in references], rouge_keys=("rouge1", "rouge2", "rougeL"))
        ours = rouge(rouge_sums(hypotheses, references))
        assert ours == pytest.approx({name: float(theirs[f"{name}_fmeasure"]) for name in ours}, rel=1e-5)


def test_longest_common_subsequence_against_its_definition() -> None:
    """The longest of all 2^n subsequences that the other one has too."""

    def has(text: str, part: Sequence[str]) -> bool:
        rest = iter(text)
        return all(symbol in rest for symbol in part)

    source = random.Random(0)
    for _ in range(100):
        a, b = ("".join(source.choices("abc", k=source.randint(0, 8))) for _ in range(2))
        subsets = ([c for i, c in enumerate(a) if kept >> i & 1] for kept in range(2 ** len(a)))
        assert longest_common_subsequence(a, b) == max(len(part) for part in subsets if has(b, part))


@pytest.mark.parametrize(("sums", "none", "value"), METRICS)
def test_sums_of_sites_merge_to_those_of_the_whole(sums: Sums, none: Any, value: Any) -> None:
    hypotheses, references = with_odd_ones(seed=7)
    merged = none()
    for part in (slice(0, 15), slice(15, 15), slice(15, 16), slice(16, None)):
        add_sums(merged, sums(hypotheses[part], references[part]))
    whole = sums(hypotheses, references)
    assert merged.keys() == whole.keys()
    for name, total in whole.items():
        torch.testing.assert_close(merged[name], total, rtol=1e-12 if total.is_floating_point() else 0, atol=0)
    assert value(merged) == pytest.approx(value(whole), rel=1e-12)


@pytest.mark.parametrize(("sums", "none", "value"), METRICS)
def test_sums_of_nothing_have_the_form_of_all_sums(sums: Sums, none: Any, value: Any) -> None:
    some = sums(["a"], ["b"])
    assert {name: (t.shape, t.dtype) for name, t in none().items()} == {n: (t.shape, t.dtype) for n, t in some.items()}
    assert not any(bool(t.any()) for t in none().values())
    assert bool(torch.tensor(scores(value(none()))).isnan().all())


@pytest.mark.parametrize(("sums", "none", "value"), METRICS)
def test_extremes(sums: Sums, none: Any, value: Any) -> None:
    """A text itself is worth 1; one without anything of it, and an empty one, nothing."""
    text = "Nothing is worth 1,000 words."
    assert scores(value(sums([text], [text]))) == pytest.approx([1.0] * len(scores(value(none()))))
    for other in ("", "???", "xyz xyz xyz xyz"):
        assert not any(scores(value(sums([other], [text]))))
    with pytest.raises(ValueError, match="zip"):
        sums([text], [text, text])


def test_empty_references() -> None:
    """Nothing that could be written: no BLEU and no chrF; a text of 0 for ROUGE, as in `rouge-score`."""
    texts, references = ["a b c d e", ""], ["", " \n"]
    assert math.isnan(bleu(bleu_sums(texts, references)))
    assert math.isnan(chrf(chrf_sums(texts, references)))
    assert set(rouge(rouge_sums(texts, references)).values()) == {0.0}
    more = bleu_sums(["a b c d"], ["a b c d"])
    add_sums(more, bleu_sums(texts, references))
    assert bleu(more) == pytest.approx((4 / 9 * 3 / 7 * 2 / 5 * 1 / 3) ** 0.25)  # empty references still cost precision


def test_contradicting_sums_of_a_site_raise_nothing() -> None:
    """More matches than n-grams: no score, but no error that would end a round of others either."""
    for rows in ([[1], [0], [1]], [[1], [0], [0]], [[5], [1], [1]], [[0], [1], [0]]):
        bleu({"bleu_ngrams": torch.tensor(rows).expand(3, 4)})
        chrf({"chrf_ngrams": torch.tensor(rows).expand(3, 6)})
    rouge({"rouge_f1": torch.ones(3, dtype=torch.float64), "rouge_texts": torch.tensor(0)})


def scores(value: float | dict[str, float]) -> list[float]:
    return list(value.values()) if isinstance(value, dict) else [value]
