"""CLIP against Hugging Face's, the size of the paper's, its bag of words by hand, and pairs learned by heart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from client.readers.base import Examples, Store
from client.trainer import evaluate, train
from client.workbench import Workbench
from shared_models.errors import ConfigError
from shared_models.job import Job
from shared_models.job_parts import WeightsPart
from shared_models.messages import Budget, Instruction
from shared_models.models import configure
from shared_models.tasks.base import Batch, make_task
from shared_models.tokens import BEGIN, END, PAD, TEXT, Bytes
from shared_models.towers import Bag, BatchNorm, Convolutions, quarters
from shared_models.weights import load_weights
from shared_models.zoo.clip import RENAMES, convert

pytestmark = pytest.mark.usefixtures("weights_here")

SMALL: dict[str, Any] = {
    "vision": "vit", "layers": 2, "width": 32, "heads": 4, "patch": 4,
    "text": "transformer", "text_layers": 3, "text_width": 24, "text_heads": 3,
}  # fmt: skip
KINDS = [{}, {"vision": "vit"}, {"text": "transformer"}, {"vision": "vit", "text": "transformer"}]


def build(shape: tuple[int, ...], outputs: int = 16, seed: int = 0, **keys: Any) -> Any:
    torch.manual_seed(seed)
    chosen, settings = configure("clip", keys)
    return chosen.build(settings, shape, outputs)


def texts(*said: str, length: int = 24) -> Tensor:
    ids = [[BEGIN, *Bytes().encode(text), END][:length] for text in said]
    return torch.tensor([row + [PAD] * (length - len(row)) for row in ids])


def a_job(train: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **task: Any) -> Job:
    return Job.resolve({
        "name": "pairs", "model": {"name": "clip", **(model or {})},
        "task": {"name": "contrastive", "width": 32, **task},
        "data": {"shape": [3, 16, 16], "tokenizer": "bytes", "text_length": 24},
        "train": {"optimizer": "adamw", "lr": 0.003, "batch_size": 16, **(train or {})},
    })  # fmt: skip


# ---- against Hugging Face --------------------------------------------------------------------------------------------
def huggingfaces(vocabulary: int, length: int, end: int) -> Any:
    transformers = pytest.importorskip("transformers")
    text = transformers.CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=24, intermediate_size=96, num_hidden_layers=3, num_attention_heads=3,
        max_position_embeddings=length, bos_token_id=BEGIN, eos_token_id=end, pad_token_id=PAD,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=12, patch_size=4
    )
    torch.manual_seed(1)
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    ).eval()
    for parameter in theirs.parameters():  # theirs start so small that much would agree by chance
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.constant_(theirs.logit_scale, 1.5)
    return theirs


def test_points_and_loss_are_huggingfaces(tmp_path: Path) -> None:
    vocabulary, length = 60, 10
    theirs = huggingfaces(vocabulary, length, end=vocabulary - 1)
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / "clip.safetensors")
    ours = build((3, 12, 12, length, vocabulary), **SMALL).eval()
    match = load_weights(ours, WeightsPart(file="clip.safetensors"), RENAMES)
    assert not any((match.missing, match.mismatched, match.unused, match.reshaped))
    ids = torch.randint(TEXT, vocabulary - 1, (5, length))
    ids[:, 0] = BEGIN
    for row, end in enumerate((2, 4, 9, 6, 5)):  # the last of HF's tokens ends its texts, and padding follows
        ids[row, end], ids[row, end + 1 :] = vocabulary - 1, PAD
    x = torch.randn(5, 3, 12, 12)
    with torch.no_grad():
        said = theirs(input_ids=ids, pixel_values=x, attention_mask=(ids != PAD).long(), return_loss=True)
        torch.testing.assert_close(ours.image(x), said.image_embeds, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.text(ids), said.text_embeds, atol=1e-5, rtol=1e-4)
        task = make_task(a_job())
        points = task.forward(ours, Batch(x, ids))
        torch.testing.assert_close(points.logits, said.logits_per_image, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(task.loss(points, Batch(x, ids)).mean(), said.loss, atol=1e-4, rtol=1e-4)


def test_converted_weights_read_our_ids_as_theirs_read_theirs(tmp_path: Path) -> None:
    """A published vocabulary of 50, of which the last two mark begin and end, is 87 ids here."""
    theirs = huggingfaces(50, 10, end=49)
    published = {k: v.contiguous() for k, v in theirs.state_dict().items()}
    save_file(convert(published), tmp_path / "clip.safetensors")
    ours = build((3, 12, 12, 10, TEXT + 50), **SMALL).eval()
    match = load_weights(ours, WeightsPart(file="clip.safetensors"), RENAMES)
    assert not any((match.missing, match.mismatched, match.unused))
    own = torch.tensor([[7, 3, 21], [40, 40, 0]])
    theirs_ids = torch.cat([torch.full((2, 1), 48), own, torch.full((2, 1), 49)], dim=1)
    ours_ids = torch.cat([torch.full((2, 1), BEGIN), TEXT + own, torch.full((2, 1), END), torch.zeros(2, 2)], dim=1)
    with torch.no_grad():
        expected = theirs.get_text_features(input_ids=theirs_ids)
        expected = getattr(expected, "pooler_output", expected)
        found = ours.text(ours_ids.long())
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected, dim=1), atol=1e-5, rtol=1e-4)


def test_the_papers_size() -> None:
    with torch.device("meta"):
        published = build((3, 224, 224, 77, 49_408), 512, size="b32")
        assert sum(p.numel() for p in published.parameters()) == 151_277_313  # ViT-B/32, as OpenAI's file
        assert published.image(torch.empty(2, 3, 224, 224)).shape == (2, 512)
        assert sum(p.numel() for p in build((3, 64, 64, 96, 293), 64).parameters()) == 415_041


# ---- what all kinds are ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("keys", KINDS)
def test_points_have_length_one_and_padding_says_nothing(keys: dict[str, Any]) -> None:
    net = build((3, 16, 16, 24, 293), **keys).eval()
    images, said = net.image(torch.randn(3, 3, 16, 16)), net.text(texts("a dog", "two cows", ""))
    assert images.shape == said.shape == (3, 16)
    for points in (images, said[:2]):
        torch.testing.assert_close(points.norm(dim=1), torch.ones(len(points)))
    torch.testing.assert_close(net.text(texts("a dog", length=12)), said[:1], atol=1e-5, rtol=1e-4)
    assert torch.equal(net(torch.zeros(1, 3, 16, 16)), net.image(torch.zeros(1, 3, 16, 16)))
    assert not torch.allclose(said[0], net.text(texts("a god"))[0], atol=1e-3)


@pytest.mark.parametrize("keys", KINDS)
def test_samples_do_not_mix_in_the_encoders(keys: dict[str, Any]) -> None:
    net = build((3, 16, 16, 24, 293), **keys).double()
    x, ids = torch.randn(3, 3, 16, 16, dtype=torch.float64), texts("one", "two", "three")
    alone = net.image(x[:1]), net.text(ids[:1])
    for one, all_of_them in zip(alone, (net.image(x), net.text(ids)), strict=True):
        torch.testing.assert_close(one[0], all_of_them[0], atol=1e-12, rtol=0)


def test_the_scale_starts_at_the_temperature_and_stays_below_100() -> None:
    net = build((3, 16, 16, 24, 293), temperature=0.05)
    assert net.scale().item() == pytest.approx(20)
    torch.nn.init.constant_(net.log_scale, 50.0)
    assert net.scale().item() == pytest.approx(100)


@pytest.mark.parametrize(
    ("keys", "shape", "message"),
    [
        ({"vision": "vit", "patch": 5}, (3, 16, 16, 8, 293), "cannot cut an image of 16x16 pixels into patches"),
        ({}, (3, 16, 14, 8, 293), "its smallest is 15x15"),
        ({"heads": 3}, (3, 16, 16, 8, 293), "width 64 should be a multiple of heads"),
        ({"text_heads": 3}, (3, 16, 16, 8, 293), "text_width 64 should be a multiple of text_heads"),
        ({}, (3, 16, 16), "It takes an image with a text"),
    ],
)
def test_what_cannot_be(keys: dict[str, Any], shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(shape, **keys)
    assert message in str(error.value)


# ---- the bag ---------------------------------------------------------------------------------------------------------
def coded(word: str) -> int:
    """The hash of a word in bytes."""
    code = 0
    for token in Bytes().encode(word):
        code = (code * 1_000_003 + token) % (2**31 - 1)
    return code


def test_a_bag_by_hand() -> None:
    """Words are runs of letters, digits and what is no ASCII; their vectors are added, by the root of their number."""
    bag = Bag(1000, 0.0, Bytes.size, 4)
    ids = texts("A dog, a DOG: 2 Kühe!")
    words = ["a", "dog", "a", "dog", "2", "kühe"]
    rows = bag.rows(ids)[0]
    assert rows[rows >= 0].tolist() == [coded(word) % 1000 for word in words]
    expected = bag.table.weight[[coded(word) % 1000 for word in words]].sum(dim=0) / 6**0.5
    torch.testing.assert_close(bag(ids)[0], expected)
    torch.testing.assert_close(bag(texts("2 kühe a a dog dog"))[0], expected)
    assert len({coded(word) % 1000 for word in words}) == 4


def test_a_word_that_is_cut_off_counts_as_it_stands() -> None:
    bag = Bag(1000, 0.0, Bytes.size, 4)
    assert torch.equal(bag(texts("two dogs run", length=8)), bag(texts("two dog", length=24)))
    assert torch.equal(bag(texts("two dogs run", length=5)), bag(texts("two")))


def test_tokens_of_a_file_are_words() -> None:
    bag = Bag(1000, 0.0, 5000, 4)
    ids = torch.tensor([[BEGIN, 100, 4999, 100, END, PAD]])
    rows = bag.rows(ids)[0].tolist()
    assert [row >= 0 for row in rows] == [False, True, True, True, False, False]
    assert rows[1] == rows[3] != rows[2]


def test_a_text_without_words_is_zero() -> None:
    bag = Bag(1000, 0.0, Bytes.size, 4)
    assert torch.equal(bag(texts("?! ...")), torch.zeros(1, 4))


def test_words_may_start_as_points_of_length_one() -> None:
    """Of a table of 4,096 x 256 numbers the standard deviation is known to one part in a thousand."""
    for std in (1 / 16, 0.01):
        model = build((3, 32, 32, 24, Bytes.size), outputs=256, size="tiny", text_std=std)
        lengths = model.language.table.weight.norm(dim=1)
        torch.testing.assert_close(lengths.square().mean().sqrt(), torch.tensor(16 * std), rtol=0.005, atol=0)


def test_words_are_left_out_in_training_alone() -> None:
    bag = Bag(1000, 0.5, Bytes.size, 4)
    ids = texts("a dog runs over it")
    assert not torch.equal(bag(ids), bag(ids))
    bag.eval()
    assert torch.equal(bag(ids), bag(ids))


def test_an_image_in_quarters() -> None:
    """Four colours, one in each quarter; of an odd side the middle belongs to both."""
    x = torch.zeros(1, 1, 4, 6)
    x[..., :2, 3:], x[..., 2:, :3], x[..., 2:, 3:] = 1.0, 2.0, 3.0
    assert quarters(x).tolist() == [[0, 1, 2, 3]]
    for several in (torch.randn(2, 3, 4, 6), torch.randn(2, 3, 5, 7)):
        means = adaptive_avg_pool2d(several, 2).flatten(2).transpose(1, 2).flatten(1)
        torch.testing.assert_close(quarters(several), means)
    assert quarters(torch.ones(1, 2, 1, 1)).tolist() == [[1.0] * 8]


def test_batch_normalisation_by_hand_and_of_an_image_alone() -> None:
    """Torch's own, which cannot train on a single image: that one takes what was measured before and moves nothing."""
    norm, x = BatchNorm(2), torch.tensor([[1.0, 4.0], [3.0, 4.0]])
    torch.testing.assert_close(norm(x), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), atol=1e-4, rtol=0)
    measured = {k: v.clone() for k, v in norm.state_dict().items()}
    assert measured["running_mean"].tolist() == pytest.approx([0.2, 0.4])
    alone = norm(x[:1])
    assert all(torch.equal(v, measured[k]) for k, v in norm.state_dict().items())
    expected = (x[:1] - measured["running_mean"]) / (measured["running_var"] + norm.eps).sqrt()
    torch.testing.assert_close(alone, expected)
    assert torch.equal(norm.eval()(x)[:1], alone)


