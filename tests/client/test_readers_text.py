"""Texts: lines, windows and roles, parallel files and tables, their parts and sites."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch

from client.readers import check, read
from client.readers.base import PARTS, Store, Wanted
from client.readers.parts import split
from shared_models.errors import ConfigError, DataError
from shared_models.job_parts import DataPart
from shared_models.tokens import BEGIN, END, PAD, TEXT, Bytes

PLAY = """\
A PLAY

First Citizen:
Before we proceed,
hear me speak.

All:
Speak, speak.

   First Citizen:
You: are all
resolved?

(They leave: all.)
"""


def texts(root: Path, skip: int = 0, reader: str = "text", wants: Any = "none", labels: Any = (), **keys: Any) -> Store:
    data = DataPart(**{"shape": (16,), "tokenizer": "bytes", **keys})
    return read(reader, root, Wanted(data, labels, wants, skip_bad=skip))


def parallel(root: Path, skip: int = 0, wants: Any = "tokens", **keys: Any) -> Store:
    return texts(root, skip, "parallel", wants, **{"text": ("en",), "target": "de", **keys})


def ids(text: str, length: int = 16, ends: bool = True) -> list[int]:
    row = [BEGIN, *Bytes().encode(text), *([END] if ends else [])]
    assert len(row) <= length
    return row + [PAD] * (length - len(row))


def said(rows: torch.Tensor) -> list[str]:
    return [Bytes().decode(row) for row in rows.tolist()]


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(raw) if path.suffix.lower() == ".gz" else raw)
    return path


# ---- what an example is ----------------------------------------------------------------------------------------------
def test_lines_are_examples_with_an_end_where_there_is_room(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "  one \n\n \t\nGrüße\n" + 14 * "f" + "\n" + 15 * "c" + "\n" + 40 * "d")
    store = texts(file)
    assert (store.x.dtype, store.y.dtype, store.y.tolist()) == (torch.int32, torch.int64, [0] * 5)
    cut = [[BEGIN, *Bytes().encode(15 * c)] for c in "cd"]
    assert store.x.tolist() == [ids("one"), ids("Grüße"), ids(14 * "f"), *cut]
    assert list(store.names) == [f"a.txt#{n:07d}.0000000" for n in (1, 4, 5, 6, 7)]
    assert not any((store.parts, store.sites, store.groups, store.skipped))
    assert store.inputs is not None
    assert store.inputs.dtype == torch.int64


def test_texts_that_do_not_fit_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One of 15 letters has no room for its end; windows of a longer text have none that could be missed."""
    file = write(tmp_path / "a.txt", "one\n" + 14 * "f" + "\n" + 15 * "c" + "\n" + 40 * "d")
    for language, lines in (("en", ("one", 15 * "e")), ("de", (20 * "z", 20 * "d"))):
        for part in PARTS:
            write(tmp_path / "pairs" / f"{part}.{language}", "\n".join(lines))
    with caplog.at_level("INFO", "fedzoo.client"):
        texts(file)
        texts(file, cut="windows")
        parallel(tmp_path / "pairs")
    counts = ((2, 4), (3, 6), (6, 6))
    assert caplog.messages == [
        f"{cut} of {count} texts have more tokens than the job's 16 and are cut off there" for cut, count in counts
    ]


@pytest.mark.parametrize("length", [2, 3, 7, 16, 500])
def test_windows_cover_a_text_without_gap_or_overlap(tmp_path: Path, length: int) -> None:
    whole = "".join(chr(0x100 + i) if i % 5 == 0 else chr(0x21 + i % 90) for i in range(150)) + "\n\nlast\n"
    store = texts(write(tmp_path / "a.txt", whole), cut="windows", shape=(length,))
    assert (store.x[:, 0] == BEGIN).all()
    assert b"".join(bytes((row[row >= TEXT] - TEXT).tolist()) for row in store.x) == whole.encode()
    assert (store.x[:-1] != PAD).all()
    assert not (store.x == END).any()
    assert list(store.names) == [f"a.txt#{i:07d}" for i in range(len(store.names))]


def test_all_that_one_role_says_is_one_text_and_every_role_a_site(tmp_path: Path) -> None:
    store = texts(write(tmp_path / "play.txt", PLAY), cut="roles", shape=(200,))
    assert said(store.x) == [
        "Speak, speak.\n",
        "Before we proceed,\nhear me speak.\n\nYou: are all\nresolved?\n",
    ]
    assert list(store.sites) == ["All", "First Citizen"]
    assert list(store.names) == ["play.txt#All.0000000", "play.txt#First Citizen.0000000"]
    short = texts(tmp_path / "play.txt", cut="roles", shape=(8,))
    assert "".join(said(short.x[:2])) == "Speak, speak.\n"
    assert list(short.sites) == ["All"] * 2 + ["First Citizen"] * 9


