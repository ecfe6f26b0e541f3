"""FedProx: Li et al. 2020, "Federated Optimization in Heterogeneous Networks", equation 2.

Each site minimises  F_k(w) + mu/2 ||w - w_t||^2,  so the gradient gains  mu (w - w_t).  mu = 0 is federated averaging.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shared_models.methods.base import Method, Tensors, method
from shared_models.methods.fedavg import FedAvgSettings
from shared_models.sums import Groups


class FedProxSettings(FedAvgSettings):
    """`mu` >= 0: strength of the pull towards the global model; 0 degenerates to fedavg."""

    mu: Annotated[float, Field(ge=0)] = 0.01


@method("fedprox")
class FedProx(Method):
    """FedAvg whose clients are held near the global model."""

    Settings = FedProxSettings

    def begin_round(self, down: Groups, kept: Groups) -> Groups:
        """The anchor w_t."""
        return {"anchor": down["model"]}

    def grad(self, grads: Tensors, params: Tensors, round_state: Groups) -> Tensors:
        """g + mu (w - w_t) for every entry that is averaged; a personal entry has no global value to be near to."""
        mu, anchor = self.settings.mu, round_state["anchor"]
        return {n: g + mu * (params[n] - anchor[n]) if n in anchor else g for n, g in grads.items()}
