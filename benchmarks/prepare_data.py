"""Writes data sets that no reader takes as they lie into files that one does.

    python benchmarks/prepare_data.py <folder that holds the data sets> <folder for the files>

AG News gets a header, Multi30k's files the names of their parts, CIFAR-10 becomes one archive of a subset and one of
all, MNIST one whose validation part is the end of its training images; of Shakespeare, what all say but the ten roles
that speak most stands apart.
"""

from __future__ import annotations

import csv
import gzip
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

CIFAR = {"train": (4000, "train", 0), "val": (1000, "train", 4000), "test": (2000, "test", 0)}  # images, file, first
WHOLE = {"train": (49_000, "train", 0), "val": (1000, "train", 49_000), "test": (10_000, "test", 0)}
ROLES = 10  # those of examples/shakespeare.toml
MULTI30K = {"train": ("train", 6000), "val": ("val", 500), "test": ("test_2016_flickr", 500)}


def ag_news(source: Path, target: Path) -> None:
    """`ag_news.csv`: columns label, title, text."""
    names = (source / "classes.txt").read_text().split()
    with (source / "test.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    with (target / "ag_news.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["label", "title", "text"], *([names[int(c) - 1], a, b] for c, a, b in rows)])


def multi30k(source: Path, target: Path) -> None:
    """`multi30k/<part>.<language>`: the first pairs of each part."""
    (target / "multi30k").mkdir(exist_ok=True)
    for part, (name, count) in MULTI30K.items():
        for language in ("en", "de"):
            with gzip.open(source / f"{name}.{language}.gz", "rt", encoding="utf-8") as file:
                lines = [line.strip() for line in file][:count]
            (target / "multi30k" / f"{part}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")


def cifar10(source: Path, target: Path, parts: dict[str, tuple[int, str, int]]) -> None:
    """An archive of these parts, as MedMNIST names its arrays."""
    arrays = {}
    for part, (count, name, first) in parts.items():
        labels = np.load(source / f"{name}_labels.npy")
        files = sorted(source.glob(f"{name}_[0-9]*.webp"))[first // 1000 : (first + count) // 1000]
        sheets = [np.asarray(Image.open(file).convert("RGB")) for file in files]
        tiles = [s.reshape(40, 32, 25, 32, 3).transpose(0, 2, 1, 3, 4).reshape(1000, 32, 32, 3) for s in sheets]
        arrays[f"{part}_images"] = np.concatenate(tiles)
        arrays[f"{part}_labels"] = labels[first : first + count]
    np.savez_compressed(target, **arrays)


def mnist(source: Path, target: Path) -> None:
    """`mnist.npz`, as MedMNIST names its arrays: 59,000, 1,000 and 10,000 images."""
    with np.load(source / "mnist.npz") as given:
        arrays = {"test_images": given["x_test"], "test_labels": given["y_test"]}
        for part, rows in (("train", slice(0, 59_000)), ("val", slice(59_000, 60_000))):
            arrays |= {f"{part}_images": given["x_train"][rows], f"{part}_labels": given["y_train"][rows]}
    np.savez_compressed(target / "mnist.npz", **arrays)


def shakespeare(source: Path, target: Path) -> None:
    """`other_roles.txt`: what a model may have read before it comes to the ten roles that speak most."""
    speeches = (source / "input.txt").read_text(encoding="utf-8").split("\n\n")
    spoken = [(speech.partition(":\n")[0], speech) for speech in speeches]
    said = Counter[str]()
    for role, speech in spoken:
        said[role] += len(speech)
    most = {role for role, _ in said.most_common(ROLES)}
    others = "\n\n".join(speech for role, speech in spoken if role not in most)
    (target / "other_roles.txt").write_text(others, encoding="utf-8")


if __name__ == "__main__":
    origin, goal = map(Path, sys.argv[1:3])
    goal.mkdir(parents=True, exist_ok=True)
    ag_news(origin / "ag_news_test", goal)
    multi30k(origin / "multi30k", goal)
    cifar10(origin / "cifar10", goal / "cifar10.npz", CIFAR)
    cifar10(origin / "cifar10", goal / "cifar10_whole.npz", WHOLE)
    mnist(origin / "mnist", goal)
    shakespeare(origin / "tinyshakespeare", goal)
