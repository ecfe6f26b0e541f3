"""LSTM, GPT, BERT and ELECTRA: counts by hand, who sees whom, padding, ties, and texts learned by heart."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from shared_models.errors import ConfigError
from shared_models.models import configure, models
from shared_models.tokens import BEGIN, END, MASK, PAD, TEXT
from shared_models.zoo.lstm import last

NAMES = ("bert", "electra", "gpt", "lstm")
TRANSFORMERS = NAMES[:3]
LENGTH, VOCABULARY, CLASSES = 10, TEXT + 20, 3
FORMS = [(name, each) for name in NAMES for each in (False, True)]


def pretrained(name: str, vocabulary: int = VOCABULARY) -> int:
    """Outputs at each place that the model's own task asks for."""
    return 1 if name == "electra" else vocabulary


def build(name: str, each: bool = False, *, shape: tuple[int, ...] = (LENGTH, VOCABULARY), **keys: Any) -> Any:
    torch.manual_seed(0)
    chosen, settings = configure(name, keys)
    return chosen.build(settings, shape, pretrained(name, shape[1]) if each else CLASSES, each=each)


def drawn(count: int, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Texts of random tokens, without padding."""
    ids = torch.randint(TEXT, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = BEGIN
    return ids


def padded(x: Tensor, lengths: list[int]) -> Tensor:
    return x * (torch.arange(x.shape[1]) < torch.tensor(lengths)[:, None])


# ---- counts ----------------------------------------------------------------------------------------------------------
def linear(before: int, after: int) -> int:
    return before * after + after


def block(width: int, mlp: int) -> int:
    """q, k, v and out, two layers, two norms."""
    return 4 * linear(width, width) + linear(width, mlp) + linear(mlp, width) + 4 * width


def gpt(shape: tuple[int, int], layers: int, width: int) -> int:
    return sum(shape) * width + layers * block(width, 4 * width) + 2 * width


def bert(shape: tuple[int, int], layers: int, width: int) -> int:
    """Three tables and a norm, blocks, the head for tokens."""
    encoder = (sum(shape) + 2) * width + 2 * width + layers * block(width, 4 * width)
    return encoder + linear(width, width) + 2 * width + shape[1]


def electra(shape: tuple[int, int], layers: int, embedding: int, width: int, part: int) -> int:
    """Tables and a norm, the discriminator with its head, the generator with its own."""
    total = (sum(shape) + 2) * embedding + 2 * embedding + linear(width, width) + linear(width, 1)
    for d in (width, width // part):
        total += layers * block(d, 4 * d) + (linear(embedding, d) if d != embedding else 0)
    return total + linear(width // part, embedding) + 2 * embedding + shape[1]


def lstm(vocabulary: int, layers: int, width: int, hidden: int, project: bool, tied: bool) -> int:
    """A table, four gates with two biases a layer, the output layer."""
    total, last = vocabulary * width, width if project else hidden
    total += sum(4 * hidden * ((hidden if i else width) + hidden + 2) for i in range(layers))
    return total + project * linear(hidden, width) + (vocabulary if tied else linear(last, vocabulary))


@pytest.mark.parametrize(
    ("name", "size", "by_hand", "count"),
    [
        ("lstm", "tiny", lstm(293, 1, 64, 128, True, True), 126_629),
        ("lstm", "small", lstm(90, 2, 8, 256, False, False), 820_522 + 2 * 4 * 256),  # Reddi et al. 2021 and a bias
        ("lstm", "base", lstm(10_004, 1, 96, 670, True, False), 4_050_748 + 4 * 670),  # the same
        ("gpt", "tiny", gpt((64, 293), 2, 64), 122_944),
        ("gpt", "small", gpt((1024, 50_257), 12, 768), 124_439_808),
        ("gpt", "medium", gpt((1024, 50_257), 24, 1024), 354_823_168),
        ("bert", "tiny", bert((64, 293), 2, 64), 127_653),
        ("bert", "base", bert((512, 30_522), 12, 768), 109_514_298),
        ("bert", "large", bert((512, 30_522), 24, 1024), 335_174_458),
        ("electra", "tiny", electra((64, 293), 2, 64, 64, 2), 157_318),
        ("electra", "small", electra((512, 30_522), 12, 128, 256, 4), 14_196_219),
        ("electra", "base", electra((512, 30_522), 12, 768, 768, 3), 119_386_427),
    ],
)
def test_parameter_counts(name: str, size: str, by_hand: int, count: int) -> None:
    shape = models[name].usual[size]
    with torch.device("meta"):
        net = build(name, True, shape=shape, size=size)
    assert sum(p.numel() for p in net.parameters()) == by_hand == count


@pytest.mark.parametrize("name", NAMES)
def test_every_size_takes_its_usual_text(name: str) -> None:
    declared = models[name]
    assert set(declared.usual) == set(declared.sizes)
    for size, shape in declared.usual.items():
        length, vocabulary = shape
        _, settings = configure(name, {"size": size})
        with torch.device("meta"):
            x = torch.zeros(2, length, dtype=torch.int64)
            for outputs, each, expected in ((5, False, (2, 5)), (vocabulary, True, (2, length, vocabulary))):
                assert declared.build(settings, shape, outputs, each=each)(x).shape == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_label_for_each_token_has_an_output_layer_of_its_own(name: str) -> None:
    chosen, settings = configure(name, {})
    assert chosen.build(settings, (LENGTH, VOCABULARY), 4, each=True)(drawn(2, 7)).shape == (2, 7, 4)


@pytest.mark.parametrize("name", NAMES)
def test_heads_are_the_entries_that_the_number_of_classes_shapes(name: str) -> None:
    chosen, settings = configure(name, {})
    few, many = (chosen.build(settings, (LENGTH, VOCABULARY), k).state_dict() for k in (3, 4))
    shaped = {key for key, value in few.items() if value.shape != many[key].shape}
    assert {key for key in few if any(fnmatchcase(key, p) for p in chosen.heads)} == shaped


# ---- who sees whom ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_who_sees_a_later_token(name: str) -> None:
    """Nobody before it in LSTM and GPT, everybody in BERT and ELECTRA."""
    net, x = build(name, each=True).double(), drawn(2)
    other = x.clone()
    other[:, 6] = torch.where(x[:, 6] == TEXT, TEXT + 1, TEXT)
    with torch.no_grad():
        moved = (net(x) - net(other)).abs().amax(dim=2)
    assert (moved[:, 6:] > 1e-4).all()
    if name in ("gpt", "lstm"):
        assert not moved[:, :6].any()
    else:
        assert (moved[:, :6] > 1e-4).all()


@pytest.mark.parametrize(("name", "each"), FORMS)
def test_padding_changes_nothing(name: str, each: bool) -> None:
    """Neither how much of it there is nor its row in the table of tokens; samples do not mix either."""
    net, lengths = build(name, each).double().eval(), [8, 5, 1]
    x = padded(drawn(3, 8), lengths)
    first = 1 if each and name != "electra" else 0  # where the table says the tokens too, it says padding otherwise

    def says(x: Tensor) -> Tensor:
        with torch.no_grad():
            return (net(x) if each else net(x)[:, None])[..., first:]

    y, longer, alone = says(x), says(F.pad(x, (0, 2))), [says(x[i : i + 1, :n])[0] for i, n in enumerate(lengths)]
    with torch.no_grad():
        next(p for key, p in net.named_parameters() if key.endswith("tokens.weight"))[PAD] += 3.0
    moved = says(x)
    for i, n in enumerate(lengths):
        for other in (longer[i], alone[i], moved[i]):
            torch.testing.assert_close(other[:n], y[i, :n], atol=1e-10, rtol=1e-8)


def test_electras_generator_does_not_see_padding_either() -> None:
    net = build("electra", each=True).double()
    x = padded(drawn(2, 8), [8, 4])
    torch.testing.assert_close(net.generator(x)[1, :4], net.generator(x[1:, :4])[0], atol=1e-10, rtol=1e-8)


def test_the_last_token_is_the_last_that_is_no_padding() -> None:
    ids = torch.tensor([[5, 6, 7], [5, 6, PAD], [5, PAD, PAD], [PAD, PAD, PAD]])
    x = torch.arange(12.0).reshape(4, 3, 1)
    assert last(x, ids).flatten().tolist() == [2.0, 4.0, 6.0, 9.0]


@pytest.mark.parametrize(("name", "each"), FORMS)
def test_a_text_of_padding_alone_gives_numbers(name: str, each: bool) -> None:
    assert build(name, each)(torch.zeros(2, 4, dtype=torch.int64)).isfinite().all()


# ---- ties ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "inside", "head"),
    [
        ("lstm", "", ""),
        ("gpt", "", ""),
        ("bert", "embeddings.", "token_head."),
        ("electra", "embeddings.", "generator_head."),
    ],
)
def test_the_output_layer_is_the_table_of_tokens(name: str, inside: str, head: str) -> None:
    """Also in a copy, in another dtype, and in a model that loaded the entries without the second name."""
    net, tokens, output = build(name, each=True), f"{inside}tokens", f"{head}output"
    assert output not in dict(build(name).named_modules())
    sent = {key: value + 1 for key, value in net.state_dict().items() if key != f"{output}.weight"}
    other = build(name, each=True)
    assert other.load_state_dict(sent, strict=False).missing_keys == [f"{output}.weight"]
    for tied in (net, copy.deepcopy(net), copy.deepcopy(net).double(), other):
        assert tied.get_submodule(output).weight is tied.get_submodule(tokens).weight
    torch.testing.assert_close(other.state_dict()[f"{output}.weight"], net.state_dict()[f"{tokens}.weight"] + 1)


def test_an_lstm_need_not_be_tied() -> None:
    assert build("lstm", each=True, tied=False).head.weight.shape == (VOCABULARY, 64)


def test_electras_networks_share_the_embedding_and_a_classifier_has_no_generator() -> None:
    net = build("electra", each=True)
    net.generator(drawn(2)).sum().backward()
    reached = {key for key, p in net.named_parameters() if p.grad is not None}
    assert all(key.startswith(("embeddings.", "generator_")) for key in reached)
    assert "embeddings.tokens.weight" in reached
    assert not [key for key in build("electra").state_dict() if key.startswith("generator_")]


# ---- what all promise ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "each"), [form for form in FORMS if form[0] in TRANSFORMERS])
def test_per_sample_gradients_equal_a_loop(name: str, each: bool) -> None:
    assert "vmap" in models[name].per_sample_gradients
    net, x = build(name, each).double(), padded(drawn(3), [10, 7, 3])
    weights = {key: p.detach() for key, p in net.named_parameters() if not key.startswith("generator_")}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(net, weights, (x[None],)).sigmoid().square().mean()

    stacked = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    for i in range(len(x)):
        net.zero_grad()
        net(x[i : i + 1]).sigmoid().square().mean().backward()
        for key in weights:
            alone = net.get_parameter(key).grad
            assert alone.any(), key
            torch.testing.assert_close(stacked[key][i], alone, atol=1e-10, rtol=1e-8, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_models_that_are_stacked_say_what_each_says(name: str) -> None:
    nets, x = [build(name, each=True), build(name, each=True)], padded(drawn(3), [10, 7, 3])
    for parameter in nets[1].parameters():
        nn.init.normal_(parameter, std=0.1)
    weights, _ = stack_module_state(nets)

    def says() -> Tensor:
        return vmap(lambda own: functional_call(nets[0], own, (x,)))(weights)

    if models[name].stackable:
        for stacked, net in zip(says(), nets, strict=True):
            torch.testing.assert_close(stacked, net(x), atol=1e-5, rtol=1e-4)
    else:
        with pytest.raises(RuntimeError, match="rule not implemented"):  # of an LSTM's gates, in torch
            says()


@pytest.mark.parametrize("name", NAMES)
def test_no_operation_is_in_place(in_place: Any, name: str) -> None:
    net, x = build(name), drawn(2)
    with in_place() as mode:
        net(x)
    assert mode.seen == []


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_for_training_only(name: str) -> None:
    for each in (False, True):
        net, x = build(name, each, dropout=0.5, layers=2), drawn(2)
        assert not torch.equal(net(x), net(x))
        assert torch.equal(net.eval()(x), net(x))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_nothing_is_dropped_within_the_mlp(name: str) -> None:
    """As in the authors' code of all three: of the attention weights and of what each layer adds, no more."""
    for each in (False, True):
        rates = {
            key: part.p for key, part in build(name, each, dropout=0.5).named_modules() if type(part) is nn.Dropout
        }
        within = {key for key in rates if "blocks." in key}
        assert {rates[key] for key in within if key.endswith("mlp.dropout")} == {0.0}
        assert {rates[key] for key in within if not key.endswith("mlp.dropout")} == {0.5}


# ---- learned by heart ------------------------------------------------------------------------------------------------
def by_heart() -> Tensor:
    """16 texts of 4 to 8 random tokens, between a begin and an end."""
    lengths = torch.tensor([4 + i % 5 for i in range(16)])[:, None]
    place = torch.arange(LENGTH)
    x = torch.where(place == lengths + 1, END, drawn(16))
    return x.masked_fill(place > lengths + 1, PAD)


def entropy(tokens: Tensor) -> float:
    """Of the frequencies of tokens, in nats."""
    share = tokens.bincount() / len(tokens)
    return float(-(share * share.clamp(min=1e-9).log()).sum())


def learn(net: nn.Module, loss: Callable[[], Tensor], rate: float, steps: int) -> nn.Module:
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return net.eval()


@pytest.mark.parametrize(("name", "rate", "steps"), [("gpt", 0.003, 100), ("lstm", 0.01, 100)])
def test_tiny_learns_sixteen_texts_by_heart(name: str, rate: float, steps: int) -> None:
    """What is left is to guess which text it will be: log(16) nats a text."""
    x, net = by_heart(), build(name, each=True)

    def loss() -> Tensor:
        return F.cross_entropy(net(x[:, :-1]).transpose(1, 2), x[:, 1:], ignore_index=PAD)

    learn(net, loss, rate, steps)
    assert loss() < 0.25 * entropy(x[:, 1:][x[:, 1:] > PAD])
    share = (x > BEGIN).sum(dim=1).float().mean()
    assert loss() > 0.8 * math.log(16) / share


def test_tiny_bert_finds_the_hidden_tokens_of_texts_it_knows() -> None:
    x, net, source = by_heart(), build("bert", each=True), torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        hidden = (torch.rand(x.shape, generator=source) < 0.25) & (x >= TEXT)
        return F.cross_entropy(net(x.masked_fill(hidden, MASK))[hidden], x[hidden])

    learn(net, loss, 0.003, 200)
    with torch.no_grad():
        assert sum(loss() for _ in range(8)) / 8 < 0.25 * entropy(x[x >= TEXT])


def test_both_of_tiny_electras_networks_know_their_texts() -> None:
    """The generator finds what is hidden, the discriminator what was drawn at random instead."""
    x, net, source = by_heart(), build("electra", each=True), torch.Generator().manual_seed(0)
    text = x >= TEXT

    def ask() -> tuple[Tensor, Tensor, Tensor]:
        hidden = (torch.rand(x.shape, generator=source) < 0.25) & text
        other = torch.randint(TEXT, VOCABULARY, x.shape, generator=source)
        seen = torch.where(hidden, other, x)
        guessed = F.cross_entropy(net.generator(x.masked_fill(hidden, MASK))[hidden], x[hidden])
        return guessed, net(seen)[..., 0][text], (seen != x)[text]

    def loss() -> Tensor:
        guessed, found, replaced = ask()
        return guessed + 50 * F.binary_cross_entropy_with_logits(found, replaced.float())  # eq. 3

    learn(net, loss, 0.002, 200)
    with torch.no_grad():
        guessed, found, replaced = (torch.stack(said) for said in zip(*(ask() for _ in range(8)), strict=True))
    assert guessed.mean() < 0.5 * entropy(x[text])
    assert (found > 0)[replaced].float().mean() > 0.8
    assert (found < 0)[~replaced].float().mean() > 0.9


@pytest.mark.parametrize(
    ("name", "rate", "steps"), [("bert", 0.003, 40), ("electra", 0.003, 40), ("gpt", 0.003, 40), ("lstm", 0.01, 40)]
)
def test_tiny_learns_classes_of_sixteen_texts(name: str, rate: float, steps: int) -> None:
    x, y, net = by_heart(), torch.arange(16) % CLASSES, build(name)
    learn(net, lambda: F.cross_entropy(net(x), y), rate, steps)
    assert torch.equal(net(x).argmax(dim=1), y)


# ---- settings --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("gpt", {"heads": 5}, "[model] gpt: width 64 should be a multiple of heads 5"),
        ("bert", {"width": 66}, "[model] bert: width 66 should be a multiple of heads 4"),
        ("electra", {"generator": 3}, "[model] electra: width 64 should be a multiple of generator 3"),
        ("electra", {"heads": 1}, "[model] electra: heads 1 should be a multiple of generator 2"),
        ("lstm", {"project": False}, "[model] lstm: tied needs project = true, or hidden 128 equal to width 64"),
    ],
)
def test_wrong_settings_get_one_clear_line(name: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        configure(name, keys)
    assert str(error.value) == message
