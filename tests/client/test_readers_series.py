"""Series in tables: windows as cut by hand, order in time, sites, parts that share no step, and rows that are bad."""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from client.readers import check, read
from client.readers.base import PARTS, Store, Wanted
from client.readers.parts import split
from client.readers.windows import in_time
from shared_models.errors import ConfigError, DataError
from shared_models.job_parts import DataPart
from shared_models.normalisation import channel_sums
from shared_models.simulation_part import SimulationPart
from simulations.partition import SitePopulation, make_partition

LABELS = ("rest", "walk")


def data(length: int, *names: str, **keys: Any) -> DataPart:
    return DataPart.model_validate({"shape": (length, len(names)), "features": names, "target": "activity", **keys})


def load(root: Path, part: DataPart, target: Any = "none", skip: int = 0, **aliases: str) -> Store:
    return read("series", root, Wanted(part, LABELS, target, aliases, skip))


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def count_up(path: Path, steps: int, start: int = 0) -> Path:
    """A column `a` that holds start, start + 1, ..."""
    return write(path, "a", *(str(start + i) for i in range(steps)))


def firsts(store: Store) -> list[float]:
    """The first number of each window."""
    return store.x[:, 0, 0].tolist()


# ---- windows ---------------------------------------------------------------------------------------------------------
def test_windows_by_hand(tmp_path: Path) -> None:
    """Seven rows make two windows of three; the columns stand in the job's order, the last row is left over."""
    file = write(tmp_path / "a.csv", "b,x,a", "10,?,1", "20,?,2", "30,?,3", "40,?,4", "50,?,5", "60,?,6", "70,?,7")
    store = load(file, data(3, "a", "b"))
    assert store.x.tolist() == [[[1, 10], [2, 20], [3, 30]], [[4, 40], [5, 50], [6, 60]]]
    assert (store.x.dtype, store.y.tolist()) == (torch.float32, [0, 0])
    assert list(store.names) == ["a.csv:0000002", "a.csv:0000005"]
    assert (store.parts, store.sites, store.skipped) == ((), (), [])


@pytest.mark.parametrize(
    ("stride", "expected"), [(0, [0, 3, 6]), (1, list(range(8))), (2, [0, 2, 4, 6]), (3, [0, 3, 6]), (4, [0, 4])]
)
def test_a_window_begins_every_stride_rows(tmp_path: Path, stride: int, expected: list[int]) -> None:
    """Ten rows, windows of three."""
    part = data(3, "a").model_copy(update={"stride": stride})  # no job may say so without blocks
    store = load(count_up(tmp_path / "a.csv", 10), part)
    assert store.x[..., 0].tolist() == [[i, i + 1, i + 2] for i in expected]


def test_indicators_are_numbers_of_a_step(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "a,wind", "1,north", "2,south")
    assert load(file, data(2, "a", "wind=south")).x.tolist() == [[[1, 0], [2, 1]]]


def test_windows_never_cross_files_or_sites(tmp_path: Path) -> None:
    """Five rows give one window of three each; sites within a file may take turns."""
    count_up(tmp_path / "bonn.csv", 5)
    count_up(tmp_path / "ulm.csv", 5, start=100)
    store = load(tmp_path, data(3, "a"))
    assert (firsts(store), list(store.sites)) == ([0, 100], ["bonn", "ulm"])
    rows = [f"{step + 100 * (site == 'ulm')},{site}" for step in range(4) for site in ("ulm", "bonn")]
    file = write(tmp_path / "ulm.csv", "a,site", *rows)
    store = load(file, data(2, "a"))
    assert store.x[..., 0].tolist() == [[100, 101], [102, 103], [0, 1], [2, 3]]
    assert list(store.sites) == ["ulm", "ulm", "bonn", "bonn"]
    assert len(set(store.names)) == 4


def test_missing_numbers_leave_a_window_out_or_become_the_mean(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "a.csv", "a,b", "1,1", "2,?", "3,3", "4,4", ",5", "6,6")
    with caplog.at_level(logging.INFO, "fedzoo.client"):
        assert firsts(load(file, data(2, "a", "b"))) == [3]
    assert "1 windows; left out: 2 that lack a number" in caplog.text
    store = load(file, data(2, "a", "b", missing="mean", mean=[1, 2], std=[2, 4]))
    assert firsts(store)[:2] == [1, 3]
    assert store.inputs is not None
    assert store.inputs[0].tolist() == [[0, -0.25], [0.5, 0]]
    assert channel_sums(store.x, store.unit)["count"].tolist() == [5, 5]


