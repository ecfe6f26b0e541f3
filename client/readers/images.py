"""One image file or array -> (C, H, W) bytes, by the rules that all readers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from PIL.ExifTags import Base
from torch import Tensor

from client.readers.folders import shown
from shared_models.errors import ConfigError, DataError
from shared_models.job_parts import DataPart

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM")  # whatever the suffix; others may start programs
MAX_PIXELS = 100_000_000  # of a file; a larger one may be a decompression bomb

T = TypeVar("T")

Size = tuple[int, int]  # width, height
Area = tuple[int, int, int, int]  # left, top, right, bottom, in pixels; may reach beyond an image's edge
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Picture:
    """A decoded file.

    Attributes:
        image: upright, in the file's own colours.
        stored: width and height before it was turned.
        orientation: how it had to be turned, as in EXIF: 1 is not at all, 6 is clockwise.
    """

    image: Image.Image
    stored: Size
    orientation: int = 1


def open_picture(path: Path) -> Picture:
    """Decode one file; raises a DataError that names it."""

    def decode(image: Image.Image, orientation: int) -> Picture:
        image.load()
        return Picture(turn(image, orientation), image.size, orientation)

    return _opened(path, decode)


def size_of(path: Path) -> Size:
    """Width and height of one file when it is upright, from its header; raises a DataError that names it."""
    return _opened(path, lambda image, orientation: image.size if orientation < 5 else image.size[::-1])


def _opened(path: Path, look: Callable[[Image.Image, int], T]) -> T:
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, the limit is {MAX_PIXELS // 10**6} megapixels")
            orientation = image.getexif().get(Base.Orientation, 1)
            return look(image, orientation if orientation in TURNS else 1)
    except Exception as error:  # a damaged file makes a decoder raise anything
        reason = str(error) or type(error).__name__
        raise DataError(f"image {shown(path)} cannot be read: {reason}", hint="Mend or remove the file") from None


def turn(image: Image.Image, orientation: int) -> Image.Image:
    """The image turned upright; an orientation that EXIF does not know turns nothing."""
    method = TURNS.get(orientation)
    return image if method is None else image.transpose(method)


def turn_boxes(boxes: Tensor, orientation: int) -> Tensor:
    """Boxes (n, 4) as fractions of the stored image -> of the image as `turn` leaves it."""
    x, y = boxes[:, 0::2], boxes[:, 1::2]
    if orientation >= 5:
        x, y = y, x
    if orientation in (2, 3, 6, 7):
        x = 1 - x
    if orientation in (3, 4, 7, 8):
        y = 1 - y
    (x0, x1), (y0, y1) = (v.sort(dim=1).values.unbind(1) for v in (x, y))
    return torch.stack([x0, y0, x1, y1], dim=1)


def load_image(path: Path, data: DataPart) -> Tensor:
    """One file as (C, H, W) uint8; raises a DataError that names it."""
    return picture_tensor(open_picture(path), path, data)


def picture_tensor(picture: Picture, path: Path, data: DataPart) -> Tensor:
    """The same of a file that is decoded."""
    return picture_tiles(picture, path, data, [(0, 0, *picture.image.size)])[0]


def picture_tiles(picture: Picture, path: Path, data: DataPart, areas: Sequence[Area]) -> Tensor:
    """(len(areas), C, H, W) uint8: tiles of a file that is decoded; raises a DataError that names it."""
    try:
        image = in_colours(picture.image, data)
    except ValueError as error:
        raise DataError(f"image {shown(path)} cannot be read: {error}", hint="Mend or remove the file") from None
    return torch.stack([_pixels(cut(image, area, 0), data) for area in areas])


def to_tensor(image: Image.Image, data: DataPart) -> Tensor:
    """(C, H, W) uint8: in the job's colours and size; raises ValueError like `in_colours`."""
    return _pixels(in_colours(image, data), data)


def in_colours(image: Image.Image, data: DataPart) -> Image.Image:
    """The image in the job's colours, grey or red, green and blue. 16-bit and float images are scaled to 8 bit.

    Float images are divided by 1, or by their largest value where that is greater.

    Raises:
        ValueError: it holds values that are no numbers, or colours that cannot be converted.
    """
    channels, _, _ = image_shape(data)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("it holds values that are no numbers")
        top = 65535.0 if image.mode.startswith("I") else max(float(values.max()), 1.0)
        image = Image.fromarray(np.clip(values * 255.0 / top, 0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layered.size, "black"), layered)
    return image.convert("L" if channels == 1 else "RGB")


def _pixels(image: Image.Image, data: DataPart) -> Tensor:
    pixels = torch.from_numpy(np.array(fit(image, data, Image.Resampling.BILINEAR, 0), dtype=np.uint8))
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()


def tiles(size: Size, data: DataPart) -> list[Area]:
    """What an image of that size is cut into, row by row from its left upper corner; without `data.tile`, itself."""
    width, height = size
    high, wide = data.tile or (height, width)
    return [(left, top, left + wide, top + high) for top in range(0, height, high) for left in range(0, width, wide)]


def cut(image: Image.Image, area: Area, fill: int) -> Image.Image:
    """An area of an image; what lies beyond its edge has one value."""
    left, top, right, bottom = area
    inside = image.crop((left, top, min(right, image.width), min(bottom, image.height)))
    return _framed(inside, (right - left, bottom - top), (0, 0), fill)


def _framed(image: Image.Image, size: Size, corner: tuple[int, int], fill: int) -> Image.Image:
    if image.size == size:
        return image
    frame = Image.new(image.mode, size, (fill,) * len(image.getbands()))
    frame.paste(image, corner)
    return frame


def fit(image: Image.Image, data: DataPart, resampling: Image.Resampling, fill: int) -> Image.Image:
    """The image in the job's size; what padding adds has one value."""
    _, height, width = image_shape(data)
    left, top, *inner = placement(image.size, data)
    if image.size != tuple(inner):
        image = image.resize((inner[0], inner[1]), resampling)
    return _framed(image, (width, height), (left, top), fill)


def placement(size: Size, data: DataPart) -> tuple[int, int, int, int]:
    """Left, top, width and height of what an image of that size covers of the job's H x W, in pixels."""
    _, height, width = image_shape(data)
    if data.resize == "stretch":
        return 0, 0, width, height
    covered_width = min(width, max(1, round(size[0] / size[1] * height)))
    covered_height = min(height, max(1, round(size[1] / size[0] * width)))
    return round((width - covered_width) / 2), round((height - covered_height) / 2), covered_width, covered_height


def image_shape(data: DataPart) -> tuple[int, int, int]:
    """(C, H, W); raises a ConfigError where the job wants features."""
    if len(data.shape) != 3:
        raise ConfigError(
            f"data.shape = {list(data.shape)} is that of a table's features, and these data are images",
            hint="E.g. shape = [1, 28, 28]; tables are read by the reader 'csv'",
        )
    return data.shape
