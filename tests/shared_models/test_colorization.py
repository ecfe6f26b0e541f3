"""Colorization: Lab against scikit-image, the paper's 313 bins, losses by hand, and a small model that learns."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation
from scipy.spatial import ConvexHull
from skimage.color import lab2rgb, rgb2lab
from torch import Tensor, nn

from shared_models.errors import ConfigError
from shared_models.job import Job
from shared_models.lab import CENTRES, centres, rgb_to_lab
from shared_models.spec import build_model
from shared_models.tasks.base import Batch, Task, make_task
from shared_models.tasks.colorization import soft_bins

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def a_job(shape: tuple[int, ...] = (3, 8, 8), data: dict[str, Any] | None = None, **keys: Any) -> Job:
    return Job.resolve({
        "name": "colours", "model": {"name": "cnn"}, "task": {"name": "colorization", **keys},
        "data": {"shape": shape, "mean": MEAN, "std": STD, **(data or {})},
    })  # fmt: skip


def batch(rgb: Tensor) -> Batch:
    """Images in [0, 1], normalised."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return Batch((rgb - mean) / std, torch.zeros(len(rgb), dtype=torch.int64))


def of_lab(lab: list[list[float]], side: int = 8) -> Tensor:
    """Images of one colour each, (B, 3, side, side) in [0, 1]."""
    rgb = torch.from_numpy(lab2rgb(np.array(lab)[:, None])).float()  # (B, 1, 3)
    return rgb[:, 0, :, None, None].expand(-1, -1, side, side)


def bin_of(a: int, b: int) -> int:
    return CENTRES.index((a, b))


# ---- colours ---------------------------------------------------------------------------------------------------------
def test_lab_is_scikit_images() -> None:
    rgb = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rgb[0, :, 0] *= 0.05  # the linear pieces of both curves
    corners = torch.tensor([[r, g, b] for r in (0.0, 1.0) for g in (0.0, 1.0) for b in (0.0, 1.0)])
    rgb[1, :, 0, :8] = corners.T
    expected = rgb2lab(rgb.double().numpy(), channel_axis=1)
    np.testing.assert_allclose(rgb_to_lab(rgb.double()).numpy(), expected, atol=1e-9)
    np.testing.assert_allclose(rgb_to_lab(rgb).numpy(), expected, atol=2e-3)


def test_the_bins_are_the_313_of_the_paper() -> None:
    """A grid of step 10 over all colours of sRGB: centres in their convex hull, and the neighbours of those."""
    steps = np.linspace(0, 1, 21)
    cube = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
    hull = ConvexHull(rgb2lab(cube)[:, 1:])
    grid = np.arange(-130, 131, 10)
    places = np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=-1)  # (27, 27, 2)
    inside = (places @ hull.equations[:, :2].T + hull.equations[:, 2] <= 0).all(axis=2)
    found = places[binary_dilation(inside, np.ones((3, 3), dtype=bool))]
    assert len(CENTRES) == 313
    assert [tuple(p) for p in found.tolist()] == CENTRES


def test_every_colour_of_srgb_has_its_bin_nearby() -> None:
    steps = torch.linspace(0, 1, 18)
    cube = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij"), dim=0).flatten(2)[None]  # (1, 3, 18, 324)
    ab = rgb_to_lab(cube)[:, 1:]
    near, _ = soft_bins(ab)
    away = (ab.movedim(1, -1) - centres()[near[:, 0]]).abs().amax(dim=-1)
    assert float(away.max()) <= 5 + 1e-4


def test_a_colour_is_spread_over_the_five_bins_around_it() -> None:
    ab = torch.tensor([[0.0, 0.0], [2.0, -1.0], [100.0, 94.0]])[:, :, None, None]
    near, shares = soft_bins(ab)
    assert near.shape == shares.shape == (3, 5, 1, 1)
    assert near[0, 0, 0, 0] == bin_of(0, 0)
    assert set(near[0, :, 0, 0].tolist()) == {bin_of(*p) for p in ((0, 0), (10, 0), (-10, 0), (0, 10), (0, -10))}
    side = math.exp(-100 / 50)  # d = 10, sigma = 5
    expected = torch.tensor([1.0, side, side, side, side]) / (1 + 4 * side)
    torch.testing.assert_close(shares[0, :, 0, 0], expected)
    assert near[1, 0, 0, 0] == bin_of(0, 0)
    far = [(-(math.dist((2.0, -1.0), CENTRES[i]) ** 2) / 50) for i in near[1, :, 0, 0].tolist()]
    torch.testing.assert_close(shares[1, :, 0, 0], torch.tensor(far).softmax(dim=0))
    assert CENTRES[int(near[2, 0])] == (90, 70)  # outside: the nearest that there is