def test_images_see_each_other_only_in_training_and_only_where_the_job_says_so() -> None:
    """With `norm = "batch"` the zoo says so of the model; the running statistics are averaged over sites."""
    x = torch.randn(3, 3, 16, 16)
    for norm, seen in (("layer", False), ("batch", True)):
        net = build((3, 16, 16, 24, 293), norm=norm)
        assert torch.allclose(net.vision(x)[:1], net.vision(x[:1]), atol=1e-4) is not seen
        net.eval()
        torch.testing.assert_close(net.vision(x)[:1], net.vision(x[:1]), atol=1e-5, rtol=1e-4)
        chosen, settings = configure("clip", {"norm": norm})
        assert chosen.unit(settings) == ("batch" if seen else "sample")
        sent = Workbench(a_job(model={"norm": norm}), torch.device("cpu")).spec.sent
        assert ("vision.norm.running_var" in sent) is seen


# ---- learning --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [{}, {"norm": "batch"}, {"vision": "vit", "text": "transformer", "patch": 4}])
def test_sixteen_pairs_are_learned_by_heart(kind: dict[str, Any]) -> None:
    job = a_job(model=kind, gallery=16)
    source = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (16, 3, 4, 4), generator=source, dtype=torch.uint8)
    x = x.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)  # squares of 4 x 4 pixels, of any colour
    store = Store(x, texts(*(f"picture {w}" for w in "abcdefghijklmnop")), [str(i) for i in range(16)], job.data)
    pairs, bench = Examples(store, torch.arange(16)), Workbench(job, torch.device("cpu"))
    before = bench.task.values(evaluate(bench, pairs))
    train(bench, pairs, Instruction("train", "r", "s", job, "", budget=Budget(steps=60)), [{}, {}])
    after = bench.task.values(evaluate(bench, pairs))
    assert before["recall_at_1"] < 0.3
    assert after["recall_at_1"] == after["recall_at_1_text"] == after["percentile"] == 1.0
    assert after["loss"] < 0.1 * before["loss"]


def test_colours_are_seen_wherever_in_a_quarter_they_are() -> None:
    """Pixels that change places within their quarter leave the soft histogram as it is, and the convolutions not."""
    tower = Convolutions((8,), 5, "layer", 0.0, (3, 8, 8), 2)
    assert tower.head.in_features == 4 * (5 + 8)
    x = torch.randn(1, 3, 8, 8)
    moved = x.clone()
    moved[:, :, :4, :4] = x[:, :, :4, :4].flip(2, 3)
    found = []
    tower.norm.register_forward_hook(lambda module, given, out: found.append(given[0]))
    tower(x), tower(moved)
    torch.testing.assert_close(found[0][:, :20], found[1][:, :20])
    assert not torch.allclose(found[0][:, 20:], found[1][:, 20:])
