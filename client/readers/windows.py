"""A long series, cut into windows of equal length, and the windows into parts that share no step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from client.readers.base import PARTS
from client.readers.parts import part_at
from shared_models.job_parts import DataPart

NO_CLASS = -1


@dataclass(frozen=True)
class Step:
    """One moment: C numbers, NaN where one is missing; the index of its class, -1 for none; the owner's part."""

    numbers: Sequence[float]
    label: int = 0
    part: str = ""


@dataclass
class Series:
    """Steps in their order, None for one that cannot be used, and for each the line it stands in."""

    steps: list[Step | None] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)

    def append(self, step: Step | None, line: int) -> None:
        """The next step."""
        self.steps.append(step)
        self.lines.append(line)


@dataclass(frozen=True)
class Windows:
    """W windows: x (W, T, C) float32, y (W,) int64, the line of each one's first step, and its part, empty for none."""

    x: Tensor
    y: Tensor
    lines: Sequence[int]
    parts: Sequence[str]


def cut(series: Series, data: DataPart, left_out: Counter[str]) -> Windows:
    """All windows that hold one class and one part.

    Args:
        series: of any length.
        data: shape (T, C), `stride`, `missing` and `parts`.
        left_out: counts those that are left out, by reason.
    """
    length, channels = data.shape
    stride = data.stride or length
    gap = Step([torch.nan] * channels)
    steps = [step or gap for step in series.steps]
    if len(steps) < length:
        return Windows(torch.empty(0, length, channels), torch.empty(0, dtype=torch.int64), (), ())
    usable = torch.tensor([step is not None for step in series.steps]).unfold(0, length, stride)  # (W, T)
    numbers = torch.tensor([step.numbers for step in steps]).unfold(0, length, stride)  # (W, C, T)
    labels = torch.tensor([step.label for step in steps]).unfold(0, length, stride)
    parts = torch.tensor([["", *PARTS].index(step.part) for step in steps]).unfold(0, length, stride)
    kept = torch.ones(len(usable), dtype=torch.bool)
    for why, good in (
        ("with a row that cannot be used", usable.all(1)),
        ("of two classes or parts, or of no class", _alike(labels) & _alike(parts) & (labels[:, 0] != NO_CLASS)),
        ("that lack a number", ~numbers.isnan().flatten(1).any(1) | (data.missing == "mean")),
    ):
        left_out[why] += int((kept & ~good).sum())
        kept &= good
    rows = kept.nonzero().flatten()
    names = [["", *PARTS][i] for i in parts[rows, 0].tolist()]
    if data.parts == "blocks" and not any(names):
        names = in_time((rows * stride).tolist(), length)
        left_out["that reach into the next part"] += names.count("")
        rows = rows[torch.tensor([bool(name) for name in names], dtype=torch.bool)]
        names = [name for name in names if name]
    return Windows(
        x=numbers[rows].transpose(1, 2).contiguous(),
        y=labels[rows, 0],
        lines=[series.lines[row] for row in (rows * stride).tolist()],
        parts=names,
    )


def in_time(starts: Sequence[int], length: int) -> list[str]:
    """The part of each window, by its place in time; empty for one that shares steps with the next part.

    Args:
        starts: first steps of windows, ascending.
        length: of each window.
    """
    parts = [part_at(i / len(starts)) for i in range(len(starts))]
    last = torch.searchsorted(torch.tensor(starts), torch.tensor(starts) + length) - 1  # that begins within the window
    return [part if part == parts[i] else "" for part, i in zip(parts, last.tolist(), strict=True)]


def _alike(values: Tensor) -> Tensor:
    """Whether all of a window's values are one, (W, T) -> (W,)."""
    return (values == values[:, :1]).all(1)