def test_a_window_has_one_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ["rest", "rest", "rest", "walk", "walk", "walk", "", "walk", "Walk", "walk"]
    file = write(tmp_path / "a.csv", "a,activity", *(f"{i},{word}" for i, word in enumerate(words)))
    with caplog.at_level(logging.INFO, "fedzoo.client"):
        store = load(file, data(2, "a"), "class", Walk="walk")
    assert (firsts(store), store.y.tolist()) == ([0, 4, 8], [0, 1, 1])
    assert "3 windows; left out: 2 of two classes or parts, or of no class" in caplog.text
    with pytest.raises(DataError, match=r"line 10 of .*a\.csv, column 'activity', stands for 'Walk', which is not a"):
        load(file, data(2, "a"), "class")
    assert firsts(load(file, data(2, "a"), "class", skip=1)) == [0, 4]
    assert len(load(file, data(2, "a")).names) == 5  # a task without a target does not read it


# ---- time ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "times",
    [
        ("0", "0.5", "1e3"), ("-2", "-1", "0"), ("2024-01-01", "2024-01-02", "2024-02-01"),
        ("2024-05-31 18:00", "2024-05-31 18:00:00.5", "2024-05-31T19:00"),
        ("2024-10-27T02:30+02:00", "2024-10-27T02:30+01:00", "2024-10-27T02:00Z"),
    ],
)  # fmt: skip
def test_time_runs_as_the_rows_lie(tmp_path: Path, times: tuple[str, ...]) -> None:
    assert firsts(load(write(tmp_path / "a.csv", "a,time", *(f"1,{t}" for t in times)), data(3, "a"))) == [1]
    for turned in (times[::-1], (times[0], times[0], times[2])):
        file = write(tmp_path / "a.csv", "a,time", *(f"1,{t}" for t in turned))
        with pytest.raises(DataError, match=r"line 3 of .*a\.csv, column 'time': .* is not later than the row before"):
            load(file, data(3, "a"))


@pytest.mark.parametrize("time", ["", "noon", "inf", "31.05.2024", "2024-13-01", "?"])
def test_a_time_that_is_none(tmp_path: Path, time: str) -> None:
    file = write(tmp_path / "a.csv", "a,time", "1,0", f"2,{time}")
    with pytest.raises(DataError, match=r"line 3 of .*a\.csv, column 'time': .* is neither a number nor a date"):
        load(file, data(2, "a"))


def test_each_site_has_a_time_of_its_own(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "a,time,site", "1,8,ulm", "2,1,bonn", "3,9,ulm", "4,2,bonn")
    assert load(file, data(2, "a")).x[..., 0].tolist() == [[1, 3], [2, 4]]


# ---- rows that are no good -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x,4", "column 'a': 'x' is no number"),
        ("inf,4", "column 'a': 'inf' is no number"),
        ("4", "has 1 cells, the header 2"),
        ("4,3", "is not later than the row before"),
    ],
)
def test_a_bad_row_is_a_gap_that_no_window_reaches_over(tmp_path: Path, row: str, message: str) -> None:
    """What lies behind it stays on the grid: passing a row over must not make neighbours of strangers."""
    rows = [f"{i},{i}" for i in range(9)]
    file = write(tmp_path / "a.csv", "a,time", *rows[:4], row, *rows[5:])
    with pytest.raises(DataError, match=rf"line 6 of .*a\.csv.*{message}"):
        load(file, data(3, "a"))
    store = load(file, data(3, "a"), skip=1)
    assert store.x[..., 0].tolist() == [[0, 1, 2], [6, 7, 8]]
    assert ["line 6 of" in line for line in store.skipped] == [True]
    write(file, "a,time", *rows[:4], row, "y,5", *rows[6:])
    with pytest.raises(DataError, match="2 files or rows cannot be used and 1 may be skipped"):
        load(file, data(3, "a"), skip=1)


def test_a_row_of_unknown_site_is_a_gap_in_all(tmp_path: Path) -> None:
    rows = ["0,ulm", "0,bonn", "1,ulm", "1,bonn", "2", "3,ulm", "2,bonn", "4,ulm", "3,bonn", "5,ulm", "6,ulm"]
    store = load(write(tmp_path / "a.csv", "a,site", *rows), data(2, "a"), skip=1)
    assert store.x[..., 0].tolist() == [[0, 1], [4, 5], [0, 1]]


@pytest.mark.parametrize(
    ("lines", "keys", "message"),
    [
        (["b", "1"], {}, "has no column 'a'"),
        (["a", "1", "2"], {}, r"gives no window of 3 steps, its longest series has 2; left out: none"),
        (["a", "1", "?", "3"], {}, "its longest series has 3; left out: 1 that lack a number"),
        (["a,part", "1,train", "2,train", "3,test"], {}, "left out: 1 of two classes or parts"),
        (["a,part", "1,dev"], {}, "is of the part 'dev'"),
    ],
)
def test_files_that_give_nothing(tmp_path: Path, lines: list[str], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "a.csv", *lines), data(3, "a", **keys))


