"""Images with captions: layouts, parts and sites, several captions of an image, and every way they can be wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from client.readers import check, read
from client.readers.base import PARTS, Store, Wanted
from client.readers.parts import part_of, split
from shared_models.errors import ConfigError, DataError
from shared_models.job_parts import DataPart
from shared_models.tokens import BEGIN, END, PAD, Bytes

TOLD = [
    ("a.png", "A dog runs."),
    ("a.png", "The dog, it is brown."),
    ("b.png", "Zwei Kühe"),
    ("a.png", "Brown dog"),
    ("b.png", "Two cows"),
]


def data(**keys: Any) -> DataPart:
    return DataPart(**{"shape": (3, 4, 6), "tokenizer": "bytes", "text_length": 24, **keys})


def pictures(folder: Path, names: Sequence[str]) -> None:
    """6 x 4, each of a colour of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(sorted(set(names))):
        Image.new("RGB", (6, 4), (10 * i, 20, 30)).save(folder / name)


def table(root: Path, rows: Sequence[Sequence[str]], header: str = "image,caption", name: str = "captions.txt") -> None:
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
    (root / name).write_text("\n".join([header, *quoted]) + "\n", encoding="utf-8")


def lines(root: Path, objects: Sequence[Any], name: str = "pairs.jsonl") -> None:
    (root / name).write_text("\n".join(o if isinstance(o, str) else json.dumps(o) for o in objects), encoding="utf-8")


def load(root: Path, skip: int = 0, **keys: Any) -> Store:
    return read("captions", root, Wanted(data(**keys), (), "tokens", skip_bad=skip))


def said(store: Store) -> list[str]:
    return [Bytes().decode(row) for row in store.y.tolist()]


# ---- layouts ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("folder", ["images", "Images", ""])
@pytest.mark.parametrize("name", ["captions.txt", "captions.csv"])
def test_a_table_beside_its_images(tmp_path: Path, folder: str, name: str) -> None:
    pictures(tmp_path / folder, ["a.png", "b.png"])
    table(tmp_path, TOLD, name=name)
    store = load(tmp_path)
    prefix = f"{folder}/" if folder else ""
    assert list(store.names) == [f"{prefix}a.png", f"{prefix}b.png"]
    assert said(store) == ["A dog runs.", "Zwei Kühe"]
    assert (store.x.shape, store.x.dtype, store.y.dtype) == ((2, 3, 4, 6), torch.uint8, torch.int64)
    assert store.x[:, 0, 0, 0].tolist() == [0, 10]
    assert not any((store.groups, store.parts, store.sites, store.alternatives))
    assert load(tmp_path / name).names == store.names


def test_ids_begin_and_end_and_are_padded_or_cut(tmp_path: Path) -> None:
    pictures(tmp_path, ["a.png", "b.png"])
    table(tmp_path, [("a.png", "ab"), ("b.png", "abcdefgh")])
    ids = load(tmp_path, text_length=6).y.tolist()
    letters = [Bytes().encode(c)[0] for c in "abcde"]
    assert ids == [[BEGIN, *letters[:2], END, PAD, PAD], [BEGIN, *letters]]


@pytest.mark.parametrize("keys", [("image", "caption"), ("file_name", "text"), ("path", "caption")])
def test_json_lines_of_one_or_several_captions(tmp_path: Path, keys: tuple[str, str]) -> None:
    image, caption = keys
    pictures(tmp_path / "images", ["a.png", "b.png"])
    lines(tmp_path, [{image: "a.png", caption: ["one", "two\nlines\u2028"]}, "", {image: "b.png", caption: "three"}])
    for root in (tmp_path, tmp_path / "pairs.jsonl"):
        assert said(load(root)) == ["one", "three"]
        assert said(load(root, captions=5)) == ["one", "two\nlines", "three"]


