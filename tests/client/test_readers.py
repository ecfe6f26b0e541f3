"""Readers: which part and which class index every file gets, and every way a folder can be wrong."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import client.readers
from client.readers import check
from client.readers.base import PARTS, Examples, Store, Wanted, readers
from client.readers.parts import part_of, split
from shared_models.errors import ConfigError, DataError, UnknownNameError
from shared_models.job import Job
from shared_models.job_parts import DataPart
from shared_models.simulation_part import SimulationPart
from simulations.demo import write_hospitals
from simulations.partition import SitePopulation, make_partition

DATA = DataPart(shape=(1, 2, 2))
LABELS = ("cat", "dog", "owl")


def put(folder: Path, *names: str, value: int = 0) -> None:
    """2 x 2 images of one grey value."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("L", (2, 2), value).save(folder / name)


def read(root: Path, labels: Iterable[str] = LABELS, skip_bad: int = 0, **aliases: str) -> Store:
    return client.readers.read("imagefolder", root, Wanted(DATA, tuple(labels), aliases=aliases, skip_bad=skip_bad))


# ---- image folders ---------------------------------------------------------------------------------------------------
def test_classes_are_numbered_by_the_job_not_by_the_folders(tmp_path: Path) -> None:
    """Three sites: all classes, made in another order; two of them; one of them."""
    grey = {"cat": 10, "dog": 20, "owl": 30}
    for site, classes in {"a": ["owl", "cat", "dog"], "b": ["owl", "dog"], "c": ["owl"]}.items():
        for name in classes:
            put(tmp_path / site / name, "1.png", "2.png", value=grey[name])
    labels = ("owl", "cat", "dog")  # not sorted
    for site, expected in {"a": [0, 0, 1, 1, 2, 2], "b": [0, 0, 2, 2], "c": [0, 0]}.items():
        store = read(tmp_path / site, labels)
        assert store.y.tolist() == expected
        assert [grey[labels[i]] for i in expected] == store.x[:, 0, 0, 0].tolist()


def test_the_owners_parts_are_kept(tmp_path: Path) -> None:
    for value, part in enumerate(PARTS, start=1):
        put(tmp_path / part / "dog", "b.png", "a.png", value=value)
        put(tmp_path / part / "cat", "z.png", value=10 * value)
    store = read(tmp_path)
    assert list(store.parts) == ["train"] * 3 + ["validation"] * 3 + ["test"] * 3
    parts = split(store)
    for value, part in enumerate(PARTS, start=1):
        examples: Examples = getattr(parts, part)
        assert examples.y.tolist() == [0, 1, 1]
        assert store.x[examples.rows, 0, 0, 0].tolist() == [10 * value, value, value]


def test_names_tell_every_example_of_a_store_apart(tmp_path: Path) -> None:
    """The same file name in two parts, and in two folders that are mapped to one label."""
    for part in PARTS:
        put(tmp_path / "parts" / part / "cat", "1.png")
    put(tmp_path / "mapped" / "cat", "1.png")
    put(tmp_path / "mapped" / "kitten", "1.png")
    for store in (read(tmp_path / "parts"), read(tmp_path / "mapped", kitten="cat")):
        assert len(set(store.names)) == len(store.names)


def test_local_names_are_mapped_to_the_jobs(tmp_path: Path) -> None:
    put(tmp_path / "Hund", "1.png", value=7)
    put(tmp_path / "cat", "1.png", value=8)
    store = read(tmp_path, Hund="dog")
    assert store.y.tolist() == [0, 1]
    assert store.x[:, 0, 0, 0].tolist() == [8, 7]
    with pytest.raises(DataError, match="stands for 'wolf', which is not a label"):
        read(tmp_path, Hund="wolf")


def test_a_folder_that_is_no_label_gets_the_nearest(tmp_path: Path) -> None:
    put(tmp_path / "dogs", "1.png")
    with pytest.raises(DataError, match=r"dogs stands for 'dogs', which is not .*client\.toml; did you mean 'dog'\?"):
        read(tmp_path)


def test_what_is_hidden_or_no_image_is_passed_over(tmp_path: Path) -> None:
    put(tmp_path / "cat", "1.PNG", ".hidden.png")
    put(tmp_path / ".thumbnails", "1.png")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / "deeper.png").mkdir()
    (tmp_path / "readme.png").write_text("not in a class folder")
    store = read(tmp_path)
    assert list(store.names) == ["cat/1.PNG"]


