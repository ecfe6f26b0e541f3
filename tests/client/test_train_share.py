"""`data.train_share`: of the train part alone, by name, nested, tiles of one image together."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from client.readers.base import PARTS, Splits, Store
from client.readers.parts import part_of, split
from shared_models.errors import ConfigError, DataError
from shared_models.job_parts import DataPart
from shared_models.validation import validate


def names(splits: Splits, part: str) -> list[str]:
    examples = getattr(splits, part)
    return [examples.store.names[row] for row in examples.rows.tolist()]


def a_store(share: float, count: int = 4000, **fields: Any) -> Store:
    data = DataPart(shape=(1, 1, 1), train_share=share)
    pixels, classes = torch.zeros(count, 1, 1, 1, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64)
    return Store(pixels, classes, [f"image-{i}.png" for i in range(count)], data, **fields)


def test_only_the_train_part_shrinks_to_the_share() -> None:
    """Binomial: 2400 training examples, a tenth of them is 240, 4.9 standard deviations either side."""
    whole, some = split(a_store(1.0)), split(a_store(0.1))
    assert len(some.train) == pytest.approx(0.1 * len(whole.train), abs=72)
    for part in ("validation", "test"):
        assert names(some, part) == names(whole, part)


def test_a_larger_share_holds_a_smaller_one_in_the_same_order() -> None:
    kept = [names(split(a_store(share)), "train") for share in (0.01, 0.1, 0.5, 1.0)]
    for fewer, more in pairwise(kept):
        assert [name for name in more if name in set(fewer)] == fewer
        assert len(fewer) < len(more)


def test_what_is_kept_follows_from_the_name_alone() -> None:
    """Not from the order of the rows or from the other rows; and not from what decides a name's part."""
    whole = a_store(0.3)
    kept = set(names(split(whole), "train"))
    rows = torch.arange(4000).flip(0)[::2]
    assert set(names(split(whole, rows), "train")) == kept & {whole.names[r] for r in rows.tolist()}
    early = [name for name in whole.names if part_of(name) == "train"]
    assert sum(name in kept for name in early[:1200]) == pytest.approx(360, abs=78)


def test_the_choice_of_known_names() -> None:
    """As `sha256sum` of "train_share", a zero byte and the name says: below 1999... Pinned for ever."""
    kept = names(split(a_store(0.1, 100)), "train")
    assert kept == [f"image-{i}.png" for i in (15, 18, 26, 34, 80)]


def test_tiles_of_one_image_stay_together() -> None:
    groups = [f"slice-{i // 8}" for i in range(4000)]
    kept = split(a_store(0.2, groups=groups)).train
    counts = torch.bincount(kept.rows // 8, minlength=500)
    assert set(counts.tolist()) == {0, 8}


def test_an_owners_own_parts_are_shared_too() -> None:
    parts = [PARTS[i % 3] for i in range(4000)]
    splits = split(a_store(0.5, parts=parts))
    assert all(int(name[6:-4]) % 3 == 0 for name in names(splits, "train"))
    assert len(splits.train) == pytest.approx(667, abs=90)
    assert (len(splits.validation), len(splits.test)) == (1333, 1333)


def test_a_share_that_leaves_nothing_is_an_error() -> None:
    with pytest.raises(DataError, match=r"data.train_share = 0.0001 leaves none of \d+ training examples"):
        split(a_store(0.0001, 40))


@pytest.mark.parametrize("share", [0.0, 1.1, -0.5])
def test_shares_that_cannot_be(share: float) -> None:
    with pytest.raises(ConfigError, match="'train_share'"):
        validate(DataPart, {"shape": (1, 1, 1), "train_share": share}, "[data]")
