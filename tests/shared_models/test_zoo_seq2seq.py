"""Sequence to sequence: torch's and Hugging Face's outputs, the papers' counts, and what each model promises."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from shared_models.errors import ConfigError
from shared_models.models import configure, models
from shared_models.tokens import BEGIN, END, TEXT
from shared_models.transformer import EncoderDecoder

NAMES = ("bart", "t5", "transformer")
T, V = 12, 40
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("bart", {}),
    ("t5", {"distance": 17}),
    ("transformer", {}),
    ("transformer", {"positions": "learnable", "before": True}),
]


def build(name: str, shape: tuple[int, ...] = (T, V), *, seed: int = 0, **keys: Any) -> Any:
    torch.manual_seed(seed)
    chosen, settings = configure(name, keys)
    return chosen.build(settings, shape, shape[-1])


def texts(count: int = 4, length: int = T, vocabulary: int = V, seed: int = 0) -> Tensor:
    """(count, length) ids of texts of 3 to `length` tokens; the first fills its row, and the last has 3."""
    source = torch.Generator().manual_seed(seed)
    ends = torch.randint(3, length + 1, (count,), generator=source)
    ends[0], ends[-1] = length, 3
    ids = torch.randint(4, vocabulary, (count, length), generator=source)
    return torch.where(torch.arange(length) < ends[:, None], ids, 0)


def begun(ids: Tensor) -> Tensor:
    """The same with BEGIN in front, what does not fit cut off."""
    return F.pad(ids, (1, 0), value=BEGIN)[:, :-1]


SOURCE, TARGET = texts(), begun(texts(length=9, seed=1))


# ---- counts ----------------------------------------------------------------------------------------------------------
def encoder_decoder(layers: int, width: int, mlp: int) -> int:
    """Attention of 4 matrices, once in an encoder's layer and twice in a decoder's, an MLP and a norm for each."""
    attention, hidden, norm = 4 * (width * width + width), 2 * width * mlp + mlp + width, 2 * width
    return layers * ((attention + hidden + 2 * norm) + (2 * attention + hidden + 3 * norm))


def bart(layers: int, width: int, mlp: int, length: int, vocabulary: int) -> int:
    return vocabulary * width + 2 * ((2 + length) * width + 2 * width) + encoder_decoder(layers, width, mlp)


def t5(layers: int, width: int, inner: int, mlp: int, heads: int, vocabulary: int) -> int:
    attention, hidden = 4 * width * inner, 2 * width * mlp
    blocks = layers * ((attention + hidden + 2 * width) + (2 * attention + hidden + 3 * width))
    return vocabulary * width + blocks + 2 * (32 * heads + width)


@pytest.mark.parametrize(
    ("name", "size", "shape", "by_hand", "count"),
    [
        ("transformer", "tiny", (32, 293), 293 * 64 + encoder_decoder(2, 64, 128), 186_176),
        ("transformer", "base", (256, 37000), 37000 * 512 + encoder_decoder(6, 512, 2048), 63_082_496),  # "65M"
        ("transformer", "big", (256, 37000), 37000 * 1024 + encoder_decoder(6, 1024, 4096), 214_245_376),  # "213M"
        ("bart", "tiny", (32, 293), bart(2, 64, 128, 32, 293), 190_784),
        ("bart", "base", (1024, 50265), bart(6, 768, 3072, 1024, 50265), 139_420_416),
        ("bart", "large", (1024, 50265), bart(12, 1024, 4096, 1024, 50265), 406_291_456),
        ("t5", "tiny", (32, 293), t5(2, 64, 64, 128, 4, 293), 183_616),
        ("t5", "small", (512, 32128), t5(6, 512, 512, 2048, 8, 32128), 60_506_624),
        ("t5", "base", (512, 32128), t5(12, 768, 768, 3072, 12, 32128), 222_903_552),
    ],
)
def test_parameter_counts(name: str, size: str, shape: tuple[int, ...], by_hand: int, count: int) -> None:
    with torch.device("meta"):
        net = build(name, shape, size=size)
    assert sum(p.numel() for p in net.parameters()) == by_hand == count


@pytest.mark.parametrize("name", NAMES)
def test_every_size_takes_its_usual_text_and_scores_every_token(name: str) -> None:
    declared = models[name]
    assert declared.inputs == ("tokens",)
    assert declared.tasks == ("translation", "denoising")
    assert set(declared.usual) == set(declared.sizes)
    for size, (length, vocabulary) in declared.usual.items():
        with torch.device("meta"):
            net = build(name, (length, vocabulary), size=size)
            assert isinstance(net, EncoderDecoder)
            source, target = torch.ones(2, length, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)
            assert net.encode(source).shape == (2, length, net.embedding.embedding_dim)
            assert net(source, target).shape == (2, 3, vocabulary)


@pytest.mark.parametrize(("name", "keys"), VARIANTS)
def test_dropout_is_in_training_only(name: str, keys: dict[str, Any]) -> None:
    net = build(name, dropout=0.5, **keys)
    assert not torch.equal(net(SOURCE, TARGET), net(SOURCE, TARGET))
    net.eval()
    assert torch.equal(net(SOURCE, TARGET), net(SOURCE, TARGET))


# ---- who sees whom ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "keys"), VARIANTS)
def test_a_score_depends_on_no_later_token(name: str, keys: dict[str, Any]) -> None:
    net = build(name, **keys).eval()
    first = net(SOURCE, TARGET)
    for i in range(1, 9):
        other = torch.cat([TARGET[:, :i], texts(length=9, seed=5)[:, i:]], dim=1)
        assert torch.equal(net(SOURCE, other)[:, :i], first[:, :i])
    assert not torch.allclose(net(SOURCE, other)[:, 8], first[:, 8])


@pytest.mark.parametrize(("name", "keys"), VARIANTS)
def test_padding_counts_nowhere(name: str, keys: dict[str, Any]) -> None:
    """A text alone gets the scores that it gets in a batch; what the memory has at padding does nothing."""
    net = build(name, **keys).double().eval()
    scores, memory = net(SOURCE, TARGET), net.encode(SOURCE)
    for i in range(4):
        source, target = (ids[i : i + 1, : int((ids[i] != 0).sum())] for ids in (SOURCE, TARGET))
        torch.testing.assert_close(net(source, target)[0], scores[i, : target.shape[1]])
    noise = torch.where((SOURCE != 0)[..., None], memory, torch.randn_like(memory))
    torch.testing.assert_close(net.decode(noise, SOURCE, TARGET), scores)
    assert net(torch.zeros_like(SOURCE), TARGET).isfinite().all()  # a source of nothing


@pytest.mark.parametrize(("name", "keys"), VARIANTS)
def test_every_token_of_the_source_counts(name: str, keys: dict[str, Any]) -> None:
    net = build(name, **keys).double().eval()
    first = net(SOURCE, TARGET)
    for i in range(T):
        other = SOURCE.clone()
        other[0, i] = 4 + (other[0, i] - 3) % (V - 4)
        moved = (net(other, TARGET) - first).abs().amax(dim=(1, 2))
        assert moved[0] > 1e-6
        assert moved[1:].max() == 0


def test_t5_knows_distances_and_not_places() -> None:
    """Padding in front moves nothing; in a transformer it moves every place."""
    before = F.pad(SOURCE, (5, 0))
    net = build("t5").double().eval()
    torch.testing.assert_close(net.encode(before)[:, 5:], net.encode(SOURCE))
    other = build("transformer", (T + 5, V)).double().eval()
    assert (other.encode(before)[:, 5:] - other.encode(SOURCE)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["none", "index", "normalised", "sine", "learnable"])
def test_the_transformers_positions_can_be_chosen(kind: str) -> None:
    net = build("transformer", positions=kind).double().eval()
    order = torch.tensor([3, 0, 1, 2, *range(4, T)])
    moved = (net(SOURCE[:1, order], TARGET[:1]) - net(SOURCE[:1], TARGET[:1])).abs().max()
    assert moved < 1e-10 if kind == "none" else moved > 1e-4


# ---- what all promise ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_one_table_is_the_input_of_both_sides_and_the_output(name: str) -> None:
    """A row of a token that is nowhere moves its own score and no more; it is still one entry after save and load."""
    assert models[name].heads == ()
    net, again = build(name).eval(), build(name, seed=1).eval()
    assert [key for key, value in net.state_dict().items() if V in value.shape] == ["embedding.weight"]
    again.load_state_dict(net.state_dict())
    unseen = 39
    source, target = SOURCE.clamp(max=38), TARGET.clamp(max=38)
    with torch.no_grad():
        first = net(source, target)
        assert torch.equal(again(source, target), first)
        again.embedding.weight[unseen] = again.embedding.weight[unseen] + 1
        moved = (again(source, target) - first).abs().amax(dim=(0, 1))
        assert [i for i in range(V) if moved[i]] == [unseen]
        again.embedding.weight[BEGIN] = again.embedding.weight[BEGIN] + 1
        assert ((again(source, target) - first).abs().amax(dim=(0, 1)) > 0).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "keys"), VARIANTS)
def test_samples_do_not_mix(name: str, keys: dict[str, Any], training: bool) -> None:
    assert models[name].unit(configure(name, keys)[1]) == "sample"
    assert moved_by_others(build(name, **keys).double().train(training)) < 1e-12


def test_batch_norm_mixes_samples_in_training() -> None:
    keys = {"norm": "batch"}
    assert models["transformer"].unit(configure("transformer", keys)[1]) == "batch"
    net = build("transformer", **keys).double()
    assert moved_by_others(net) > 1e-3
    assert moved_by_others(net.eval()) < 1e-12


def moved_by_others(net: nn.Module) -> float:
    """How far the first text's scores move when all others of the batch change."""
    other = torch.cat([SOURCE[:1], texts(seed=8)[1:]]), torch.cat([TARGET[:1], begun(texts(length=9, seed=9))[1:]])
    with torch.no_grad():
        return float((net(SOURCE, TARGET)[0] - net(*other)[0]).abs().max())


