"""Language modelling, masked tokens and replaced tokens: numbers by hand, torchmetrics, draws, and what is learned."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.text import Perplexity

from client.readers.base import Examples, Splits, Store
from client.trainer import evaluate
from client.workbench import Benches, Workbench
from server.coordinator import Coordinator
from shared_models.errors import ConfigError
from shared_models.job import Job
from shared_models.keys import keyed_global
from shared_models.spec import build_model
from shared_models.tasks.base import Batch, Task, add_sums, make_task, tasks
from shared_models.tasks.language import Said
from shared_models.tasks.masked_language_modelling import choose, hide
from shared_models.tokens import BEGIN, END, GAP, MASK, PAD, TEXT, UNKNOWN, Bytes
from simulations.engines.inprocess import InProcess

MODELS = {"language-modelling": "gpt", "masked-language-modelling": "bert", "replaced-token-detection": "electra"}
TASKS = list(MODELS)
V = Bytes.size


def a_job(name: str, length: int = 12, model: str = "", **parts: Any) -> Job:
    return Job.resolve({
        "name": "text", "model": {"name": model or MODELS[name]}, "task": {"name": name, **parts.pop("task", {})},
        "data": {"shape": [length], "tokenizer": "bytes"}, **parts,
    })  # fmt: skip


def ids(*texts: str, length: int = 12) -> Tensor:
    """As the readers make them: `<begin>`, bytes, `<end>` where there is room, padding."""
    rows = [[BEGIN, *Bytes().encode(text), END][:length] for text in texts]
    return torch.tensor([row + [PAD] * (length - len(row)) for row in rows])


def batch(*texts: str, length: int = 12) -> Batch:
    return Batch(ids(*texts, length=length), torch.zeros(len(texts), dtype=torch.int64))


def a_model(job: Job, spread: float = 0.3) -> nn.Module:
    """With weights that are large enough to say something else for each token."""
    model = build_model(job)[0].eval()
    with torch.no_grad(), keyed_global(7):
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return model


def measured(task: Task, model: nn.Module, given: Batch) -> tuple[Any, dict[str, float]]:
    with torch.no_grad(), keyed_global(3):
        outputs = task.forward(model, given)
        return outputs, task.values(task.sums(outputs, given))


# ---- every task on texts ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TASKS)
def test_sums_of_two_halves_add_up_to_the_whole(name: str) -> None:
    job = a_job(name)
    task, model = make_task(job), a_model(job)
    given = task.draw((12,), 10, torch.Generator().manual_seed(1))
    outputs, values = measured(task, model, given)
    merged = dict(task.zeros)
    for rows in (slice(0, 3), slice(3, 3), slice(3, 10)):
        add_sums(merged, task.sums(_rows(outputs, rows), given[rows]))
    assert task.values(merged) == pytest.approx(values, rel=1e-9)
    sums = task.sums(outputs, given)
    assert {n: (t.shape, t.dtype) for n, t in sums.items()} == {n: (t.shape, t.dtype) for n, t in task.zeros.items()}
    assert values.keys() >= {*task.metrics, "loss", "examples"}


def _rows(outputs: Any, rows: slice) -> Any:
    """The same outputs of some of the texts."""
    parts = {n: v[rows] if isinstance(v, Tensor) else v and _rows(v, rows) for n, v in vars(outputs).items()}
    return type(outputs)(**parts)


@pytest.mark.parametrize("name", TASKS)
def test_the_sums_of_nothing(name: str) -> None:
    task = make_task(a_job(name))
    for nothing in ({}, task.zeros):
        values = task.values(nothing)
        assert values["examples"] == 0
        assert all(math.isnan(values[n]) for n in (*task.metrics, "loss"))


@pytest.mark.parametrize("name", TASKS)
def test_a_job_without_labels_and_texts_is_refused_where_something_is_wrong(name: str) -> None:
    with pytest.raises(ConfigError, match="has no tokenizer"):
        _ = tasks[name](tasks[name].Settings()).tokenizer
    with pytest.raises(ConfigError, match="'hidden'" if name != "language-modelling" else "unknown key 'hidden'"):
        a_job(name, task={"hidden": 1.0})
    with pytest.raises(ConfigError, match="cannot serve"):
        a_job(name, model="bart")


@pytest.mark.parametrize("text", ["", "a"])
@pytest.mark.parametrize("name", TASKS)
def test_texts_of_no_or_one_token_do_no_harm(name: str, text: str) -> None:
    job = a_job(name)
    task, model = make_task(job), a_model(job)
    given = batch(text, "another one")
    outputs, values = measured(task, model, given)
    assert torch.isfinite(task.loss(outputs, given)).all()
    assert math.isfinite(values["loss"])


# ---- the next token --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model_name", ["gpt", "lstm"])
def test_language_modelling_by_hand(model_name: str) -> None:
    """Grüße has two characters of two bytes; the second text fills all places, so that its end is never said."""
    job = a_job("language-modelling", model=model_name)
    task, model = make_task(job), a_model(job)
    texts = ["Grüße", "exactly 11.", "ab"]
    given = batch(*texts)
    outputs, values = measured(task, model, given)
    assert outputs.logits.shape == (3, 11, V)
    nats, tokens, hits, losses = 0.0, 0, 0, []
    with torch.no_grad():
        for text in texts:
            alone = ids(text, length=12)[0]
            own = alone[alone != PAD]
            logits = model(own[None, :-1])[0]  # without any padding
            surprise = F.cross_entropy(logits, own[1:], reduction="none")
            nats, tokens = nats + float(surprise.double().sum()), tokens + len(own) - 1
            hits += int((logits.argmax(1) == own[1:]).sum())
            losses.append(float(surprise.mean()))
    assert tokens == (7 + 1) + 11 + (2 + 1)
    assert task.loss(outputs, given).tolist() == pytest.approx(losses, rel=1e-5)
    assert values["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert values["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert values["bits_per_character"] == pytest.approx(nats / math.log(2) / (5 + 11 + 2), rel=1e-5)
    assert values["accuracy"] == pytest.approx(hits / tokens)
    assert values["examples"] == 3
    reference = Perplexity(ignore_index=PAD)
    reference.update(outputs.logits, given.x[:, 1:])
    assert values["perplexity"] == pytest.approx(float(reference.compute()), rel=1e-5)


@pytest.mark.parametrize("model_name", ["gpt", "lstm"])
def test_padding_changes_nothing_and_no_token_sees_itself_or_later_ones(model_name: str) -> None:
    job = a_job("language-modelling", length=20, model=model_name)
    task, model = make_task(job), a_model(job)
    short, long = batch("some", "text", length=7), batch("some", "text", length=20)
    (few, values), (many, again) = measured(task, model, short), measured(task, model, long)
    torch.testing.assert_close(task.loss(few, short), task.loss(many, long))
    assert values == pytest.approx(again, rel=1e-5)
    one, other = (measured(task, model, batch(t, length=20))[0].logits[0] for t in ("abcdefgh", "abcdXfgh"))
    torch.testing.assert_close(one[:5], other[:5])  # what says the first five tokens has not seen the fifth
    assert float((one[5] - other[5]).abs().max()) > 1e-3


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary_for_each_token() -> None:
    task = make_task(a_job("language-modelling"))
    given = batch("abc", "äö")
    outputs = Said(torch.zeros(2, 11, V), given.x[:, 1:])
    values = task.values(task.sums(outputs, given))
    assert task.loss(outputs, given).tolist() == pytest.approx([math.log(V)] * 2)
    assert values["perplexity"] == pytest.approx(V)
    assert values["bits_per_character"] == pytest.approx((4 + 5) * math.log2(V) / (3 + 2))


def test_windows_of_a_text_have_its_characters_in_all() -> None:
    """A window may end within a character, which is then counted in one of the two."""
    task, text = make_task(a_job("language-modelling", length=5)), "日本語のテキスト😀"
    whole = Bytes().encode(text)
    x = torch.tensor([[BEGIN, *whole[i : i + 4]] for i in range(0, len(whole), 4)])
    given = Batch(x, torch.zeros(len(x), dtype=torch.int64))
    assert int(task.sums(Said(torch.zeros(len(x), 4, V), x[:, 1:]), given)["characters"]) == len(text)


def test_predicted_is_the_likeliest_token() -> None:
    task = make_task(a_job("language-modelling"))
    logits = torch.randn(2, 11, V, generator=torch.Generator().manual_seed(0))
    assert torch.equal(task.predict(Said(logits, ids("a", "b")[:, 1:]), batch("a", "b")), logits.argmax(-1))


# ---- masked tokens ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [0.15, 0.3, 0.35, 0.5, 0.7])
def test_exactly_the_share_is_chosen_and_never_a_special_token(share: float) -> None:
    texts = [[BEGIN, *[TEXT + 5] * n, UNKNOWN, END, MASK, GAP] + [PAD] * (400 - n) for n in range(401)]
    chosen = choose(torch.tensor(texts), share)
    assert not chosen[torch.tensor(texts) < TEXT].any()
    assert chosen.sum(1).tolist() == [0, *(max(1, round(share * n)) for n in range(1, 401))]


def test_every_token_is_as_likely_to_be_chosen() -> None:
    torch.manual_seed(0)
    counts = choose(ids("abcdefghij").expand(20_000, -1), 0.3).sum(0)[1:11]
    assert (counts - 6000).abs().max() < 5 * math.sqrt(20_000 * 0.3 * 0.7)


def test_of_the_chosen_80_are_masked_10_another_token_and_10_the_same() -> None:
    torch.manual_seed(0)
    n = 200_000
    text, chosen = torch.full((n, 3), TEXT + 65), torch.tensor([[True, True, False]]).expand(n, -1)
    seen = hide(text, chosen, V)
    assert torch.equal(seen[:, 2], text[:, 2])
    found = seen[:, :2].flatten()
    masked, same = int((found == MASK).sum()), int((found == TEXT + 65).sum())
    other = found[(found != MASK) & (found != TEXT + 65)]
    for count, p in ((masked, 0.8), (same, 0.1 + 0.1 / 256), (len(other), 0.1 * 255 / 256)):
        assert abs(count - 2 * n * p) < 5 * math.sqrt(2 * n * p * (1 - p))
    spread = Counter(other.tolist())
    assert (min(spread), max(spread), len(spread)) == (TEXT, V - 1, 255)


def test_masked_language_modelling_counts_the_hidden_tokens_alone() -> None:
    job = a_job("masked-language-modelling", length=40, task={"hidden": 0.3})
    task, model = make_task(job), a_model(job)
    given = batch("a text of twenty-two.", "äöüß", length=40)
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    outputs, values = measured(task, model, given)
    hidden = outputs.truth != PAD
    assert hidden.sum(1).tolist() == [6, 2]
    assert torch.equal(outputs.truth[hidden], given.x[hidden])
    assert torch.equal(seen[0][~hidden], given.x[~hidden])
    each = F.cross_entropy(outputs.logits[hidden], given.x[hidden], reduction="none")
    expected = [float(each[:6].mean()), float(each[6:].mean())]
    assert task.loss(outputs, given).tolist() == pytest.approx(expected, rel=1e-5)
    assert values["perplexity"] == pytest.approx(math.exp(float(each.mean())), rel=1e-5)
    right = (outputs.logits.argmax(-1) == given.x) & hidden
    assert values["accuracy"] == pytest.approx(int(right.sum()) / 8)


@pytest.mark.parametrize("name", TASKS[1:])
def test_training_draws_differ_and_measuring_draws_repeat(name: str) -> None:
    job = a_job(name, train={"deterministic": True})
    bench = Workbench(job, torch.device("cpu"))
    given = bench.task.draw((12,), 40, torch.Generator().manual_seed(1))
    store = Store(given.x.int(), given.y, [str(i) for i in range(40)], job.data)
    examples = Examples(store, torch.arange(40))
    first = evaluate(bench, examples, "ulm")
    torch.manual_seed(99)
    again = evaluate(bench, examples, "ulm")
    assert all(torch.equal(again[n], t) for n, t in first.items())
    assert any(not torch.equal(evaluate(bench, examples, "bonn")[n], t) for n, t in first.items())
    with torch.no_grad():
        one, two = (bench.task.forward(bench.model, given) for _ in range(2))
    truth = [o.truth if isinstance(o, Said) else o.generated.truth for o in (one, two)]
    assert not torch.equal(*truth)


# ---- replaced tokens -------------------------------------------------------------------------------------------------
class Guesser(nn.Module):
    """A generator that says one token everywhere, or nothing, and a discriminator that says what it is told."""

    def __init__(self, says: Tensor, thinks: Tensor) -> None:
        super().__init__()
        self.says, self.thinks = says, thinks
        self.asked: list[Tensor] = []
        self.seen: list[Tensor] = []

    def generator(self, x: Tensor) -> Tensor:
        self.asked.append(x)
        return self.says.expand(*x.shape, V)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.thinks.expand(x.shape)[..., None]


def sure_of(letter: str) -> Tensor:
    return torch.zeros(V).index_fill(0, torch.tensor(Bytes().encode(letter)), 100.0)


def test_a_token_that_was_guessed_right_counts_as_original() -> None:
    """The generator says `a`: hidden letters of `aaaa` come back, those of `bbbb` are replaced."""
    task = make_task(a_job("replaced-token-detection", task={"hidden": 0.5, "weight": 2.0}))
    model = Guesser(sure_of("a"), torch.tensor(-1.0))
    given = batch("aaaa", "bbbb")
    outputs, values = measured(task, model, given)
    hidden = outputs.generated.truth != PAD
    assert hidden.sum(1).tolist() == [2, 2]
    assert torch.equal(model.asked[0] == MASK, hidden)
    assert torch.equal(model.seen[0][0], given.x[0])
    assert torch.equal(outputs.replaced, hidden & (given.x == Bytes().encode("b")[0]))
    assert torch.equal(outputs.counted, given.x != PAD)
    original, replaced = math.log1p(math.exp(-1)), math.log1p(math.exp(1))  # -log(1 - sigmoid(-1)), -log sigmoid(-1)
    assert task.loss(outputs, given).tolist() == pytest.approx(
        [2 * original, 100 + 2 * (original * 4 + replaced * 2) / 6]
    )
    assert values["balanced_accuracy"] == pytest.approx((0 / 2 + 10 / 10) / 2)
    assert values["accuracy"] == pytest.approx(10 / 12)
    assert values["generator_accuracy"] == pytest.approx(2 / 4)
    assert task.predict(outputs, given).tolist() == torch.zeros(2, 12).tolist()


def test_balanced_accuracy_by_hand() -> None:
    task = make_task(a_job("replaced-token-detection"))
    sums = {
        "found": 3,
        "replaced": 4,
        "left": 10,
        "original": 40,
        "guessed": 1,
        "hidden": 8,
        "loss": 6.0,
        "examples": 3,
    }
    values = task.values({n: torch.tensor(v) for n, v in sums.items()})
    assert values["balanced_accuracy"] == pytest.approx((0.75 + 0.25) / 2)
    assert values["accuracy"] == pytest.approx(13 / 44)
    assert (values["generator_accuracy"], values["loss"], values["examples"]) == (0.125, 2.0, 3.0)


def test_a_generator_that_knows_nothing_costs_log_v_and_draws_evenly() -> None:
    task = make_task(a_job("replaced-token-detection", task={"hidden": 0.5}))
    model = Guesser(torch.zeros(V), torch.tensor(0.0))
    given = Batch(batch("abcdefghij").x.expand(4000, -1), torch.zeros(4000, dtype=torch.int64))
    with keyed_global(1):
        outputs = task.forward(model, given)
    assert task.loss(outputs, given).tolist() == pytest.approx([math.log(V) + 50 * math.log(2)] * 4000)
    drawn = torch.bincount(model.seen[0][outputs.generated.truth != PAD], minlength=V)
    assert abs(int(drawn.max()) - 20_000 / V) < 6 * math.sqrt(20_000 / V)
    assert int(drawn[PAD]) == 0
    assert int(drawn[PAD + 1 :].min()) > 0


def test_tokens_are_drawn_as_likely_as_the_generator_says() -> None:
    task = make_task(a_job("replaced-token-detection", task={"hidden": 0.5}))
    says = torch.full((V,), -1e9)
    says[TEXT : TEXT + 3] = torch.tensor([0.5, 0.3, 0.2]).log()
    says[PAD] = 9.0  # is never drawn: both networks would overlook the token
    model = Guesser(says, torch.tensor(0.0))
    given = Batch(batch("zzzzzzzzzz").x.expand(10_000, -1), torch.zeros(10_000, dtype=torch.int64))
    with keyed_global(1):
        hidden = task.forward(model, given).generated.truth != PAD
    counts = torch.bincount(model.seen[0][hidden] - TEXT)
    assert counts.tolist() == pytest.approx([25_000, 15_000, 10_000], abs=5 * math.sqrt(50_000 * 0.25))


def test_loss_by_hand_and_no_gradient_of_the_discriminator_reaches_the_generator() -> None:
    job = a_job("replaced-token-detection")
    task, model = make_task(job), a_model(job)
    given = batch("some text", "ab")
    with keyed_global(5):
        outputs = task.forward(model, given)
    asked = torch.where(outputs.generated.truth != PAD, MASK, given.x)
    torch.testing.assert_close(outputs.generated.logits, model.generator(asked))  # type: ignore[operator]
    expected = []
    for i, length in enumerate((11, 4)):
        hidden = (outputs.generated.truth[i] != PAD).nonzero()[:, 0]
        guess = F.cross_entropy(outputs.generated.logits[i, hidden], given.x[i, hidden])
        judge = F.binary_cross_entropy(outputs.logits[i, :length].sigmoid(), outputs.replaced[i, :length].float())
        expected.append((guess + 50 * judge).item())
    assert task.loss(outputs, given).tolist() == pytest.approx(expected, rel=1e-4)
    own = {n: p for n, p in model.named_parameters() if n.startswith("generator_")}
    assert own
    judged = torch.autograd.grad(outputs.logits.sum(), list(own.values()), allow_unused=True, retain_graph=True)
    assert judged == (None,) * len(own)
    guessed = torch.autograd.grad(outputs.generated.logits.sum(), [*own.values(), model.head.weight], allow_unused=True)
    assert all(g is not None for g in guessed[:-1])
    assert guessed[-1] is None


# ---- through the whole stack -----------------------------------------------------------------------------------------
def test_two_sites_learn_which_letter_follows_which() -> None:
    """Each letter is as frequent as any other, and nine times in ten it says which one comes next."""
    job = a_job(
        "language-modelling", length=32, train={"optimizer": "adamw", "lr": 0.01, "batch_size": 16, "epochs": 5.0},
        federation={"rounds": 4, "min_sites": 2},
    )  # fmt: skip

    def site(seed: int) -> Splits:
        source = torch.Generator().manual_seed(seed)
        state, rows = torch.randint(16, (96,), generator=source), []
        for _ in range(31):
            rows.append(state)
            jump = torch.rand(96, generator=source) < 0.1
            state = torch.where(jump, torch.randint(16, (96,), generator=source), (5 * state + 3) % 16)
        x = torch.cat([torch.full((96, 1), BEGIN), TEXT + 97 + torch.stack(rows, dim=1)], dim=1)
        store = Store(x.int(), torch.zeros(96, dtype=torch.int64), [str(i) for i in range(96)], job.data)
        return Splits(*(Examples(store, torch.arange(*ends)) for ends in ((0, 64), (64, 80), (80, 96))))

    sites = {"ulm": site(1), "bonn": site(2)}
    outcome = Coordinator(job, InProcess(list(sites), sites.__getitem__, Benches(torch.device("cpu"))), "run").run()
    said = torch.cat([s.test.store.x[s.test.rows][:, 1:].flatten() for s in sites.values()])
    shares = torch.unique(said, return_counts=True)[1].double() / len(said)
    unigram = -float((shares * shares.log2()).sum())
    assert unigram > 3.9
    assert outcome.curve[0]["bits_per_character"] > unigram
    assert outcome.all_sites["bits_per_character"] < 0.5 * unigram
    assert outcome.all_sites["accuracy"] > 0.7
