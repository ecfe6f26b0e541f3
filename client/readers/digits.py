"""scikit-learn's handwritten digits: 1,797 grey images of 8 x 8 that ship with the library. For demos and tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from client.readers.base import Reader, Store, Wanted, reader
from client.readers.images import to_tensor
from shared_models.errors import DataError


@reader("digits")
class Digits(Reader):
    """Pixels 0..16 are scaled to bytes 0..255. The root is not used."""

    targets = ("class", "none")
    needs_root = False

    def read(self, root: Path, wanted: Wanted) -> Store:
        """Samples in the order of label list (of digits where none is wanted) and index; labels are the ten digits."""
        known = wanted.target == "class"
        index = [wanted.index(str(digit), f"digit {digit}") if known else digit for digit in range(10)]
        pixels, target = _load()
        grey = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        classes = [index[d] for d in target]
        order = sorted(range(len(grey)), key=lambda i: (classes[i], i))
        return Store(
            x=torch.stack([to_tensor(Image.fromarray(grey[i]), wanted.data) for i in order]),
            y=torch.tensor([classes[i] if known else 0 for i in order]),
            names=[f"{i:05d}.png" for i in order],
            data=wanted.data,
        )

    def check(self, root: Path) -> dict[str, Any]:
        """The library's own counts."""
        _, target = _load()
        counts = {str(d): int(n) for d, n in enumerate(np.bincount(target))}
        return {"images": len(target), "classes": {"all": counts}, "unreadable": []}


def _load() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (1797, 64) float64 in 0..16, and digits (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("the reader 'digits' needs scikit-learn", hint="pip install 'fedzoo[simulations]'") from None
    pixels, target = load_digits(return_X_y=True)
    return pixels, target
