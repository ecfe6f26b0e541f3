"""Masked autoencoding: errors by hand, what is hidden is not seen, decoders of all forms, and models that learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared_models.backbone import MaskedAutoencoder, backbone, crowned
from shared_models.decoders import GridDecoder, PixelDecoder
from shared_models.errors import ConfigError
from shared_models.job import Job
from shared_models.keys import keyed_global
from shared_models.spec import build_model
from shared_models.tasks.base import Batch, Task, make_task
from shared_models.tasks.masked_autoencoding import Picture, standardised


def a_job(
    model: str = "cnn", shape: tuple[int, ...] = (1, 8, 8), keys: dict[str, Any] | None = None, **task: Any
) -> Job:
    return Job.resolve({
        "name": "hidden", "model": {"name": model, **(keys or {})}, "task": {"name": "masked-autoencoding", **task},
        "data": {"shape": shape},
    })  # fmt: skip


def batch(x: Tensor) -> Batch:
    return Batch(x, torch.zeros(len(x), dtype=torch.int64))


# ---- errors ----------------------------------------------------------------------------------------------------------
def test_loss_and_metrics_by_hand() -> None:
    """Four pixels, the right two hidden: they are 3 and 5, the visible ones 1 and 3."""
    task = make_task(a_job())
    given = batch(torch.tensor([[1.0, 3.0], [3.0, 5.0]])[None, None])
    hidden = torch.tensor([[False, True], [False, True]])[None, None]
    painted = torch.tensor([[9.0, 4.0], [9.0, 3.0]])[None, None]  # 9 is where nobody looks
    outputs = Picture(painted, hidden, 1)
    assert task.loss(outputs, given).tolist() == [(1 + 4) / 2]
    values = task.values(task.sums(outputs, given))
    assert values["error"] == pytest.approx(2.5**0.5)
    assert values["explained"] == pytest.approx(1 - 5 / (1 + 9))  # the visible mean is 2
    assert values["loss"] == 2.5
    assert task.predict(outputs, given).tolist() == [[[[1.0, 4.0], [3.0, 3.0]]]]
    assert not task.measure("error").larger
    assert task.measure("explained").larger


@pytest.mark.parametrize("normalise", [False, True])
def test_the_very_pixels_are_no_error_and_the_mean_explains_nothing(normalise: bool) -> None:
    task = make_task(a_job(normalise=normalise))
    given = batch(torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)))
    hidden = torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    hidden[:, :, :4, 4:] = True
    target = standardised(given.x, 4) if normalise else given.x
    mean = (given.x * ~hidden).sum((2, 3), keepdim=True) / (~hidden).sum((2, 3), keepdim=True)
    mean = torch.zeros_like(mean) if normalise else mean
    exact, blind = (
        task.values(task.sums(Picture(p.expand(3, 2, 8, 8), hidden, 4), given)) for p in (target, mean)
    )  # fmt: skip
    assert (exact["error"], exact["loss"], exact["explained"]) == (0, 0, 1)
    assert blind["explained"] == pytest.approx(0, abs=1e-6)


def test_standardised_patches_by_numpys_numbers() -> None:
    x = 5 + 3 * torch.randn(2, 3, 8, 12)
    found = standardised(x, 4)
    for row in (0, 4):
        for column in (0, 4, 8):
            patch = x[1, :, row : row + 4, column : column + 4]
            expected = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            torch.testing.assert_close(found[1, :, row : row + 4, column : column + 4], expected)


# ---- what is hidden --------------------------------------------------------------------------------------------------
CASES = [("cnn", (1, 8, 8)), ("resnet18", (3, 16, 24)), ("vit", (1, 8, 12)), ("mae", (1, 8, 12))]


@pytest.mark.parametrize(("name", "shape"), CASES)
@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_equally_many_whole_patches_are_hidden_in_every_image(name: str, shape: tuple[int, ...], ratio: float) -> None:
    job = a_job(name, shape, ratio=ratio)
    model, task = build_model(job)[0].eval(), make_task(job)
    with torch.no_grad(), keyed_global(1):
        outputs = task.forward(model, task.draw(shape, 20, torch.Generator().manual_seed(0)))
    patch = outputs.patch
    grid = outputs.hidden[:, 0, ::patch, ::patch]  # (20, h, w)
    assert torch.equal(grid.repeat_interleave(patch, 1).repeat_interleave(patch, 2), outputs.hidden[:, 0])
    count = grid[0].numel()
    assert grid.flatten(1).sum(dim=1).tolist() == [count - round(count * (1 - ratio))] * 20
    assert len({tuple(g.flatten().tolist()) for g in grid}) > 3
    assert outputs.pixels.shape == (20, *shape)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_hidden_pixels_are_not_seen_and_visible_ones_are(name: str, shape: tuple[int, ...]) -> None:
    job = a_job(name, shape)
    model, task = build_model(job)[0].eval(), make_task(job)
    given = task.draw(shape, 3, torch.Generator().manual_seed(0))

    def painted(x: Tensor) -> Picture:
        with torch.no_grad(), keyed_global(1):
            found: Picture = task.forward(model, batch(x))
        return found

    before = painted(given.x)
    noise = torch.randn(given.x.shape, generator=torch.Generator().manual_seed(1))
    hidden, seen = (painted(given.x + noise * where) for where in (before.hidden, ~before.hidden))
    assert torch.equal(hidden.pixels, before.pixels)
    assert not torch.allclose(seen.pixels, before.pixels)
    assert torch.equal(hidden.hidden, before.hidden)


def test_patches_of_a_backbone_are_those_of_the_job_or_the_steps_of_its_map() -> None:
    def patch(*what: Any, **keys: Any) -> int:
        model, _ = build_model(a_job(*what, **keys))
        net = model if isinstance(model, MaskedAutoencoder) else crowned(backbone(model, ""))
        found: Any = net.patch
        return int(found)

    assert patch("cnn") == 4
    assert patch("cnn", patch=2) == 2
    assert patch("resnet18", (3, 32, 32)) == 8
    assert patch("vit") == patch("mae") == 2


@pytest.mark.parametrize(
    ("arguments", "task", "message"),
    [
        (
            ("cnn", (3, 32, 32), {"size": "niid-bench"}),
            {},
            "patches of side 7. Set task.patch to one of 1, 2, 4, 8, 16",
        ),
        (("cnn",), {"patch": 3}, "cannot cut an image of 8x8 pixels into patches of side 3"),
        (("mae",), {"patch": 4}, "the model has patches of side 2 of its own"),
        (("cnn",), {"ratio": 0.05}, "task.ratio = 0.05 of 4 patches of side 4 hides the whole image, or nothing"),
        (("cnn",), {"ratio": 0.95}, "hides the whole image, or nothing"),
        (("cnn",), {"ratio": 1.0}, "'ratio'"),
        (("mae", (1, 8, 8), {"patch": 1}), {"normalise": True}, "a patch of one grey pixel has no deviation"),
        (("cnn",), {"patch": 1, "normalise": True}, "a patch of one grey pixel has no deviation"),
    ],
)
def test_what_cannot_be(arguments: tuple[Any, ...], task: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_model(a_job(*arguments, **task))
    assert message in str(error.value)


# ---- decoders --------------------------------------------------------------------------------------------------------
def test_each_step_of_a_map_paints_its_own_square() -> None:
    decoder = PixelDecoder((2, 3, 2), (3, 7, 5), 1)  # squares of 3x3, 9x6 in all
    maps = torch.zeros(1, 2, 3, 2)
    with torch.no_grad():
        blank = decoder(maps)
        maps[0, :, 1, 0] = 1
        moved = (decoder(maps) - blank).abs().sum(dim=(0, 1)) > 0
    assert blank.shape == (1, 3, 7, 5)
    expected = torch.zeros(7, 5, dtype=torch.bool)
    expected[3:6, :3] = True
    assert torch.equal(moved, expected)


def test_pixels_within_a_square_are_rows_of_their_channel() -> None:
    decoder = PixelDecoder((1, 1, 1), (2, 2, 3), 1)
    with torch.no_grad():
        decoder.pixels.weight.copy_(torch.arange(12.0).reshape(12, 1, 1, 1))
        decoder.pixels.bias.zero_()  # type: ignore[union-attr]
        found = decoder(torch.ones(1, 1, 1, 1))
    assert found.tolist() == [[[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]]


def test_the_token_covers_what_is_hidden_and_starts_at_the_mean() -> None:
    decoder = PixelDecoder((1, 1, 1), (2, 2, 2), 1)
    x, hidden = torch.randn(2, 2, 2, 2), torch.tensor([[True, False], [False, True]]).expand(2, 1, 2, 2)
    assert torch.equal(decoder.cover(x, hidden), x * ~hidden)
    with torch.no_grad():
        decoder.token.weight.copy_(torch.tensor([[3.0, 5.0]]))
    covered = decoder.cover(x, hidden)
    assert covered[1, :, 0, 0].tolist() == [3, 5]
    assert torch.equal(covered * ~hidden, x * ~hidden)


def test_a_grid_decoder_gives_its_grid() -> None:
    assert GridDecoder(4, 8, 5, (6, 3))(torch.randn(2, 4, 3, 3)).shape == (2, 5, 6, 3)


# ---- learning --------------------------------------------------------------------------------------------------------
def scenes(count: int, seed: int) -> Batch:
    """Slopes in a random direction, so that a few patches tell the others."""
    angle = 6.3 * torch.rand(count, 1, 1, generator=torch.Generator().manual_seed(seed))
    place = torch.linspace(-1.5, 1.5, 8)
    return batch((angle.cos() * place[:, None] + angle.sin() * place)[:, None])


def measured(task: Task, model: nn.Module, given: Batch) -> dict[str, float]:
    with torch.no_grad(), keyed_global(9):
        return task.values(task.sums(task.forward(model.eval(), given), given))


@pytest.mark.parametrize(("name", "keys"), [("cnn", {"kernel": 5}), ("vit", {}), ("mae", {})])
def test_small_models_learn_slopes(name: str, keys: dict[str, Any]) -> None:
    job = a_job(name, keys=keys, patch=None if name == "mae" else 2, ratio=0.5)
    task, (model, _) = make_task(job), build_model(job)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    given, new = scenes(32, seed=0), scenes(64, seed=1)
    assert measured(task, model, new)["explained"] < 0.3
    with keyed_global(4):
        for _ in range(60):
            optimizer.zero_grad()
            task.loss(task.forward(model.train(), given), given).mean().backward()
            optimizer.step()
    after = measured(task, model, new)
    assert after["explained"] > 0.7
    assert after["error"] < 0.5