@pytest.mark.parametrize(("name", "keys"), VARIANTS)
def test_per_sample_gradients_equal_a_loop(name: str, keys: dict[str, Any]) -> None:
    net = build(name, encoder=1, decoder=1, **keys).double()
    answer = texts(length=9, seed=1)
    weights = {k: v.detach() for k, v in net.named_parameters()}

    def loss(weights: dict[str, Tensor], source: Tensor, target: Tensor, y: Tensor) -> Tensor:
        scores = functional_call(net, weights, (source[None], target[None]))
        return F.cross_entropy(scores[0], y, ignore_index=0)

    stacked = vmap(grad(loss), in_dims=(None, 0, 0, 0))(weights, SOURCE, TARGET, answer)
    for i in range(4):
        net.zero_grad()
        F.cross_entropy(net(SOURCE[i : i + 1], TARGET[i : i + 1])[0], answer[i], ignore_index=0).backward()
        for key, parameter in net.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.any(), key
            torch.testing.assert_close(stacked[key][i], parameter.grad, atol=1e-10, rtol=1e-8, msg=key)


@pytest.mark.parametrize(("name", "keys"), VARIANTS)
def test_no_operation_is_in_place(in_place: Any, name: str, keys: dict[str, Any]) -> None:
    net = build(name, **keys)
    for module in net.modules():
        if isinstance(module, nn.RMSNorm):  # torch's own writes into what it has just made
            module.forward = nn.Identity().forward
    with in_place() as mode:
        net(SOURCE, TARGET)
    assert mode.seen == []


