"""Whole series in archives: forms, parts, missing numbers, classes, and arrays that are something else."""

from __future__ import annotations

import logging
import math
import pickle
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

DATA = DataPart(shape=(3, 2))
LABELS = ("rest", "walk")
NAN = math.nan
SIZES = {"train": 3, "val": 1, "test": 2}


def load(root: Path, data: DataPart = DATA, target: Any = "class", skip: int = 0, **aliases: str) -> Store:
    return read("series", root, Wanted(data, LABELS, target, aliases, skip))


def series(count: int, *shape: int, start: int = 0) -> np.ndarray:
    """Series i holds start + i throughout."""
    return np.ones((count, *shape)) * np.arange(start, start + count).reshape(-1, *[1] * len(shape))


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def in_parts(path: Path, **arrays: Any) -> Path:
    for part, count in SIZES.items():
        arrays.setdefault(f"{part}_x", series(count, 3, 2))
        arrays.setdefault(f"{part}_y", np.arange(count) % 2)
    return save(path, **arrays)


@pytest.mark.parametrize("give", ["file", "folder"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int16", "uint8"])
def test_numbers_of_any_kind_in_the_files_order(tmp_path: Path, give: str, dtype: str) -> None:
    x = np.arange(24).reshape(4, 3, 2).astype(dtype)
    file = save(tmp_path / "x.npz", x=x, y=np.array([1, 0, 0, 1], np.uint8)[:, None])
    store = load(file if give == "file" else tmp_path)
    assert (store.x.dtype, store.x.tolist()) == (torch.float32, x.tolist())
    assert (store.y.dtype, store.y.tolist()) == (torch.int64, [1, 0, 0, 1])
    assert (list(store.names)[:2], store.parts, store.sites) == (["0000000", "0000001"], (), ())


def test_one_number_a_step_needs_no_last_axis(tmp_path: Path) -> None:
    file = save(tmp_path / "x.npz", x=np.arange(6.0).reshape(2, 3))
    assert load(file, DataPart(shape=(3, 1)), "none").x.tolist() == [[[0], [1], [2]], [[3], [4], [5]]]


def test_the_owners_parts(tmp_path: Path) -> None:
    store = load(in_parts(tmp_path / "x.npz"))
    assert [len(getattr(split(store), part)) for part in PARTS] == [3, 1, 2]
    assert store.y.tolist() == [0, 1, 0, 0, 0, 1]
    assert list(store.names)[2:5] == ["train/0000002", "validation/0000000", "test/0000000"]


def test_a_task_without_target_needs_no_y(tmp_path: Path) -> None:
    file = save(tmp_path / "x.npz", x=series(4, 3, 2))
    assert load(file, target="none").y.tolist() == [0] * 4
    with pytest.raises(DataError, match=r"x\.npz has no y. It has 'x'"):
        load(file)
    parts = {f"{part}_x": series(count, 3, 2) for part, count in SIZES.items()}
    assert len(load(save(tmp_path / "x.npz", **parts), target="none").names) == 6
    with pytest.raises(DataError, match=r"x\.npz has no train_y, val_y, test_y"):
        load(tmp_path)
    del parts["val_x"]
    with pytest.raises(DataError, match=r"x\.npz has no val_x"):
        load(save(tmp_path / "x.npz", **parts), target="none")


def test_blocks_follow_the_files_order(tmp_path: Path) -> None:
    file = save(tmp_path / "x.npz", x=series(20, 3, 2))
    parts = split(load(file, DataPart(shape=(3, 2), parts="blocks"), "none"))
    assert parts.validation.rows.tolist() == [12, 13, 14, 15]


def test_missing_numbers_leave_a_series_out_or_become_the_mean(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    x = series(3, 3, 2)
    x[1, 2, 0] = NAN
    file = save(tmp_path / "x.npz", x=x, y=np.array([0, 1, 1]))
    with caplog.at_level(logging.INFO, "fedzoo.client"):
        store = load(file)
    assert (store.x[:, 0, 0].tolist(), store.y.tolist()) == ([0, 2], [0, 1])
    assert "2 series; 1 that lack a number are left out" in caplog.text
    store = load(file, DataPart(shape=(3, 2), missing="mean", mean=(1, 3), std=(2, 2)))
    assert store.inputs is not None
    assert store.inputs[1].tolist() == [[0, -1], [0, -1], [0, -1]]
    with pytest.raises(DataError, match=r"gives no series. data\.missing = 'mean' keeps those"):
        load(save(tmp_path / "x.npz", x=x[1:2], y=np.array([1])))


@pytest.mark.parametrize("number", [math.inf, -math.inf, 1e39])
def test_a_number_that_float32_cannot_hold(tmp_path: Path, number: float) -> None:
    x = series(3, 3, 2)
    x[1, 2, 0] = number
    file = save(tmp_path / "x.npz", x=x, y=np.array([0, 1, 1]))
    with pytest.raises(DataError, match=r"x\.npz: x\[1\] holds an infinite number"):
        load(file)
    store = load(file, skip=1)
    assert (store.x[:, 0, 0].tolist(), len(store.skipped)) == ([0, 2], 1)


def test_what_a_number_stands_for(tmp_path: Path) -> None:
    file = save(tmp_path / "x.npz", x=series(3, 3, 2), y=np.array([0, 2, 1]))
    with pytest.raises(DataError, match=r"x\.npz: y\[1\] holds class 2, which stands for none of the job's 2 labels"):
        load(file)
    assert load(file, skip=1).y.tolist() == [0, 1]
    assert load(file, **{"0": "walk", "1": "rest", "2": "rest"}).y.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((2, 4, 2))}, r"x holds series of \(T, C\) = \(4, 2\), the job wants \(3, 2\)"),
        ({"x": np.zeros((2, 3))}, r"x holds series of \(T, C\) = \(3, 1\), the job wants \(3, 2\)"),
        ({"x": np.zeros(2)}, r"x is float64 of shape \(2,\)"),
        ({"x": np.zeros((2, 3, 2, 1))}, r"x is float64 of shape \(2, 3, 2, 1\)"),
        ({"x": np.zeros((2, 0, 2))}, r"x is float64 of shape \(2, 0, 2\)"),
        ({"x": np.zeros((2, 3, 2), complex)}, "x is complex128"),
        ({"x": np.zeros((2, 3, 2), bool)}, "x is bool"),
        ({"x": np.array([["a"] * 3] * 2)}, "x is <U1"),
        ({"y": np.zeros(2)}, "x has 2 series, y is float64"),
        ({"y": np.zeros(3, int)}, r"x has 2 series, y is int64 of shape \(3,\)"),
        ({"y": np.zeros((2, 2), int)}, r"x has 2 series, y is int64 of shape \(2, 2\)"),
    ],
)
def test_arrays_of_another_form(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    whole = {"x": np.zeros((2, 3, 2)), "y": np.zeros(2, int), **arrays}
    with pytest.raises(DataError, match=rf"x\.npz: {message}"):
        load(save(tmp_path / "x.npz", **whole), skip=99)


class Malice:
    """What would be called on unpickling."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("a pickle was read",))


def test_pickles_are_refused_unread_and_so_is_what_would_swell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loads(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was read")

    file = save(tmp_path / "x.npz", x=series(2, 3, 2), y=np.array([Malice(), Malice()], dtype=object))
    monkeypatch.setattr(pickle, "load", loads)
    monkeypatch.setattr(pickle, "loads", loads)
    for act in (lambda: load(file), lambda: check(file, "series")):
        with pytest.raises(DataError, match="Object arrays cannot be loaded"):
            act()
    monkeypatch.setattr(npz, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match="the limit is"):
        load(save(tmp_path / "x.npz", x=series(100, 3, 2), y=np.zeros(100, int)))


def test_an_archive_beside_tables_is_read_and_two_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("a\n1\n")
    save(tmp_path / "x.npz", x=series(4, 3, 2))
    assert len(load(tmp_path, target="none").names) == 4
    save(tmp_path / "y.npz", x=series(4, 3, 2))
    with pytest.raises(DataError, match=r"has 2 \.npz files. Name the one to read"):
        load(tmp_path, target="none")


def test_check_counts_series_classes_and_missing_numbers(tmp_path: Path) -> None:
    x = series(3, 3, 2)
    x[0, 0, 0], x[1, 0, 0] = NAN, math.inf
    found = check(in_parts(tmp_path / "x.npz", train_x=x), "series")
    assert found["parts"]["train"] == {"series": 2, "shape": [3, 2], "missing": 1}
    assert found["classes"] == {"train": {"0": 2}, "validation": {"0": 1}, "test": {"0": 1, "1": 1}}
    assert ["train_x[1] holds an infinite number" in line for line in found["unreadable"]] == [True]
    found = check(save(tmp_path / "x.npz", x=series(4, 3)), "series")
    assert (found["parts"], found["classes"]) == ({"all": {"series": 4, "shape": [3, 1], "missing": 0}}, {})
