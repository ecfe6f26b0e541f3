"""MedMNIST's files: parts, what a number stands for, and archives that lie, swell or run code."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.readers import check, npz, read
from client.readers.base import PARTS, Store, Wanted
from client.readers.parts import split
from shared_models.errors import DataError
from shared_models.job_parts import DataPart

DATA = DataPart(shape=(1, 2, 2))
LABELS = ("normal", "pneumonia")


def write(path: Path, shape: tuple[int, ...] = (2, 2), **arrays: Any) -> Path:
    """Three images for training and one each for the rest, of grey values 0, 1, 2, ...; labels 0, 1, 1 | 0 | 1."""
    start = 0
    for part, labels in {"train": [0, 1, 1], "val": [0], "test": [1]}.items():
        grey = np.arange(start, start + len(labels), dtype=np.uint8)
        images = np.ones((len(labels), *shape), np.uint8) * grey.reshape(-1, *[1] * len(shape))
        arrays.setdefault(f"{part}_images", images)
        arrays.setdefault(f"{part}_labels", np.array(labels, np.uint8)[:, None])
        start += len(labels)
    np.savez(path, **arrays)
    return path


def load(root: Path, data: DataPart = DATA, labels: tuple[str, ...] = LABELS, skip: int = 0, **alias: str) -> Store:
    return read("npz", root, Wanted(data, labels, "class", alias, skip))


@pytest.mark.parametrize("give", ["file", "folder"])
def test_parts_and_order_of_the_file(tmp_path: Path, give: str) -> None:
    file = write(tmp_path / "x.npz")
    store = load(file if give == "file" else tmp_path)
    assert store.x[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert store.y.tolist() == [0, 1, 1, 0, 1]
    assert list(store.parts) == ["train"] * 3 + ["validation", "test"]
    assert list(store.names)[2:] == ["train/0000002", "val/0000000", "test/0000000"]
    assert [len(getattr(split(store), part)) for part in PARTS] == [3, 1, 1]


def test_colour_and_labels_of_one_dimension(tmp_path: Path) -> None:
    colour = np.arange(36, dtype=np.uint8).reshape(3, 2, 2, 3)
    file = write(tmp_path / "x.npz", (2, 2, 3), train_images=colour, train_labels=np.array([1, 0, 1]))
    store = load(file, DataPart(shape=(3, 2, 2)))
    assert torch.equal(store.x[:3], torch.from_numpy(colour).permute(0, 3, 1, 2))
    assert store.y[:3].tolist() == [1, 0, 1]


def test_images_get_the_jobs_size(tmp_path: Path) -> None:
    assert load(write(tmp_path / "x.npz", (5, 7)), DataPart(shape=(3, 4, 6))).x.shape == (5, 3, 4, 6)


def test_a_number_is_an_alias_a_label_or_else_an_index(tmp_path: Path) -> None:
    file = write(tmp_path / "x.npz")
    assert load(file, **{"0": "pneumonia", "1": "normal"}).y.tolist() == [1, 0, 0, 1, 0]
    assert load(file, labels=("1", "0")).y.tolist() == [1, 0, 0, 1, 0]
    with pytest.raises(DataError, match=r"x\.npz: train_labels\[0\] holds class 0, which stands for none"):
        load(file, labels=("1", "2"))


def test_a_number_beyond_the_jobs_labels(tmp_path: Path) -> None:
    file = write(tmp_path / "x.npz", train_labels=np.array([0, 7, 1]))
    with pytest.raises(
        DataError, match=r"train_labels\[1\] holds class 7, which stands for none of the job's 2 labels"
    ):
        load(file)
    store = load(file, skip=1)
    assert (store.x[:, 0, 0, 0].tolist(), store.y.tolist()) == ([0, 2, 3, 4], [0, 1, 0, 1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"val_images": np.zeros((1, 2, 2), np.float32)}, r"val_images is float32 of shape \(1, 2, 2\)"),
        ({"val_images": np.zeros((1, 2, 2, 4), np.uint8)}, r"uint8 of shape \(1, 2, 2, 4\)"),
        ({"val_images": np.zeros((1, 2, 2, 2, 3), np.uint8)}, r"uint8 of shape \(1, 2, 2, 2, 3\)"),
        ({"val_images": np.zeros((1, 0, 2), np.uint8)}, r"uint8 of shape \(1, 0, 2\)"),
        ({"val_labels": np.zeros((1, 14), np.uint8)}, r"1 images, val_labels is uint8 of shape \(1, 14\)"),
        ({"val_labels": np.zeros(1)}, "val_labels is float64"),
        ({"val_labels": np.zeros(3, np.uint8)}, r"1 images, val_labels is uint8 of shape \(3,\)"),
    ],
)
def test_arrays_of_another_form(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "x.npz", **arrays), skip=99)


class Malice:
    """What would be called on unpickling."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("a pickle was read",))


