"""GPT-2, BERT and ELECTRA compute what Hugging Face's do, from the files that Hugging Face writes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shared_models.job_parts import WeightsPart
from shared_models.models import configure
from shared_models.weights import Match, load_weights
from shared_models.zoo.gpt import convert


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved into the test's own folder is a folder of weights."""
    monkeypatch.setenv("FEDZOO_WEIGHTS", str(tmp_path.parent))


hf = pytest.importorskip("transformers")

LENGTH, VOCABULARY = 12, 40
SMALL = {"layers": 2, "width": 16, "mlp": 24, "heads": 4}


def build(name: str, outputs: int, each: bool = False, **keys: Any) -> Any:
    torch.manual_seed(1)
    chosen, settings = configure(name, {**SMALL, **keys})
    return chosen.build(settings, (LENGTH, VOCABULARY), outputs, each=each).eval()


def written(kind: str, config: Any, folder: Path) -> Any:
    """A model of theirs, no entry of which is left at 0 or 1, written to a folder as they do."""
    torch.manual_seed(0)
    theirs = getattr(hf, kind)(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    theirs.save_pretrained(folder)
    return theirs


def load(name: str, net: nn.Module, folder: Path, *rename: tuple[str, str]) -> Match:
    file = str(folder.relative_to(os.environ["FEDZOO_WEIGHTS"]))
    return load_weights(net, WeightsPart(file=file, rename=rename), configure(name, {})[0].renames)


def texts() -> Tensor:
    """Texts of 11, 8 and 1 tokens, with padding behind."""
    ids = torch.randint(1, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(0))
    return ids * (torch.arange(11) < torch.tensor([[11], [8], [1]]))


def assert_equal(ours: Tensor, theirs: Tensor, x: Tensor) -> None:
    """At every token that is no padding."""
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours[x > 0], theirs[x > 0], atol=2e-5, rtol=1e-4)


def bert_config(**keys: Any) -> Any:
    return hf.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=LENGTH, **keys,
    )  # fmt: skip


def electra_config(divisor: int = 1, **keys: Any) -> Any:
    return hf.ElectraConfig(
        vocab_size=VOCABULARY, embedding_size=8, hidden_size=16 // divisor, num_hidden_layers=2,
        num_attention_heads=4 // divisor, intermediate_size=24 // divisor, max_position_embeddings=LENGTH, **keys,
    )  # fmt: skip


# ---- GPT-2 -----------------------------------------------------------------------------------------------------------
def gpt2(folder: Path) -> Any:
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=4, n_inner=24, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return written("GPT2LMHeadModel", config, folder)


def test_gpt_is_hugging_faces(tmp_path: Path) -> None:
    theirs = gpt2(tmp_path)
    save_file(convert(load_file(tmp_path / "model.safetensors")), tmp_path / "converted.safetensors")
    net, x = build("gpt", VOCABULARY, each=True), texts()
    match = load("gpt", net, tmp_path / "converted.safetensors")
    assert (match.missing, match.mismatched, match.unused) == ((), (), ())
    assert_equal(net(x), theirs(x, attention_mask=x > 0).logits, x)


def test_old_files_of_gpt_with_masks_and_without_a_prefix_convert_to_the_same(tmp_path: Path) -> None:
    state = gpt2(tmp_path).transformer.state_dict()
    masks = {f"h.{i}.attn.{name}": torch.ones(1, 1, 12, 12) for i in range(2) for name in ("bias", "masked_bias")}
    ours, again = convert(load_file(tmp_path / "model.safetensors")), convert({**state, **masks})
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[key], again[key]) for key in ours)


def test_gpt_starts_as_hugging_faces_does() -> None:
    """The scale of every weight, from their own initialisation."""
    torch.manual_seed(0)
    theirs = hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=300, n_positions=64, n_embd=64, n_layer=8, n_head=4, bos_token_id=1, eos_token_id=2)
    )
    torch.manual_seed(1)
    chosen, settings = configure("gpt", {"layers": 8, "std": 0.02})
    ours = chosen.build(settings, (64, 300), 300, each=True).state_dict()
    for key, value in convert(theirs.state_dict()).items():
        torch.testing.assert_close(ours[key].std(), value.std(), rtol=0.06, atol=0, msg=key)


# ---- BERT ------------------------------------------------------------------------------------------------------------
def test_bert_finds_tokens_as_hugging_faces(tmp_path: Path) -> None:
    theirs = written("BertForMaskedLM", bert_config(), tmp_path)
    net, x = build("bert", VOCABULARY, each=True), texts()
    match = load("bert", net, tmp_path)
    assert (match.missing, match.mismatched, match.unused) == ((), (), ())
    assert_equal(net(x), theirs(x, attention_mask=x > 0).logits, x)