def test_a_role_that_says_nothing_is_none(tmp_path: Path) -> None:
    file = write(tmp_path / "play.txt", "HAMLET:\nTo be.\n\nGHOST:\n\nOPHELIA:\n")
    assert list(texts(file, cut="roles").sites) == ["HAMLET"]
    with pytest.raises(DataError, match="there is no text"):
        texts(write(tmp_path / "prose.txt", "No play at all.\n"), cut="roles")


def test_blanks_behind_a_roles_colon_are_nothing(tmp_path: Path) -> None:
    plain = texts(write(tmp_path / "a.txt", PLAY), cut="roles")
    blank = texts(write(tmp_path / "b.txt", PLAY.replace(":\n", ": \t\u00a0\n")), cut="roles")
    assert torch.equal(blank.x, plain.x)
    assert list(blank.sites) == list(plain.sites)


def test_nothing_but_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "a\u2028b\x85c\x0bd\x0ce\rf\n\u2028\ng")
    store = texts(file)
    assert said(store.x) == ["a\u2028b\x85c\x0bd\x0ce\rf", "g"]
    assert [name[-15:-8] for name in store.names] == ["0000001", "0000003"]
    assert check(file, "text")["lines"] == 2


# ---- files -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cut", ["lines", "windows", "roles"])
@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.text", "a.txt.gz", "a.TXT.GZ"])
def test_packing_line_ends_and_a_byte_order_mark_change_nothing(tmp_path: Path, name: str, cut: str) -> None:
    plain = texts(write(tmp_path / "plain" / "a.txt", PLAY), cut=cut)
    other = texts(write(tmp_path / "other" / name, "\ufeff" + PLAY.replace("\n", "\r\n")).parent, cut=cut)
    assert torch.equal(plain.x, other.x)
    assert plain.sites == other.sites
    assert [n.split("#")[1] for n in plain.names] == [n.split("#")[1] for n in other.names]


def test_each_of_several_files_is_a_site_by_its_name(tmp_path: Path) -> None:
    for name in ("dr. b.txt", "dr. a.txt.gz", "c.TEXT"):
        write(tmp_path / name, f"says {name[:5]}\nand more\n")
    write(tmp_path / "empty.txt", " \n")
    for name in ("notes.md", ".hidden.txt"):
        write(tmp_path / name, "no text")
    (tmp_path / "folder.txt").mkdir()
    store = texts(tmp_path)
    assert list(store.sites) == ["c"] * 2 + ["dr. a"] * 2 + ["dr. b"] * 2
    assert said(store.x)[::2] == ["says c.TEX", "says dr. a", "says dr. b"]
    assert len(set(store.names)) == 6
    again = texts(tmp_path)
    assert (again.names, again.sites) == (store.names, store.sites)


def test_the_owners_folders_are_parts(tmp_path: Path) -> None:
    for part in ("test", "valid", "train"):
        write(tmp_path / part / "ulm.txt", f"{part}\n{part} 2\n")
        write(tmp_path / part / "bonn.txt", f"{part} 3\n")
    store = texts(tmp_path)
    assert list(store.parts) == ["train"] * 3 + ["validation"] * 3 + ["test"] * 3
    assert list(store.sites) == ["bonn", "ulm", "ulm"] * 3
    assert list(store.names)[:2] == ["train/bonn.txt#0000001.0000000", "train/ulm.txt#0000001.0000000"]
    assert said(split(store).test.store.x[split(store).test.rows]) == ["test 3", "test", "test 2"]
    (tmp_path / "valid").rename(tmp_path / "other")
    with pytest.raises(DataError, match="has train, test but not validation"):
        texts(tmp_path)


def test_blocks_cut_a_text_in_its_order(tmp_path: Path) -> None:
    whole = " ".join(f"{i:04d}" for i in range(400))
    parts = split(texts(write(tmp_path / "a.txt", whole), cut="windows", parts="blocks"))
    pieces = ["".join(said(getattr(parts, part).store.x[getattr(parts, part).rows])) for part in PARTS]
    assert "".join(pieces) == whole
    assert [len(piece) / len(whole) for piece in pieces] == pytest.approx([0.6, 0.2, 0.2], abs=0.02)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"abc\nd\xe9\n", r"bad\.txt is not UTF-8 at byte 5"),
        ("abc".encode("utf-16"), r"bad\.txt is not UTF-8 at byte 0"),
        (b"one\ntwo\x00\n", r"bad\.txt is no text: line 2 holds '\\x00'"),
        (b"\x1b[31mred", r"bad\.txt is no text: line 1 holds '\\x1b'"),
    ],
)
def test_a_file_that_is_no_text_is_named_or_passed_over(tmp_path: Path, raw: bytes, message: str) -> None:
    write(tmp_path / "good.txt", "good\n")
    write(tmp_path / "bad.txt", raw)
    with pytest.raises(DataError, match=message) as error:
        texts(tmp_path)
    assert str(error.value).isprintable()
    store = texts(tmp_path, skip=1)
    assert (said(store.x), list(store.sites), len(store.skipped)) == (["good"], ["good"], 1)