def test_an_empty_class_folder_is_no_error(tmp_path: Path) -> None:
    put(tmp_path / "cat", "1.png")
    (tmp_path / "dog").mkdir()
    assert read(tmp_path).y.tolist() == [0]


def test_names_beyond_ascii(tmp_path: Path) -> None:
    """Also one that is not even valid UTF-8, as old disks have them."""
    put(tmp_path / "Mélanome", "Schrödinger 猫.png", value=1)
    odd = os.fsdecode(b"caf\xe9.png")
    (tmp_path / "plain.png").write_bytes((tmp_path / "Mélanome" / "Schrödinger 猫.png").read_bytes())
    (tmp_path / "plain.png").rename(tmp_path / "Mélanome" / odd)
    store = read(tmp_path, ["Mélanome"])
    assert list(store.names) == ["Mélanome/Schrödinger 猫.png", f"Mélanome/{odd}"]
    assert all(part_of(name) in PARTS for name in store.names)


@pytest.mark.parametrize(("job", "disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_one_word_in_two_unicode_spellings(tmp_path: Path, job: str, disk: str) -> None:
    """A Mac writes é as two code points; the job's author may not have."""
    put(tmp_path / unicodedata.normalize(disk, "Mélanome"), "1.png")
    assert read(tmp_path, [unicodedata.normalize(job, "Mélanome")]).y.tolist() == [0]


def _nothing(root: Path) -> None:
    """The folder is not there."""


def _no_class(root: Path) -> None:
    root.mkdir()
    put(root, "1.png")


def _no_image(root: Path) -> None:
    (root / "cat").mkdir(parents=True)


def _two_parts(root: Path) -> None:
    put(root / "train" / "cat", "1.png")
    put(root / "test" / "cat", "1.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_nothing, r"site does not exist"),
        (_no_class, r"site has no class folder"),
        (_no_image, r"no image below .*site"),
        (_two_parts, r"site has train, test but not validation"),
    ],
)
def test_a_wrong_root_is_explained(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "site")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "site")


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a share whose rights were changed; root may list everything, hence the injected fault."""
    put(tmp_path / "cat", "1.png")
    listed = Path.iterdir
    for closed in (tmp_path, tmp_path / "cat"):

        def iterdir(self: Path, closed: Path = closed) -> object:
            if self == closed:
                raise PermissionError(13, "Permission denied", str(self))
            return listed(self)

        monkeypatch.setattr(Path, "iterdir", iterdir)
        for act in (lambda: read(tmp_path), lambda: check(tmp_path, "imagefolder")):
            with pytest.raises(DataError, match=rf"{closed} cannot be listed: Permission denied"):
                act()


def test_an_unreadable_image_stops_the_reading(tmp_path: Path) -> None:
    put(tmp_path / "cat", "1.png")
    (tmp_path / "cat" / "2.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"cat/2\.png cannot be read"):
        read(tmp_path)


def test_a_few_unreadable_images_may_be_passed_over(tmp_path: Path) -> None:
    for label, value in {"cat": 1, "dog": 2}.items():
        put(tmp_path / label, "1.png", "2.png", "3.png", value=value)
    (tmp_path / "cat" / "1.png").write_bytes(b"")
    (tmp_path / "dog" / "3.png").write_text("no image")
    store = read(tmp_path, skip_bad=2)
    assert list(store.names) == ["cat/2.png", "cat/3.png", "dog/1.png", "dog/2.png"]
    assert store.y.tolist() == [0, 0, 1, 1]
    assert store.x[:, 0, 0, 0].tolist() == [1, 1, 2, 2]
    assert [line.split(" cannot")[0] for line in store.skipped] == [
        f"image {tmp_path}/cat/1.png",
        f"image {tmp_path}/dog/3.png",
    ]
    with pytest.raises(DataError, match=r"2 files or rows cannot be used and 1 may be skipped; the last: .*dog/3\.png"):
        read(tmp_path, skip_bad=1)


def test_other_words_for_the_validation_part(tmp_path: Path) -> None:
    for value, part in enumerate(("train", "val", "test")):
        put(tmp_path / "a" / part / "cat", "1.png", value=value)
    store = read(tmp_path / "a")
    assert (list(store.parts), store.x[:, 0, 0, 0].tolist()) == (["train", "validation", "test"], [0, 1, 2])
    put(tmp_path / "a" / "valid" / "cat", "1.png")
    with pytest.raises(DataError, match="has both val and valid"):
        read(tmp_path / "a")


def test_links_out_of_the_folder_are_the_owners_wish(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "1.png", value=3)
    put(tmp_path / "site" / "dog", "1.png", value=4)
    (tmp_path / "site" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "site" / "dog" / "2.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    store = read(tmp_path / "site")
    assert (list(store.names), store.x[:, 0, 0, 0].tolist()) == (["cat/1.png", "dog/1.png", "dog/2.png"], [3, 4, 3])


def test_a_message_is_one_printable_line_whatever_the_file_is_called(tmp_path: Path) -> None:
    put(tmp_path / "cat", "1.png")
    (tmp_path / "cat" / os.fsdecode(b"a\nb\xe9.png")).write_bytes(b"")
    with pytest.raises(DataError, match=r"cat/a\\nb\\udce9\.png cannot be read") as caught:
        read(tmp_path)
    assert str(caught.value).isprintable()


def test_added_samples_move_no_old_one(tmp_path: Path) -> None:
    put(tmp_path / "cat", *(f"{i}.png" for i in range(40)))

    def members() -> dict[str, set[str]]:
        store = read(tmp_path)
        parts = split(store)
        return {p: {store.names[r] for r in getattr(parts, p).rows.tolist()} for p in PARTS}

    before = members()
    put(tmp_path / "cat", *(f"added-{i}.png" for i in range(40)))
    put(tmp_path / "owl", "0.png", "1.png")
    after = members()
    old = set().union(*before.values())
    assert sum(len(names) for names in after.values()) == 82
    assert {p: names & old for p, names in after.items()} == before


# ---- the one way in --------------------------------------------------------------------------------------------------
def test_a_reader_that_cannot_give_what_the_task_wants(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reader 'imagefolder' gives classes, the task wants masks\. .*them: masks$"):
        client.readers.read("imagefolder", tmp_path, Wanted(DATA, LABELS, "mask"))
    with pytest.raises(ConfigError, match=r"'masks' gives masks, the task wants boxes\. .*them: coco, csv, voc, yolo$"):
        client.readers.read("masks", tmp_path, Wanted(DATA, LABELS, "boxes"))
    with pytest.raises(ConfigError, match=r"'voc' gives boxes or one box an image, the task wants classes"):
        client.readers.read("voc", tmp_path, Wanted(DATA, LABELS, "class"))
    with pytest.raises(UnknownNameError, match=r"unknown reader 'vox'; did you mean 'voc'\?|vox.*did you mean 'voc'"):
        client.readers.read("vox", tmp_path, Wanted(DATA, LABELS))


@pytest.mark.parametrize("name", [name for name in readers if readers[name].needs_root])
def test_data_that_are_not_there(tmp_path: Path, name: str) -> None:
    wanted = Wanted(DATA, LABELS, readers[name].targets[0])
    for act in (lambda: client.readers.read(name, tmp_path / "x", wanted), lambda: check(tmp_path / "x", name)):
        with pytest.raises(DataError, match=r"/x does not exist"):
            act()


@pytest.mark.parametrize("name", [name for name in readers if readers[name].needs_root and name != "text"])
def test_a_folder_of_something_else_is_one_line(tmp_path: Path, name: str) -> None:
    forms = {
        "series": DataPart(shape=(4, 1), features=("a",)), "parallel": DataPart(shape=(8,), tokenizer="bytes"),
        "captions": DataPart(shape=(1, 4, 4), tokenizer="bytes"),
    }  # fmt: skip
    (tmp_path / "letter.txt").write_text("Dear colleague")
    with pytest.raises(DataError) as caught:
        client.readers.read(name, tmp_path, Wanted(forms.get(name, DATA), LABELS, readers[name].targets[0]))
    assert str(tmp_path) in str(caught.value)
    assert str(caught.value).isprintable()


def test_images_are_not_read_as_features(tmp_path: Path) -> None:
    put(tmp_path / "cat", "1.png")
    features = DataPart(shape=(2,), features=("age", "sex"))
    with pytest.raises(ConfigError, match=r"shape = \[2\] is that of a table"):
        client.readers.read("imagefolder", tmp_path, Wanted(features, LABELS))


# ---- the check before any job ----------------------------------------------------------------------------------------
def test_check_counts_and_lists_every_unreadable_file(tmp_path: Path) -> None:
    for part in PARTS:
        put(tmp_path / part / "cat", "1.png", "2.png")
        put(tmp_path / part / "dog", "1.png")
    (tmp_path / "train" / "cat" / "2.png").write_bytes(b"")
    (tmp_path / "test" / "dog" / "1.png").write_text("text")
    found = check(tmp_path, "imagefolder")
    assert found["images"] == 7
    assert found["classes"] == {
        "train": {"cat": 1, "dog": 1},
        "validation": {"cat": 2, "dog": 1},
        "test": {"cat": 2, "dog": 0},
    }
    assert len(found["unreadable"]) == 2
    assert "train/cat/2.png" in found["unreadable"][0]
    assert "test/dog/1.png" in found["unreadable"][1]


def test_check_without_parts(tmp_path: Path) -> None:
    put(tmp_path / "cat", "1.png")
    assert check(tmp_path, "imagefolder") == {"images": 1, "classes": {"all": {"cat": 1}}, "unreadable": []}
    with pytest.raises(DataError, match="does not exist"):
        check(tmp_path / "x", "imagefolder")
    with pytest.raises(UnknownNameError, match="did you mean 'imagefolder'"):
        check(tmp_path, "imagefoldr")


# ---- digits ----------------------------------------------------------------------------------------------------------
def test_digits_are_scikit_learns(make_job: Callable[..., Job]) -> None:
    job = make_job()
    store = readers["digits"]().read(Path(), Wanted.by(job))
    bunch = load_digits()
    order = [int(name.removesuffix(".png")) for name in store.names]
    assert sorted(order) == list(range(1797))
    assert store.y.tolist() == bunch.target[order].tolist() == sorted(bunch.target)
    assert torch.equal(store.x[:, 0], torch.from_numpy(np.rint(bunch.images[order] * 255 / 16)).to(torch.uint8))


def test_digits_under_the_jobs_own_names() -> None:
    words = ["nine", "eight", "seven", "six", "five", "four", "three", "two", "one", "zero"]
    mapping = {str(d): words[9 - d] for d in range(10)}
    store = readers["digits"]().read(Path(), Wanted(DataPart(shape=(1, 8, 8)), tuple(words), aliases=mapping))
    assert torch.bincount(store.y).tolist() == np.bincount(load_digits().target)[::-1].tolist()
    with pytest.raises(DataError, match="digit 0 stands for '0', which is not a label"):
        readers["digits"]().read(Path(), Wanted(DataPart(shape=(1, 8, 8)), tuple(words)))


def test_digits_are_counted_by_check(tmp_path: Path) -> None:
    found = check(tmp_path, "digits")
    assert found["images"] == 1797
    assert list(found["classes"]["all"].values()) == np.bincount(load_digits().target).tolist()


def test_digits_without_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"fedzoo\[simulations\]"):
        readers["digits"]().read(tmp_path, Wanted(DATA, tuple(map(str, range(10)))))
    with pytest.raises(DataError, match=r"fedzoo\[simulations\]"):
        check(tmp_path, "digits")


def test_a_hospitals_folder_is_its_simulated_site_bit_for_bit(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    """Pool -> partition -> PNG folders -> reader: the same bytes and labels in the same order, part by part."""
    job = make_job()
    pool = readers["digits"]().read(Path(), Wanted.by(job))
    part = SimulationPart(partition="dirichlet", alpha=0.3, sites=3, seed=0)
    sites = SitePopulation(pool, make_partition(pool, part))
    counts = write_hospitals(sites, tmp_path)
    assert sum(counts.values()) == 1797
    for site in sites.names:
        simulated = sites.splits(site)
        on_disk = split(readers["imagefolder"]().read(tmp_path / site, Wanted.by(job)))
        for name in PARTS:
            ours, theirs = getattr(simulated, name), getattr(on_disk, name)
            rows = torch.arange(len(ours))
            assert torch.equal(ours.batch(rows).x, theirs.batch(rows).x)
            assert torch.equal(ours.y, theirs.y)
