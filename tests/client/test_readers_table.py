"""Tables: what a cell may hold, which rows are used, sites and parts, and rows that name images."""

from __future__ import annotations

import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from client.readers import check, read
from client.readers.base import PARTS, Store, Wanted
from shared_models.boxes import PADDING
from shared_models.errors import DataError
from shared_models.job_parts import DataPart
from shared_models.tokens import Bytes

LABELS = ("healthy", "sick")
NAN = math.nan


def features(root: Path, *names: str, skip: int = 0, missing: Any = "drop", **aliases: str) -> Store:
    data = DataPart(shape=(len(names),), features=names, target="diagnosis", missing=missing)
    return read("csv", root, Wanted(data, LABELS, aliases=aliases, skip_bad=skip))


def write(path: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path.write_bytes("\n".join(lines).encode(encoding))
    return path


# ---- features --------------------------------------------------------------------------------------------------------
def test_columns_in_the_jobs_order(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "id,weight,diagnosis,age", "x,70.5,sick,40", "y,-1e2,healthy,50")
    store = features(file, "age", "weight")
    assert store.x.tolist() == [[40, 70.5], [50, -100]]
    assert (store.x.dtype, store.y.dtype) == (torch.float32, torch.int64)
    assert store.y.tolist() == [1, 0]
    assert list(store.names) == ["a.csv:0000002", "a.csv:0000003"]
    assert (store.sites, store.parts) == ((), ())


def test_an_indicator_is_one_where_the_cell_says_the_word(tmp_path: Path) -> None:
    """Numbers are compared as numbers; a column whose own name has the sign is that column; missing stays missing."""
    file = write(
        tmp_path / "a.csv", "cp,x=y,diagnosis", "3,7,sick", "3.0,7,sick", "4,7,sick", "three,7,sick", "?,7,sick"
    )
    store = features(file, "cp=3", "cp=three", "x=y", missing="mean")
    assert store.x[:4].tolist() == [[1, 0, 7], [1, 0, 7], [0, 0, 7], [0, 1, 7]]
    assert store.x[4].isnan().tolist() == [True, True, False]


def test_missing_cells_drop_a_row_or_stay_open(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = ["age,weight,diagnosis", "40,70,sick", "?,70,sick", ",70,sick", "NA,70,sick", "NaN , 70,sick", "40,70,?"]
    file = write(tmp_path / "a.csv", *lines)
    with caplog.at_level(logging.INFO, "fedzoo.client"):
        assert features(file, "age", "weight").x.tolist() == [[40, 70]]
    assert "1 rows; 5 that lack a value are left out" in caplog.text
    assert len(features(file, "weight").names) == 5  # a column that is not used may lack values
    store = features(file, "age", "weight", missing="mean", skip=1)
    assert store.x[:, 0].isnan().tolist() == [False, True, True, True, True]
    assert ["line 7 of" in line for line in store.skipped] == [True]  # a class has no mean
    assert torch.equal(store.normalise(store.x)[1:, 0], torch.zeros(4))


def test_a_text_may_say_what_is_missing_for_a_number(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "title,body,label", "?,,x", "NA, nan ,x", "na,said,?")
    data = DataPart(shape=(16,), tokenizer="bytes", text=("title", "body"))
    store = read("csv", file, Wanted(data, (), "none"))
    assert [Bytes().decode(row) for row in store.x.tolist()] == ["?", "NA nan", "na said"]
    with pytest.raises(DataError, match=r"line 4 of .*, column 'label'"):
        read("csv", file, Wanted(data, ("x",), "class"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_delimiters_and_a_byte_order_mark(tmp_path: Path, encoding: str, delimiter: str) -> None:
    rows = [["age", '"a, ""b""; c"', "diagnosis"], ["40", "1.5", '"sick"'], ["", "", ""], ["50", "2.5", "healthy"]]
    file = write(tmp_path / "a.csv", "", *(delimiter.join(row) for row in rows), "", encoding=encoding)
    store = features(file, "age", 'a, "b"; c')
    assert store.x.tolist() == [[40, 1.5], [50, 2.5]]
    assert list(store.names) == ["a.csv:0000003", "a.csv:0000005"]


@pytest.mark.parametrize("cell", ["abc", "1,5", "inf", "-inf", "-nan", "1e39", "1_000", "0x10"])
def test_a_value_that_is_no_number(tmp_path: Path, cell: str) -> None:
    file = write(tmp_path / "a.csv", "age;diagnosis", "40;sick", f"{cell};sick")
    with pytest.raises(DataError, match=r"line 3 of .*a\.csv, column 'age': .* is no number") as caught:
        features(file, "age")
    assert str(caught.value).isprintable()
    store = features(file, "age", skip=1)
    assert (store.x.tolist(), len(store.skipped)) == ([[40]], 1)


def test_a_class_that_the_job_does_not_have(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "age,diagnosis", "40,sick", "50,sicker", "60,0")
    with pytest.raises(DataError, match=r"line 3 of .*a\.csv, column 'diagnosis', stands for 'sicker', which is not a"):
        features(file, "age")
    assert features(file, "age", skip=2).y.tolist() == [1]
    assert features(file, "age", sicker="sick", **{"0": "healthy"}).y.tolist() == [1, 1, 0]


def test_rows_of_another_length(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "age,diagnosis", "40,sick", "50,sick,1", "60", '"7\n0",sick', "80,sick")
    with pytest.raises(DataError, match=r"line 3 of .*a\.csv has 3 cells, the header 2"):
        features(file, "age")
    store = features(file, "age", skip=3)
    assert store.x.tolist() == [[40], [80]]
    assert "line 6 of" in store.skipped[2]  # the cell with a line break ends there


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has no header"),
        (b"age,age,diagnosis\n1,2,sick\n", "has two columns 'age'"),
        (b"Age,diagnosis\n1,sick\n", "has no column 'age'\\. did you mean 'Age'"),
        (b"age,diagnosis\n1,si\x00ck\n", r"is no text: line 2 holds '\\x00'"),
        (b"age,label\n1,sick\n", "has no column 'diagnosis'"),
        (b"age,diagnosis\n1,\xe9\n", "is not UTF-8 at byte 16"),
        ("age,diagnosis\n1,sick\n".encode("utf-16"), "is not UTF-8"),
        (b'age,diagnosis\n1,"sick\n', "is no CSV at line 2"),
        (b"age,diagnosis\n1," + b"x" * 200_000, "is no CSV at line 2: field larger"),
    ],
)
def test_a_file_that_is_no_table_cannot_be_passed_over(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.csv {message}"):
        features(tmp_path, "age", skip=99)


# ---- sites and parts -------------------------------------------------------------------------------------------------
def test_each_of_several_files_is_a_site(tmp_path: Path) -> None:
    write(tmp_path / "processed.ulm.data", "age,diagnosis", "1,sick")
    write(tmp_path / "bonn.csv", "diagnosis,age", "sick,2", "healthy,3")
    write(tmp_path / "notes.txt", "no table")
    write(tmp_path / ".hidden.csv", "no table")
    store = features(tmp_path, "age")
    assert (list(store.sites), store.x.flatten().tolist()) == (["bonn", "bonn", "ulm"], [2, 3, 1])
    (tmp_path / "bonn.csv").unlink()
    assert features(tmp_path, "age").sites == ()


def test_a_site_that_codes_otherwise_says_so(tmp_path: Path) -> None:
    """One of two hospitals counts chest pain from 0 and turns the class round; its words become the shared ones."""
    write(tmp_path / "east.csv", "cp,diagnosis", "4,sick", "1,healthy", "9")
    write(tmp_path / "west.csv", "cp,diagnosis", " 3 ,0", "0,1")
    data = DataPart(shape=(1,), features=("cp",), target="diagnosis")
    west = {"cp": {"3": "4", "0": "1"}, "diagnosis": {"0": "sick", "1": "healthy"}}
    store = read("csv", tmp_path, Wanted(data, LABELS, values={"west": west}, skip_bad=1))
    assert (store.x.flatten().tolist(), store.y.tolist()) == ([4, 1, 4, 1], [1, 0, 1, 0])
    assert list(store.sites) == ["east", "east", "west", "west"]
    assert "has 1 cells, the header 2" in store.skipped[0]
    alone = read("csv", tmp_path / "west.csv", Wanted(data, LABELS, values={"": west}))  # at a node: its own words
    assert (alone.x.flatten().tolist(), alone.y.tolist()) == ([4, 1], [1, 0])


def test_columns_for_site_and_part(tmp_path: Path) -> None:
    lines = ["age,diagnosis,site,part", "1,sick,ulm,test", "2,sick,bonn,valid", "3,sick,ulm,Train", "4,sick,ulm,val"]
    file = write(tmp_path / "a.csv", *lines)
    store = features(file, "age")
    assert store.x.flatten().tolist() == [3, 2, 4, 1]
    assert list(store.parts) == ["train", "validation", "validation", "test"]
    assert list(store.sites) == ["ulm", "bonn", "ulm", "ulm"]
    write(file, *lines, "5,sick,,train", "6,sick,ulm,dev")
    store = features(file, "age", skip=2)
    assert ["has no site" in store.skipped[0], "is of the part 'dev'" in store.skipped[1]] == [True, True]


def test_parts_for_some_files_only(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "age,diagnosis,part", "1,sick,train")
    write(tmp_path / "b.csv", "age,diagnosis", "1,sick")
    with pytest.raises(DataError, match="1 of 2 examples have a part"):
        features(tmp_path, "age")


def test_check_of_features(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "age,target", "1,0", "?,1", "2,1", "1,2,3")
    found = check(tmp_path, "csv")
    assert found["rows"] == 3
    assert found["missing"] == {"age": 1, "target": 0}
    assert found["classes"] == {"all": {"0": 1, "1": 2}}
    assert ["line 5 of" in line for line in found["unreadable"]] == [True]
    write(tmp_path / "b.csv", "age,target", "1,0")
    assert check(tmp_path, "csv")["sites"] == {"a": 3, "b": 1}


# ---- images ----------------------------------------------------------------------------------------------------------
def picture(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (16, 8), value).save(path)


def images(root: Path, target: Any = "class", skip: int = 0, column: str = "label", **aliases: str) -> Store:
    data = DataPart(shape=(1, 8, 16), target=column)
    return read("csv", root, Wanted(data, LABELS, target, aliases, skip))


@pytest.mark.parametrize("column", ["path", "filename"])
@pytest.mark.parametrize("folder", ["", "images", "JPEGImages"])
def test_rows_name_images(tmp_path: Path, column: str, folder: str) -> None:
    for value, name in enumerate(("b.png", "deep/a.png", "c é.png")):
        picture(tmp_path / folder / name, value)
    rows = ["b.png,sick,val", "deep/a.png,healthy,train", "c é.png,sick,test"]
    file = write(tmp_path / "list.csv", f"{column},label,part", *rows)
    store = images(file)
    assert [Path(n).name for n in store.names] == ["a.png", "b.png", "c é.png"]
    assert (store.y.tolist(), store.x[:, 0, 0, 0].tolist()) == ([0, 1, 1], [1, 0, 2])
    assert list(store.parts) == list(PARTS)
    assert images(tmp_path).y.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("../../etc/passwd,sick", "does not lie within its folder"),
        ("/etc/passwd,sick", "does not lie within its folder"),
        ("images/../../x.png,sick", "does not lie within its folder"),
        (r"..\x.png,sick", "does not lie within its folder"),
        (r"C:\x.png,sick", "does not lie within its folder"),
        (",sick", "does not lie within its folder"),
        ("none.png,sick", r"names 'none\.png', which is not in"),
        ("a.png,sick", r"names 'a\.png' again"),
        ("b.png,ill", "stands for 'ill'"),
        ("b.png,", "stands for ''"),
        ("broken.png,sick", r"broken\.png cannot be read"),
    ],
)
def test_rows_that_name_no_image_that_can_be_used(tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "site").mkdir()
    picture(tmp_path / "x.png")
    for name in ("a.png", "b.png"):
        picture(tmp_path / "site" / name)
    (tmp_path / "site" / "broken.png").write_bytes(b"x")
    file = write(tmp_path / "site" / "list.csv", "path,label", "a.png,healthy", row)
    with pytest.raises(DataError, match=message):
        images(file)
    store = images(file, skip=1)
    assert (list(store.names), len(store.skipped)) == (["a.png"], 1)


def test_a_link_out_of_the_folder_is_the_owners_wish(tmp_path: Path) -> None:
    picture(tmp_path / "x.png", 9)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "link.png").symlink_to(tmp_path / "x.png")
    assert images(write(tmp_path / "site" / "list.csv", "path,label", "link.png,sick")).x[0, 0, 0, 0] == 9


