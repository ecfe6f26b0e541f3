"""k-means (MacQueen 1967): K points that stand for the examples nearest to them.

The centroids are the only parameter. With the method `lloyd` they become the means of their examples, exactly; trained
by steps (every other method), each is drawn to the examples it is nearest to (Bottou & Bengio 1995, Convergence
Properties of the K-Means Algorithms, section 2). They start at random, N(0, std^2), never at an example: that would
carry it to every site. Steps therefore need numbers whose means are near 0, as features have that the sites normalise:
from far away one centroid, the nearest, gets all examples, and the others never move. Lloyd's method does not.
"""

from __future__ import annotations

import math

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from shared_models.models import ModelSettings, Shape, model


class KMeansSettings(ModelSettings):
    """`std` > 0 of the centroids at the start, in units of the normalised data; how many there are says the task."""

    std: PositiveFloat = 0.1


class KMeans(nn.Module):
    """`centroids` (K, D), D numbers per example."""

    def __init__(self, clusters: int, numbers: int, std: float) -> None:
        super().__init__()
        self.centroids = nn.Parameter(std * torch.randn(clusters, numbers))

    def forward(self, x: Tensor) -> Tensor:
        """(B, *shape) -> squared distances to the centroids, (B, K): |x|^2 - 2 x c + |c|^2.

        In full precision whatever the job says: a small distance is a difference of large numbers.
        """
        x = x.flatten(1)  # (B, D)
        with torch.autocast(x.device.type, enabled=False):
            lengths = (x * x).sum(dim=1, keepdim=True) + (self.centroids * self.centroids).sum(dim=1)  # (B, K)
            return (lengths - 2 * x @ self.centroids.T).clamp(min=0)


@model(
    "kmeans",
    settings=KMeansSettings,
    sizes={"tiny": {}},
    paper="MacQueen 1967, Some Methods for Classification and Analysis of Multivariate Observations",
    tasks=("clustering",),
    inputs=("image", "features"),
    heads=("centroids",),
    notes="Round clusters of like size. Its method is lloyd; normalise the data, for far numbers count most.",
    usual={"tiny": (1, 8, 8)},
)
def build(settings: KMeansSettings, shape: Shape, outputs: int) -> nn.Module:
    """(B, *shape) -> (B, outputs) squared distances; an image is flattened."""
    return KMeans(outputs, math.prod(shape), settings.std)
