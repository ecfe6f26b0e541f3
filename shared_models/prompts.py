"""Prompts made from masks: which object of an image is meant, and the point or box that names it.

An object is a connected component (by edges, not corners) of one class; objects of one class that touch are one.
Everything here works on one image at a time, in NumPy. Random choices take numbers from [0, 1) that the caller drew, so
what is chosen for one image does not depend on another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.special import ndtri

from shared_models.promptable import HIGH_CORNER, INSIDE, LOW_CORNER, PADDING

DRAWS = 7  # numbers for one image: which object, point or box, which pixel, and the noise of four coordinates
NONE = -1  # the class of an image without an object
SPREAD = 0.1  # standard deviation of the noise on a box's coordinates, as a share of its sides
FARTHEST = 20 / 1024  # but no coordinate moves by more than this share of the image's side
DEVIATIONS = 3.0  # nor by more standard deviations: a box stays a box


class Object(NamedTuple):
    """One object of an image.

    Attributes:
        pixels: (H, W) bool; none is true where the image has no object.
        label: its class index, or -1.
    """

    pixels: npt.NDArray[np.bool_]
    label: int


class Prompt(NamedTuple):
    """Two points, of which the second may be padding.

    Attributes:
        points: (2, 2), x and y as fractions of width and height.
        labels: (2,), see `shared_models.promptable`.
    """

    points: npt.NDArray[np.float64]
    labels: tuple[int, int]


NOTHING = Prompt(np.zeros((2, 2)), (PADDING, PADDING))


def choose(mask: npt.NDArray[Any], classes: Sequence[int], smallest: int, draw: float | None = None) -> Object:
    """An object of the image: by a number from [0, 1) any with the same probability, without one the largest.

    Args:
        mask: (H, W) integers, a class index at every pixel.
        classes: that objects can have.
        smallest: pixels that an object has at least.
        draw: the number.
    """
    found: list[tuple[int, int, int]] = []  # pixels, class, number within the class
    parts: dict[int, npt.NDArray[Any]] = {}
    for label in np.intersect1d(mask, np.asarray(classes)).tolist():
        parts[label], _ = ndimage.label(mask == label)
        sizes = np.bincount(parts[label].ravel()).tolist()
        found += [(size, label, i) for i, size in enumerate(sizes) if i and size >= smallest]
    if not found:
        return Object(np.zeros(mask.shape, dtype=np.bool_), NONE)
    _, label, number = max(found, key=lambda part: part[0]) if draw is None else found[int(draw * len(found))]
    return Object(parts[label] == number, label)


def by_point(thing: Object) -> Prompt:
    """The pixel of the object that is farthest from its border; the image's edge is a border."""
    if thing.label == NONE:
        return NOTHING
    depth = ndimage.distance_transform_edt(np.pad(thing.pixels, 1))[1:-1, 1:-1]
    return _point(int(depth.argmax()), thing.pixels.shape)


def by_box(thing: Object) -> Prompt:
    """The smallest box around the object."""
    if thing.label == NONE:
        return NOTHING
    height, width = thing.pixels.shape
    rows, columns = np.flatnonzero(thing.pixels.any(axis=1)), np.flatnonzero(thing.pixels.any(axis=0))
    low = columns[0] / width, rows[0] / height
    high = (columns[-1] + 1) / width, (rows[-1] + 1) / height
    return Prompt(np.array([low, high]), (LOW_CORNER, HIGH_CORNER))


def by_chance(thing: Object, draws: Sequence[float]) -> Prompt:
    """Any pixel of the object or its box with noise, one as likely as the other (Kirillov et al. 2023, appendix A).

    Args:
        thing: the object.
        draws: six numbers from [0, 1).
    """
    kind, which, *noise = draws
    if thing.label == NONE:
        return NOTHING
    if kind < 0.5:
        pixels = np.flatnonzero(thing.pixels)
        return _point(int(pixels[int(which * len(pixels))]), thing.pixels.shape)
    corners, labels = by_box(thing)
    normal = np.clip(ndtri(noise), -DEVIATIONS, DEVIATIONS).reshape(2, 2)
    moves = np.clip(SPREAD * (corners[1] - corners[0]) * normal, -FARTHEST, FARTHEST)
    return Prompt(np.clip(corners + moves, 0.0, 1.0), labels)


def _point(pixel: int, shape: tuple[int, ...]) -> Prompt:
    """The centre of a pixel, given by its index in the flattened image."""
    row, column = divmod(pixel, shape[1])
    return Prompt(np.array([((column + 0.5) / shape[1], (row + 0.5) / shape[0]), (0.0, 0.0)]), (INSIDE, PADDING))