HEADER = "filename,kind,xmin,xmax,ymin,ymax"


def test_a_row_for_each_box(tmp_path: Path) -> None:
    """Counted from 0; four empty cells are a negative; the columns stand in any order."""
    for name in "abc":
        picture(tmp_path / "images" / f"{name}.png")
    rows = ["b.png,sick,2,6,1,3", "a.png,healthy,0,16,0,8", "b.png,healthy,8,16,4,8", "c.png,,,,,"]
    file = write(tmp_path / "boxes.csv", HEADER, *rows)
    store = images(file, "boxes", column="kind")
    assert list(store.names) == ["images/a.png", "images/b.png", "images/c.png"]
    empty = [PADDING, 0, 0, 0, 0]
    a, b = [0, 0, 0, 1, 1], [[1, 2 / 16, 1 / 8, 6 / 16, 3 / 8], [0, 0.5, 0.5, 1, 1]]
    assert store.y.tolist() == [[a, empty], b, [empty, empty]]
    single = images(file, "box", column="kind", skip=2)
    assert (single.y.tolist(), len(single.skipped)) == ([a[1:]], 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.png,sick,2,?,1,3", "has a coordinate that is no number"),
        ("a.png,sick,2,x,1,3", "column 'xmax': 'x' is no number"),
        ("a.png,sick,2,18,1,3", "reaches out of its image of 16x8"),
        ("a.png,sick,2,2,1,3", "is empty"),
        ("a.png,ill,2,6,1,3", "stands for 'ill'"),
    ],
)
def test_boxes_that_cannot_be(tmp_path: Path, row: str, message: str) -> None:
    """The whole image is left out: with some of its objects only it would be a lie."""
    picture(tmp_path / "a.png")
    file = write(tmp_path / "boxes.csv", HEADER, "a.png,sick,0,1,0,1", row)
    with pytest.raises(DataError, match=rf"line 3 of .*boxes\.csv.*{message}"):
        images(file, "boxes", column="kind")
    assert len(images(file, "boxes", column="kind", skip=1).names) == 0