@pytest.mark.parametrize("name", NAMES)
def test_tokens_have_scores_of_about_one_at_the_start(name: str) -> None:
    """At the paper's widths too: neither all alike nor so far apart that the first steps are spent on that."""
    keys = {"encoder": 2, "decoder": 2, "size": "base"}
    with torch.no_grad():
        assert 0.3 < build(name, (T, V), **keys).eval()(SOURCE, TARGET).std() < 3


# ---- learning --------------------------------------------------------------------------------------------------------
@cache
def reversal() -> tuple[Tensor, Tensor]:
    """16 texts of 4 to 10 letters, with END behind, and the same backwards between BEGIN and END."""
    source = torch.Generator().manual_seed(0)
    x, y = torch.zeros(16, 11, dtype=torch.long), torch.zeros(16, 12, dtype=torch.long)
    for i in range(16):
        n = int(torch.randint(4, 11, (1,), generator=source))
        letters = TEXT + torch.randint(26, (n,), generator=source)
        x[i, : n + 1] = F.pad(letters, (0, 1), value=END)
        y[i, : n + 2] = F.pad(letters.flip(0), (1, 1), value=END).index_fill(0, torch.tensor(0), BEGIN)
    return x, y


def written(net: Any, source: Tensor, steps: int) -> Tensor:
    """The likeliest token after the likeliest tokens, nothing after END: (B, 1 + steps)."""
    memory, target = net.encode(source), torch.full((len(source), 1), BEGIN)
    for _ in range(steps):
        token = net.decode(memory, source, target)[:, -1:].argmax(dim=2)
        over = (target[:, -1:] == END) | (target[:, -1:] == 0)
        target = torch.cat([target, token.masked_fill(over, 0)], dim=1)
    return target


@pytest.mark.parametrize(
    ("name", "keys", "steps"),
    [
        ("bart", {}, 60),
        ("t5", {}, 160),
        ("transformer", {}, 100),
        ("transformer", {"positions": "learnable", "norm": "batch"}, 80),
        ("transformer", {"positions": "learnable", "before": True}, 100),
    ],
)
def test_tiny_learns_sixteen_texts_backwards(name: str, keys: dict[str, Any], steps: int) -> None:
    x, y = reversal()
    net = build(name, (12, TEXT + 26), **keys)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.003)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x, y[:, :-1]).transpose(1, 2), y[:, 1:], ignore_index=0).backward()
        optimizer.step()
    with torch.no_grad():
        assert (written(net.eval(), x, 11) == y).all(dim=1).float().mean() >= 0.9


# ---- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("transformer", {"heads": 5}, "[model] transformer: width 64 should be a multiple of heads 5"),
        ("bart", {"heads": 5}, "[model] bart: width 64 should be a multiple of heads 5"),
        ("transformer", {"norm": "group"}, "[model] transformer: 'norm' should be 'layer' or 'batch', not 'group'"),
        ("t5", {"distance": 16}, "[model] t5: distance 16 should be more than half of the 32 buckets"),
    ],
)
def test_wrong_settings_get_one_clear_line(name: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        configure(name, keys)
    assert str(error.value) == message


def test_texts_longer_than_the_positions_get_one_clear_line() -> None:
    with pytest.raises(ConfigError) as error:
        build("bart", (2000, V), size="base")
    assert str(error.value) == (
        "model 'bart' has 1024 positions, too few for texts of 2000 tokens. "
        "Set positions to at least that, or let texts be shorter"
    )