def test_bert_tells_classes_and_tags_as_hugging_faces(tmp_path: Path) -> None:
    for kind, each in (("BertForSequenceClassification", False), ("BertForTokenClassification", True)):
        theirs = written(kind, bert_config(num_labels=3), tmp_path / kind)
        net, x = build("bert", 3, each), texts()
        match = load("bert", net, tmp_path / kind)
        assert (match.missing, match.mismatched, match.unused) == ((), (), ())
        assert_equal(net(x), theirs(x, attention_mask=x > 0).logits, x if each else torch.ones(3))


def test_old_names_of_berts_norms_are_known(tmp_path: Path) -> None:
    """The first files have `gamma` and `beta`, and a pre-trained one has heads for both of the paper's tasks."""
    theirs = written("BertForPreTraining", bert_config(), tmp_path)
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in load_file(tmp_path / "model.safetensors").items()
    }
    assert sum(key.endswith(".gamma") for key in old) == 6
    save_file(old, tmp_path / "old.safetensors")
    net, x = build("bert", VOCABULARY, each=True), texts()
    match = load("bert", net, tmp_path / "old.safetensors")
    assert (match.missing, match.mismatched) == ((), ())
    assert sorted({key.split(".")[-2] for key in match.unused}) == [
        "dense",
        "seq_relationship",
    ]  # pooler, next sentence
    assert_equal(net(x), theirs(x, attention_mask=x > 0).prediction_logits, x)


# ---- ELECTRA ---------------------------------------------------------------------------------------------------------
def test_electras_discriminator_is_hugging_faces(tmp_path: Path) -> None:
    theirs = written("ElectraForPreTraining", electra_config(), tmp_path)
    net, x = build("electra", 1, each=True, embedding=8, generator=2), texts()
    match = load("electra", net, tmp_path)
    assert all(key.startswith("generator_") for key in match.missing)
    assert (match.mismatched, match.unused) == ((), ())
    assert_equal(net(x)[..., 0], theirs(x, attention_mask=x > 0).logits, x)


@pytest.mark.parametrize("divisor", [1, 2])
def test_electras_generator_is_hugging_faces(tmp_path: Path, divisor: int) -> None:
    theirs = written("ElectraForMaskedLM", electra_config(divisor), tmp_path)
    net, x = build("electra", 1, each=True, embedding=8, generator=divisor), texts()
    match = load("electra", net, tmp_path, ("^encoder", "generator_encoder"))
    assert all(key.startswith(("encoder.", "dense.", "head.")) for key in match.missing)
    assert (match.mismatched, match.unused) == ((), ())
    assert_equal(net.generator(x), theirs(x, attention_mask=x > 0).logits, x)


def test_electra_tells_classes_as_hugging_faces(tmp_path: Path) -> None:
    theirs = written("ElectraForSequenceClassification", electra_config(num_labels=3), tmp_path)
    net, x = build("electra", 3, embedding=8, generator=2), texts()
    match = load("electra", net, tmp_path)
    assert (match.missing, match.mismatched, match.unused) == ((), (), ())
    assert_equal(net(x), theirs(x, attention_mask=x > 0).logits, torch.ones(3))


# ---- sizes -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "size", "kind", "config"),
    [
        ("gpt", "small", "GPT2LMHeadModel", hf.GPT2Config()),
        ("gpt", "medium", "GPT2LMHeadModel", hf.GPT2Config(n_embd=1024, n_layer=24, n_head=16)),
        ("bert", "base", "BertForMaskedLM", hf.BertConfig()),
        (
            "bert", "large", "BertForMaskedLM",
            hf.BertConfig(
                hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
            ),
        ),
        ("electra", "small", "ElectraForPreTraining", hf.ElectraConfig()),
        (
            "electra", "base", "ElectraForPreTraining",
            hf.ElectraConfig(
                embedding_size=768, hidden_size=768, num_attention_heads=12, intermediate_size=3072
            ),
        ),
    ],
)  # fmt: skip
def test_published_sizes_have_as_many_parameters(name: str, size: str, kind: str, config: Any) -> None:
    chosen, settings = configure(name, {"size": size})
    length, vocabulary = chosen.usual[size]
    with torch.device("meta"):
        theirs = getattr(hf, kind)(config)
        ours = chosen.build(settings, (length, vocabulary), 1 if name == "electra" else vocabulary, each=True)
    counted = sum(p.numel() for key, p in ours.named_parameters() if not key.startswith("generator_"))
    assert counted == sum(p.numel() for p in theirs.parameters())
