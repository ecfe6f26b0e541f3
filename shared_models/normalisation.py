"""Mean and standard deviation over several sites' training examples, from sums that each site gives.

For every channel (or feature) c a site gives n_c, sum x_c and sum x_c^2 over its training examples, with x in units of
`byte / 255` for images; nothing about a single example. Merged by addition they give what pooling would:

    mean_c = sum x_c / n_c,    std_c = sqrt(sum x_c^2 / n_c - mean_c^2)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

FEWEST = 10  # a site with fewer training examples gives no sums: they would say too much about each
CONSTANT = 1e30
NAMES = ("count", "sum", "squares")


def no_sums(channels: int) -> dict[str, Tensor]:
    """Sums of no examples: the names, shapes (C,) and the dtype float64 that all sums have."""
    return {name: torch.zeros(channels, dtype=torch.float64) for name in NAMES}


def channel_sums(x: Tensor, unit: float, rows: int = 256) -> dict[str, Tensor]:
    """Sums over x / unit, (N, C, H, W), (N, F) or series (N, T, C); a missing feature (NaN) counts nowhere."""
    axis = 2 if x.dim() == 3 else 1
    sums = no_sums(x.shape[axis])
    for part in x.split(rows):
        values = part.double().movedim(axis, 0).flatten(1) / unit  # (C, n)
        known = ~values.isnan()
        values = values.nan_to_num(nan=0.0)
        for name, more in zip(NAMES, (known, values, values * values), strict=True):
            sums[name] += more.sum(dim=1)
    return sums


def merge(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """`mean` and `std`, each (C,) float32, over all parts in their order.

    A channel that is constant at these sites gets an enormous std, so that it is 0 everywhere: nothing can be learnt
    from it, and another site's values must not be let loose on a weight that was never trained.
    """
    total: dict[str, Tensor] = {}
    for part in parts:
        total = {name: total[name] + part[name] if total else part[name] for name in NAMES}
    count = total["count"].clamp(min=1)
    mean = total["sum"] / count
    std = (total["squares"] / count - mean * mean).clamp(min=0).sqrt()
    return {"mean": mean.float(), "std": torch.where(std > 1e-6, std, CONSTANT).float()}
