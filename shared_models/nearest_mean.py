"""Classification by the nearest mean of exemplars: Rebuffi et al. 2017, "iCaRL", Algorithm 1.

    y* = argmin_y ||phi(x) - mu_y||,    mu_y: the mean of phi over the exemplars of y

phi are the numbers that the head takes, as a vector of length 1; the mean is brought to that length too. In a
federation mu_y is the mean over all sites' exemplars: each site gives for every class the sum of phi over its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_models.errors import ConfigError
from shared_models.methods.base import NEVER
from shared_models.sums import Groups

SUMS, MEANS = "exemplars", "means"  # the group that a site gives, and the one that it is given to measure with


def find_head(model: nn.Module, heads: Iterable[str]) -> nn.Linear:
    """The linear layer whose entries match a model's declared `heads`.

    Raises:
        ConfigError: there is none.
    """
    patterns = tuple(heads)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(fnmatchcase(f"{name}.weight", p) for p in patterns):
            return module
    raise ConfigError(
        f"no linear layer matches the model's head ({', '.join(patterns) or 'it declares none'}), whose input would be "
        "an example's features",
        hint="Choose a model that ends in one, or a continual method that needs no features",
    )


@contextmanager
def inputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """What the layer is given while the block runs, call by call."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        hook.remove()


def no_sums(head: nn.Linear) -> Groups:
    """A site's sums over no exemplars: (C, D) float64."""
    return {SUMS: {"sum": torch.zeros(head.out_features, head.in_features, dtype=torch.float64)}}


def merge(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """`mean` (C, D) float32 over all parts in their order; a row of zeros where a class has no exemplar."""
    total = sum((part["sum"] for part in parts), start=torch.zeros((), dtype=torch.float64))
    return {"mean": F.normalize(total, dim=1).float()}


def nearness(features: Tensor, means: Tensor) -> Tensor:
    """(B, D), (C, D) -> (B, C): -||phi(x) - mu||^2, or as good as never where a class has no mean."""
    scores = 2 * features @ means.T - 2  # both are of length 1
    return scores.masked_fill((means == 0).all(dim=1), NEVER)
