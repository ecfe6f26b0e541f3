"""ER-ACE: Caccia et al. 2022, "New Insights on Reducing Abrupt Representation Change in Online Continual Learning".

    L = L_ce(old examples, all classes) + L_ce(new examples, the classes among them alone)          equation 3

New examples do not push down the outputs of classes that they do not belong to: those of earlier tasks are then not
unlearned as soon as a new task begins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shared_models.methods.base import NEVER, Method, ReplaySettings, Tensors, method
from shared_models.sums import Groups
from shared_models.tasks.base import Batch


@method("er-ace")
class AsymmetricReplay(Method):
    """Experience replay with an asymmetric cross-entropy."""

    Settings = ReplaySettings
    continual = True
    draws = 1

    def see(self, outputs: Tensor, batch: Batch, round_state: Groups) -> Tensor:
        """The logits of the batch's own examples, those of classes that are not among them out of the way."""
        if batch.past is None:  # nothing old is there to be unlearned
            return outputs
        among = torch.zeros(outputs.shape[1], dtype=torch.bool, device=outputs.device)
        among[batch.past.labels] = True
        return outputs.masked_fill((batch.past.draw == 0)[:, None] & ~among, NEVER)

    def loss(self, values: Tensor, params: Tensors, batch: Batch, outputs: Tensor, round_state: Groups) -> Tensor:
        """The sum of both means."""
        return values if batch.past is None else values * batch.past.scale
