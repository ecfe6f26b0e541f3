"""Federated averaging: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks", Algorithm 1.

    w_{t+1} = sum_k n_k / n  w_k,    w_k = local training from w_t

Everything it does is the default of `Method`.
"""

from __future__ import annotations

from shared_models.methods.base import Method, MethodSettings, Weighting, method


class FedAvgSettings(MethodSettings):
    """`weighting`: by training examples (the paper), or uniform over sites."""

    weighting: Weighting = "examples"


@method("fedavg")
class FedAvg(Method):
    """Average the sites' models."""

    Settings = FedAvgSettings