def test_a_caption_may_say_what_a_number_has_for_missing(tmp_path: Path) -> None:
    pictures(tmp_path, ["a.png", "b.png"])
    table(tmp_path, [("a.png", "NA"), ("b.png", " ? ")])
    assert said(load(tmp_path)) == ["NA", "?"]


def test_a_key_that_is_null_is_as_if_it_were_left_out(tmp_path: Path) -> None:
    pictures(tmp_path, ["a.png"])
    lines(tmp_path, [{"image": None, "path": "a.png", "caption": None, "text": "x", "part": None, "site": None}])
    store = load(tmp_path)
    assert (said(store), list(store.parts), list(store.sites)) == (["x"], [], [])


# ---- several captions of an image ------------------------------------------------------------------------------------
def test_captions_of_an_image_are_examples_of_one_group(tmp_path: Path) -> None:
    pictures(tmp_path / "images", ["a.png", "b.png"])
    table(tmp_path, TOLD)
    store = load(tmp_path, captions=2)
    assert said(store) == ["A dog runs.", "The dog, it is brown.", "Zwei Kühe", "Two cows"]
    assert list(store.names) == [f"images/{n}" for n in ("a.png#0", "a.png#1", "b.png#0", "b.png#1")]
    assert list(store.groups) == ["images/a.png"] * 2 + ["images/b.png"] * 2
    assert store.x[:, 0, 0, 0].tolist() == [0, 0, 10, 10]
    assert len(load(tmp_path, captions=9).names) == 5


@pytest.mark.parametrize("parts", ["hash", "blocks"])
def test_all_captions_are_trained_with_and_the_first_alone_is_measured(tmp_path: Path, parts: str) -> None:
    names = [f"{i:02d}.png" for i in range(40)]
    pictures(tmp_path / "images", names)
    table(tmp_path, [(name, f"{name} {k}") for k in range(3) for name in names])
    alone, several = (split(load(tmp_path, captions=k, parts=parts)) for k in (1, 3))
    for part in PARTS:
        one, many = getattr(alone, part), getattr(several, part)
        held = [one.store.names[row] for row in one.rows.tolist()]
        copies = 3 if part == "train" else 1
        assert [many.store.groups[row] for row in many.rows.tolist()] == [n for n in held for _ in range(copies)]
        firsts = many.y[::3] if part == "train" else many.y
        assert torch.equal(firsts, one.y)
        if parts == "hash":
            assert {part_of(name) for name in held} == {part}


def test_measured_is_the_first_of_the_rows_that_a_site_holds() -> None:
    store = Store(
        torch.zeros(6, 1, 1, 1, dtype=torch.uint8), torch.arange(6), [f"x#{i}" for i in range(6)],
        DataPart(shape=(1, 1, 1)), parts=["train", "train", "validation", "validation", "test", "test"],
        groups=["a", "a", "b", "b", "c", "c"], alternatives=True,
    )  # fmt: skip
    found = split(store, torch.tensor([1, 3, 2, 0, 5, 4]))
    assert [getattr(found, part).rows.tolist() for part in PARTS] == [[1, 0], [3], [5]]


# ---- parts and sites -------------------------------------------------------------------------------------------------
def test_parts_and_sites_beside_the_captions(tmp_path: Path) -> None:
    names = ["a.png", "b.png", "c.png"]
    pictures(tmp_path, names)
    rows = [(n, f"{n} {k}", p, f"site {p}") for n, p in zip(names, ("test", "val", "train"), strict=True) for k in "xy"]
    table(tmp_path, rows, header="image,caption,part,site")
    store = load(tmp_path, captions=2)
    assert list(store.parts) == ["train"] * 2 + ["validation"] * 2 + ["test"] * 2
    assert list(store.sites) == ["site train"] * 2 + ["site val"] * 2 + ["site test"] * 2
    (tmp_path / "captions.txt").unlink()
    lines(tmp_path, [{"image": n, "caption": [t], "part": p, "site": s} for n, t, p, s in rows])
    again = load(tmp_path, captions=2)
    assert (again.names, again.parts, again.sites) == (store.names, store.parts, store.sites)
    assert torch.equal(again.y, store.y)
    rows[1] = (*rows[1][:2], "train", rows[1][3])
    table(tmp_path, rows, header="image,caption,part,site")
    with pytest.raises(DataError, match=r"line 3 of .* has another part or site than line 2 of the same image"):
        load(tmp_path)


