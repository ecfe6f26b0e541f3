"""Denoising and translation: texts come back from what is read and written, and what is written is the likeliest."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.text import Perplexity

from client.readers.base import Examples, Store
from client.trainer import evaluate
from client.workbench import Workbench
from shared_models.errors import ConfigError
from shared_models.job import Job
from shared_models.keys import keyed_global
from shared_models.metrics.bleu import bleu, bleu_sums
from shared_models.metrics.chrf import chrf, chrf_sums
from shared_models.metrics.rouge import rouge, rouge_sums
from shared_models.spec import build_model
from shared_models.tasks.base import Batch, Task, add_sums, make_task, tasks
from shared_models.tasks.denoising import corrupt
from shared_models.tasks.language import Said
from shared_models.tasks.translation import Written, write
from shared_models.tokens import BEGIN, END, GAP, GAPS, MASK, PAD, TEXT, UNKNOWN, Bytes

MODELS = ["bart", "t5", "transformer"]
SCORES = ["bleu", "chrf", "rouge1", "rouge2", "rougeL"]
V = Bytes.size


def a_job(name: str, model: str = "transformer", length: int = 16, **task: Any) -> Job:
    return Job.resolve({
        "name": "text", "model": {"name": model}, "task": {"name": name, **task},
        "data": {"shape": [length], "tokenizer": "bytes"},
    })  # fmt: skip


def ids(*texts: str, length: int = 16) -> Tensor:
    rows = [[BEGIN, *Bytes().encode(text), END][:length] for text in texts]
    return torch.tensor([row + [PAD] * (length - len(row)) for row in rows])


def numbered(n: int, length: int, whole: bool = True) -> Tensor:
    """A text of n tokens that all differ; without an end where it is not whole."""
    row = [BEGIN, *range(TEXT, TEXT + n), *([END] if whole else [])]
    return torch.tensor(row + [PAD] * (length - len(row)))


def a_model(job: Job) -> nn.Module:
    """With weights that are large enough to say something else for each token."""
    model = build_model(job)[0].eval()
    with torch.no_grad(), keyed_global(7):
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


class Script(nn.Module):
    """An encoder and decoder that says what it was told, token by token, whatever it reads."""

    def __init__(self, *rows: Sequence[int]) -> None:
        super().__init__()
        self.rows = rows
        self.asked: list[Tensor] = []

    def encode(self, source: Tensor) -> Tensor:
        return source

    def decode(self, memory: Tensor, source: Tensor, target: Tensor) -> Tensor:
        self.asked.append(target)
        said = [[row[i] if i < len(row) else PAD for i in range(target.shape[1])] for row in self.rows]
        return 50.0 * F.one_hot(torch.tensor(said), V).float()

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.decode(self.encode(source), source, target)


# ---- denoising: what is read and written -----------------------------------------------------------------------------
FORMS = [(n, n + 2 + room, True) for n in (1, 2, 3, 4, 7, 20, 61) for room in (0, 3)]
FORMS += [(n, n + 1, False) for n in (2, 3, 4, 7, 20, 61)]


@pytest.mark.parametrize(("share", "mean"), [(0.15, 3.0), (0.3, 3.0), (0.5, 1.0), (0.95, 2.0), (0.01, 10.0)])
@pytest.mark.parametrize(("n", "length", "whole"), FORMS)
def test_spans_reading_and_writing_give_the_text_back(
    n: int, length: int, whole: bool, share: float, mean: float
) -> None:
    given = numbered(n, length, whole)
    hidden = min(max(1, round(n * share)), max(1, n - 1))
    count = min(max(1, round(hidden / mean)), max(1, n - hidden))
    for seed in range(5):
        with keyed_global(seed):
            read, written, gone = corrupt(given, share, mean, spans=True)
        if (n, length) == (1, 3):  # the gap leaves no place for the end
            assert written.tolist() == [BEGIN, GAP, TEXT]
            continue
        assert read.shape == written.shape == gone.shape == (length,)
        gaps = [i for i in read.tolist() if GAP <= i < GAP + GAPS]
        assert gaps == [i for i in written.tolist() if GAP <= i < GAP + GAPS] == list(range(GAP, GAP + count))
        assert written[gone].tolist() == [i for i in written.tolist() if i >= TEXT]
        assert int(gone.sum()) == hidden
        found = dict.fromkeys(gaps, ()) | _behind(written.tolist())
        assert all(found.values())
        text = [i for j in read.tolist() for i in found.get(j, (j,))]
        assert [i for i in text if i != PAD] == [i for i in given.tolist() if i != PAD]
        assert (END in read, END in written) == (whole, whole)


def _behind(written: list[int]) -> dict[int, tuple[int, ...]]:
    """Gap -> the tokens that are written behind it."""
    found: dict[int, tuple[int, ...]] = {}
    gap = 0
    for i in written:
        if GAP <= i < GAP + GAPS:
            gap = i
            found[gap] = ()
        elif i >= TEXT:
            found[gap] += (i,)
    return found


@pytest.mark.parametrize(("share", "mean"), [(0.15, 3.0), (0.3, 3.0), (0.5, 1.0), (0.95, 2.0)])
@pytest.mark.parametrize(("n", "length", "whole"), FORMS)
def test_infill_writes_the_whole_text_and_marks_what_was_gone(
    n: int, length: int, whole: bool, share: float, mean: float
) -> None:
    given = numbered(n, length, whole)
    hidden = min(max(1, round(n * share)), max(1, n - 1))
    for seed in range(5):
        with keyed_global(seed):
            read, written, gone = corrupt(given, share, mean, spans=False)
        assert torch.equal(written, given)
        assert int(gone.sum()) == hidden
        assert not gone[given < TEXT].any()
        left = given[~gone]
        assert read[read >= TEXT].tolist() == left[left >= TEXT].tolist()
        masks = [BEGIN]  # rebuilt: one mask for each run of tokens that are gone
        for token, lost, before in zip(given[1:].tolist(), gone[1:].tolist(), gone[:-1].tolist(), strict=True):
            masks += [] if lost and before else [MASK if lost else token]
        assert read.tolist() == masks + [PAD] * (length - len(masks))


def test_no_more_gaps_than_there_are_ids_for() -> None:
    with keyed_global(0):
        read, written, gone = corrupt(numbered(400, 402), 0.5, 1.0, spans=True)
    assert int(gone.sum()) == 200
    assert int((read == GAP + GAPS - 1).sum()) == int((written == GAP + GAPS - 1).sum()) == 1
    assert not ((read >= TEXT) & torch.isin(read, written)).any()


def test_infill_needs_no_gaps_and_keeps_the_mean_span_of_a_long_text() -> None:
    with keyed_global(0):
        read, _, gone = corrupt(numbered(1022, 1024), 0.3, 3.0, spans=False)
    assert int(gone.sum()) == round(0.3 * 1022) == 307
    assert int((read == MASK).sum()) == round(307 / 3) == 102


@pytest.mark.parametrize("spans", [True, False])
@pytest.mark.parametrize("given", [[BEGIN, END], [BEGIN, PAD], [BEGIN, END, PAD, PAD]])
def test_a_text_of_no_tokens_stays_what_it_is(given: list[int], spans: bool) -> None:
    read, written, gone = corrupt(torch.tensor(given), 0.3, 3.0, spans)
    assert read.tolist() == written.tolist() == given
    assert not gone.any()


@pytest.mark.parametrize("spans", [True, False])
def test_what_a_tokenizer_does_not_know_is_a_token_too(spans: bool) -> None:
    given = numbered(10, 12)
    given[3] = given[7] = UNKNOWN
    for seed in range(20):
        with keyed_global(seed):
            read, written, gone = corrupt(given, 0.3, 3.0, spans)
        both = torch.cat([read, written[gone]])
        assert sorted(both[(both >= TEXT) | (both == UNKNOWN)].tolist()) == sorted(given[1:11].tolist())


@pytest.mark.parametrize(("n", "mean", "count"), [(6, 3.0, 1), (6, 1.5, 2), (5, 1.0, 2)])
def test_every_choice_of_spans_is_as_likely(n: int, mean: float, count: int) -> None:
    """Also of a single one, which may lie anywhere."""
    hidden, given = round(n / 2), numbered(n, n + 2)
    runs = {s: len("".join(s).split()) for s in product("x ", repeat=n) if s.count("x") == hidden}
    expected = {s for s, found in runs.items() if found == count}
    torch.manual_seed(0)
    drawn = [corrupt(given, 0.5, mean, spans=False)[2][1 : n + 1].tolist() for _ in range(200 * len(expected))]
    ways = Counter(tuple("x" if gone else " " for gone in row) for row in drawn)
    assert ways.keys() == expected
    assert max(abs(found - 200) for found in ways.values()) < 5 * math.sqrt(200)


# ---- denoising: the task ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("noise", ["infill", "spans"])
def test_denoising_learns_from_all_and_counts_what_was_gone(noise: str, model_name: str) -> None:
    job = a_job("denoising", model_name, noise=noise)
    task, model = make_task(job), a_model(job)
    given = Batch(ids("full to the rim", "Grüße", "a", ""), torch.zeros(4, dtype=torch.int64))
    with torch.no_grad(), keyed_global(2):
        outputs = task.forward(model, given)
        values = task.values(task.sums(outputs, given))
    with keyed_global(2):
        noisy = [corrupt(row, 0.3, 3.0, noise == "spans") for row in given.x]
    losses, gone_nats, gone_count, hits = [], 0.0, 0, 0
    for read, written, gone in noisy:
        own = written[written != PAD]
        with torch.no_grad():
            logits = model(read[read != PAD][None], own[None, :-1])[0]
        each = F.cross_entropy(logits, own[1:], reduction="none")
        losses.append(float(each.mean()))
        here = gone[1 : len(own)]
        gone_nats, gone_count = gone_nats + float(each[here].sum()), gone_count + int(here.sum())
        hits += int((logits.argmax(1) == own[1:])[here].sum())
    assert gone_count == 4 + 2 + 1
    assert task.loss(outputs, given).tolist() == pytest.approx(losses, rel=1e-4)
    assert values["loss"] == pytest.approx(sum(losses) / 4, rel=1e-4)
    assert values["perplexity"] == pytest.approx(math.exp(gone_nats / gone_count), rel=1e-4)
    assert values["accuracy"] == pytest.approx(hits / gone_count)


def test_a_denoiser_is_measured_on_the_same_noise_each_time() -> None:
    job = a_job("denoising")
    bench = Workbench(job, torch.device("cpu"))
    given = bench.task.draw((16,), 20, torch.Generator().manual_seed(1))
    examples = Examples(Store(given.x.int(), given.y, [str(i) for i in range(20)], job.data), torch.arange(20))
    first, again, other = (evaluate(bench, examples, site) for site in ("ulm", "ulm", "bonn"))
    assert all(torch.equal(again[n], t) for n, t in first.items())
    assert not torch.equal(other["surprise"], first["surprise"])
    with torch.no_grad():
        assert not torch.equal(*(bench.task.forward(bench.model, given).scored for _ in range(2)))


@pytest.mark.parametrize("key", [{"hidden": 0.0}, {"hidden": 1.0}, {"span": 0.5}, {"noise": "salt"}])
def test_settings_that_cannot_be(key: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"'{next(iter(key))}'"):
        a_job("denoising", **key)


# ---- translation: teacher forcing ------------------------------------------------------------------------------------
@pytest.mark.parametrize("model_name", MODELS)
def test_translation_by_hand(model_name: str) -> None:
    job = a_job("translation", model_name)
    task, model = make_task(job), a_model(job)
    given = Batch(ids("a dog", "cats", "the sun shines"), ids("ein Hund", "Kätzchen", "die Sonne schei"))
    with torch.no_grad():
        outputs = task.forward(model, given)
        values = task.values(task.sums(outputs, given))
        losses, surprises, hits = [], [], 0
        for x, y in zip(given.x, given.y, strict=True):
            source, target = x[x != PAD], y[y != PAD]
            logits = model(source[None], target[None, :-1])[0]
            surprises.append(F.cross_entropy(logits, target[1:], reduction="none").double())
            losses.append(float(surprises[-1].mean()))
            hits += int((logits.argmax(1) == target[1:]).sum())
    pooled = torch.cat(surprises)
    assert len(pooled) == 9 + 10 + 15
    assert task.loss(outputs, given).tolist() == pytest.approx(losses, rel=1e-4)
    assert values["perplexity"] == pytest.approx(math.exp(float(pooled.mean())), rel=1e-4)
    assert values["accuracy"] == pytest.approx(hits / len(pooled))
    assert "bits_per_character" not in values
    reference = Perplexity(ignore_index=PAD)
    reference.update(outputs.logits, given.y[:, 1:])
    assert values["perplexity"] == pytest.approx(float(reference.compute()), rel=1e-4)
    merged = dict(task.zeros)
    for rows in (slice(0, 1), slice(1, 1), slice(1, 3)):
        add_sums(merged, task.sums(Written(outputs.logits[rows], outputs.truth[rows]), given[rows]))
    assert task.values(merged) == pytest.approx(values, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("model_name", MODELS)
def test_a_token_is_said_before_it_is_seen(model_name: str) -> None:
    job = a_job("translation", model_name)
    task, model = make_task(job), a_model(job)
    source, one, other = ids("source"), ids("abcdefgh"), ids("abcdXfgh")
    with torch.no_grad():
        first, second = (task.forward(model, Batch(source, y)).logits[0] for y in (one, other))
        torch.testing.assert_close(first[:5], second[:5])  # the fifth token, e or X, is said at place 4
        assert float((first[5] - second[5]).abs().max()) > 1e-3
        third = task.forward(model, Batch(ids("sourcX"), one)).logits[0]
    assert float((first[0] - third[0]).abs().max()) > 1e-3  # all of the source is seen from the start


@pytest.mark.parametrize("name", ["translation", "denoising"])
def test_the_sums_of_nothing(name: str) -> None:
    task = make_task(a_job(name))
    for nothing in ({}, task.zeros):
        values = task.values(nothing)
        assert values["examples"] == 0
        assert all(math.isnan(values[n]) for n in (*task.metrics, "loss"))
    drawn = task.draw((16,), 3, torch.Generator().manual_seed(0))
    assert (tasks[name].target, drawn.y.dim()) == (("tokens", 2) if name == "translation" else ("none", 1))
    with torch.no_grad():
        sums = task.sums(task.forward(a_model(a_job(name)), drawn), drawn)
    assert {n: (t.shape, t.dtype) for n, t in sums.items()} == {n: (t.shape, t.dtype) for n, t in task.zeros.items()}


# ---- translation: what is written ------------------------------------------------------------------------------------
def greedy(model: Any, source: Tensor, longest: int) -> list[int]:
    """One text alone, without padding, by a call of the whole model for each token."""
    said = [BEGIN]
    while len(said) < longest:
        said.append(int(model(source[source != PAD][None], torch.tensor([said]))[0, -1].argmax()))
        if said[-1] == END:
            return said[1:-1]
    return said[1:]


@pytest.mark.parametrize("model_name", MODELS)
def test_written_is_the_likeliest_token_step_by_step(model_name: str) -> None:
    model = a_model(a_job("translation", model_name))
    sources = ids(*(f"text {i} {'x' * (i % 7)}" for i in range(6)))
    with torch.no_grad():
        written = write(model, sources, 16)
        assert written == [greedy(model, source, 16) for source in sources]
    assert len(set(map(tuple, written))) > 1, "texts are told apart"


def test_each_text_ends_at_its_own_end_and_all_at_the_longest() -> None:
    a, b, c = Bytes().encode("abc")
    model = Script([a, END, b, b, b, b, b], [END], [a, b, MASK, c, END], [a, b, c, a, b, c, a, b, c])
    source = ids(*"wxyz")
    assert write(model, source, 6) == [[a], [], [a, b, MASK, c], [a, b, c, a, b]]
    assert [target.shape[1] for target in model.asked] == [1, 2, 3, 4, 5]
    assert model.asked[-1][0].tolist() == [BEGIN, a, END, PAD, PAD]
    short = Script([a, END], [END], [b, c, END], [END])
    assert write(short, source, 16) == [[a], [], [b, c], []]
    assert len(short.asked) == 3, "nobody is asked once all have ended"


@pytest.mark.parametrize(("longest", "tokens"), [(0, 15), (1, 1), (4, 4), (15, 15), (500, 15)])
@pytest.mark.parametrize("model_name", ["", "bart"])
def test_longest_bounds_what_is_written_and_so_does_the_models_length(
    model_name: str, longest: int, tokens: int
) -> None:
    job = a_job("translation", model_name or "transformer", longest=longest)
    task, given = make_task(job), Batch(ids("x"), ids("y"))
    model: Any = a_model(job) if model_name else Script(Bytes().encode("z") * 99)
    with torch.no_grad():
        (text,) = task.examine(model, given, "test").texts
    assert len(text) == tokens if not model_name else len(text) <= tokens


def measured(task: Task, model: nn.Module, given: Batch, part: Any) -> dict[str, float]:
    with torch.no_grad():
        return task.values(task.sums(task.examine(model, given, part), given))


def test_scores_of_what_is_written_are_those_of_the_texts_and_of_the_test_part_alone() -> None:
    truth, said = ["the cat sat on the mat", "a dog"], ["the cat sat on a mat", "a dog"]
    task = make_task(a_job("translation", length=32))
    given = Batch(ids("x", "y", length=32), ids(*truth, length=32))
    model = Script(*([*Bytes().encode(text), END] for text in said))
    values = measured(task, model, given, "test")
    assert values["bleu"] == pytest.approx(bleu(bleu_sums(said, truth)))
    assert values["chrf"] == pytest.approx(chrf(chrf_sums(said, truth)))
    assert {n: values[n] for n in SCORES[2:]} == pytest.approx(rouge(rouge_sums(said, truth)))
    assert all(0 < values[n] < 1 for n in SCORES)
    right = measured(task, Script(*(row[1:].tolist() for row in given.y)), given, "test")
    assert [right[n] for n in SCORES] == pytest.approx([1.0] * 5)
    assert right["accuracy"] == 1.0
    before = len(model.asked)
    checked = measured(task, model, given, "validation")
    assert len(model.asked) == before + 1, "nothing is written"
    assert all(math.isnan(checked[n]) for n in SCORES)
    assert checked["perplexity"] == values["perplexity"]
    plain = task.sums(Said(model(given.x, given.y[:, :-1]), given.y[:, 1:]), given)
    assert plain.keys() == task.zeros.keys()


def test_a_translation_that_was_cut_off_is_no_reference() -> None:
    task = make_task(a_job("translation", length=16))
    whole, cut = "a short one", "one that is longer than sixteen tokens"
    given = Batch(ids("x", "y"), ids(whole, cut))
    sums = task.sums(Written(torch.zeros(2, 15, V), given.y[:, 1:], texts=("a short cat", "one that is lo")), given)
    alone = bleu_sums(["a short cat"], [whole]) | chrf_sums(["a short cat"], [whole])
    assert all(torch.equal(sums[name], value) for name, value in alone.items())
    assert int(sums["examples"]) == 2


def test_a_word_that_the_tokenizer_does_not_know_is_in_the_reference_and_in_no_translation() -> None:
    task = make_task(a_job("translation", length=16))
    row = [BEGIN, *Bytes().encode("ab"), UNKNOWN, *Bytes().encode("cd"), END]
    given = Batch(ids("x"), torch.tensor([row + [PAD] * (16 - len(row))]))
    sums = task.sums(Written(torch.zeros(1, 15, V), given.y[:, 1:], texts=("ab cd",)), given)
    expected = bleu_sums(["ab cd"], ["ab \N{REPLACEMENT CHARACTER} cd"])
    assert all(torch.equal(sums[name], value) for name, value in expected.items())


def test_a_site_measures_scores_on_its_test_part_alone() -> None:
    bench = Workbench(a_job("translation"), torch.device("cpu"))
    given = bench.task.draw((16,), 9, torch.Generator().manual_seed(1))
    store = Store(given.x.int(), given.y, [str(i) for i in range(9)], bench.job.data)
    found = {part: evaluate(bench, Examples(store, torch.arange(9)), part=part) for part in ("validation", "test")}
    assert (int(found["validation"]["rouge_texts"]), int(found["test"]["rouge_texts"])) == (0, 9)
    assert torch.equal(found["validation"]["surprise"], found["test"]["surprise"])
