"""Tokens: bytes and tokenizer files, what ids mean with both, and how a file becomes a part of the job."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from shared_models.errors import ConfigError, FingerprintError
from shared_models.job import Job
from shared_models.job_parts import DataPart
from shared_models.messages import Instruction
from shared_models.spec import build_model, require_same
from shared_models.tasks.base import make_task
from shared_models.tokens import (
    BEGIN,
    BYTES,
    END,
    GAP,
    GAPS,
    MASK,
    PAD,
    TEXT,
    UNKNOWN,
    Bytes,
    File,
    draw_ids,
    make_tokenizer,
)
from shared_models.validation import validate
from shared_models.wire import decode_instruction, encode_instruction

SENTENCES = ["the cat sat on the mat", "a dog ate the hat", "the cat ate a fat rat", "on the mat the dog sat"]
JOB = """\
name = "texts"
[model]
name = "gpt"
[task]
name = "language-modelling"
[data]
shape = [16]
tokenizer = "{name}"
"""


def trained(**changes: Any) -> str:
    """The JSON of a byte-pair encoding that was learned from the sentences; `changes` are of its top level."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=["[UNK]", "[PAD]"], show_progress=False)
    made.train_from_iterator(SENTENCES, trainer)
    return json.dumps({**json.loads(made.to_str()), **changes}, ensure_ascii=False)


