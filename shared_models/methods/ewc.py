"""Elastic weight consolidation, online (EWC): Kirkpatrick et al. 2017, equation 3; Schwarz et al. 2018, equation 9.

    L = L_ce(new) + lambda / 2 sum_i F_i (w_i - w*_i)^2,    F <- gamma F + E[(d log p(y | x) / d w)^2]

w* is the model as it was when the last task ended, F the diagonal of the Fisher information at the site's own examples,
with their true labels, gathered over the tasks. The pull acts on the gradient: lambda F (w - w*).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from shared_models.methods.base import Method, MethodSettings, Tensors, method
from shared_models.sums import Groups
from shared_models.tasks.base import Batch, Task


class EWCSettings(MethodSettings):
    """Settings of online EWC.

    Attributes:
        strength: lambda >= 0; 0 is fine-tuning. One that is too large for the learning rate lets the steps diverge.
        decay: gamma in [0, 1]: what remains of earlier tasks' Fisher information when a task ends.
        samples: at most so many of a task's examples, drawn at random, give the expectation.
    """

    strength: Annotated[float, Field(ge=0)] = 10.0
    decay: Annotated[float, Field(ge=0, le=1)] = 1.0
    samples: PositiveInt = 500


@method("ewc")
class EWC(Method):
    """Weights that mattered for earlier tasks are held."""

    Settings = EWCSettings
    continual = True

    def begin_round(self, down: Groups, kept: Groups) -> Groups:
        """F and w*; nothing in the first task."""
        return {"fisher": kept.get("fisher", {}), "anchor": kept.get("anchor", {})}

    def grad(self, grads: Tensors, params: Tensors, round_state: Groups) -> Tensors:
        """g + lambda F (w - w*)."""
        fisher, anchor = round_state["fisher"], round_state["anchor"]
        pull = self.settings.strength
        return {n: g + pull * fisher[n] * (params[n] - anchor[n]) if n in fisher else g for n, g in grads.items()}

    def end_task(self, model: nn.Module, task: Task, batches: Iterable[Batch], kept: Groups) -> Groups:
        """Add what the task's examples say."""
        found = fisher(model, task, batches, self.settings.samples)
        before = kept.get("fisher", {})
        gathered = {n: self.settings.decay * before[n] + f if n in before else f for n, f in found.items()}
        trained = {n: p.detach().clone() for n, p in model.named_parameters() if n in found}
        return {"fisher": gathered, "anchor": trained}


def fisher(model: nn.Module, task: Task, batches: Iterable[Batch], samples: int) -> dict[str, Tensor]:
    """Mean square of each trained parameter's gradient over examples taken one by one, `samples` of them at most."""
    examples = [batch[i : i + 1] for batch in batches for i in range(len(batch))]
    chosen = torch.randperm(len(examples))[:samples].tolist()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in trained.items()}
    for i in chosen:
        value = task.loss(task.forward(model, examples[i]), examples[i]).sum()
        for (name, _), g in zip(
            trained.items(), torch.autograd.grad(value, list(trained.values()), allow_unused=True), strict=True
        ):
            if g is not None:
                total[name] += g.square()
    return {n: t / len(chosen) for n, t in total.items()}