@pytest.mark.parametrize(
    "raw", [b"no gzip", gzip.compress(b"long enough to cut" * 99, mtime=0)[:-12], b"\x1f\x8b" + b"x" * 30]
)
def test_a_packed_file_that_is_broken(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.txt.gz").write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.txt\.gz cannot be unpacked"):
        texts(tmp_path)


def test_a_packed_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.readers.texts.MAX_BYTES", 1000)
    assert len(texts(write(tmp_path / "a.txt.gz", "a" * 1000)).names) == 1
    with pytest.raises(DataError, match=r"a\.txt\.gz unpacks to more than"):
        texts(write(tmp_path / "a.txt.gz", "a" * 1001))


@pytest.mark.parametrize("cut", ["lines", "windows", "roles"])
def test_where_there_is_no_text(tmp_path: Path, cut: str) -> None:
    with pytest.raises(DataError, match="no text in"):
        texts(tmp_path, cut=cut)
    write(tmp_path / "a.txt", "")
    with pytest.raises(DataError, match="there is no text"):
        texts(tmp_path, cut=cut)
    with pytest.raises(DataError, match=r"gone\.txt does not exist"):
        texts(tmp_path / "gone.txt", cut=cut)


def test_check_of_texts(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "Grüße\r\n\r\nzwei\r\n")
    write(tmp_path / "b.txt.gz", "drei\n")
    write(tmp_path / "c.txt", b"\xff")
    found = check(tmp_path, "text")
    assert {n: found[n] for n in ("files", "lines", "characters")} == {"files": 2, "lines": 3, "characters": 12 + 5}
    assert ["c.txt is not UTF-8" in line for line in found["unreadable"]] == [True]


# ---- parallel files --------------------------------------------------------------------------------------------------
def pairs(root: Path, end: str = "", **files: str) -> None:
    """Three parts of two lines each; `files` are others, `_` for the point."""
    given = {f"{part}_{language}": f"{language} {part}\n{language} 2\n" for part in PARTS for language in ("en", "de")}
    for name, text in {**given, **files}.items():
        write(root / (name.replace("_", ".") + end), text)


@pytest.mark.parametrize("end", ["", ".gz"])
def test_line_i_belongs_to_line_i(tmp_path: Path, end: str) -> None:
    pairs(tmp_path, end, train_fr="fr 1\n", notes_en="passed over\n", train_en="\ufeff one \r\nGrüße\u2028 2\r\n")
    store = parallel(tmp_path)
    assert said(store.x) == ["one", "Grüße\u2028 2", "en validation"[:15], "en 2", "en test", "en 2"]
    assert said(store.y) == ["de train", "de 2", "de validation"[:15], "de 2", "de test", "de 2"]
    assert store.x[0].tolist() == ids("one")
    assert store.y[0].tolist() == ids("de train")
    assert (store.x.dtype, store.y.dtype) == (torch.int32, torch.int64)
    assert list(store.parts) == [part for part in PARTS for _ in range(2)]
    assert list(store.names) == [f"{part}/{i:07d}" for part in PARTS for i in (1, 2)]
    back = parallel(tmp_path, text=("de",), target="en")
    assert (back.x.tolist(), back.y.tolist()) == (store.y.tolist(), store.x.tolist())
    assert check(tmp_path, "parallel")["lines"][f"train.en{end}"] == 2


def test_a_task_without_a_target_reads_one_language(tmp_path: Path) -> None:
    pairs(tmp_path)
    for part in PARTS:
        (tmp_path / f"{part}.de").unlink()
    store = parallel(tmp_path, wants="none")
    assert store.y.tolist() == [0] * 6
    assert said(store.x)[4] == "en test"
    write(tmp_path / "train.en", "one\n\n")
    with pytest.raises(DataError, match=r"line 2 of .*train\.en is empty\. Remove"):
        parallel(tmp_path, wants="none")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train_de": "one\n"}, r"train\.en has 2 lines and .*train\.de 1\. Line i"),
        ({"test_de": "1\n2\n3\n"}, r"test\.en has 2 lines and .*test\.de 3\. Line i"),
        ({"train_de": "one\n\n"}, r"line 2 of .*train\.en and train\.de is empty on one side"),
        ({"train_de": "one\r\n\r\n"}, r"line 2 of .*train\.en and train\.de is empty on one side"),
        ({"train_en": " \t\nwords"}, r"line 1 of .*train\.en and train\.de is empty on one side"),
        ({"train_en": "a\n\x07\n"}, r"train\.en is no text: line 2"),
        ({"val_en": "again\n"}, r"has both val\.en and validation\.en"),
    ],
)
def test_pairs_that_do_not_fit(tmp_path: Path, files: dict[str, str], message: str) -> None:
    pairs(tmp_path, **files)
    with pytest.raises(DataError, match=message):
        parallel(tmp_path)


