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

from client.readers import check
from client.readers.base import PARTS, Examples, Store, part_of, readers, split
from shared_models.errors import DataError, UnknownNameError
from shared_models.job import DataPart, Job, SimulationPart
from simulations.demo import write_hospitals
from simulations.partition import SitePopulation, make_partition

DATA = DataPart(shape=(1, 2, 2))
LABELS = ("cat", "dog", "owl")


def put(folder: Path, *names: str, value: int = 0) -> None:
    """2 x 2 images of one grey value."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("L", (2, 2), value).save(folder / name)


def read(root: Path, labels: Iterable[str] = LABELS, **mapping: str) -> Store:
    return readers["imagefolder"]().read(root, DATA, tuple(labels), mapping)


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
        assert store.labels.tolist() == expected
        assert [grey[labels[i]] for i in expected] == store.images[:, 0, 0, 0].tolist()


def test_the_owners_parts_are_kept(tmp_path: Path) -> None:
    for value, part in enumerate(PARTS, start=1):
        put(tmp_path / part / "dog", "b.png", "a.png", value=value)
        put(tmp_path / part / "cat", "z.png", value=10 * value)
    store = read(tmp_path)
    assert list(store.parts) == ["train"] * 3 + ["validation"] * 3 + ["test"] * 3
    parts = split(store)
    for value, part in enumerate(PARTS, start=1):
        examples: Examples = getattr(parts, part)
        assert examples.labels.tolist() == [0, 1, 1]
        assert store.images[examples.rows, 0, 0, 0].tolist() == [10 * value, value, value]


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
    assert store.labels.tolist() == [0, 1]
    assert store.images[:, 0, 0, 0].tolist() == [8, 7]
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
    assert read(tmp_path).labels.tolist() == [0]


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
    assert read(tmp_path, [unicodedata.normalize(job, "Mélanome")]).labels.tolist() == [0]


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


# ---- the check before any job ----------------------------------------------------------------------------------------
def test_check_counts_and_lists_every_unreadable_file(tmp_path: Path) -> None:
    for part in PARTS:
        put(tmp_path / part / "cat", "1.png", "2.png")
        put(tmp_path / part / "dog", "1.png")
    (tmp_path / "train" / "cat" / "2.png").write_bytes(b"")
    (tmp_path / "test" / "dog" / "1.png").write_text("text")
    found = check(tmp_path, "imagefolder")
    assert found["images"] == 9
    assert found["classes"] == {part: {"cat": 2, "dog": 1} for part in PARTS}
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


# ---- parts by name ---------------------------------------------------------------------------------------------------
def _store(names: list[str]) -> Store:
    count = len(names)
    return Store(torch.zeros(count, 1, 2, 2, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64), names, DATA)


def test_sixty_twenty_twenty() -> None:
    """Binomial: 10,000 names, 4.9 standard deviations (24 of 6000, 20 of 2000) either side."""
    counts = dict.fromkeys(PARTS, 0)
    for i in range(10_000):
        counts[part_of(f"image-{i}.png")] += 1
    assert counts["train"] == pytest.approx(10_000 * 154 / 256, abs=240)
    assert counts["validation"] == pytest.approx(10_000 * 51 / 256, abs=200)
    assert counts["test"] == pytest.approx(10_000 * 51 / 256, abs=200)


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


def test_the_parts_of_known_names() -> None:
    """First byte of SHA-256: below 153.6 train, below 204.8 validation, else test. Pinned for ever."""
    assert [part_of(f"cat/{i}.png") for i in range(6)] == ["train", "train", "train", "train", "test", "train"]


def test_an_empty_part_is_an_error() -> None:
    lonely = next(f"{i}" for i in range(99) if part_of(f"{i}") == "train")
    with pytest.raises(DataError, match="no example for the validation part among 1"):
        split(_store([lonely]))


# ---- batches ---------------------------------------------------------------------------------------------------------
def test_normalisation_is_the_documented_formula() -> None:
    """All 256 byte values, per channel, against float64."""
    data = DataPart(shape=(3, 1, 256), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    images = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 1, 1)
    store = Store(images, torch.tensor([4, 2]), ["a", "b"], data)
    batch = Examples(store, torch.tensor([1, 0])).batch(torch.tensor([1, 0]))
    assert batch.x.dtype == torch.float32
    assert batch.y.tolist() == [4, 2]
    mean, std = np.reshape(data.mean, (3, 1, 1)), np.reshape(data.std, (3, 1, 1))
    exact = (np.arange(256.0).reshape(1, 1, 256) / 255 - mean) / std
    assert np.abs(batch.x[0].numpy() - exact).max() < 1e-6
    assert images.max() == 255  # the stored bytes are untouched


def test_one_mean_serves_all_channels() -> None:
    store = Store(torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 1, 2).repeat(1, 3, 1, 1), torch.tensor([0]),
                  ["a"], DataPart(shape=(3, 1, 2)))  # fmt: skip
    assert Examples(store, torch.tensor([0])).batch(torch.tensor([0])).x.tolist() == [[[[-1.0, 1.0]]] * 3]


def test_one_task_of_a_stream_keeps_the_order() -> None:
    store = Store(torch.zeros(6, 1, 2, 2, dtype=torch.uint8), torch.tensor([2, 0, 1, 2, 0, 1]), list("abcdef"), DATA)
    examples = Examples(store, torch.tensor([5, 4, 3, 2, 1, 0]))
    assert examples.of_classes([0, 2]).rows.tolist() == [4, 3, 1, 0]
    assert examples.of_classes([0, 2]).labels.tolist() == [0, 2, 0, 2]
    assert len(examples.of_classes([3])) == 0
    assert (examples.nbytes, examples.of_classes([3]).nbytes) == (24, 0)


# ---- digits ----------------------------------------------------------------------------------------------------------
def test_digits_are_scikit_learns(make_job: Callable[..., Job]) -> None:
    job = make_job()
    store = readers["digits"]().read(Path(), job.data, job.task.labels, {})
    bunch = load_digits()
    order = [int(name.removesuffix(".png")) for name in store.names]
    assert sorted(order) == list(range(1797))
    assert store.labels.tolist() == bunch.target[order].tolist() == sorted(bunch.target)
    assert torch.equal(store.images[:, 0], torch.from_numpy(np.rint(bunch.images[order] * 255 / 16)).to(torch.uint8))


def test_digits_under_the_jobs_own_names() -> None:
    words = ["nine", "eight", "seven", "six", "five", "four", "three", "two", "one", "zero"]
    mapping = {str(d): words[9 - d] for d in range(10)}
    store = readers["digits"]().read(Path(), DataPart(shape=(1, 8, 8)), words, mapping)
    assert torch.bincount(store.labels).tolist() == np.bincount(load_digits().target)[::-1].tolist()
    with pytest.raises(DataError, match="digit '0' is not a label"):
        readers["digits"]().read(Path(), DataPart(shape=(1, 8, 8)), words, {})


def test_digits_are_counted_by_check(tmp_path: Path) -> None:
    found = check(tmp_path, "digits")
    assert found["images"] == 1797
    assert list(found["classes"]["all"].values()) == np.bincount(load_digits().target).tolist()


def test_digits_without_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"fedzoo\[simulations\]"):
        readers["digits"]().read(tmp_path, DATA, [str(d) for d in range(10)], {})
    with pytest.raises(DataError, match=r"fedzoo\[simulations\]"):
        check(tmp_path, "digits")


def test_a_hospitals_folder_is_its_simulated_site_bit_for_bit(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    """Pool -> partition -> PNG folders -> reader: the same bytes and labels in the same order, part by part."""
    job = make_job()
    pool = readers["digits"]().read(Path(), job.data, job.task.labels, {})
    part = SimulationPart(partition="dirichlet", alpha=0.3, sites=3, seed=0)
    sites = SitePopulation(pool, make_partition(pool, part))
    counts = write_hospitals(sites, tmp_path)
    assert sum(counts.values()) == 1797
    for site in sites.names:
        simulated = sites.splits(site)
        on_disk = split(readers["imagefolder"]().read(tmp_path / site, job.data, job.task.labels, {}))
        for name in PARTS:
            ours, theirs = getattr(simulated, name), getattr(on_disk, name)
            rows = torch.arange(len(ours))
            assert torch.equal(ours.batch(rows).x, theirs.batch(rows).x)
            assert torch.equal(ours.labels, theirs.labels)
