"""Stores: parts by name, normalisation, and the examples of one task."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from client.readers.base import PARTS, Examples, Store
from client.readers.parts import part_of, split
from shared_models.errors import DataError
from shared_models.job import Job
from shared_models.job_parts import DataPart

DATA = DataPart(shape=(1, 2, 2))


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


def test_one_task_of_a_stream_keeps_the_order(make_job: Callable[..., Job]) -> None:
    store = Store(torch.zeros(6, 1, 2, 2, dtype=torch.uint8), torch.tensor([2, 0, 1, 2, 0, 1]), list("abcdef"), DATA)
    examples = Examples(store, torch.tensor([5, 4, 3, 2, 1, 0]))
    job = make_job(task={"labels": list("abcd")}, time="continual", stream={"tasks": 4}, federation={"rounds": 4})
    assert examples.of_tasks(job, (0, 2)).rows.tolist() == [4, 3, 1, 0]
    assert examples.of_tasks(job, (0, 2)).y.tolist() == [0, 2, 0, 2]
    assert len(examples.of_tasks(job, (3,))) == 0
    assert (examples.nbytes, examples.of_tasks(job, (3,)).nbytes) == (24, 0)
    assert examples.of_tasks(job.replace(time="offline"), (0,)) is examples