# ---- weights ---------------------------------------------------------------------------------------------------------
def test_weights_are_those_of_the_equation() -> None:
    prior = torch.zeros(313)
    prior[0], prior[5] = 3.0, 1.0  # 3/4 and 1/4
    weights = make_task(a_job(prior=prior.tolist(), uniform=0.5)).weights  # type: ignore[attr-defined]
    raw = torch.full((313,), 313 / 0.5)
    raw[0], raw[5] = 1 / (0.5 * 0.75 + 0.5 / 313), 1 / (0.5 * 0.25 + 0.5 / 313)
    torch.testing.assert_close(weights, raw / (0.75 * raw[0] + 0.25 * raw[5]))


def test_by_default_grey_weighs_least_and_all_alike_with_lambda_1() -> None:
    weights = make_task(a_job()).weights  # type: ignore[attr-defined]
    far = centres().norm(dim=1)
    assert weights.argmin() == bin_of(0, 0)
    assert (weights[far.argsort()].diff() >= 0).all()
    prior = (-far / 10).exp() / (-far / 10).exp().sum()
    assert float((prior * weights).sum()) == pytest.approx(1, abs=1e-5)
    assert float(prior[bin_of(0, 0)]) == pytest.approx(1 / 7, abs=0.02)
    assert float(weights.max() / weights.min()) == pytest.approx(49.3, abs=0.1)
    torch.testing.assert_close(make_task(a_job(uniform=1.0)).weights, torch.ones(313))  # type: ignore[attr-defined]


# ---- the task --------------------------------------------------------------------------------------------------------
def test_loss_and_metrics_by_hand() -> None:
    """Two images of one colour each, at a bin's centre; the model is sure of one bin everywhere."""
    task = make_task(a_job(uniform=1.0))
    given = batch(of_lab([[60.0, 20.0, 30.0], [60.0, 0.0, 0.0]]))
    said = bin_of(20, 30), bin_of(30, 0)  # right; 30 away
    logits = torch.stack([torch.full((313, 2, 2), -30.0).index_fill(0, torch.tensor([q]), 0.0) for q in said])
    side = math.exp(-2)
    share = side / (1 + 4 * side)  # of each of the four around; grey's are as far from (30, 0) as 20
    task_loss = task.loss(logits, given)
    assert task_loss.tolist() == pytest.approx([30 * 4 * share, 30.0], rel=1e-3)
    values = task.values(task.sums(logits, given))
    assert values["accuracy"] == pytest.approx(0.5)
    assert values["distance"] == pytest.approx((0 + 30) / 2, abs=0.05)
    # the first image is within every threshold from 1 (or 0) on, the second from 30 or 31 on
    assert values["auc"] == pytest.approx((150.5 + 120.5) / 151 / 2, abs=0.01)
    assert values["loss"] == pytest.approx(float(task_loss.mean()))


def test_a_model_that_has_diverged_is_as_far_from_the_colours_as_can_be() -> None:
    task = make_task(a_job())
    given = batch(of_lab([[60.0, 20.0, 30.0]]))
    sums = task.sums(torch.full((1, 313, 2, 2), torch.nan), given)
    assert sums["distances"].tolist() == [0] * 151 + [4]
    values = task.values(sums)
    assert values["auc"] == 0
    assert math.isnan(values["distance"])
    assert math.isnan(values["loss"])


def test_area_under_the_curve_is_the_mean_over_the_thresholds() -> None:
    task = make_task(a_job((3, 32, 32)))
    source = torch.Generator().manual_seed(3)
    given, logits = batch(torch.rand(2, 3, 32, 32, generator=source)), 3 * torch.randn(2, 313, 8, 8, generator=source)
    pooled = rgb_to_lab(given.x * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None])[:, 1:]
    truth = pooled.unflatten(3, (8, 4)).unflatten(2, (8, 4)).mean(dim=(3, 5))
    away = (task.predict(logits, given) - truth).norm(dim=1)
    expected = np.mean([(away <= t).double().mean() for t in range(151)])
    values = task.values(task.sums(logits, given))
    assert values["auc"] == pytest.approx(expected, abs=1e-9)
    assert values["distance"] == pytest.approx(float(away.mean()), rel=1e-5)


