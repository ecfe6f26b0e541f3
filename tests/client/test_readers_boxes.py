"""Boxes of VOC, COCO and YOLO: the same two objects by hand in each, turning, padding, and every way to be wrong."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from client.readers import check, read
from client.readers.base import Store, Wanted
from client.readers.boxes import Annotation, Box, decode, within
from shared_models.boxes import PADDING
from shared_models.errors import DataError
from shared_models.job_parts import DataPart

DATA = DataPart(shape=(1, 8, 16))
LABELS = ("cell", "platelet")
WIDTH, HEIGHT = 16, 8

Corners = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels, counted from 0
Thing = tuple[str, Corners]
A: Thing = ("platelet", (2, 1, 6, 3))
B: Thing = ("cell", (8, 0, 16, 8))
ROWS = [[1, 2 / 16, 1 / 8, 6 / 16, 3 / 8], [0, 0.5, 0, 1, 1]]  # what A and B become


def picture(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT), **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, 50).save(path, **options)


# ---- the same images in each format ----------------------------------------------------------------------------------
def voc(root: Path, things: dict[str, Sequence[Thing]], size: tuple[float, float] | None = (WIDTH, HEIGHT)) -> None:
    (root / "Annotations").mkdir(parents=True, exist_ok=True)
    for stem, boxes in things.items():
        picture(root / "JPEGImages" / f"{stem}.png")
        objects = "".join(
            f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin>"
            f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for name, (x0, y0, x1, y1) in boxes
        )
        stated = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
        text = f"<annotation><filename>{stem}.png</filename>{stated}{objects}</annotation>"
        (root / "Annotations" / f"{stem}.xml").write_text(text)


def coco(root: Path, things: dict[str, Sequence[Thing]], size: tuple[float, float] | None = (WIDTH, HEIGHT)) -> None:
    stated = {"width": size[0], "height": size[1]} if size else {}
    images, annotations = [], []
    for number, (stem, boxes) in enumerate(things.items()):
        picture(root / "images" / f"{stem}.png")
        images.append({"id": number, "file_name": f"{stem}.png", **stated})
        for name, (x0, y0, x1, y1) in boxes:
            category = {"cell": 7, "platelet": 3}.get(name, 9)
            annotations.append({"image_id": number, "category_id": category, "bbox": [x0, y0, x1 - x0, y1 - y0]})
    categories = [{"id": 7, "name": "cell"}, {"id": 3, "name": "platelet"}, {"id": 9, "name": "wolf"}]
    whole = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations.json").write_text(json.dumps(whole))


def yolo(root: Path, things: dict[str, Sequence[Thing]], size: tuple[float, float] | None = None) -> None:
    (root / "labels").mkdir(parents=True, exist_ok=True)
    for stem, boxes in things.items():
        picture(root / "images" / f"{stem}.png")
        lines = [
            f"{({'cell': 0, 'platelet': 1}).get(name, 2)} {(x0 + x1) / 2 / WIDTH} {(y0 + y1) / 2 / HEIGHT} "
            f"{(x1 - x0) / WIDTH} {(y1 - y0) / HEIGHT}"
            for name, (x0, y0, x1, y1) in boxes
        ]
        if lines:
            (root / "labels" / f"{stem}.txt").write_text("\n".join(lines))


Write = Callable[..., None]
FORMATS: dict[str, Write] = {"voc": voc, "coco": coco, "yolo": yolo}
every_format = pytest.mark.parametrize("name", FORMATS)


def load(name: str, root: Path, data: DataPart = DATA, target: Any = "boxes", skip: int = 0, **alias: str) -> Store:
    return read(name, root, Wanted(data, LABELS, target, alias, skip))


@every_format
def test_classes_and_fractions_of_the_image(tmp_path: Path, name: str) -> None:
    """Two boxes, one, and none, which is a valid negative; padded with rows of class -1."""
    FORMATS[name](tmp_path, {"b": [A, B], "c": [], "a": [B]})
    store = load(name, tmp_path)
    assert [Path(n).stem for n in store.names] == ["a", "b", "c"]
    empty = [PADDING, 0, 0, 0, 0]
    assert store.y.dtype == torch.float32
    assert store.y.tolist() == [[ROWS[1], empty], ROWS, [empty, empty]]
    assert store.x.shape == (3, 1, 8, 16)
    assert store.x.unique().tolist() == [50]
    assert not store.parts


@every_format
def test_one_box_in_each_image(tmp_path: Path, name: str) -> None:
    FORMATS[name](tmp_path, {"a": [A], "b": [A, B], "c": []})
    store = load(name, tmp_path, target="box", skip=2)
    assert store.y.tolist() == [ROWS[0][1:]]
    assert ["2 boxes and the task wants one" in store.skipped[0], "0 boxes" in store.skipped[1]] == [True, True]
    with pytest.raises(DataError, match="has 2 boxes and the task wants one in each image"):
        load(name, tmp_path, target="box")


@every_format
def test_padding_moves_boxes_along_and_stretching_does_not(tmp_path: Path, name: str) -> None:
    """16 x 8 in a square of 16: four rows of black above and below."""
    FORMATS[name](tmp_path, {"a": [A, B]})
    padded = load(name, tmp_path, DataPart(shape=(1, 16, 16), resize="pad"))
    assert padded.y[0].tolist() == [[1, 2 / 16, 5 / 16, 6 / 16, 7 / 16], [0, 0.5, 4 / 16, 1, 12 / 16]]
    assert (padded.x[0, 0, 4:12] == 50).all()
    assert padded.x[0, 0, :4].max() == 0
    assert load(name, tmp_path, DataPart(shape=(3, 5, 7))).y[0].tolist() == ROWS


@every_format
@pytest.mark.parametrize(
    ("corners", "found"),
    [
        ((-1, -1, 4, 4), [0, 0, 0.25, 0.5]),  # by one pixel: rounding
        ((12, 4, 17, 9), [0.75, 0.5, 1, 1]),
        ((-1.5, 0, 4, 4), "reaches out of its image of 16x8: (-1.5, 0, 4, 4)"),
        ((0, 0, 4, 9.5), "reaches out of its image"),
        ((5, 2, 5, 6), "is empty: (5, 2, 5, 6)"),
        ((5, 6, 7, 2), "is empty"),
        ((-1, 0, 0, 4), "is empty"),
        ((float("nan"), 0, 4, 4), "has a coordinate that is no number"),
        ((0, 0, float("inf"), 4), "has a coordinate that is no number"),
    ],
)
def test_boxes_at_the_border_and_beyond(tmp_path: Path, name: str, corners: Corners, found: Any) -> None:
    FORMATS[name](tmp_path, {"a": [("cell", corners)]})
    if isinstance(found, list):
        assert load(name, tmp_path).y.tolist() == [[[0, *found]]]
        return
    with pytest.raises(DataError, match=re.escape(found)) as caught:
        load(name, tmp_path)
    places = {"voc": "object 1 of ", "coco": "annotation 1 of image 0 of ", "yolo": "line 1 of "}
    assert str(caught.value).startswith(places[name] + str(tmp_path))


@every_format
def test_a_class_that_the_job_does_not_have(tmp_path: Path, name: str) -> None:
    FORMATS[name](tmp_path, {"a": [A], "b": [A, ("wolf", (1, 1, 2, 2))]})
    with pytest.raises(DataError, match=r"stands for 'wolf'|line 2 of .*b\.txt holds class 2, which stands for none"):
        load(name, tmp_path)
    store = load(name, tmp_path, skip=1)
    assert len(store.names) == len(store.skipped) == 1
    aliases = {"2": "cell"} if name == "yolo" else {"wolf": "cell"}
    assert load(name, tmp_path, **aliases).y[1, 1].tolist() == pytest.approx([0, 1 / 16, 1 / 8, 2 / 16, 2 / 8])


@every_format
@pytest.mark.parametrize("damage", ["truncated", "empty"])
def test_an_image_that_cannot_be_read(tmp_path: Path, name: str, damage: str) -> None:
    FORMATS[name](tmp_path, {"a": [A], "b": [B]})
    file = next(tmp_path.rglob("a.png"))
    file.write_bytes(file.read_bytes()[:45] if damage == "truncated" else b"")
    with pytest.raises(DataError, match=r"image .*a\.png cannot be read"):
        load(name, tmp_path)
    store = load(name, tmp_path, skip=1)
    assert store.y.tolist() == [[ROWS[1]]]
    found = check(tmp_path, name)
    assert (found["images"], sum(found["classes"]["all"].values())) == (1, 1)
    assert ["a.png cannot be read" in line for line in found["unreadable"]] == [True]


@every_format
def test_check_counts_boxes(tmp_path: Path, name: str) -> None:
    FORMATS[name](tmp_path, {"a": [A, B], "b": [A], "c": []})
    words = {"0": 1, "1": 2} if name == "yolo" else {"cell": 1, "platelet": 2}
    assert check(tmp_path, name) == {"images": 3, "classes": {"all": words}, "unreadable": []}


@every_format
def test_names_beyond_ascii(tmp_path: Path, name: str) -> None:
    """Written NFC, on the disk NFD, as a Mac does; and a stem of bytes that are no UTF-8."""
    word = unicodedata.normalize("NFC", "Zellen é 猫")
    FORMATS[name](tmp_path, {word: [A]})
    file = next(tmp_path.rglob("*.png"))
    file.rename(file.with_name(unicodedata.normalize("NFD", file.name)))
    assert load(name, tmp_path).y.tolist() == [[ROWS[0]]]
    if name == "coco":  # JSON can hardly say such a name
        return
    odd = os.fsdecode(b"caf\xe9")
    for path in [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.xml"), *tmp_path.rglob("*.txt")]:
        path.rename(path.with_stem(odd))
    assert [odd in n for n in load(name, tmp_path).names] == [True]


# ---- turned images ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["voc", "coco"])
def test_boxes_turn_where_only_the_stored_size_fits(tmp_path: Path, name: str) -> None:
    """Stored 16 x 8 and shown 8 x 16, turned clockwise: the stored left half is the upper half that one sees."""
    exif = Image.Exif()
    exif[274] = 6
    data = DataPart(shape=(1, 16, 8))
    left: Thing = ("cell", (0, 0, 8, 4))  # the stored upper left quarter is the upper right one that one sees
    FORMATS[name](tmp_path, {"a": [left]}, (16, 8))
    picture(next(tmp_path.rglob("a.png")), (16, 8), exif=exif)
    assert load(name, tmp_path, data).y.tolist() == [[[0, 0.5, 0, 1, 0.5]]]
    FORMATS[name](tmp_path, {"a": [left]}, (8, 16))
    picture(next(tmp_path.rglob("a.png")), (16, 8), exif=exif)
    assert load(name, tmp_path, data).y.tolist() == [[[0, 0, 0, 1, 0.25]]]
    FORMATS[name](tmp_path, {"a": [left]}, (8, 15))
    picture(next(tmp_path.rglob("a.png")), (16, 8), exif=exif)
    with pytest.raises(DataError, match=r"is for an image of 8x15, but .*a\.png has 8x16"):
        load(name, tmp_path, data)


def test_yolo_fractions_are_of_the_image_as_one_sees_it(tmp_path: Path) -> None:
    yolo(tmp_path, {"a": [A, B]})
    exif = Image.Exif()
    exif[274] = 6
    picture(tmp_path / "images" / "a.png", exif=exif)
    assert load("yolo", tmp_path, DataPart(shape=(1, 16, 8))).y.tolist() == [ROWS]


@pytest.mark.parametrize("name", ["voc", "coco"])
@pytest.mark.parametrize("size", [None, (0, 0)])
def test_a_size_that_is_not_stated(tmp_path: Path, name: str, size: tuple[int, int] | None) -> None:
    FORMATS[name](tmp_path, {"a": [A]}, size)
    assert load(name, tmp_path).y.tolist() == [[ROWS[0]]]


# ---- geometry --------------------------------------------------------------------------------------------------------
def test_boxes_follow_the_pixels_of_any_size_and_frame(tmp_path: Path) -> None:
    """Random rectangles drawn into images: the thumbnail's bright area is where the box is, to half a pixel."""
    random = np.random.default_rng(0)
    file = tmp_path / "a.png"
    for trial in range(20):
        width, height = (int(v) for v in random.integers(40, 200, 2))
        x0, y0 = int(random.integers(0, width - 20)), int(random.integers(0, height - 20))
        x1, y1 = int(random.integers(x0 + 15, width)), int(random.integers(y0 + 15, height))
        pixels = np.zeros((height, width), np.uint8)
        pixels[y0:y1, x0:x1] = 255
        Image.fromarray(pixels).save(file)
        data = DataPart(shape=(1, 48, 64), resize=("pad", "stretch")[trial % 2])
        box = Box(0, (x0, y0, x1, y1), "here")
        image, target = decode(file, Annotation([box]), Wanted(data, ("a",), "boxes"), "here")
        rows, columns = np.nonzero(image[0].numpy() > 127)
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert (target[0, 1:] * torch.tensor([64, 48, 64, 48])).tolist() == pytest.approx(seen, abs=0.6)


def test_the_tolerance_is_one_pixel_of_the_image() -> None:
    assert within(Box(0, (-0.01, 0, 0.5, 0.5), ""), (100, 100), fractions=True) == (0, 0, 0.5, 0.5)
    with pytest.raises(DataError):
        within(Box(0, (-0.0101, 0, 0.5, 0.5), ""), (100, 100), fractions=True)
