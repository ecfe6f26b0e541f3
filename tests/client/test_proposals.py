"""Selective search: its merging by hand, what its boxes are, and how many objects they find."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from client.proposals import ALIKE, SMALLEST, _first_regions, _histograms, _merge, _Regions, propose
from shared_models.boxes import area, pairwise_iou


def drawn(count: int, channels: int = 3, seed: int = 0, side: int = 64) -> tuple[Tensor, list[Tensor]]:
    """Images of one to three rectangles or discs on noise, and the boxes around them as fractions."""
    source = np.random.default_rng(seed)
    rows, columns = np.indices((side, side))
    images, truths = [], []
    for _ in range(count):
        image = source.normal(100, 12, (side, side, channels))
        boxes: list[list[int]] = []
        for _ in range(int(source.integers(1, 4))):
            width, height = source.integers(12, 26, 2)
            left, top = source.integers(1, side - width - 1), source.integers(1, side - height - 1)
            inside = (columns >= left) & (columns < left + width) & (rows >= top) & (rows < top + height)
            if source.random() < 0.5:
                height = width = min(width, height)
                centre = (left + width / 2 - 0.5, top + height / 2 - 0.5)
                inside = (columns - centre[0]) ** 2 + (rows - centre[1]) ** 2 <= width**2 / 4
            box = [left, top, left + width, top + height]
            if boxes and pairwise_iou(torch.tensor([box]), torch.tensor(boxes)).max() > 0:
                continue
            image[inside] = source.choice([20, 220], channels) + source.normal(0, 12, (int(inside.sum()), channels))
            boxes.append(box)
        images.append(torch.from_numpy(image.clip(0, 255).astype(np.uint8)).permute(2, 0, 1))
        truths.append(torch.tensor(boxes) / side)
    return torch.stack(images), truths


def recall(proposals: Tensor, truths: list[Tensor], overlap: float = 0.5) -> float:
    hits = [pairwise_iou(t, p).amax(dim=1) >= overlap for p, t in zip(proposals, truths, strict=True)]
    return float(torch.cat(hits).float().mean())


def test_the_most_similar_neighbours_merge_first() -> None:
    """Three regions in a row, of 2, 1 and 1 pixels; the first two look alike."""
    first = _Regions(
        pixels=4,
        sizes=np.array([2, 1, 1], np.float32),
        boxes=np.array([[0, 0, 2, 1], [2, 0, 3, 1], [3, 0, 4, 1]], np.float32),
        histograms=np.array([[1, 0], [0.75, 0.25], [0, 1]], np.float32),
        touching=np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], bool),
    )
    # alike(0, 1) = 0.75 + 2 - 3/4 = 2, alike(1, 2) = 0.25 + 2 - 2/4 = 1.75
    boxes, ends = _merge(first, first.histograms)
    assert boxes.tolist() == [[0, 0, 2, 1], [2, 0, 3, 1], [3, 0, 4, 1], [0, 0, 3, 1], [0, 0, 4, 1]]
    np.testing.assert_allclose(ends, [1 / 3, 1 / 3, 2 / 3, 2 / 3, 1])
    # by size and fill alone the two small ones go first: 2 - 2/4 before 2 - 3/4
    boxes, ends = _merge(first, first.histograms[:, :0])
    assert boxes.tolist()[3:] == [[2, 0, 4, 1], [0, 0, 4, 1]]
    np.testing.assert_allclose(ends, [2 / 3, 1 / 3, 1 / 3, 2 / 3, 1])


def test_a_merged_region_has_the_mean_histogram_of_its_pixels() -> None:
    """b (3 pixels) and d (1) go first and share 0.525 with c: less than a does, 0.54. An unweighted mean has 0.55."""
    first = _Regions(
        pixels=100,
        sizes=np.array([1, 3, 1, 1], np.float32),
        boxes=np.array([[0, 0, 1, 1]] * 4, np.float32),
        histograms=np.array([[0.96, 0.04], [0, 1], [0.5, 0.5], [0.1, 0.9]], np.float32),
        touching=~np.eye(4, dtype=bool),
    )
    ends = _merge(first, first.histograms)[1]
    np.testing.assert_allclose(ends, [2 / 4, 1 / 4, 2 / 4, 1 / 4, 3 / 4, 3 / 4, 1])  # a, b, c, d, bd, ac, all


def test_histograms_count_colours_and_the_direction_of_gradients() -> None:
    image = np.zeros((8, 8, 1), np.float32)
    image[:, 4:] = 0.5  # brighter to the right, nowhere up or down
    labels = (np.indices((8, 8))[0] >= 4).astype(int)  # an upper and a lower half
    found = _histograms(image, labels, 2)
    assert found.shape == (2, 25 + 80)
    np.testing.assert_allclose(found.sum(axis=1), 2, rtol=1e-5)
    np.testing.assert_allclose(found[:, [0, 12]], 0.5)  # half of each is black, half grey: 0.5 * 25 = 12.5
    texture = found[0, 25:].reshape(8, 10)
    assert texture[0, 1:].sum() > 0.01  # to the right
    assert texture[[2, 4, 6], 1:].sum() == 0  # down, left, up
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_first_regions_cover_the_image() -> None:
    image = drawn(1)[0][0].permute(1, 2, 0).numpy().astype(np.float32) / 255
    regions = _first_regions(image, 10.0)
    assert regions.sizes.sum() == regions.pixels == 64 * 64
    assert (regions.sizes <= (regions.boxes[:, 2:] - regions.boxes[:, :2]).prod(axis=1)).all()
    assert (regions.touching == regions.touching.T).all()
    assert not regions.touching.diagonal().any()
    assert regions.touching.any(axis=1).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_it_finds_what_is_drawn(channels: int) -> None:
    images, truths = drawn(6, channels)
    found = propose(images, 200)
    assert recall(found, truths) >= 0.95
    assert recall(found.flip(0), truths) < 0.8  # another image's proposals do not


def test_boxes_are_fractions_apart_from_each_other_and_padded_at_the_end() -> None:
    images = torch.cat([drawn(2)[0], torch.full((1, 3, 64, 64), 90, dtype=torch.uint8)])
    images = images[..., :40]  # 64 high, 40 wide
    found = propose(images, 400)
    assert found.shape == (3, 400, 4)
    assert found.dtype == torch.float32
    for boxes in found:
        count = int((area(boxes) > 0).sum())
        assert 0 < count < 400
        assert (boxes[count:] == 0).all()
        boxes = boxes[:count]
        assert boxes.min() >= 0
        assert boxes.max() <= 1
        assert ((boxes[:, 2:] - boxes[:, :2]) * torch.tensor([40, 64])).min() >= SMALLEST - 1e-3
        overlaps = pairwise_iou(boxes, boxes) - torch.eye(count)
        assert overlaps.max() <= ALIKE + 1e-5
        pixels = boxes * torch.tensor([40, 64, 40, 64])
        torch.testing.assert_close(pixels, pixels.round(), atol=1e-3, rtol=0)
    torch.testing.assert_close(found[-1, 0], torch.tensor([0.0, 0.0, 1.0, 1.0]))  # an even image is one region
    assert (found[-1, 1:] == 0).all()


def test_the_image_alone_decides() -> None:
    images, _ = drawn(3, seed=2)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found = propose(images, 60)
    assert torch.equal(torch.get_rng_state(), before)
    np.random.seed(5)
    assert torch.equal(propose(images, 60), found)
    assert torch.equal(propose(images[1:2], 60)[0], found[1])  # whatever lies beside it
    assert torch.equal(propose(images, 20), found[:, :20])  # a limit cuts off the end
    assert not torch.equal(found[0], found[1])


def test_nothing_to_look_at() -> None:
    assert propose(torch.zeros(0, 3, 16, 16, dtype=torch.uint8), 5).shape == (0, 5, 4)
    assert not propose(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), 5).any()  # smaller than the smallest box


@pytest.mark.data
def test_it_finds_blood_cells(real_data: Path) -> None:
    """Cells that overlap; the docstring of `client.proposals` gives the recall on all images."""
    folder = real_data / "bccd" / "BCCD"
    images, truths = [], []
    for path in sorted((folder / "JPEGImages").glob("*.jpg"))[:8]:
        picture = Image.open(path)
        width, height = picture.size
        images.append(torch.from_numpy(np.array(picture.resize((160, 120)))).permute(2, 0, 1))
        corners = [
            [float(box.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax")]
            for box in ElementTree.parse(folder / "Annotations" / f"{path.stem}.xml").iter("bndbox")
        ]
        truths.append((torch.tensor(corners) - torch.tensor([1, 1, 0, 0])) / torch.tensor([width, height] * 2))
    found = propose(torch.stack(images), 300)
    assert recall(found, truths) > 0.82
    assert recall(found, truths, 0.35) > 0.95
