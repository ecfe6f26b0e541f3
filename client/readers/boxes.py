"""Boxes as annotators write them -> class index and corners as fractions of the job's H x W."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from client.readers.base import Wanted
from client.readers.folders import shown
from client.readers.images import image_shape, open_picture, picture_tensor, placement, turn_boxes
from shared_models.errors import DataError

ROUNDING = 1.0  # pixels by which a box may reach out of its image; it is clipped

Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class Box:
    """One object in an image.

    Attributes:
        label: class index.
        corners: x0, y0, x1, y1 from the image's upper left corner, in pixels; the last pixel of an image of width W
            ends at W.
        where: file, and line or object, for messages.
    """

    label: int
    corners: Corners
    where: str


@dataclass(frozen=True)
class Annotation:
    """All objects in an image; none of them is a valid negative.

    Attributes:
        boxes: the objects.
        size: width and height that the image has by the annotator's word; None where he gave no word.
        fractions: corners are fractions of the width and height instead of pixels.
    """

    boxes: Sequence[Box]
    size: tuple[float, float] | None = None
    fractions: bool = False


def decode(path: Path, annotation: Annotation, wanted: Wanted, where: str) -> tuple[Tensor, Tensor]:
    """An image (C, H, W) and its target: boxes (n, 5) or, where the task wants one, box (4,).

    Images are shown upright, so annotations are taken for upright too, unless the size that they state is only that of
    the image as it is stored: then they are turned along.

    Raises:
        DataError: names `where` or the image.
    """
    if wanted.target == "box" and len(annotation.boxes) != 1:
        raise DataError(f"{where} has {len(annotation.boxes)} boxes and the task wants one in each image")
    picture = open_picture(path)
    upright = picture.image.size
    size = annotation.size or upright
    if size not in (upright, picture.stored):
        raise DataError(
            f"{where} is for an image of {size[0]:g}x{size[1]:g}, but {shown(path)} has {upright[0]}x{upright[1]}",
            hint="Annotate the image as it is",
        )
    labels = torch.tensor([float(box.label) for box in annotation.boxes]).reshape(-1, 1)
    corners = [within(box, size, annotation.fractions) for box in annotation.boxes]
    boxes = torch.tensor(corners).reshape(-1, 4)
    if size != upright:
        boxes = turn_boxes(boxes, picture.orientation)
    _, height, width = image_shape(wanted.data)
    left, top, *covered = placement(upright, wanted.data)
    frame = torch.tensor([width, height, width, height])
    boxes = ((boxes * torch.tensor(covered * 2) + torch.tensor([left, top] * 2)) / frame).clamp(0, 1)
    target = boxes[0] if wanted.target == "box" else torch.cat([labels, boxes], dim=1)
    return picture_tensor(picture, path, wanted.data), target


def within(box: Box, size: tuple[float, float], fractions: bool = False) -> Corners:
    """The box as fractions of an image of that size, clipped to it.

    Raises:
        DataError: a corner is no number, the box reaches out by more than rounding, or it is empty.
    """
    width, height = size
    x0, y0, x1, y1 = (c * side for c, side in zip(box.corners, size * 2, strict=True)) if fractions else box.corners
    if not all(map(math.isfinite, (x0, y0, x1, y1))):
        raise DataError(f"{box.where} has a coordinate that is no number")
    text = f"({x0:g}, {y0:g}, {x1:g}, {y1:g})"
    if max(-x0, -y0, x1 - width, y1 - height) > ROUNDING:
        raise DataError(f"{box.where} reaches out of its image of {width:g}x{height:g}: {text}")
    x0, y0, x1, y1 = max(x0, 0.0), max(y0, 0.0), min(x1, width), min(y1, height)
    if x1 <= x0 or y1 <= y0:
        raise DataError(f"{box.where} is empty: {text}")
    return x0 / width, y0 / height, x1 / width, y1 / height
