"""Adaptive federated optimization: Reddi et al. 2021, Algorithm 2. The server treats the mean update as a gradient.

    d   = mean_k(w_k) - w
    m   <- b1 m + (1 - b1) d
    v   <- v + d^2                                   fedadagrad
    v   <- b2 v + (1 - b2) d^2                       fedadam
    v   <- v - (1 - b2) d^2 sign(v - d^2)            fedyogi
    w   <- w + eta m / (sqrt(v) + tau)

As in the paper there is no bias correction and v starts at tau^2. Running statistics are not optimised: they are
averaged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from shared_models.methods.base import Method, Tensors, method
from shared_models.methods.fedavg import FedAvgSettings
from shared_models.sums import Groups


class FedOptSettings(FedAvgSettings):
    """The server's optimizer.

    Attributes:
        server_lr: eta > 0.
        beta1: of the first moment, in [0, 1); 0 forgets earlier rounds.
        beta2: of the second moment, in [0, 1).
        tau: degree of adaptivity > 0; the larger, the nearer to plain averaging with rate eta / tau.
    """

    server_lr: Annotated[float, Field(gt=0)] = 0.1
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Field(gt=0)] = 1e-3


class FedAdagradSettings(FedOptSettings):
    """As for the others; the paper takes beta1 = 0 for fedadagrad."""

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.0


class FedOpt(Method, ABC):
    """What the three share; `second` is what sets them apart."""

    Settings: ClassVar[type[FedOptSettings]] = FedOptSettings

    def init(self, template: Tensors, trained: Sequence[str]) -> Groups:
        """w, m = 0 and v = tau^2."""
        moved = [n for n in trained if n in template]
        return {
            "model": template,
            "first": {n: torch.zeros_like(template[n]) for n in moved},
            "second": {n: torch.full_like(template[n], self.settings.tau**2) for n in moved},
        }

    def finish(self, state: Groups, mean: Groups, cohort: int, population: int) -> Groups:
        """One step of the server's optimizer."""
        s, model, first, second = self.settings, dict(mean["model"]), {}, {}
        for n, m in state["first"].items():
            before = state["model"][n]
            change = model[n] - before
            first[n] = s.beta1 * m + (1 - s.beta1) * change
            second[n] = self.second(state["second"][n], change * change)
            model[n] = before + s.server_lr * first[n] / (second[n].sqrt() + s.tau)
        return {"model": model, "first": first, "second": second}

    @abstractmethod
    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """The second moment after a round whose squared mean update is `square`."""


@method("fedadam")
class FedAdam(FedOpt):
    """v is a moving average."""

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """b2 v + (1 - b2) d^2."""
        moved: Tensor = self.settings.beta2 * v + (1 - self.settings.beta2) * square
        return moved


@method("fedadagrad")
class FedAdagrad(FedOpt):
    """v only grows."""

    Settings = FedAdagradSettings

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """v + d^2."""
        return v + square


@method("fedyogi")
class FedYogi(FedOpt):
    """v moves towards d^2 by a step whose size does not depend on v."""

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """v - (1 - b2) d^2 sign(v - d^2)."""
        moved: Tensor = v - (1 - self.settings.beta2) * square * torch.sign(v - square)
        return moved