def test_pickles_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loads(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was read")

    file = write(tmp_path / "x.npz", val_images=np.array([Malice()], dtype=object))
    monkeypatch.setattr(pickle, "load", loads)
    monkeypatch.setattr(pickle, "loads", loads)
    with pytest.raises(DataError, match=r"x\.npz cannot be read: Object arrays cannot be loaded"):
        load(file)


def test_an_archive_that_would_swell_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the size in the archive, and by the one that an array's header claims."""
    file = tmp_path / "x.npz"
    zeros = {"train_images": np.zeros((1000, 64, 64), np.uint8), "train_labels": np.zeros(1000, np.uint8)}
    write(file, **zeros)
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert file.stat().st_size < 10_000
    monkeypatch.setattr(npz, "MAX_BYTES", 2**20)
    with pytest.raises(DataError, match=r"x\.npz unpacks to 0\.0 GiB, the limit is 0\.000976562 GiB"):
        load(file)
    monkeypatch.undo()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            claim = data[:128].replace(b"(1000, 64, 64), }  ", b"(9000000, 64, 64)}  ") + data[128:256]
            archive.writestr(name, claim if name == "train_images.npy" else data)
    with pytest.raises(DataError, match=r"x\.npz unpacks to 34\.3 GiB, the limit is 8 GiB"):
        load(file)


def _no_zip(file: Path) -> None:
    file.write_text("no archive")


def _cut(file: Path) -> None:
    file.write_bytes(write(file).read_bytes()[:-50])


def _rotten(file: Path) -> None:
    data = write(file).read_bytes()
    place = data.index(b"\x93NUMPY") + 130
    file.write_bytes(data[:place] + b"\xff\xff" + data[place + 2 :])


def _lacks_parts(file: Path) -> None:
    np.savez(file, x_train=np.zeros(1), train_images=np.zeros(1))


def _short(file: Path) -> None:
    write(file)
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data[:-2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_no_zip, r"x\.npz cannot be read: File is not a zip file"),
        (_cut, r"x\.npz cannot be read: "),
        (_rotten, r"x\.npz cannot be read: Bad CRC-32"),
        (_short, r"x\.npz cannot be read: "),
        (_lacks_parts, r"x\.npz has no train_labels, val_images, .*It has 'x_train', 'train_images'"),
    ],
)
def test_files_that_are_damaged_or_something_else(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "x.npz")
    for act in (lambda: load(tmp_path), lambda: check(tmp_path, "npz")):
        with pytest.raises(DataError, match=message):
            act()


def test_a_folder_needs_exactly_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has 0 \.npz files"):
        load(tmp_path)
    write(tmp_path / "a.npz")
    write(tmp_path / "b.npz")
    with pytest.raises(DataError, match=r"has 2 \.npz files\. Name the one to read"):
        load(tmp_path)


@pytest.mark.data
def test_pneumonia(real_data: Path) -> None:
    root = real_data / "pneumoniamnist"
    store = load(root, DataPart(shape=(1, 28, 28)))
    parts = split(store)
    assert [len(getattr(parts, part)) for part in PARTS] == [4708, 524, 624]
    with np.load(root / "pneumoniamnist.npz") as arrays:
        assert np.array_equal(store.x[parts.test.rows, 0], arrays["test_images"])
        assert np.array_equal(store.y[parts.validation.rows], arrays["val_labels"][:, 0])
    assert check(root, "npz")["classes"] == {
        "train": {"0": 1214, "1": 3494},
        "validation": {"0": 135, "1": 389},
        "test": {"0": 234, "1": 390},
    }
