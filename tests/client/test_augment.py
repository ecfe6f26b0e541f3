"""Augmentation: what moves in the picture moves in its annotation, and the same key gives the same change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from client.augment import Augment
from client.readers.base import Splits
from client.trainer import train
from client.workbench import Workbench
from shared_models.errors import CompatibilityError
from shared_models.job import Job
from shared_models.job_parts import AugmentPart
from shared_models.keys import keyed_global
from shared_models.messages import Budget, Instruction
from shared_models.tasks.base import Batch

SIDE = 32
EVERYTHING = AugmentPart(flip=True, flip_vertical=True, quarter_turns=True, crop=4, rotate=20, scale=0.2)


def squares(count: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """A white rectangle in a black image, its mask, and its box in fractions."""
    source = torch.Generator().manual_seed(1)
    images = torch.zeros(count, 1, SIDE, SIDE, dtype=torch.uint8)
    masks = torch.zeros(count, SIDE, SIDE, dtype=torch.uint8)
    boxes = torch.zeros(count, 4)
    for i in range(count):
        x, y = torch.randint(8, 14, (2,), generator=source).tolist()
        w, h = torch.randint(6, 12, (2,), generator=source).tolist()
        images[i, 0, y : y + h, x : x + w] = 255
        masks[i, y : y + h, x : x + w] = 1
        boxes[i] = torch.tensor([x, y, x + w, y + h]) / SIDE
    return images, masks, boxes


def around(image: Tensor) -> Tensor:
    """The box around the bright pixels, in pixels."""
    rows, columns = torch.nonzero(image > 127, as_tuple=True)
    return torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


def test_masks_move_with_their_images() -> None:
    images, masks, _ = squares()
    with keyed_global(3):
        changed = Augment(EVERYTHING, "mask", (1, SIDE, SIDE))(Batch(images, masks))
    assert (changed.x != images).flatten(1).any(1).sum() > 20
    counted = changed.y != 255  # what comes in from outside counts nowhere
    assert torch.equal((changed.x[:, 0] > 127)[counted], (changed.y == 1)[counted])
    assert (changed.y == 255).any()
    assert changed.y.dtype == torch.uint8


@pytest.mark.parametrize(
    "part", [AugmentPart(flip=True), AugmentPart(quarter_turns=True), AugmentPart(crop=4, flip=True)]
)
def test_boxes_move_with_their_images(part: AugmentPart) -> None:
    images, _, boxes = squares()
    rows = torch.cat([torch.zeros(len(boxes), 1), boxes], dim=1)[:, None]
    padding = torch.tensor([-1.0, 0, 0, 0, 0]).expand(len(boxes), 1, 5)
    proposals = torch.stack([boxes, torch.zeros_like(boxes)], dim=1)
    with keyed_global(5):
        changed = Augment(part, "boxes", (1, SIDE, SIDE))(Batch(images, torch.cat([rows, padding], 1), proposals))
    assert changed.proposals is not None
    for image, y, regions in zip(changed.x, changed.y, changed.proposals, strict=True):
        torch.testing.assert_close(y[0, 1:] * SIDE, around(image[0]), atol=1e-3, rtol=0)
        assert torch.equal(regions[0], y[0, 1:])
        assert (regions[1] == 0).all()
        assert y[1].tolist() == [-1, 0, 0, 0, 0]
    with keyed_global(5):
        alone = Augment(part, "box", (1, SIDE, SIDE))(Batch(images, boxes))
    assert torch.equal(alone.y, changed.y[:, 0, 1:])


def test_an_object_that_leaves_the_image_is_an_object_no_more() -> None:
    image = torch.zeros(40, 1, SIDE, SIDE, dtype=torch.uint8)
    edge = torch.tensor([[[0.0, 0.0, 0.0, 3 / SIDE, 1.0]]]).repeat(40, 1, 1)  # three pixels at the left side
    with keyed_global(0):
        changed = Augment(AugmentPart(crop=8), "boxes", (1, SIDE, SIDE))(Batch(image, edge))
    there = changed.y[:, 0, 0] == 0
    assert 0 < there.sum() < 40
    assert (changed.y[~there, 0, 0] == -1).all()
    assert (changed.y[~there, 0, 1:] == 0).all()


def test_the_key_decides_and_every_sample_draws_its_own_change() -> None:
    images = squares(1)[0].repeat(16, 1, 1, 1)
    change = Augment(EVERYTHING, "class", (1, SIDE, SIDE))

    def drawn(key: int) -> Tensor:
        with keyed_global(key):
            return change(Batch(images, torch.zeros(16, dtype=torch.int64))).x

    assert torch.equal(drawn(7), drawn(7))
    assert not torch.equal(drawn(7), drawn(8))
    assert len({x.numpy().tobytes() for x in drawn(7)}) > 8


def test_training_sees_changed_images_and_measuring_does_not(
    make_job: Callable[..., Job], make_splits: Callable[..., Splits]
) -> None:
    plain, changed = make_job(), make_job(augment={"flip": True, "crop": 2, "brightness": 0.2})
    data = make_splits(1).train
    ends = []
    for job in (plain, changed, changed):
        bench = Workbench(job, torch.device("cpu"))
        train(bench, data, Instruction("train", "r", "s", job, "", budget=Budget(epochs=1)), [{}, {}])
        ends.append({n: t.clone() for n, t in bench.entries.items()})
    assert not all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])
    assert all(torch.equal(ends[1][n], ends[2][n]) for n in ends[1])
    assert plain.hash != changed.hash


def test_what_cannot_be_is_refused(make_job: Callable[..., Job]) -> None:
    with pytest.raises(CompatibilityError, match="not square"):
        make_job(data={"shape": [1, 8, 6]}, augment={"quarter_turns": True})
    features = {"shape": [2], "features": ["a", "b"]}
    with pytest.raises(CompatibilityError, match="changes images"):
        make_job(model={"name": "logistic"}, data=features, augment={"flip": True})
