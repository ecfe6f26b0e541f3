"""Principal components (Pearson 1901; Hotelling 1933): the linear map to k numbers and back that loses least.

    y = m + W^T W (x - m),   W W^T = I

With the method `pca`, m is the mean and the rows of W are the first eigenvectors of the covariance of all sites'
examples, exactly; trained by steps (every other method), it is a linear autoencoder with tied weights, which finds the
same plane but not its axes (Baldi & Hornik 1989, Neural Networks and Principal Component Analysis).
"""

from __future__ import annotations

import math

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from shared_models.errors import ConfigError
from shared_models.models import ModelSettings, Shape, model


class PCASettings(ModelSettings):
    """`components`: k, at most as many as an example has numbers."""

    components: PositiveInt


class PCA(nn.Module):
    """`mean` (D,) and `components` (k, D), D numbers per example; it starts at a random plane through 0."""

    def __init__(self, components: int, numbers: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(numbers))
        self.components = nn.Parameter(nn.init.orthogonal_(torch.empty(components, numbers)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, *shape) -> (B, *shape)."""
        codes = (x.flatten(1) - self.mean) @ self.components.T  # (B, k)
        return (self.mean + codes @ self.components).reshape(x.shape)


@model(
    "pca",
    settings=PCASettings,
    sizes={"tiny": {"components": 8}, "medium": {"components": 32}},
    paper="Hotelling 1933, Analysis of a Complex of Statistical Variables into Principal Components",
    tasks=("reconstruction", "anomaly"),
    inputs=("image", "features"),
    heads=("components",),
    family="reconstruction",
    notes="The baseline of every autoencoder; with the method pca one round is all.",
    usual={"tiny": (1, 8, 8), "medium": (1, 32, 32)},
)
def build(settings: PCASettings, shape: Shape, outputs: int) -> nn.Module:
    """(B, *shape) -> (B, *shape); an image is flattened on the way.

    Raises:
        ConfigError: there are more components than numbers.
    """
    numbers = math.prod(shape)
    if settings.components > numbers:
        raise ConfigError(
            f"model 'pca' cannot find {settings.components} components in an example of {numbers} numbers",
            hint=f"Set model.components to {numbers} or less",
        )
    return PCA(settings.components, numbers)