def test_jobs_that_these_data_do_not_fit(tmp_path: Path) -> None:
    file = count_up(tmp_path / "a.csv", 9)
    with pytest.raises(ConfigError, match=r"these data are series, and \[data\] describes features of shape \[1\]"):
        load(file, DataPart(shape=(1,), features=("a",)))
    with pytest.raises(ConfigError, match=r"data\.features names no column"):
        load(file, DataPart(shape=(3, 1)))
    with pytest.raises(ConfigError, match="reader 'series' gives classes, the task wants masks"):
        load(file, data(3, "a"), "mask")
    for keys, message in (({"shape": (1,)}, "stride belongs to a series"), ({}, "windows of 3 steps, one every 2")):
        with pytest.raises(ValueError, match=message):
            data(3, "a", stride=2, **keys)


# ---- parts -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("length", "stride"), [(3, 0), (3, 1), (3, 2), (3, 5), (8, 1), (1, 1)])
def test_blocks_share_no_step_and_leave_out_only_what_they_must(tmp_path: Path, length: int, stride: int) -> None:
    for name, steps in (("a.csv", 200), ("b.csv", 75)):
        count_up(tmp_path / name, steps, start=1000 * (name == "b.csv"))
    store = load(tmp_path, data(length, "a", stride=stride, parts="blocks"))
    for site in ("a", "b"):
        of = [i for i, s in enumerate(store.sites) if s == site]
        parts = split(store, torch.tensor(of))
        steps = [set(store.x[getattr(parts, part).rows].flatten().tolist()) for part in PARTS]
        for before, after in itertools.pairwise(steps):
            assert max(before) < min(after)
        every = stride or length
        windows = range(0, (200 if site == "a" else 75) - length + 1, every)
        overlapping = math.ceil(length / every) - 1  # windows that begin within one
        assert len(windows) - len(of) == 2 * overlapping
        assert len(parts.train) == math.ceil(0.6 * len(windows)) - overlapping


def test_without_overlap_blocks_are_those_of_every_reader(tmp_path: Path) -> None:
    store = load(count_up(tmp_path / "a.csv", 120), data(3, "a", parts="blocks"))
    plain = split(replace(store, parts=()))
    assert all(torch.equal(getattr(split(store), part).rows, getattr(plain, part).rows) for part in PARTS)


def test_windows_at_a_cut_by_hand() -> None:
    """Ten windows of three steps, one every step: 6 and 8 begin the next parts, and 4, 5 and 6, 7 reach into them."""
    names = in_time(range(10), 3)
    assert names == ["train"] * 4 + [""] * 2 + [""] * 2 + ["test"] * 2
    assert in_time(range(0, 30, 3), 3) == ["train"] * 6 + ["validation"] * 2 + ["test"] * 2
    assert in_time([0, 3, 9, 12, 15], 5) == ["train", "train", "", "", "test"]
    assert in_time([], 3) == []


def test_the_owners_parts_win_and_no_window_crosses_them(tmp_path: Path) -> None:
    words = ["train"] * 5 + ["val"] * 3 + ["test"] * 4
    file = write(tmp_path / "a.csv", "a,part", *(f"{i},{word}" for i, word in enumerate(words)))
    store = load(file, data(2, "a", parts="blocks"))
    assert (firsts(store), list(store.parts)) == ([0, 2, 6, 8, 10], ["train", "train", "validation", "test", "test"])


def test_sites_of_a_simulation_are_cut_in_time_each(tmp_path: Path) -> None:
    for name in ("bonn", "ulm"):
        count_up(tmp_path / f"{name}.csv", 60)
    store = load(tmp_path, data(2, "a", stride=1, parts="blocks"))
    sites = SitePopulation(store, make_partition(store, SimulationPart(partition="column")))
    assert sites.sizes() == {s: {"train": 35, "validation": 11, "test": 11} for s in ("bonn", "ulm")}
    mixed = SitePopulation(store, make_partition(store, SimulationPart(partition="iid", sites=3))).pooled()
    assert float(store.x[mixed.train.rows].max()) < float(store.x[mixed.validation.rows].min())


# ---- check -----------------------------------------------------------------------------------------------------------
def test_check_counts_steps_and_finds_bad_rows(tmp_path: Path) -> None:
    lines = ["a,class,site,time", "1,rest,ulm,1", "?,walk,bonn,1", "3,,ulm,2", "4,rest,ulm,2", "5,rest,ulm"]
    write(tmp_path / "a.csv", *lines)
    found = check(tmp_path, "series")
    assert found["steps"] == {"a.csv, site ulm": 2, "a.csv, site bonn": 1}
    assert found["classes"] == {"all": {"rest": 1, "walk": 1}}
    assert found["missing"] == {"a": 1, "class": 1, "site": 0, "time": 0}
    assert ["line 5 of" in found["unreadable"][0], "line 6 of" in found["unreadable"][1]] == [True, True]
