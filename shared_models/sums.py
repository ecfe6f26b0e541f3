"""Weighted means over a cohort by a fixed pairwise tree: the order of arrival cannot change a bit.

Slot k of the cohort is leaf k. Two siblings merge as soon as both are known, `m = m_l + (m_r - m_l) w_r / (w_l + w_r)`
in float32, so memory is O(log cohort) when replies come in order, the mean of one client is that client's tensors
exactly, and equal updates stay equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Groups = Mapping[str, Mapping[str, Tensor]]
"""Named tensors in named groups: `{"model": {"head.weight": ...}, "control": {...}}`."""


@dataclass
class _Node:
    weights: dict[str, float]
    tensors: dict[str, list[Tensor]]
    ours: bool = False  # whether merges may write into the tensors

    def own(self) -> _Node:
        """Itself, or a float32 copy that merges may overwrite."""
        if self.ours:
            return self
        copies = {g: [t.detach().to(torch.float32, copy=True) for t in ts] for g, ts in self.tensors.items()}
        return _Node(dict(self.weights), copies, ours=True)


class PairwiseMean:
    """The mean of each group over the slots of one cohort, each group with its own weights.

    Args:
        slots: size of the cohort; each slot must be added or skipped once.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._names: dict[str, list[str]] = {}
        self._waiting: dict[tuple[int, int], _Node | None] = {}
        self._seen: set[int] = set()

    def add(self, slot: int, groups: Groups, weights: Mapping[str, float]) -> None:
        """Take one client's tensors; they are read now and copied where they must wait.

        Raises:
            ValueError: the slot was used before, or a weight is not positive and finite.
        """
        if not self._names:
            self._names = {group: list(tensors) for group, tensors in groups.items()}
        if not all(0 < weights[group] < math.inf for group in groups):
            raise ValueError(f"slot {slot}: a weight must be positive and finite")
        tensors = {group: [groups[group][name] for name in names] for group, names in self._names.items()}
        self._insert(slot, _Node({group: float(weights[group]) for group in groups}, tensors))

    def skip(self, slot: int) -> None:
        """Leave a slot out of the mean: its client was lost or rejected."""
        self._insert(slot, None)

    def result(self) -> dict[str, dict[str, Tensor]] | None:
        """The means in float32, or None when every slot was skipped.

        Raises:
            ValueError: a slot is still open.
        """
        if len(self._seen) != self.slots:
            raise ValueError(f"{self.slots - len(self._seen)} of {self.slots} slots are still open")
        node = next(iter(self._waiting.values()), None)
        if node is None:
            return None
        return {g: dict(zip(names, node.tensors[g], strict=True)) for g, names in self._names.items()}

    def _insert(self, slot: int, node: _Node | None) -> None:
        if slot in self._seen or not 0 <= slot < self.slots:
            raise ValueError(f"slot {slot} was used before or does not exist")
        self._seen.add(slot)
        level, index, width = 0, slot, self.slots
        while width > 1:
            sibling = index ^ 1
            if sibling < width:
                if (level, sibling) not in self._waiting:
                    break
                other = self._waiting.pop((level, sibling))
                node = _merge(other, node) if sibling < index else _merge(node, other)
            level, index, width = level + 1, index // 2, (width + 1) // 2
        self._waiting[(level, index)] = node.own() if node else None


def _merge(left: _Node | None, right: _Node | None) -> _Node | None:
    """The weighted mean of two nodes, written into the left one's tensors."""
    if left is None or right is None:
        return left or right
    left = left.own()
    for group, tensors in left.tensors.items():
        total = left.weights[group] + right.weights[group]
        others = [t.detach().float() for t in right.tensors[group]]
        torch._foreach_lerp_(tensors, others, right.weights[group] / total)
        left.weights[group] = total
    return left
