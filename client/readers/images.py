"""One image file or array -> (C, H, W) bytes, by the rules that all readers share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from shared_models.errors import DataError
from shared_models.job import DataPart

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm"}


def load_image(path: Path, data: DataPart) -> Tensor:
    """Decode one file; raises a DataError that names it."""
    try:
        with Image.open(path) as image:
            return to_tensor(image, data)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"image {path} cannot be read: {error}", hint="Mend or remove the file") from None


def to_tensor(image: Image.Image, data: DataPart) -> Tensor:
    """(C, H, W) uint8: upright, in the job's colours and size. 16-bit and float images are scaled to 8 bit.

    Float images are divided by 1, or by their largest value where that is greater.

    Raises:
        ValueError: it holds values that are no numbers, or colours that cannot be converted.
    """
    channels, height, width = data.shape
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):
        values = np.asarray(upright, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("it holds values that are no numbers")
        top = 65535.0 if upright.mode.startswith("I") else max(float(values.max()), 1.0)
        upright = Image.fromarray(np.clip(values * 255.0 / top, 0, 255).round().astype(np.uint8))
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        layered = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layered.size, "black"), layered)
    upright = upright.convert("L" if channels == 1 else "RGB")
    if upright.size != (width, height):
        if data.resize == "pad":
            upright = ImageOps.pad(upright, (width, height), Image.Resampling.BILINEAR, color=0)
        else:
            upright = upright.resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(upright, dtype=np.uint8))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()