def test_a_pair_that_is_empty_on_one_side_can_be_passed_over(tmp_path: Path) -> None:
    pairs(tmp_path, train_de="\nzwei\n", test_en="one\n\n")
    with pytest.raises(DataError, match="2 files or rows cannot be used and 1 may be skipped"):
        parallel(tmp_path, skip=1)
    store = parallel(tmp_path, skip=2)
    assert list(store.names) == ["train/0000002", "validation/0000001", "validation/0000002", "test/0000001"]
    assert len(store.skipped) == 2


def test_files_that_are_missing(tmp_path: Path) -> None:
    pairs(tmp_path)
    with pytest.raises(DataError, match=r"has no files in fr and de\. Expected e\.g\. train\.fr and train\.de"):
        parallel(tmp_path, text=("fr",))
    with pytest.raises(ConfigError, match=r"data\.text names the one language that is read"):
        parallel(tmp_path, text=("en", "fr"))
    (tmp_path / "validation.de").unlink()
    with pytest.raises(DataError, match="has train, test but not validation"):
        parallel(tmp_path)
    with pytest.raises(DataError, match=r"train\.en cannot be listed"):
        parallel(tmp_path / "train.en")


def test_check_of_parallel_files(tmp_path: Path) -> None:
    pairs(tmp_path, train_de="one\u2028 line\x0b of\x85 three\nlast", test_en=" \n")
    write(tmp_path / "test.de", b"\xff")
    found = check(tmp_path, "parallel")
    assert found["lines"] == {"train.de": 2, "train.en": 2, "validation.de": 2, "validation.en": 2, "test.en": 1}
    assert ["test.de is not UTF-8" in line for line in found["unreadable"]] == [True]


# ---- texts in a table ------------------------------------------------------------------------------------------------
def test_texts_of_a_table_with_classes_parts_and_sites(tmp_path: Path) -> None:
    lines = [
        "title,body,label,part,site",
        'Hi,"a\nb",good,test,ulm',
        ",only body,bad,train,bonn",
        "Grüße,,good,val,ulm",
    ]
    file = write(tmp_path / "a.csv", "\n".join(lines))
    store = texts(file, 0, "csv", "class", ("bad", "good"), text=("title", "body"))
    assert said(store.x) == ["only body", "Grüße", "Hi a\nb"]
    assert store.x[0].tolist() == ids("only body")
    assert store.y.tolist() == [0, 1, 1]
    assert (list(store.parts), list(store.sites)) == (list(PARTS), ["bonn", "ulm", "ulm"])
    assert list(store.names) == ["a.csv:0000004", "a.csv:0000005", "a.csv:0000003"]
    plain = texts(file, 0, "csv", text=("title", "body"))
    assert (plain.y.tolist(), said(plain.x)) == ([0, 0, 0], said(store.x))


@pytest.mark.parametrize(
    ("row", "message"),
    [(" ,good", "line 3 of .* has no text"), ("x,ugly", "stands for 'ugly'"), ("x", "line 3 of .* has 1 cells")],
)
def test_rows_that_cannot_be_used(tmp_path: Path, row: str, message: str) -> None:
    file = write(tmp_path / "a.csv", f"text,label\nfine,good\n{row}\n")
    with pytest.raises(DataError, match=message):
        texts(file, 0, "csv", "class", ("bad", "good"))
    store = texts(file, 1, "csv", "class", ("bad", "good"))
    assert (said(store.x), len(store.skipped)) == (["fine"], 1)
    with pytest.raises(DataError, match="has no column 'words'"):
        texts(file, 0, "csv", text=("words",))
    with pytest.raises(DataError, match="there is no text"):
        texts(write(file, "text,label\n"), 0, "csv")


# ---- wrong forms -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reader", ["text", "parallel"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (16, 2)])
def test_a_job_about_something_else_is_refused(tmp_path: Path, reader: str, shape: tuple[int, ...]) -> None:
    pairs(tmp_path, a_txt="text")
    with pytest.raises(ConfigError, match=r"these data are texts, and \[data\] describes .*E\.g\. tokenizer = 'bytes'"):
        texts(tmp_path, 0, reader, tokenizer="", shape=shape)
    with pytest.raises(ConfigError, match="the task wants classes"):
        texts(tmp_path, 0, reader, "class", ("a", "b"))
