"""Exemplars by herding: Rebuffi et al. 2017, "iCaRL", Algorithms 4 and 5.

    p_k = argmin_x || mu - (phi(x) + sum_{j < k} phi(p_j)) / k ||,    mu: the mean of phi over the class's examples

Each class's list is in that order, so that a shorter one is made by dropping its end. A site shares its buffer out over
the classes that it has seen, m = buffer // classes. Examples are kept as they were read and never leave the site.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from client.readers.base import Examples, Store
from client.trainer import in_order
from client.workbench import Workbench
from shared_models.methods.base import Tensors
from shared_models.nearest_mean import SUMS
from shared_models.sums import Groups


def herd(features: Tensor, count: int) -> list[int]:
    """The first `count` examples of (n, D) features in the order of herding, each at most once; all where n is less."""
    mean, total = features.mean(dim=0), torch.zeros_like(features[0])
    chosen: list[int] = []
    for k in range(1, min(count, len(features)) + 1):
        apart = (mean - (features + total) / k).square().sum(dim=1)
        apart[chosen] = torch.inf
        chosen.append(int(apart.argmin()))
        total = total + features[chosen[-1]]
    return chosen


def firsts(y: Tensor, count: int) -> Tensor:
    """Rows of the first `count` of each class, in order."""
    rank = F.one_hot(y).cumsum(dim=0).gather(1, y[:, None])[:, 0]
    return (rank <= count).nonzero()[:, 0]


@torch.no_grad()
def choose(bench: Workbench, examples: Examples, memory: Tensors, size: int) -> dict[str, Tensor]:
    """What is kept when a task has ended, by the features of the loaded model.

    Args:
        bench: holds the model.
        examples: of the task.
        memory: what was kept: x (M, *shape), y (M,), class by class in the order of herding, and seen; may be empty.
        size: how many are kept in all.

    Returns:
        The same of all tasks so far.
    """
    fresh, store = examples.y.unique(), examples.store
    before = {n: memory[n].cpu() for n in ("x", "y")} if memory else {"x": store.x[:0], "y": store.y[:0]}
    old = {n: t[~torch.isin(before["y"], fresh)] for n, t in before.items()}
    each = size // max(1, len(old["y"].unique()) + len(fresh))
    kept = {n: [t[firsts(old["y"], each)] if len(t) else t] for n, t in old.items()}
    found = _features(bench, examples)
    for label in fresh:
        members = (examples.y == label).nonzero()[:, 0]
        rows = examples.rows[members[herd(found[members], each)]]
        kept["x"].append(store.x[rows])
        kept["y"].append(store.y[rows])
    seen = len(examples) + (int(memory["seen"]) if memory else 0)
    return {**{n: torch.cat(parts) for n, parts in kept.items()}, "seen": torch.tensor(seen)}


@torch.no_grad()
def sums(bench: Workbench, store: Store, memory: Tensors) -> Groups:
    """For each class the sum of its exemplars' features, (C, D) float64.

    Args:
        bench: holds the model.
        store: whose form and statistics normalise.
        memory: what is kept.
    """
    own = Store(
        memory["x"], memory["y"], [str(i) for i in range(len(memory["y"]))], store.data, statistics=store.statistics
    )
    found = _features(bench, Examples(own, torch.arange(len(own.y))))
    total = torch.zeros(bench.head.out_features, found.shape[1], dtype=torch.float64)
    return {SUMS: {"sum": total.index_add_(0, memory["y"], found)}}


def _features(bench: Workbench, examples: Examples) -> Tensor:
    """(n, D) float64, on the CPU."""
    parts = [bench.features(batch).cpu().double() for batch in in_order(examples, bench)]
    return torch.cat(parts) if parts else torch.zeros(0, bench.head.in_features, dtype=torch.float64)
