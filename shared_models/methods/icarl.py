"""iCaRL: Rebuffi et al. 2017, "iCaRL: Incremental Classifier and Representation Learning".

Training, Algorithm 3, per example of the task's own and of the exemplars, with g = sigmoid(f):

    L = - sum_{c new} [1(c = y) log g_c(x) + 1(c != y) log(1 - g_c(x))]
        - sum_{c old} [q_c log g_c(x) + (1 - q_c) log(1 - g_c(x))]

q are the outputs g of the model as it was before the task; classes of later tasks have no term. The task's own loss has
no part in it. As with other methods that replay, a step draws `replay` exemplars beside its own examples, where the
paper shuffles both into one set.

At the end of a task the site chooses exemplars by herding, `buffer` of them over all classes that it has seen
(`client.exemplars`), and test data are measured by the nearest mean of exemplars (`shared_models.nearest_mean`); on
validation data, round by round, the model answers by its outputs (the paper's hybrid1).

Exemplars stay at the site. For each class the sum of their features leaves it, because one model is to be measured
alike everywhere. Such a sum tells of the examples in it, the more the fewer they are: that of one is its features.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_models.methods.base import Method, ReplaySettings, Tensors, method
from shared_models.sums import Groups
from shared_models.tasks.base import Batch, Task


@method("icarl")
class ICaRL(Method):
    """Exemplars by herding, distillation by class, nearest mean of exemplars."""

    Settings = ReplaySettings
    continual = True
    draws = 1
    herds = True

    def begin_round(self, down: Groups, kept: Groups) -> Groups:
        """The former model, and which classes are old and new; nothing where there is no stream."""
        return {"former": kept.get("former", {}), "stream": kept.get("stream", {})}

    def former(self, round_state: Groups) -> Tensors:
        """The model as it was when the last task ended; none in the first task."""
        return round_state["former"]

    def loss(self, values: Tensor, params: Tensors, batch: Batch, outputs: Tensor, round_state: Groups) -> Tensor:
        """L, per example."""
        if not round_state["stream"]:
            return values
        old, counted = round_state["stream"]["before"], round_state["stream"]["now"]
        targets = F.one_hot(batch.y, outputs.shape[1]).float()
        if batch.past is not None and batch.past.outputs is not None:
            targets, counted = torch.where(old, batch.past.outputs.sigmoid(), targets), counted | old
        each = F.binary_cross_entropy_with_logits(outputs.float(), targets, reduction="none")
        return (each * counted).sum(dim=1)

    def end_task(self, model: nn.Module, task: Task, batches: Iterable[Batch], kept: Groups) -> Groups:
        """Keep the model."""
        return {"former": {n: t.detach().clone() for n, t in model.state_dict().items()}}
