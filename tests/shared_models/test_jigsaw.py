"""Jigsaw: the orders against a slow search, tiles by hand, chance that is keyed, and a small model that learns."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_models.errors import ConfigError
from shared_models.job import Job
from shared_models.keys import keyed_global
from shared_models.spec import build_model
from shared_models.tasks.base import Batch, Task, make_task
from shared_models.tasks.jigsaw import JigsawSettings, Puzzle, far_apart, shuffled


def a_job(shape: tuple[int, ...] = (1, 12, 12), model: str = "cnn", **keys: Any) -> Job:
    return Job.resolve({
        "name": "tiles", "model": {"name": model}, "task": {"name": "jigsaw", **keys}, "data": {"shape": shape},
    })  # fmt: skip


def batch(x: Tensor) -> Batch:
    return Batch(x, torch.zeros(len(x), dtype=torch.int64))


# ---- orders ----------------------------------------------------------------------------------------------------------
def test_the_orders_are_those_of_a_slow_search() -> None:
    every = list(permutations(range(4)))
    chosen = [every[0]]
    while len(chosen) < 12:
        rest = [p for p in every if p not in chosen]
        far = [sum(a != b for q in chosen for a, b in zip(p, q, strict=True)) for p in rest]
        chosen.append(rest[far.index(max(far))])
    assert far_apart(4, 12).tolist() == [list(p) for p in chosen]
    assert sorted(map(tuple, far_apart(4, 24).tolist())) == every


def test_nine_tiles_lie_as_far_apart_as_the_papers() -> None:
    """Noroozi & Favaro 2016, Table 4: of 100 orders the mean distance is 8.08 and the smallest is 2, of 6 all are 9."""
    orders = far_apart(9, 100)
    assert orders[0].tolist() == list(range(9))
    assert (np.sort(orders, axis=1) == np.arange(9)).all()
    apart = (orders[:, None] != orders[None]).sum(axis=2)
    others = ~np.eye(100, dtype=bool)
    assert apart[others].mean() == pytest.approx(8.08, abs=0.005)
    assert apart[others].min() == 2
    assert (apart[:6, :6] == 9 * (1 - np.eye(6))).all()
    assert np.array_equal(far_apart(9, 30), orders[:30])


# ---- tiles -----------------------------------------------------------------------------------------------------------
def middle(count: int, tiles: int = 9) -> Tensor:
    return torch.full((count, 2, tiles), 0.5, dtype=torch.float64)


def test_tiles_lie_as_the_order_says() -> None:
    x = torch.arange(9.0).reshape(1, 1, 3, 3).repeat(2, 1, 1, 1)
    orders = torch.from_numpy(far_apart(9, 5)[[3, 0]])
    found = shuffled(x, orders, middle(2), JigsawSettings(gap=0))
    assert found[:, 0].flatten(1).long().tolist() == orders.tolist()


def test_the_first_order_gives_the_image_back_but_for_an_edge_that_does_not_fit() -> None:
    x = torch.randn(2, 3, 8, 10)
    whole = shuffled(x, torch.arange(9).expand(2, -1), middle(2), JigsawSettings(gap=0))
    inside = torch.zeros(8, 10, dtype=torch.bool)
    inside[1:7, :9] = True  # 8 = 1 + 3 * 2 + 1, 10 = 0 + 3 * 3 + 1
    assert torch.equal(whole, x * inside)


def test_a_tile_is_cut_out_of_its_place_at_random_and_enlarged() -> None:
    """Cells of 4 pixels, tiles of 3: with 0 the upper left of them, just below 1 the lower right."""
    x = torch.arange(144.0).reshape(1, 1, 12, 12)
    orders = torch.arange(9)[None].flip(1)
    places = torch.zeros(1, 2, 9, dtype=torch.float64)
    places[0, :, 0] = 0.999  # of what lies in the first place: the last tile, rows and columns 8 to 11
    found = shuffled(x, orders, places, JigsawSettings(gap=0.25))
    low, high = x[:, :, 8:11, 8:11], x[:, :, 9:12, 9:12]
    enlarged = F.interpolate(high, (4, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found[:, :, :4, :4], enlarged)
    places[0, :, 0] = 0
    found = shuffled(x, orders, places, JigsawSettings(gap=0.25))
    torch.testing.assert_close(found[:, :, :4, :4], F.interpolate(low, (4, 4), mode="bilinear", align_corners=False))


def test_every_place_of_a_gap_is_drawn() -> None:
    """Tiles of 3 in cells of 4: two places down and two across, each for about half of the images."""
    x = torch.zeros(400, 1, 12, 12)
    x[:, :, 0, 0] = 1  # seen where the first tile is cut out at the upper left
    task, model = make_task(a_job(gap=0.25, permutations=2)), nn.Flatten()
    with keyed_global(2):
        seen = task.forward(model, batch(x)).logits.amax(dim=1) > 0.5
    assert 60 < int(seen.sum()) < 140  # 100 expected, deviation 8.7


def test_normalised_tiles_have_mean_0_and_deviation_1() -> None:
    x = torch.randn(2, 3, 12, 12) * torch.linspace(1, 5, 12) + torch.linspace(-9, 9, 12)
    found = shuffled(x, torch.arange(9).expand(2, -1), middle(2), JigsawSettings(gap=0, normalise=True))
    tiles = found.unflatten(3, (3, 4)).unflatten(2, (3, 4))
    torch.testing.assert_close(tiles.mean(dim=(1, 3, 5)), torch.zeros(2, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(tiles.std(dim=(1, 3, 5), correction=0), torch.ones(2, 3, 3), atol=1e-4, rtol=0)


# ---- the task --------------------------------------------------------------------------------------------------------
def test_by_hand() -> None:
    task = make_task(a_job(permutations=4))
    outputs = Puzzle(torch.tensor([[0.0, 0, 0, 0], [2.0, 1, 0, 0], [0.0, 0, 0, 5]]), torch.tensor([0, 1, 3]))
    given = batch(torch.zeros(3, 1))
    assert task.predict(outputs, given).tolist() == [0, 0, 3]
    values = task.values(task.sums(outputs, given))
    assert values["accuracy"] == pytest.approx(2 / 3)
    expected = F.cross_entropy(outputs.logits, outputs.answer, reduction="none")
    torch.testing.assert_close(task.loss(outputs, given), expected)
    assert values["loss"] == pytest.approx(float(expected.mean()))


def test_all_orders_are_drawn_and_the_answer_is_the_one_that_was() -> None:
    task = make_task(a_job(gap=0, permutations=7))
    x = torch.arange(9.0).reshape(3, 3).repeat_interleave(4, 0).repeat_interleave(4, 1).expand(300, 1, 12, 12)
    with keyed_global(1):
        outputs = task.forward(nn.Flatten(), batch(x))
    orders = outputs.logits.unflatten(1, (12, 12))[:, ::4, ::4].flatten(1).long()
    assert torch.equal(orders, torch.from_numpy(far_apart(9, 7))[outputs.answer])
    counts = torch.bincount(outputs.answer, minlength=7)
    assert counts.shape == (7,)
    assert int(counts.min()) > 15  # 43 expected, deviation 6


def test_chance_is_keyed_and_a_sample_draws_the_same_beside_any_others() -> None:
    task = make_task(a_job())
    x = torch.randn(5, 1, 12, 12)

    def answers(key: int, given: Tensor) -> Tensor:
        with keyed_global(key):
            found: Tensor = task.forward(nn.Flatten(), batch(given)).answer
        return found

    assert torch.equal(answers(1, x), answers(1, x))
    assert not torch.equal(answers(1, x), answers(2, x))
    assert torch.equal(answers(1, x)[:3], answers(1, x[:3]))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"grid": 2, "permutations": 25}, "4 tiles have 24 orders, not 25"),
        ({"grid": 4}, "'grid'"),
        ({"permutations": 1}, "'permutations'"),
        ({"gap": 1.0}, "'gap'"),
    ],
)
def test_settings_that_cannot_be(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        a_job(**keys)
    assert message in str(error.value)


def test_too_small_an_image_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot cut 2x9 pixels into 3 tiles a side"):
        build_model(a_job((1, 2, 9), "resnet18"))


def scenes(count: int, seed: int) -> Batch:
    """A slope down and another across, so that each tile has its own brightness in each channel, and noise."""
    noise = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    down, across = torch.linspace(-2, 2, 12)[:, None].expand(12, 12), torch.linspace(-2, 2, 12).expand(12, 12)
    return batch(torch.stack([down, across, torch.zeros(12, 12)]) + 0.3 * noise)


def accuracy(task: Task, model: nn.Module, given: Batch) -> float:
    with torch.no_grad(), keyed_global(9):
        return task.values(task.sums(task.forward(model.eval(), given), given))["accuracy"]


def test_a_small_model_learns_the_order() -> None:
    job = a_job((3, 12, 12), permutations=10)
    task, (model, _) = make_task(job), build_model(job)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    given, new = scenes(48, seed=0), scenes(100, seed=1)
    assert accuracy(task, model, new) < 0.3
    with keyed_global(4):
        for _ in range(40):
            optimizer.zero_grad()
            task.loss(task.forward(model.train(), given), given).mean().backward()
            optimizer.step()
    assert accuracy(task, model, new) > 0.9
