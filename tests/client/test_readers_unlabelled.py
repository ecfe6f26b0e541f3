"""Images without a target: labels and the folders of classes are passed over."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from client.readers import read
from client.readers.base import PARTS, Store, Wanted
from shared_models.errors import ConfigError
from shared_models.job_parts import DataPart


def image(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), value).save(path)


def images(reader: str, root: Path, target: Any = "none", labels: Sequence[str] = (), **keys: Any) -> Store:
    return read(reader, root, Wanted(DataPart(**{"shape": (1, 4, 4), **keys}), tuple(labels), target))


@pytest.mark.parametrize("parts", [True, False])
def test_images_however_they_lie_where_no_class_is_wanted(tmp_path: Path, parts: bool) -> None:
    names = ["b.png", "any/a.png", "any/deeper/c.png"]
    for i, part in enumerate(PARTS if parts else ("",)):
        for k, name in enumerate(names):
            image(tmp_path / part / name, 100 * i + k)
    store = images("imagefolder", tmp_path)
    order = sorted(range(3), key=lambda k: names[k])
    assert store.x[:, 0, 0, 0].tolist() == [100 * i + k for i in range(3 if parts else 1) for k in order]
    assert store.y.tolist() == [0] * len(store.names)
    assert list(store.parts) == ([p for p in PARTS for _ in range(3)] if parts else [])
    with pytest.raises(ConfigError, match="these data are images"):
        images("imagefolder", tmp_path, shape=(16,), tokenizer="bytes")


def test_digits_arrays_and_tables_of_images_without_labels(tmp_path: Path) -> None:
    store = images("digits", tmp_path, shape=(1, 8, 8))
    labelled = images("digits", tmp_path, "class", "0123456789", shape=(1, 8, 8))
    place = {name: i for i, name in enumerate(labelled.names)}
    assert torch.equal(store.x, labelled.x[[place[name] for name in store.names]])
    assert not store.y.any()
    arrays = {}
    for k, part in enumerate(("train", "val", "test")):
        arrays |= {f"{part}_images": np.full((2, 4, 4), k, np.uint8), f"{part}_labels": np.array([7, 9])}
    np.savez(tmp_path / "a.npz", **arrays)
    store = images("npz", tmp_path)
    assert (store.y.tolist(), store.x[:, 0, 0, 0].tolist()) == ([0] * 6, [0, 0, 1, 1, 2, 2])
    image(tmp_path / "x.png", 5)
    (tmp_path / "list.csv").write_text("path\nx.png\n")
    store = images("csv", tmp_path / "list.csv")
    assert (store.y.tolist(), store.x[0, 0, 0, 0].item()) == ([0], 5)
