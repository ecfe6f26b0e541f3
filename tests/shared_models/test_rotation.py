"""Rotation: turns and loss by hand, nothing drawn, and a small model that learns which side is up."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from shared_models.errors import CompatibilityError, ConfigError
from shared_models.job import Job
from shared_models.spec import build_model
from shared_models.tasks.base import Batch, Task, make_task
from shared_models.tasks.rotation import turned


def a_job(shape: tuple[int, ...] = (1, 8, 8), **parts: object) -> Job:
    data = {"name": "turn", "model": {"name": "cnn"}, "task": {"name": "rotation"}, "data": {"shape": shape}}
    return Job.resolve({**data, **parts})


def batch(x: Tensor) -> Batch:
    return Batch(x, torch.zeros(len(x), dtype=torch.int64))


def test_turned_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    expected = [[[1, 2], [3, 4]], [[2, 4], [1, 3]], [[4, 3], [2, 1]], [[3, 1], [4, 2]]]  # each a quarter turn left
    assert turned(x[None, None])[0, :, 0].tolist() == expected


def test_every_image_is_turned_and_keeps_its_own_four_places() -> None:
    x = torch.randn(3, 2, 5, 5)
    four = turned(x)
    assert four.shape == (3, 4, 2, 5, 5)
    for image, turns in zip(x, four, strict=True):
        for turn, picture in enumerate(turns):
            assert torch.equal(picture, torch.rot90(image, turn, (1, 2)))


class Corner(nn.Module):
    """The logit of a turn is the brightest pixel's place among the corners: bottom right at turn 0, and so on."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, S, S) -> (B, 4)."""
        return torch.stack([x[:, 0, -1, -1], x[:, 0, 0, -1], x[:, 0, 0, 0], x[:, 0, -1, 0]], dim=1)


def test_loss_and_accuracy_by_hand() -> None:
    """A corner of log 3 gives 3/6 to its turn; an image without a corner says nothing, and argmax then says turn 0."""
    task, x = make_task(a_job()), torch.zeros(2, 1, 4, 4)
    x[0, 0, -1, -1] = math.log(3)
    outputs = task.forward(Corner(), batch(x))
    assert outputs.shape == (2, 4, 4)
    expected = [math.log(2), math.log(4)]
    assert task.loss(outputs, batch(x)).tolist() == pytest.approx(expected)
    assert task.predict(outputs, batch(x)).tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    values = task.values(task.sums(outputs, batch(x)))
    assert values["accuracy"] == pytest.approx(5 / 8)
    assert values["loss"] == pytest.approx(sum(expected) / 2)
    assert values["examples"] == 2


def test_nothing_is_drawn() -> None:
    task, given = make_task(a_job()), batch(torch.randn(2, 1, 4, 4))
    before = torch.random.get_rng_state()
    assert not task.draws
    task.forward(Corner(), given)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_labels_are_not_needed_and_mean_nothing() -> None:
    assert make_task(a_job()).outputs == 4
    labelled = a_job(task={"name": "rotation", "labels": ["a", "b"]})
    assert make_task(labelled).outputs == 4


def test_images_that_are_not_square_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"6x8 pixels are not square\. Give data.shape equal sides"):
        build_model(a_job((1, 6, 8)))


def test_turns_before_the_task_turns_are_refused() -> None:
    with pytest.raises(CompatibilityError, match="cannot tell how far"):
        a_job(augment={"quarter_turns": True})


def scenes(count: int, seed: int) -> Batch:
    """Dark below, bright above, a dot at the left: no turn looks like another."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 8, 8, generator=source) + torch.linspace(1, -1, 8)[:, None]
    dot = torch.zeros(8, 8)
    dot[3:5, :2] = 2
    return batch(x + dot)


def accuracy(task: Task, model: nn.Module, given: Batch) -> float:
    with torch.no_grad():
        return task.values(task.sums(task.forward(model.eval(), given), given))["accuracy"]


def test_a_small_model_learns_which_side_is_up() -> None:
    job = a_job()
    task, (model, _) = make_task(job), build_model(job)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    given, new = scenes(32, seed=0), scenes(64, seed=1)
    assert accuracy(task, model, new) < 0.45
    for _ in range(25):
        optimizer.zero_grad()
        task.loss(task.forward(model.train(), given), given).mean().backward()
        optimizer.step()
    assert accuracy(task, model, new) > 0.9