def test_the_annealed_mean_lies_between_mean_and_mode() -> None:
    task = make_task(a_job())
    logits = torch.full((1, 313, 1, 1), -1e4)
    logits[0, bin_of(0, 0)], logits[0, bin_of(40, 0)] = math.log(0.4), math.log(0.6)
    nothing = batch(torch.zeros(1, 3, 4, 4))
    share = 0.6 ** (1 / 0.38) / (0.6 ** (1 / 0.38) + 0.4 ** (1 / 0.38))
    torch.testing.assert_close(task.predict(logits, nothing).flatten(), torch.tensor([40 * share, 0.0]))
    assert 24 < 40 * share < 40


class Seen(nn.Module):
    """A backbone that keeps what it was shown."""

    top = ("head",)

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Identity()
        self.shown = torch.empty(0)

    def maps(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        self.shown = x
        return x


def test_the_model_sees_lightness_normalised_like_the_images() -> None:
    task, model = make_task(a_job()), Seen()
    task.forward(model, batch(of_lab([[60.0, 20.0, 30.0], [60.0, -30.0, 10.0]])))
    grey = batch(torch.full((1, 3, 8, 8), 0.6)).x
    torch.testing.assert_close(model.shown, grey.expand(2, -1, -1, -1), atol=1e-4, rtol=1e-4)


def test_cells_that_do_not_divide_the_image_are_smaller_at_the_edge() -> None:
    job = a_job((3, 10, 7), cell=4)
    task, (model, _) = make_task(job), build_model(job)
    x = torch.zeros(1, 3, 10, 7)
    x[:, :, 8:, 4:] = of_lab([[50.0, 30.0, 30.0]], 1)
    given = batch(x)
    assert task.forward(model, given).shape == (1, 313, 3, 2)
    said = torch.full((1, 313, 3, 2), -30.0)
    said[:, bin_of(0, 0)] = 0
    said[:, bin_of(0, 0), 2, 1], said[:, bin_of(30, 30), 2, 1] = -30, 0
    assert task.values(task.sums(said, given))["accuracy"] == 1


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"shape": (1, 8, 8), "data": {"mean": [0.5], "std": [0.5]}}, "needs colours"),
        ({"data": {"mean": [0.5], "std": [0.5], "normalise_by": "sites"}}, "data.normalise_by = 'sites' does not tell"),
        ({"prior": [1.0] * 312}, "should have 313 numbers, one for each bin, not 312"),
        ({"prior": [0.0] * 313}, "not all of them 0"),
        ({"uniform": 0.0}, "'uniform'"),
    ],
)
def test_what_cannot_be(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_model(a_job(**parts))
    assert message in str(error.value)


def scenes(count: int, seed: int) -> Batch:
    """Left or right is light and blue, the other side dark and orange."""
    source = torch.Generator().manual_seed(seed)
    blue, orange = of_lab([[75.0, -10.0, -30.0]]), of_lab([[40.0, 30.0, 40.0]])
    left = torch.arange(8) < 4
    swap = torch.rand(count, 1, 1, 1, generator=source) < 0.5
    noise = 0.03 * torch.randn(count, 1, 8, 8, generator=source)
    return batch((torch.where(left ^ swap, blue, orange) + noise).clamp(0, 1))


def measured(task: Task, model: nn.Module, given: Batch) -> dict[str, float]:
    with torch.no_grad():
        return task.values(task.sums(task.forward(model.eval(), given), given))


def test_a_small_model_learns_which_colour_is_light() -> None:
    job = a_job(width=32)
    task, (model, _) = make_task(job), build_model(job)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    given, new = scenes(32, seed=0), scenes(64, seed=1)
    before = measured(task, model, new)
    assert before["accuracy"] < 0.3
    for _ in range(60):
        optimizer.zero_grad()
        task.loss(task.forward(model.train(), given), given).mean().backward()
        optimizer.step()
    after = measured(task, model, new)
    assert after["accuracy"] > 0.8
    assert after["distance"] < 8 < before["distance"]
    assert after["auc"] > 0.94 > before["auc"]
    assert not task.measure("distance").larger
