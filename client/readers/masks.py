"""Images and a mask for each: `<root>/image/*` and `<root>/label/*`, or the same below train, validation and test.

The two folders may also be called images and labels, images and masks, or imgs and masks. An image and its mask have
one name up to the suffix.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from client.readers.base import Reader, Store, Tolerance, Wanted, reader, spelling
from client.readers.folders import image_files, part_folders, shown
from client.readers.images import Picture, cut, fit, open_picture, picture_tiles, size_of, tiles, turn
from client.readers.samples import Sample, anything, fill, in_order, numbered
from shared_models.errors import DataError
from shared_models.tasks.base import IGNORED

FOLDERS = (("image", "label"), ("images", "labels"), ("images", "masks"), ("imgs", "masks"))
OTHER_MASK = "Save masks as PNG, and say under [data.labels] in client.toml what a value or colour stands for"


@dataclass(frozen=True)
class Pair:
    """An image and its mask."""

    image: Path
    mask: Path


@reader("masks")
class Masks(Reader):
    """A pixel's class is the label or alias that its grey value, palette index or colour `#rrggbb` spells.

    Else a number is an index into the label list, except 255, which counts nowhere, and a colour without hue is its
    grey value. In masks of one bit the one is 255 where 255 has an alias, else 1.
    """

    targets = ("mask",)

    def read(self, root: Path, wanted: Wanted) -> Store:
        """Samples in the order of part and file name."""
        bad = Tolerance(wanted.skip_bad)

        def decode(sample: Sample[Pair]) -> tuple[Tensor, Tensor]:
            pair = sample.about
            picture = open_picture(pair.image)
            mask = load_mask(pair.mask, picture, wanted)
            areas = tiles(picture.image.size, wanted.data)
            pieces = [cut(Image.fromarray(mask), area, IGNORED) for area in areas]
            small = [np.array(fit(piece, wanted.data, Image.Resampling.NEAREST, IGNORED)) for piece in pieces]
            return picture_tiles(picture, pair.image, wanted.data, areas), torch.from_numpy(np.stack(small))

        samples = _samples(root, bad)
        if wanted.data.tile:
            sizes = bad.each(samples, lambda sample: size_of(sample.about.image))
            samples = [replace(sample, tiles=len(tiles(size, wanted.data))) for sample, size in sizes]
        return fill(samples, decode, wanted, bad)

    def check(self, root: Path) -> dict[str, Any]:
        """Opens every image and mask; counts the images that show a value or colour, be it in one pixel."""
        bad, wanted = Tolerance(sys.maxsize), anything("mask")
        seen: dict[str, Counter[int]] = {}

        def look(sample: Sample[Pair]) -> None:
            mask = load_mask(sample.about.mask, open_picture(sample.about.image), wanted)
            seen.setdefault(sample.part or "all", Counter()).update(np.unique(mask).tolist())

        found = bad.each(_samples(root, bad), look)
        classes = {
            part: wanted.named([counts[index] for index in range(len(wanted.words))]) for part, counts in seen.items()
        }
        return {"images": len(found), "classes": classes, "unreadable": bad.found}


def load_mask(path: Path, picture: Picture, wanted: Wanted) -> np.ndarray:
    """(height, width) uint8: the class index of every pixel of a picture, or 255.

    Raises:
        DataError: it cannot be read, has another size than its image, or a value that stands for no class.
    """
    mask = open_picture(path)
    upright = mask.image
    if upright.size != picture.image.size and mask.orientation == 1 and mask.stored == picture.stored:
        upright = turn(upright, picture.orientation)  # drawn on the image as it is stored
    if upright.size != picture.image.size:
        (width, height), (wide, high) = upright.size, picture.image.size
        raise DataError(f"mask {shown(path)} has {width}x{height} pixels, its image {wide}x{high}", hint=OTHER_MASK)
    return _classes(upright, wanted, f"mask {shown(path)}")


def _samples(root: Path, bad: Tolerance) -> list[Sample[Pair]]:
    parts = part_folders(root) or {"": root}
    found = [(part, pair) for part, base in parts.items() for pair in _pairs(base, bad)]
    return in_order(Sample(pair.image.relative_to(root).as_posix(), pair, part) for part, pair in found)


def _pairs(base: Path, bad: Tolerance) -> list[Pair]:
    for images, masks in FOLDERS:
        if (base / images).is_dir() and (base / masks).is_dir():
            break
    else:
        raise DataError(
            f"{shown(base)} has no folders for images and masks",
            hint="Expected one of " + ", ".join(f"{a}/ and {b}/" for a, b in FOLDERS),
        )
    sides: list[dict[str, list[Path]]] = [{}, {}]
    for side, folder in zip(sides, (base / images, base / masks), strict=True):
        for path in image_files(folder):
            side.setdefault(spelling(path.stem), []).append(path)
    if not sides[0]:
        raise DataError(f"no image in {shown(base / images)}")

    def pair(stem: str) -> Pair:
        found = [side.get(stem, []) for side in sides]
        if [len(f) for f in found] != [1, 1]:
            raise DataError(
                f"{shown((found[0] or found[1])[0])}: {len(found[0])} images and {len(found[1])} masks have this name",
                hint=f"Give each image in {images}/ one mask in {masks}/",
            )
        return Pair(found[0][0], found[1][0])

    return [good for _, good in bad.each(sorted({*sides[0], *sides[1]}), pair)]


def _classes(mask: Image.Image, wanted: Wanted, where: str) -> np.ndarray:
    """(height, width) uint8: a class index or 255 for each pixel."""
    if mask.mode in ("RGBA", "LA"):
        if mask.getextrema()[-1] != (255, 255):
            raise DataError(f"{where} has transparent pixels", hint=OTHER_MASK)
        mask = mask.convert(mask.mode[:-1])
    colours = mask.mode == "RGB"
    if colours:
        red, green, blue = np.moveaxis(np.asarray(mask, dtype=np.int32), 2, 0)
        values = red << 16 | green << 8 | blue
    elif mask.mode == "1":
        values = np.where(np.asarray(mask), IGNORED if wanted.knows(str(IGNORED)) else 1, 0)
    elif mask.mode in ("L", "P") or mask.mode.startswith("I"):
        values = np.asarray(mask)
    else:
        raise DataError(f"{where} is of Pillow's mode {mask.mode}, which is no mask's", hint=OTHER_MASK)
    present = np.unique(values)
    table = np.empty(len(present), np.uint8)
    for i, value in enumerate(present.tolist()):
        y, x = np.unravel_index(np.argmax(values == value), values.shape)
        table[i] = _class(value, colours, wanted, f"{where} at (x, y) = ({x}, {y})")
    classes: np.ndarray = table[np.searchsorted(present, values)]
    return classes


def _class(value: int, colour: bool, wanted: Wanted, where: str) -> int:
    if colour:
        code = f"#{value:06x}"
        for word in (code, code.upper()):
            if wanted.knows(word):
                return _in_a_byte(wanted.index(word, where), where)
        grey, rest = value & 255, value >> 8
        if rest != grey << 8 | grey:
            raise DataError(f"{where} has the colour {code}, which stands for no class", hint=OTHER_MASK)
        value = grey
    if value == IGNORED and not wanted.knows(str(IGNORED)):
        return IGNORED
    return _in_a_byte(numbered(value, wanted, where), where)


def _in_a_byte(index: int, where: str) -> int:
    if index >= IGNORED:
        raise DataError(f"{where} has the {index + 1}th class, and a mask holds at most {IGNORED}", hint=OTHER_MASK)
    return index