# ---- what is wrong ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("c.png", "not there"), r"line 7 of .* names 'c\.png', which is not in"),
        (("../a.png", "outside"), "does not lie within its folder"),
        (("", "of nothing"), "names '', which does not lie within"),
        (("a.png", "  "), r"line 7 of .*captions\.txt has no caption"),
        (("a.png", "x", "y"), "line 7 of .* has 3 cells, the header 2"),
    ],
)
def test_rows_that_are_wrong_are_named_or_passed_over(tmp_path: Path, row: tuple[str, ...], message: str) -> None:
    pictures(tmp_path / "images", ["a.png", "b.png"])
    table(tmp_path, [*TOLD, row])
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    store = load(tmp_path, skip=1, captions=9)
    assert (len(store.names), len(store.skipped)) == (5, 1)


def test_a_broken_image_is_one_fault_however_many_captions_it_has(tmp_path: Path) -> None:
    pictures(tmp_path / "images", ["a.png", "b.png"])
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    table(tmp_path, TOLD)
    with pytest.raises(DataError, match=r"a\.png cannot be read"):
        load(tmp_path)
    store = load(tmp_path, skip=1, captions=3)
    assert (said(store), len(store.skipped)) == (["Zwei Kühe", "Two cows"], 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 of .* is no JSON"),
        ("[" * 100_000, "line 2 of .* is no JSON"),
        ("[]", "line 2 of .* has no image and caption"),
        ('{"image": "a.png"}', "has no image and caption"),
        ('{"image": 3, "caption": "x"}', "has no image and caption"),
        ('{"image": "a.png", "caption": null}', "has no image and caption"),
        ('{"image": "a.png", "caption": [1]}', "has no image and caption"),
        ('{"image": "a.png", "caption": []}', "line 2 of .* has no caption"),
        ('{"image": "a.png", "caption": "x", "part": "exam"}', "is of the part 'exam'"),
    ],
)
def test_json_lines_that_are_wrong(tmp_path: Path, line: str, message: str) -> None:
    pictures(tmp_path, ["a.png", "b.png"])
    lines(tmp_path, [{"image": "b.png", "caption": "good"}, line])
    with pytest.raises(DataError, match=message):
        load(tmp_path)
    store = load(tmp_path, skip=1)
    assert (said(store), len(store.skipped)) == (["good"], 1)


@pytest.mark.parametrize("files", [[], ["a.jsonl", "b.jsonl"], ["captions.txt", "captions.csv"]])
def test_which_file_is_meant_must_be_clear(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        (tmp_path / name).write_text("image,caption\n")
    with pytest.raises(DataError, match=f"holds {len(files) or 'no'} files of captions"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("picture,caption\na.png,x\n", "has no column 'image'"),
        ("image,words\na.png,x\n", "has no column 'caption'"),
        ("image,caption\n", "has no caption of an image"),
    ],
)
def test_a_table_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "captions.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_a_job_without_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[data\] describes image of shape \[3, 4, 6\]"):
        load(tmp_path, tokenizer="")


def test_check_counts_images_and_captions(tmp_path: Path) -> None:
    pictures(tmp_path / "images", ["a.png", "b.png", "c.png"])
    (tmp_path / "images" / "c.png").write_bytes(b"no image")
    table(tmp_path, [*TOLD, ("c.png", "broken"), ("d.png", "missing")])
    found = check(tmp_path, "captions")
    assert (found["images"], found["captions"]) == (2, 5)
    assert ["c.png" in line or "d.png" in line for line in found["unreadable"]] == [True, True]