def test_the_stated_size_of_an_image(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    file = write(tmp_path / "boxes.csv", HEADER + ",width,height", "a.png,sick,0,8,0,8,16,8")
    assert images(file, "boxes", column="kind").y[0, 0].tolist() == [1, 0, 0, 0.5, 1]
    write(file, HEADER + ",width,height", "a.png,sick,0,8,0,8,640,480")
    with pytest.raises(DataError, match=r"is for an image of 640x480, but .*a\.png has 16x8"):
        images(file, "boxes", column="kind")


def test_one_image_in_two_parts(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    file = write(tmp_path / "boxes.csv", HEADER + ",part", "a.png,sick,0,1,0,1,train", "a.png,sick,2,3,2,3,test")
    with pytest.raises(DataError, match=r"line 3 of .* has another part or site than line 2"):
        images(file, "boxes", column="kind")


def test_check_of_images_opens_each(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    write(tmp_path / "list.csv", "path,label,part", "a.png,sick,train", "b.png,sick,train", "c.png,sick,test")
    found = check(tmp_path / "list.csv", "csv")
    assert (found["rows"], found["classes"]) == (1, {"train": {"sick": 1}})
    assert ["b.png cannot be read" in found["unreadable"][0], "names 'c.png'" in found["unreadable"][1]] == [True] * 2


# ---- real data -------------------------------------------------------------------------------------------------------
@pytest.mark.data
def test_heart_disease_of_four_hospitals(real_data: Path) -> None:
    names = ("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak")
    aliases = {"0": "healthy", **{str(grade): "sick" for grade in range(1, 5)}}
    root = real_data / "heart_disease_uci"
    data = DataPart(shape=(10,), features=names, target="target")
    store = read("csv", root, Wanted(data, LABELS, aliases=aliases))
    assert Counter(store.sites) == {"cleveland": 303, "hungarian": 261, "switzerland": 46, "va": 130}
    assert store.x[0].tolist() == pytest.approx([63, 1, 3, 145, 233, 1, 0, 150, 0, 2.3])
    whole = read("csv", root, Wanted(data.model_copy(update={"missing": "mean"}), LABELS, aliases=aliases))
    assert Counter(whole.sites) == {"cleveland": 303, "hungarian": 294, "switzerland": 123, "va": 200}
    sick = Counter(site for site, y in zip(whole.sites, whole.y.tolist(), strict=True) if y)
    assert sorted(sick.values()) == [106, 115, 149, 165]
    assert check(root, "csv")["rows"] == 920
