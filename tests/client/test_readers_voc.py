"""Pascal VOC: lists, names, the first and the last pixel, and annotations that attack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from client.readers import read
from client.readers.base import PARTS, Store, Wanted
from client.readers.parts import split
from shared_models.errors import DataError
from shared_models.job_parts import DataPart

DATA = DataPart(shape=(1, 8, 16))
LABELS = ("cell", "platelet")


def picture(path: Path, **options: Any) -> None:
    """16 x 8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (16, 8), 50).save(path, **options)


def voc(root: Path, *stems: str, box: tuple[int, int, int, int] = (1, 1, 8, 4)) -> None:
    """One cell in each image; xmin, ymin, xmax, ymax."""
    (root / "Annotations").mkdir(parents=True, exist_ok=True)
    sides = "".join(f"<{side}>{v}</{side}>" for side, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    for stem in stems:
        picture(root / "JPEGImages" / f"{stem}.png")
        thing = f"<object><name>cell</name><bndbox>{sides}</bndbox></object>"
        text = f"<annotation><filename>{stem}.png</filename>{thing}</annotation>"
        (root / "Annotations" / f"{stem}.xml").write_text(text)


def load(root: Path, data: DataPart = DATA, skip: int = 0, **aliases: str) -> Store:
    return read("voc", root, Wanted(data, LABELS, "boxes", aliases, skip))


def test_voc_counts_from_one_and_includes_the_last_pixel(tmp_path: Path) -> None:
    """xmin = xmax = 1 is the first pixel, one wide."""
    voc(tmp_path, "a", box=(1, 1, 1, 1))
    assert load(tmp_path).y.tolist() == [[[0, 0, 0, 1 / 16, 1 / 8]]]


def test_voc_parts_are_the_owners_lists_where_all_three_are_there(tmp_path: Path) -> None:
    root = tmp_path / "VOC2007"
    voc(root, *"abcd")
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("c\n")
    (lists / "test.txt").write_text("a  1\n\n")
    assert (load(tmp_path).parts, len(load(tmp_path).names)) == ((), 4)
    (lists / "val.txt").write_text("b\ne\n")
    store = load(tmp_path, skip=1)
    assert (list(store.names), list(store.parts)) == (["c", "b", "a"], list(PARTS))
    assert ["e.xml cannot be read: No such file" in line for line in store.skipped] == [True]
    (lists / "val.txt").write_text("b\nc\n")
    with pytest.raises(DataError, match="'c' stands in two lists"):
        load(tmp_path)


def test_voc_needs_one_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no folder with Annotations/ and JPEGImages/"):
        load(tmp_path)
    voc(tmp_path / "one", "a")
    voc(tmp_path / "two", "a")
    with pytest.raises(DataError, match="has 2 folders with Annotations/"):
        load(tmp_path)


LOL = "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefghi", "bcdefghij", strict=True))
LAUGHS = f'<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "lol">{LOL}]><annotation>&j;</annotation>'
OUTSIDE = """<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><filename>&x;</filename></annotation>"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS.encode(), "declares a document type"),
        (OUTSIDE.encode(), "declares a document type"),
        (OUTSIDE.encode("utf-16"), "declares a document type"),
        (b"<annotation><object>", "is no XML"),
        (b"", "is no XML"),
        (b"\xff\xfe\x00", "is no XML"),
        (b'<?xml version="1.0" encoding="klingon"?><annotation/>', "is no XML"),
        (
            b"<annotation><object><name>cell</name></object></annotation>",
            "object 1 of .*no number in bndbox/xmin: None",
        ),
        (b"<annotation><size><width>nan</width><height>inf</height></size></annotation>", "for an image of nanxinf"),
        (b"<annotation><size><width>wide</width></size></annotation>", "no number in size/width: 'wide'"),
        (b"<annotation><filename>../../etc/passwd</filename></annotation>", "does not lie within its folder"),
        (b"<annotation><filename>/etc/passwd</filename></annotation>", "does not lie within its folder"),
    ],
)
def test_voc_annotations_that_are_wrong(tmp_path: Path, text: bytes, message: str) -> None:
    voc(tmp_path, "a", "b")
    (tmp_path / "Annotations" / "a.xml").write_bytes(text)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path)
    assert f"{tmp_path}/Annotations/a.xml" in str(caught.value)
    store = load(tmp_path, skip=1)
    assert (list(store.names), len(store.skipped)) == (["b"], 1)


def test_a_voc_image_goes_by_the_annotations_name_or_else_by_the_one_it_states(tmp_path: Path) -> None:
    voc(tmp_path, "a", "b")
    file = tmp_path / "Annotations" / "a.xml"
    file.write_text(file.read_text().replace("a.png", "camera-0815.png"))
    assert list(load(tmp_path).names) == ["a", "b"]
    (tmp_path / "JPEGImages" / "a.png").rename(tmp_path / "JPEGImages" / "camera-0815.png")
    assert list(load(tmp_path).names) == ["a", "b"]
    (tmp_path / "JPEGImages" / "camera-0815.png").unlink()
    with pytest.raises(DataError, match=r"a\.xml names 'camera-0815\.png', which is not in .*JPEGImages"):
        load(tmp_path)


@pytest.mark.data
def test_bccd(real_data: Path) -> None:
    """364 blood smears of 640 x 480; two of the 4,888 boxes are one pixel in size, and none has to be passed over."""
    labels = ("RBC", "WBC", "Platelets")
    store = read("voc", real_data / "bccd", Wanted(DataPart(shape=(1, 48, 64)), labels, "boxes"))
    parts = split(store)
    assert [len(getattr(parts, part)) for part in PARTS] == [205, 87, 72]
    classes, boxes = store.y[..., 0], store.y[..., 1:]
    assert [int((classes == c).sum()) for c in range(3)] == [4155, 372, 361]
    assert not store.skipped
    assert boxes.min() >= 0
    assert boxes.max() <= 1
    size = ((boxes[..., 2:] - boxes[..., :2]) * torch.tensor([640.0, 480.0]))[classes >= 0]
    assert int((size < 1.5).all(1).sum()) == 2
    first = store.y[list(store.names).index("BloodImage_00000")]
    assert first[0].tolist() == pytest.approx([1, 259 / 640, 176 / 480, 491 / 640, 376 / 480])
