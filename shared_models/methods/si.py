"""Synaptic intelligence (SI): Zenke et al. 2017, equations 3 to 5.

    L = L_ce(new) + c sum_i Omega_i (w_i - w*_i)^2
    Omega_i <- Omega_i + max(0, omega_i) / ((w_i(end) - w_i(start))^2 + xi),    omega_i = - sum over steps g_i dw_i

omega gathers at each site what its own steps did to its own loss, from round to round; start and end are the server's
models, w* is the model as it was when the last task ended. The pull acts on the gradient: 2 c Omega (w - w*).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field
from torch import nn

from shared_models.methods.base import Method, MethodSettings, Progress, Tensors, method
from shared_models.sums import Groups
from shared_models.tasks.base import Batch, Task


class SISettings(MethodSettings):
    """`strength` is c >= 0, 0 is fine-tuning; `damping` is xi > 0."""

    strength: Annotated[float, Field(ge=0)] = 0.5
    damping: Annotated[float, Field(gt=0)] = 0.1


@method("si")
class SynapticIntelligence(Method):
    """Weights that lowered the loss of earlier tasks are held."""

    Settings = SISettings
    continual = True

    def begin_round(self, down: Groups, kept: Groups) -> Groups:
        """omega so far, Omega and w*, and the task's first model."""
        return {
            "path": kept.get("path", {}),
            "start": kept.get("start") or down["model"],
            "importance": kept.get("importance", {}),
            "anchor": kept.get("anchor", {}),
        }

    def grad(self, grads: Tensors, params: Tensors, round_state: Groups) -> Tensors:
        """g + 2 c Omega (w - w*)."""
        importance, anchor = round_state["importance"], round_state["anchor"]
        pull = 2 * self.settings.strength
        return {
            n: g + pull * importance[n] * (params[n] - anchor[n]) if n in importance else g for n, g in grads.items()
        }

    def after_step(self, grads: Tensors, before: Tensors, params: Tensors, round_state: Groups) -> Groups:
        """omega - g dw."""
        path, start = round_state["path"], round_state["start"]
        if not path:  # entries that the server does not know start here too
            round_state = {**round_state, "start": {**before, **start}}
        moved = {n: g * (before[n] - params[n].detach()) for n, g in grads.items()}
        return {**round_state, "path": {n: path[n] + m if n in path else m for n, m in moved.items()}}

    def end_round(
        self, model: Tensors, down: Groups, kept: Groups, round_state: Groups, progress: Progress
    ) -> tuple[Groups, Groups]:
        """omega and the task's first model are kept."""
        start = {n: round_state["start"][n] for n in round_state["path"] if n in round_state["start"]}
        return {}, {**kept, "path": round_state["path"], "start": start}

    def end_task(self, model: nn.Module, task: Task, batches: Iterable[Batch], kept: Groups) -> Groups:
        """Omega grows, the path begins anew."""
        path, start, before = (kept.get(name, {}) for name in ("path", "start", "importance"))
        now = {n: p.detach().clone() for n, p in model.named_parameters() if n in path and n in start}
        grown = {n: path[n].clamp(min=0) / ((w - start[n]).square() + self.settings.damping) for n, w in now.items()}
        importance = {n: before[n] + g if n in before else g for n, g in grown.items()}
        return {"importance": importance or before, "anchor": now or kept.get("anchor", {})}
