"""Sequence to sequence: the outputs of torch's Transformer and of Hugging Face's BART and T5, with the same weights."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared_models.job_parts import WeightsPart
from shared_models.models import configure, models
from shared_models.tokens import draw_ids
from shared_models.transformer import sines
from shared_models.weights import Match, load_weights
from shared_models.zoo.t5 import bucket

pytestmark = pytest.mark.usefixtures("weights_here")

T, V = 12, 40


def build(name: str, length: int = T, **keys: Any) -> Any:
    torch.manual_seed(0)
    chosen, settings = configure(name, keys)
    return chosen.build(settings, (length, V), V)


def texts(length: int, seed: int = 0) -> Tensor:
    return draw_ids(length, V, 4, torch.Generator().manual_seed(seed))


SOURCE, TARGET = texts(T), texts(9, seed=1)


def randomised(module: nn.Module) -> Any:
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("before", [False, True])
def test_the_transformer_is_torchs_between_scaled_tokens_and_the_tied_table(before: bool) -> None:
    net = build("transformer", width=16, mlp=24, before=before)
    theirs = randomised(nn.Transformer(16, 4, 2, 2, 24, 0.0, batch_first=True, norm_first=before))
    if not before:  # torch would normalise the last sum twice
        theirs.encoder.norm = theirs.decoder.norm = None
    state = {"embedding.weight": net.embedding.weight}
    for key, value in theirs.state_dict().items():
        key = re.sub(r"^(encoder|decoder)\.layers\.", r"\1.", key)
        key = re.sub(r"^(encoder|decoder)\.norm\.", r"\1_norm.", key)
        key = key.replace("self_attn.", "attention.").replace("multihead_attn.", "cross.").replace("out_proj.", "out.")
        key = key.replace("linear1.", "mlp.hidden.").replace("linear2.", "mlp.out.")
        names = [key.replace("in_proj_", f"{name}.") for name in "qkv"] if "in_proj_" in key else [key]
        state |= dict(zip(names, value.chunk(len(names)), strict=True))
    net.load_state_dict(state)
    place = sines(torch.arange(T), 16)
    source, target = (math.sqrt(16) * net.embedding(ids) + place[: ids.shape[1]] for ids in (SOURCE, TARGET))
    later = torch.ones(9, 9, dtype=torch.bool).triu(1)
    padded = {"src_key_padding_mask": SOURCE == 0, "memory_key_padding_mask": SOURCE == 0}
    theirs.train()  # without dropout the same, and not torch's fast path, which puts zeros where padding is
    out = theirs(source, target, tgt_mask=later, tgt_key_padding_mask=TARGET == 0, **padded)
    torch.testing.assert_close(net(SOURCE, TARGET), out @ net.embedding.weight.T, atol=1e-4, rtol=1e-4)


def hugging_face_bart() -> tuple[nn.Module, nn.Module]:
    """Theirs with random weights, and ours of the same sizes."""
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.BartConfig(
        vocab_size=V, max_position_embeddings=T, encoder_layers=2, decoder_layers=3, d_model=16, encoder_ffn_dim=24,
        decoder_ffn_dim=24, encoder_attention_heads=4, decoder_attention_heads=4, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=2,
    )  # fmt: skip
    ours = build("bart", encoder=2, decoder=3, width=16, mlp=24)
    return randomised(transformers.BartForConditionalGeneration(config)), ours.eval()


def hugging_face_t5() -> tuple[nn.Module, nn.Module]:
    """The same; their heads are wider than a quarter of the width."""
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=V, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=4, pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=1, relative_attention_num_buckets=12, relative_attention_max_distance=30,
    )  # fmt: skip
    ours = build("t5", encoder=2, decoder=3, width=16, head_width=6, mlp=24, buckets=12, distance=30)
    return randomised(transformers.T5ForConditionalGeneration(config)), ours.eval()


HUGGING_FACE = {"bart": hugging_face_bart, "t5": hugging_face_t5}


def loaded(name: str, ours: nn.Module, file: Path) -> Match:
    return load_weights(ours, WeightsPart(file=file.name), models[name].renames)


@pytest.mark.parametrize(("name", "length"), [("bart", T), ("t5", 50)])
def test_hugging_faces_weights_give_hugging_faces_outputs(name: str, length: int, tmp_path: Path) -> None:
    theirs, ours = HUGGING_FACE[name]()
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    match = loaded(name, ours, tmp_path / "a.pth")
    assert match.missing == match.mismatched == ()
    source, target = texts(length), texts(length, seed=1)
    seen = {"attention_mask": (source != 0).long(), "decoder_attention_mask": (target != 0).long()}
    with torch.no_grad():
        expected = theirs(input_ids=source, decoder_input_ids=target, **seen)
        memory = ours.encode(source)
        torch.testing.assert_close(memory, expected.encoder_last_hidden_state, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.decode(memory, source, target), expected.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_folder_of_hugging_face_loads_but_for_its_duplicates(name: str, tmp_path: Path) -> None:
    theirs, ours = HUGGING_FACE[name]()
    theirs.save_pretrained(tmp_path / "hub")
    first = loaded(name, ours, tmp_path / "hub")
    assert first.missing == first.mismatched == ()
    assert set(first.unused) <= {"final_logits_bias"}  # of BART, zero
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    tied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    unused = {re.sub(r"^model\.", "", key) for key in loaded(name, ours, tmp_path / "a.pth").unused}
    assert unused == tied | set(first.unused)


def test_a_larger_table_of_positions_takes_published_ones(tmp_path: Path) -> None:
    theirs, _ = hugging_face_bart()
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    net = build("bart", 5, encoder=2, decoder=3, width=16, mlp=24, positions=T)
    assert loaded("bart", net, tmp_path / "a.pth").mismatched == ()
    short = build("bart", 5, encoder=2, decoder=3, width=16, mlp=24)
    left = [d.key for d in loaded("bart", short, tmp_path / "a.pth").mismatched]
    assert left == ["source.positions.weight", "target.positions.weight"]


def test_distances_of_t5_by_hand() -> None:
    """16 buckets: to both sides 4 for 0 to 3 tokens and 4 that grow to 32, to one side 8 for 0 to 7 and 8 that grow."""
    apart = torch.tensor([0, 1, 3, 4, 6, 7, 11, 12, 19, 20, 31, 32, 500])
    both = [0, 1, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7, 7]  # 4 + floor(4 log(n/4) / log 8): from 4, 6.7, 11.3 and 19.03 on
    assert bucket(-apart, 16, 32, both=True).tolist() == both
    assert bucket(apart, 16, 32, both=True).tolist() == [0, *(8 + k for k in both[1:])]
    one = [0, 1, 3, 4, 6, 7, 9, 10, 12, 13, 15, 15, 15]  # 8 + floor(8 log(n/8) / log 4)
    assert bucket(-apart, 16, 32, both=False).tolist() == one
    assert not bucket(apart, 16, 32, both=False).any()
