"""COCO: files of each part, crowds, and entries that are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from client.readers import read
from client.readers.base import PARTS, Store, Wanted
from shared_models.errors import DataError
from shared_models.job_parts import DataPart

DATA = DataPart(shape=(1, 8, 16))
LABELS = ("cell", "platelet")


def picture(path: Path, **options: Any) -> None:
    """16 x 8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (16, 8), 50).save(path, **options)


def coco(root: Path, *stems: str) -> None:
    """A platelet and a cell in each image."""
    images, annotations = [], []
    for number, stem in enumerate(stems):
        picture(root / "images" / f"{stem}.png")
        images.append({"id": number, "file_name": f"{stem}.png", "width": 16, "height": 8})
        annotations.append({"image_id": number, "category_id": 3, "bbox": [2, 1, 4, 2]})
        annotations.append({"image_id": number, "category_id": 7, "bbox": [8, 0, 8, 8]})
    categories = [{"id": 7, "name": "cell"}, {"id": 3, "name": "platelet"}]
    whole = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations.json").write_text(json.dumps(whole))


def load(root: Path, data: DataPart = DATA, skip: int = 0, **aliases: str) -> Store:
    return read("coco", root, Wanted(data, LABELS, "boxes", aliases, skip))


def change(root: Path, act: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((root / "annotations.json").read_text())
    act(data)
    (root / "annotations.json").write_text(json.dumps(data))


def test_coco_crowds_are_left_out(tmp_path: Path) -> None:
    coco(tmp_path, "a")
    change(tmp_path, lambda d: d["annotations"][0].update(iscrowd=1, bbox="a mask instead"))
    assert load(tmp_path).y.tolist() == [[[0, 0.5, 0, 1, 1]]]


def test_coco_parts_by_the_word_in_the_name(tmp_path: Path) -> None:
    """The official layout: files of other kinds beside, images in a folder called like the part and the year."""
    folder = tmp_path / "annotations"
    for part, stem in {"val": "b", "test": "a", "train": "c"}.items():
        coco(tmp_path, stem)
        folder.mkdir(exist_ok=True)
        (tmp_path / "annotations.json").rename(folder / f"instances_{part}2017.json")
        (folder / f"captions_{part}2017.json").write_text("{}")
        (tmp_path / "images").rename(tmp_path / f"{part}2017")
    store = load(tmp_path)
    assert list(store.names) == ["train2017/c.png", "val2017/b.png", "test2017/a.png"]
    assert list(store.parts) == list(PARTS)
    (folder / "instances_test2017.json").unlink()
    with pytest.raises(DataError, match="has train, validation but not test"):
        load(tmp_path)
    (folder / "instances_val2017.json").unlink()
    assert not load(tmp_path).parts


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda d: d["images"][0].update(file_name="../../etc/passwd"), "does not lie within its folder"),
        (lambda d: d["images"][0].update(file_name="/etc/passwd"), "does not lie within its folder"),
        (lambda d: d["images"][0].update(file_name="C:\\x\\a.png"), "does not lie within its folder"),
        (lambda d: d["images"][0].update(file_name="\x00"), "which is not in"),
        (lambda d: d["images"][0].update(file_name="x" * 5000), "which is not in"),
        (lambda d: d["images"][0].update(file_name=17), "no 'file_name'"),
        (lambda d: d["images"][0].update(width="wide"), "'wide' where a number should be"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, 3]), "a bbox of 3 numbers"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, 3, None]), "None where a number should be"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, 3, 10**400]), "where a number should be"),
        (lambda d: d["annotations"][0].update(bbox={}), "no 'bbox'"),
        (lambda d: d["annotations"][0].update(category_id=99), "category 99, which is not listed"),
        (lambda d: d["annotations"][0].update(category_id=[]), "no 'category_id'"),
        (lambda d: d["annotations"].append({"image_id": 99}), "annotation 5 of .* is of image 99, which is not listed"),
        (lambda d: d["annotations"].append(None), "annotation 5 of .* has no 'image_id'"),
        (lambda d: d["images"].append({"id": 5, "file_name": "images/a.png"}), "image 5 .* is listed twice"),
    ],
)
def test_coco_entries_that_are_wrong(tmp_path: Path, act: Callable[[dict[str, Any]], object], message: str) -> None:
    coco(tmp_path, "a", "b")
    change(tmp_path, act)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    store = load(tmp_path, skip=1)
    assert ("images/b.png" in store.names, len(store.skipped)) == (True, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "has no 'categories'"),
        ('{"images": {}, "annotations": [], "categories": []}', "has no 'images'"),
        ('{"images": [1], "annotations": [], "categories": []}', "an image of .* has no 'id'"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "has no 'name'"),
    ],
)
def test_a_coco_file_that_is_none_cannot_be_passed_over(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "annotations.json").write_text(text)
    with pytest.raises(DataError, match=message):
        load(tmp_path, skip=99)
