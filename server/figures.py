"""Metric sums of several answers as one, and figures as events, checkpoints and results hold them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from shared_models.messages import Contribution
from shared_models.tasks.base import add_sums


def round_to(value: float) -> float:
    """Seven significant digits: what float32 holds, and readable in a log."""
    return float(f"{value:.7g}")


def merge_sums(replies: Iterable[Contribution], prefix: str) -> dict[str, Tensor]:
    """Metric sums below `prefix`, added over replies and over what stands between prefix and name."""
    sums: dict[str, Tensor] = {}
    for reply in sorted(replies, key=lambda r: r.site):  # float sums must not depend on arrival
        for path, value in reply.metrics.items():
            if path.startswith(prefix + "/"):
                add_sums(sums, {path.rpartition("/")[2]: value})
    return sums
