"""Learning without forgetting (LwF): Li and Hoiem 2017, equations 2 to 4.

    L = L_ce(new) - alpha sum_c p'_c log q'_c,    p' = softmax(z / T), q' = softmax(f(x) / T)

z are the outputs of the model as it was before the task, for the same new examples; both sums go over the classes that
occurred at the site before the task. No old example is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from shared_models.methods.base import NEVER, Method, MethodSettings, Tensors, method
from shared_models.sums import Groups
from shared_models.tasks.base import Batch, Task


class LwFSettings(MethodSettings):
    """`alpha` >= 0: weight of what the former model says; `temperature` T > 0 softens it."""

    alpha: Annotated[float, Field(ge=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 2.0


@method("lwf")
class LearningWithoutForgetting(Method):
    """New examples are to be answered as the former model did, among the classes that it knew."""

    Settings = LwFSettings
    continual = True

    def begin_round(self, down: Groups, kept: Groups) -> Groups:
        """The former model, and which classes it knew."""
        return {"former": kept.get("former", {}), "known": kept.get("known", {})}

    def former(self, round_state: Groups) -> Tensors:
        """The model as it was when the last task ended; none in the first task."""
        return round_state["former"]

    def loss(self, values: Tensor, params: Tensors, batch: Batch, outputs: Tensor, round_state: Groups) -> Tensor:
        """L, per example."""
        if batch.past is None or batch.past.outputs is None:
            return values
        unknown = ~round_state["known"]["classes"].bool()
        then, now = (
            (z.float() / self.settings.temperature).masked_fill(unknown, NEVER) for z in (batch.past.outputs, outputs)
        )
        changed: Tensor = values - self.settings.alpha * (then.softmax(dim=1) * now.log_softmax(dim=1)).sum(dim=1)
        return changed

    def end_task(self, model: nn.Module, task: Task, batches: Iterable[Batch], kept: Groups) -> Groups:
        """Keep the model, and add the task's classes to those it knows."""
        entries = {n: t.detach().clone() for n, t in model.state_dict().items()}
        seen = torch.cat([batch.y for batch in batches])
        now = torch.zeros(len(task.settings.labels), dtype=torch.uint8, device=seen.device)
        now[seen] = 1
        before = kept.get("known", {}).get("classes", torch.zeros_like(now))
        return {"former": entries, "known": {"classes": torch.maximum(before, now)}}
