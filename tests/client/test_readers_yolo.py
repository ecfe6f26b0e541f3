"""YOLO: layouts, where class names come from, and lines that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from client.readers import read
from client.readers.base import PARTS, Store, Wanted
from client.readers.yolo import yaml_names
from shared_models.errors import DataError
from shared_models.job_parts import DataPart

DATA = DataPart(shape=(1, 8, 16))
LABELS = ("cell", "platelet")


def picture(path: Path, **options: Any) -> None:
    """16 x 8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (16, 8), 50).save(path, **options)


def yolo(root: Path, *stems: str) -> None:
    """A platelet (1) and a cell (0) in each image."""
    (root / "labels").mkdir(parents=True, exist_ok=True)
    for stem in stems:
        picture(root / "images" / f"{stem}.png")
        (root / "labels" / f"{stem}.txt").write_text("1 0.25 0.25 0.25 0.25\n0 0.75 0.5 0.5 1\n")


def load(root: Path, data: DataPart = DATA, skip: int = 0, **aliases: str) -> Store:
    return read("yolo", root, Wanted(data, LABELS, "boxes", aliases, skip))


@pytest.mark.parametrize("layout", ["part/images", "images/part"])
def test_yolo_layouts_with_parts(tmp_path: Path, layout: str) -> None:
    for number, part in enumerate(("train", "val", "test")):
        yolo(tmp_path / "one", f"{number}")
        for kind in ("images", "labels"):
            to = tmp_path / "all" / (f"{part}/{kind}" if layout == "part/images" else f"{kind}/{part}")
            to.parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "one" / kind).rename(to)
    store = load(tmp_path / "all")
    assert list(store.parts) == list(PARTS)
    assert [Path(n).name for n in store.names] == ["0.png", "1.png", "2.png"]
    assert store.y[:, 0].tolist() == [[1, 0.125, 0.125, 0.375, 0.375]] * 3


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("classes.txt", "platelet\ncell\n"),
        ("obj.names", "platelet\ncell"),
        ("data.yaml", "path: ../x\nnames: ['platelet', \"cell\"]  # two\nnc: 2\n"),
        ("data.yaml", "nc: 2\nnames:\n  0: platelet\n  1: cell\n\ntrain: images\n"),
        ("data.yaml", "names:\n- platelet\n- cell\n"),
        ("data.yaml", "names: [\n  platelet,\n  cell,\n]\n"),
    ],
)
def test_yolo_class_names(tmp_path: Path, file: str, text: str) -> None:
    """The numbers are turned round: 0 is the platelet here."""
    yolo(tmp_path, "a")
    (tmp_path / file).write_text(text)
    assert load(tmp_path).y[0, :, 0].tolist() == [0, 1]
    (tmp_path / file).write_text(text.replace("cell", "cells"))
    with pytest.raises(DataError, match=r"line 1 of .*a\.txt stands for 'cells', which is not a label"):
        load(tmp_path)
    assert load(tmp_path, cells="cell").y[0, :, 0].tolist() == [0, 1]


def test_yolo_names_that_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "data.yaml"
    for text in ("names: *others\n", "names: [a, b\n", "names:\n  a\n  b\n", "names:\n"):
        file.write_text(text)
        with pytest.raises(DataError, match="'names' in a form that is not read"):
            yaml_names(file)
    file.write_text("train: x\n")
    assert yaml_names(file) == {}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.1", "has 4 values"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3", "has 7 values"),
        ("cell 0.5 0.5 0.1 0.1", "is not a class number and four fractions: 'cell"),
        ("0.0 0.5 0.5 0.1 0.1", "is not a class number"),
        ("-1 0.5 0.5 0.1 0.1", "holds class -1"),
        ("5 0.5 0.5 0.1 0.1", "holds class 5, which stands for none of the job's 2 labels"),
        ("0 0.5 0.5 0 0.1", "is empty"),
        ("0 8 4 4 4", "reaches out"),  # pixels instead of fractions
    ],
)
def test_yolo_lines_that_are_wrong(tmp_path: Path, line: str, message: str) -> None:
    yolo(tmp_path, "a", "b")
    file = tmp_path / "labels" / "a.txt"
    file.write_text(f"{file.read_text()}\n{line}\n")
    with pytest.raises(DataError, match=rf"line 4 of .*a\.txt {message}"):
        load(tmp_path)
    assert len(load(tmp_path, skip=1).skipped) == 1
    file.write_bytes(b"\xff\xff")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 at byte 0"):
        load(tmp_path)


def test_a_yolo_class_beyond_the_names(tmp_path: Path) -> None:
    yolo(tmp_path, "a")
    (tmp_path / "classes.txt").write_text("cell\n")
    with pytest.raises(DataError, match=r"line 1 of .*a\.txt is of class 1, and there are 1 class names"):
        load(tmp_path)


def test_a_yolo_text_without_its_image_and_no_folder_of_texts(tmp_path: Path) -> None:
    yolo(tmp_path, "a", "b")
    (tmp_path / "images" / "b.png").unlink()
    (tmp_path / "labels" / "classes.txt").write_text("not about an image")
    with pytest.raises(DataError, match=r"b\.txt has no image in"):
        load(tmp_path)
    assert len(load(tmp_path, skip=9).skipped) == 1
    (tmp_path / "labels").rename(tmp_path / "texts")
    with pytest.raises(DataError, match=r"there is no folder .*labels\. Expected images/ and labels/"):
        load(tmp_path)
