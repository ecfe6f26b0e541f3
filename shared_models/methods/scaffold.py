"""SCAFFOLD: Karimireddy et al. 2020, "Stochastic Controlled Averaging", Algorithm 1 with option II.

local step     y <- y - eta_l (g(y) - c_i + c)
control        c_i+ = c_i - c + (x - y) / (K eta_l)          K eta_l = the sum of the round's learning rates
server         x <- x + eta_g mean(y - x),   c <- c + |S|/N mean(c_i+ - c_i)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from shared_models.methods.base import Method, Progress, Tensors, method
from shared_models.methods.fedavg import FedAvgSettings
from shared_models.sums import Groups


class ScaffoldSettings(FedAvgSettings):
    """`server_lr` is eta_g > 0; 1 makes the mean of the sites' models the new model."""

    server_lr: Annotated[float, Field(gt=0)] = 1.0


@method("scaffold")
class Scaffold(Method):
    """Both halves: control variates c on the server and c_i kept at each site remove client drift."""

    Settings = ScaffoldSettings

    def init(self, template: Tensors, trained: Sequence[str]) -> Groups:
        """x and c = 0."""
        return {"model": template, "control": {n: torch.zeros_like(template[n]) for n in trained if n in template}}

    def down(self, state: Groups) -> Groups:
        """x and c."""
        return {"model": state["model"], "control": state["control"]}

    def begin_round(self, down: Groups, kept: Groups) -> Groups:
        """The constant correction c - c_i of every local step."""
        own = kept.get("control", {})
        return {"correction": {n: c - own[n] if n in own else c for n, c in down["control"].items()}}

    def grad(self, grads: Tensors, params: Tensors, round_state: Groups) -> Tensors:
        """g - c_i + c."""
        correction = round_state["correction"]
        return {n: g + correction[n] if n in correction else g for n, g in grads.items()}

    def end_round(
        self, model: Tensors, down: Groups, kept: Groups, round_state: Groups, progress: Progress
    ) -> tuple[Groups, Groups]:
        """y and c_i+ - c_i go up, c_i+ is kept."""
        own = kept.get("control", {})
        change = {n: (down["model"][n] - model[n]) / progress.lr_sum - c for n, c in down["control"].items()}
        kept = {**kept, "control": {n: own[n] + d if n in own else d for n, d in change.items()}}
        return {"model": model, "control": change}, kept

    def finish(self, state: Groups, mean: Groups, cohort: int, population: int) -> Groups:
        """x <- x + eta_g (mean(y) - x); c <- c + |S|/N mean(c_i+ - c_i)."""
        rate, share = self.settings.server_lr, cohort / population
        moved = mean["model"]
        if rate != 1.0:
            moved = {n: x + rate * (moved[n] - x) for n, x in state["model"].items()}
        return {"model": moved, "control": {n: c + share * mean["control"][n] for n, c in state["control"].items()}}