def words(vocabulary: dict[str, int], unknown: str = "?") -> str:
    """The JSON of a tokenizer that knows some words."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=unknown))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return str(made.to_str())


def write_job(folder: Path, content: str | None, name: str = "tokenizer.json") -> Path:
    if content is not None:
        (folder / name).write_text(content, encoding="utf-8")
    path = folder / "job.toml"
    path.write_text(JOB.format(name=name))
    return path


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        Job.load(path)
    message = str(error.value)
    assert message.isprintable()
    return message


# ---- bytes -----------------------------------------------------------------------------------------------------------
def test_ids_of_bytes_are_what_the_table_says() -> None:
    assert (PAD, BEGIN, END, MASK, UNKNOWN, GAP, GAP + GAPS) == (0, 1, 2, 3, 4, 5, TEXT)
    assert TEXT == 37
    assert Bytes().encode("aé") == [37 + 0x61, 37 + 0xC3, 37 + 0xA9]
    assert Bytes().size == 37 + 256 == 293


def test_any_text_comes_back_from_its_bytes() -> None:
    made = Bytes()
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000, 17), 0x10FFFF]))
    ids = made.encode(everything)
    assert made.decode(ids) == everything
    assert min(ids) == TEXT
    assert max(ids) < made.size
    assert made.encode("") == []
    assert made.decode([]) == ""


def test_a_half_of_a_surrogate_pair_becomes_a_question_mark() -> None:
    assert Bytes().decode(Bytes().encode("a\ud800b\udfff😀")) == "a?b?😀"


def test_special_ids_are_no_text_and_broken_bytes_are_marked() -> None:
    a, e1, e2 = Bytes().encode("aé")
    assert Bytes().decode([BEGIN, a, MASK, UNKNOWN, *range(GAP, TEXT), a, END, PAD, PAD]) == "aa"
    assert Bytes().decode([e1, BEGIN, e2]) == "é"
    assert Bytes().decode([a, e1]) == "a\ufffd"


@pytest.mark.parametrize("text", ["plain", "Grüße", "日本語", "😀😀", "e\u0301"])
def test_characters_of_a_text_are_counted_once_however_it_is_cut(text: str) -> None:
    ids = Bytes().encode(text)
    assert Bytes().characters([BEGIN, *ids, END, PAD]) == len(text)
    for cut in range(len(ids) + 1):
        assert Bytes().characters(ids[:cut]) + Bytes().characters(ids[cut:]) == len(text)


@pytest.mark.parametrize("length", [2, 3, 40])
def test_drawn_texts_have_the_form_that_readers_give(length: int) -> None:
    ids = draw_ids(length, Bytes.size, 300, torch.Generator().manual_seed(0))
    assert (ids.shape, ids.dtype) == ((300, length), torch.int64)
    for row in ids.tolist():
        said = row[1 : row.index(END)] if END in row else row[1:]
        assert row == [BEGIN, *said, *([END] if END in row else []), *[PAD] * (row.count(PAD))]
        assert said
        assert all(TEXT <= i < Bytes.size for i in said)
    assert (END in ids[:, -1]) == (length > 2)
    assert any(END not in row for row in ids.tolist())


# ---- a file ----------------------------------------------------------------------------------------------------------
def test_a_file_encodes_and_decodes_behind_the_special_ids() -> None:
    content = trained()
    made = make_tokenizer(content)
    own = made._own  # type: ignore[attr-defined]
    for text in SENTENCES:
        ids = made.encode(text)
        assert [i - TEXT for i in ids] == own.encode(text, add_special_tokens=False).ids
        assert made.decode([BEGIN, *ids, END, PAD]) == text
        assert len(ids) < len(text)
        assert made.characters([BEGIN, *ids, END]) == len(text)
    assert made.size == TEXT + own.get_vocab_size()


def test_what_a_file_has_no_token_for_is_unknown() -> None:
    made = make_tokenizer(trained())
    ids = made.encode("the ß cat")
    assert ids.count(UNKNOWN) == 1
    assert UNKNOWN not in made.encode("the cat")
    assert make_tokenizer(words({"?": 0, "the": 1})).encode("the ß") == [TEXT + 1, UNKNOWN]
    unigram = json.loads(trained())
    unigram["model"] = {"type": "Unigram", "unk_id": 1, "vocab": [["▁", -1.0], ["<unk>", -9.0], ["a", -1.0]]}
    unigram["added_tokens"] = []
    assert make_tokenizer(json.dumps(unigram)).encode("aß") == [TEXT, TEXT + 2, UNKNOWN]


def test_a_file_that_cuts_and_pads_does_neither_here() -> None:
    """Files of published models often say so; a text would lose its end, and padding would be taken for text."""
    cuts = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    pads = {
        "strategy": {"Fixed": 10}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0,
        "pad_token": "[PAD]",
    }  # fmt: skip
    plain, changed = make_tokenizer(trained()), make_tokenizer(trained(truncation=cuts, padding=pads))
    for text in [*SENTENCES, "a"]:
        assert changed.encode(text) == plain.encode(text)


def test_a_file_that_drops_merges_at_random_does_not_here() -> None:
    """BPE dropout (Provilkov et al. 2020) is for training a model on one text in many forms; a site reads it once."""
    plain, written = make_tokenizer(trained()), json.loads(trained())
    written["model"]["dropout"] = 0.9
    changed = make_tokenizer(json.dumps(written))
    for text in SENTENCES:
        assert changed.encode(text) == plain.encode(text)


def test_a_half_of_a_surrogate_pair_becomes_a_question_mark_for_a_file_too() -> None:
    made = make_tokenizer(trained())
    assert made.encode("the \ud83d cat") == made.encode("the ? cat")


def test_ids_may_have_holes() -> None:
    made = make_tokenizer(words({"?": 2, "a": 0, "b": 7}))
    assert made.encode("a b") == [TEXT, TEXT + 7]
    assert made.size == TEXT + 8
    with pytest.raises(ConfigError, match="has an id of 4194304, the limit is 4194304"):
        make_tokenizer(words({"?": 2, "a": 0, "b": 2**22}))


def test_no_file_has_as_many_ids_as_bytes() -> None:
    """By the number of ids a model tells whether a token is a byte."""
    sizes = [make_tokenizer(words({"?": 0, **{f"w{i}": i for i in range(1, n)}})).size - TEXT for n in (255, 256, 257)]
    assert sizes == [255, 257, 257]


def test_a_file_on_which_the_library_panics_is_one_line() -> None:
    """Its Rust half then raises what is no Exception, and a node would have lost its worker to an unread job."""
    pytest.importorskip("tokenizers")
    written = json.loads(words({"?": 0, "a": 1}))
    written["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    with pytest.raises(ConfigError, match="no tokenizer's JSON"):
        make_tokenizer(json.dumps(written))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("byte", "data.tokenizer = 'byte' is neither 'bytes' nor a tokenizer's JSON"),
        ("[1]\nx", r"data.tokenizer = '\[1\]\\nx' is neither"),
        ("{", "data.tokenizer is no tokenizer's JSON: "),
        ('{"a": 1}', "data.tokenizer is no tokenizer's JSON: "),
    ],
)
def test_what_is_no_tokenizer(written: str, message: str) -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(ConfigError, match=message) as error:
        make_tokenizer(written)
    assert str(error.value).isprintable()


def test_a_file_without_tokens_is_refused() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    with pytest.raises(ConfigError, match="has no tokens"):
        File(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())


# ---- a file in a job -------------------------------------------------------------------------------------------------
def test_a_file_beside_the_job_becomes_part_of_it_word_for_word(tmp_path: Path) -> None:
    content = trained()
    pretty = json.dumps(json.loads(content), indent=2, ensure_ascii=False)
    job = Job.load(write_job(tmp_path, pretty))
    assert json.loads(job.data.tokenizer) == json.loads(content)
    made = make_tokenizer(job.data.tokenizer)
    assert make_task(job).outputs == made.size == job.data.sample[1]
    assert made.decode(made.encode(SENTENCES[0])) == SENTENCES[0]
    (tmp_path / "tokenizer.json").unlink()
    assert Job.resolve(json.loads(job.canonical)).hash == job.hash
    again = tmp_path / "again.toml"
    again.write_text(job.to_toml(), encoding="utf-8")
    assert Job.load(again).hash == job.hash


def test_odd_characters_of_a_vocabulary_survive_the_job_file(tmp_path: Path) -> None:
    odd = ["?", "\x7f", "\x85", "\u2028", '"', "\\", "\t", "\r", "'''", "😀", "é"]
    content = words({word: i for i, word in enumerate(odd)})
    job = Job.load(write_job(tmp_path, content))
    assert set(json.loads(job.data.tokenizer)["model"]["vocab"]) == set(odd)
    (tmp_path / "again.toml").write_bytes(job.to_toml().encode())
    assert Job.load(tmp_path / "again.toml").hash == job.hash


def test_another_file_is_another_job_and_another_fingerprint(tmp_path: Path) -> None:
    first = words({"?": 0, "the": 1, "cat": 2})
    swapped = words({"?": 0, "cat": 1, "the": 2})  # of the same size: only its content tells them apart
    jobs = [Job.load(write_job(tmp_path, content)) for content in (first, swapped, first)]
    bytes_job = jobs[0].replace(data={"tokenizer": BYTES})
    assert len({job.hash for job in (*jobs, bytes_job)}) == 3
    specs = [build_model(job)[1] for job in jobs]
    assert specs[0].fingerprint == specs[2].fingerprint != specs[1].fingerprint
    with pytest.raises(FingerprintError, match=r"'preprocessing\.tokenizer' is"):
        require_same(specs[0], specs[1].document, "ulm")


def test_the_job_with_its_tokenizer_crosses_the_wire(tmp_path: Path) -> None:
    job = Job.load(write_job(tmp_path, trained()))
    there = decode_instruction(*encode_instruction(Instruction("train", "run", "site", job, "")))
    assert there.job.hash == job.hash
    assert there.job.data.tokenizer == job.data.tokenizer


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"tokenizer\.json cannot be read: .*Name a tokenizer\.json beside the job file"),
        ("", r"tokenizer\.json cannot be read"),
        ('{"model": ', r"tokenizer\.json cannot be read"),
        ("[" * 100_000, r"tokenizer\.json cannot be read"),
        ("\ufeff{}", r"tokenizer\.json cannot be read"),
        ("[]", "neither 'bytes' nor a tokenizer's JSON"),
        ("{}", "data.tokenizer is no tokenizer's JSON"),
        ('{"model": {"type": "BPE", "vocab": {"\\ud800": 0}, "merges": []}}', "data.tokenizer is no tokenizer's JSON"),
    ],
)
def test_a_file_that_is_missing_or_broken_is_one_line_when_the_job_is_read(
    tmp_path: Path, content: str | None, message: str
) -> None:
    pytest.importorskip("tokenizers")
    assert re.search(message, refused(write_job(tmp_path, content)))


def test_bytes_that_are_no_utf8_and_names_that_are_no_file(tmp_path: Path) -> None:
    path = write_job(tmp_path, "{}")
    (tmp_path / "tokenizer.json").write_bytes(b'{"a": "\xff"}')
    assert "tokenizer.json cannot be read" in refused(path)
    assert "'gpt2' is neither 'bytes' nor" in refused(write_job(tmp_path, None, name="gpt2"))
    (tmp_path / "folder.json").mkdir()
    assert "folder.json cannot be read" in refused(write_job(tmp_path, None, name="folder.json"))


# ---- the forms of [data] ---------------------------------------------------------------------------------------------
def form(**keys: Any) -> DataPart:
    return validate(DataPart, keys, "[data]")


def test_form_and_sample_follow_from_shape_and_tokenizer() -> None:
    texts = form(shape=[16], tokenizer=BYTES)
    assert (texts.form, texts.sample) == ("tokens", (16, 293))
    both = form(shape=[3, 8, 8], tokenizer=BYTES, text_length=20)
    assert (both.form, both.sample) == ("image-text", (3, 8, 8, 20, 293))
    series = form(shape=[96, 7])
    assert (series.form, series.sample, series.channels) == ("series", (96, 7), 7)
    assert form(shape=[96, 2], mean=[1.0, 2.0], std=[3.0, 4.0], features=["a", "b"]).channels == 2
    row = form(shape=[2], features=["a", "b"])
    assert (row.form, row.sample) == ("features", (2,))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"shape": [1], "tokenizer": BYTES}, "shape of a text is one number, of at least 2 tokens"),
        ({"shape": [3, 8, 8], "tokenizer": BYTES, "text_length": 1}, "greater than or equal to 2"),
        ({"shape": [8, 3], "tokenizer": BYTES}, "shape of a text is one number"),
        ({"shape": [8], "tokenizer": BYTES, "mean": [0.0]}, "tokens are not normalised"),
        ({"shape": [8], "tokenizer": BYTES, "normalise_by": "sites"}, "tokens are not normalised"),
        ({"shape": [8], "tokenizer": BYTES, "features": ["a"]}, "'features' belongs to a table"),
        ({"shape": [8], "tokenizer": BYTES, "stride": 2}, "stride belongs to a series"),
        ({"shape": [8], "tokenizer": BYTES, "cut": "words"}, "'cut' should be 'lines', 'windows' or 'roles'"),
        ({"shape": [8], "tokenizer": BYTES, "text": []}, "'text'"),
        ({"shape": [8]}, "shape says 8 features and the list 'features' names 0"),
        ({"shape": [96, 2], "features": ["a"]}, "shape says 2 numbers a step and 'features' names 1"),
        ({"shape": [96, 2], "mean": [0.0, 0.0, 0.0]}, r"or one per channel or feature \(2\)"),
        ({"shape": [96, 2], "stride": 95}, "overlap, and parts = 'hash' would put the same steps"),
        ({"shape": [1, 8, 8], "stride": 1}, "stride belongs to a series"),
        ({"shape": [1, 1, 8, 8]}, "not 4 numbers"),
    ],
)
def test_data_that_cannot_be(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        form(**keys)


def test_a_text_task_without_texts_says_what_is_missing() -> None:
    table = {"shape": [2], "features": ["a", "b"]}
    with pytest.raises(ConfigError, match="cannot take what"):
        Job.resolve({"name": "x", "model": {"name": "gpt"}, "task": {"name": "language-modelling"}, "data": table})
