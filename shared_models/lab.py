"""CIE L*a*b* under D65, as scikit-image converts it, and the 313 bins of its colours (Zhang et al. 2016)."""

from __future__ import annotations

import torch
from torch import Tensor

XYZ_FROM_RGB = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
WHITE = (0.95047, 1.0, 1.08883)
STEP = 10  # side of a bin
# a of a row of bins -> b of its first and last one. The paper's bins: those whose centre lies in the convex hull of all
# colours of sRGB, and their eight neighbours.
ROWS = {
    -90: (50, 90), -80: (20, 90), -70: (0, 90), -60: (-20, 90), -50: (-30, 100), -40: (-40, 100), -30: (-50, 100),
    -20: (-50, 100), -10: (-60, 100), 0: (-70, 100), 10: (-80, 90), 20: (-80, 90), 30: (-90, 90), 40: (-100, 90),
    50: (-100, 80), 60: (-110, 80), 70: (-110, 80), 80: (-110, 70), 90: (-110, 70), 100: (-90, 0),
}  # fmt: skip
CENTRES = [(a, b) for a, (low, high) in ROWS.items() for b in range(low, high + 1, STEP)]


def centres(device: torch.device | None = None) -> Tensor:
    """(313, 2) float32: a and b of each bin."""
    return torch.tensor(CENTRES, dtype=torch.float32, device=device)


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB in [0, 1] -> L in [0, 100], a and b; both (B, 3, H, W)."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    matrix, white = (torch.tensor(v, dtype=rgb.dtype, device=rgb.device) for v in (XYZ_FROM_RGB, WHITE))
    # a sum, not a product of matrices, which autocast would round to bfloat16
    xyz = (linear[:, None] * matrix[:, :, None, None]).sum(dim=2) / white[:, None, None]
    f = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(dim=1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)
