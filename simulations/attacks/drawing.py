"""What the report of an attack shows: images as PNG files, and ROC curves on two logarithmic axes as inline SVG."""

from __future__ import annotations

import base64
import io

from PIL import Image
from torch import Tensor

SIDE = 128  # pixels of a picture's longer side, about


def png(image: Tensor) -> str:
    """A (C, H, W) image of pixels from 0 to 1, enlarged without smoothing: a PNG file, base64."""
    grey = (image * 255).round().clamp(0, 255).byte()
    array = grey[0].numpy() if len(grey) == 1 else grey.permute(1, 2, 0).numpy()
    drawn = Image.fromarray(array)
    factor = max(1, round(SIDE / max(drawn.size)))
    drawn = drawn.resize((drawn.width * factor, drawn.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    drawn.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
