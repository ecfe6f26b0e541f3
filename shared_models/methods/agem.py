"""A-GEM: Chaudhry et al. 2019, "Efficient Lifelong Learning with A-GEM", equation 11.

    g <- g - (g . r) / (r . r) r    where g . r < 0

r is the gradient on old examples: a step that would raise their loss is turned until it does not, to first order. The
product is over all trained parameters together. What is kept is a reservoir, as with the other methods, so that
examples of the task at hand are among the old ones (A-GEM-R in Buzzega et al. 2020).
"""

from __future__ import annotations

import torch

from shared_models.methods.base import Method, ReplaySettings, Tensors, method
from shared_models.sums import Groups


@method("a-gem")
class AGEM(Method):
    """Old examples only say in which direction not to go."""

    Settings = ReplaySettings
    continual = True
    draws = 1
    reference = True

    def grad(self, grads: Tensors, params: Tensors, round_state: Groups) -> Tensors:
        """g, or its projection."""
        old = round_state.get("reference", {})
        if not old:
            return grads
        product = torch.stack([(g * old[n]).sum() for n, g in grads.items()]).sum()
        square = torch.stack([r.square().sum() for r in old.values()]).sum()
        factor = torch.where((product < 0) & (square > 0), product / square.clamp(min=1e-30), torch.zeros_like(product))
        return {n: g - factor * old[n] for n, g in grads.items()}
