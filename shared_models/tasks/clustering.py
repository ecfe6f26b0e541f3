"""Clustering: examples go to the nearest of K centroids; labels are used only to say how well clusters fit classes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from shared_models.metrics.clusters import adjusted_rand_index, contingency, normalized_mutual_information
from shared_models.tasks.base import Batch, Measure, Task, TaskSettings, task


class ClusteringSettings(TaskSettings):
    """Settings of clustering.

    Attributes:
        clusters: K; 0 is as many as there are labels. A site without labels can put all examples under one: then the
            inertia alone says something.
    """

    clusters: NonNegativeInt = 0


@task("clustering")
class Clustering(Task):
    """Targets are class indices, (B,) int64; outputs are squared distances to the centroids, (B, K)."""

    Settings = ClusteringSettings
    supervision = "unsupervised"
    metrics = ("nmi", "ari", "inertia")
    measures = {"inertia": Measure(unit="", factor=1.0, digits=2, larger=False)}

    @property
    def outputs(self) -> int:
        """One distance per cluster."""
        clusters: int = self.settings.clusters or len(self.settings.labels)
        return clusters

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The squared distance to the nearest centroid, (B,)."""
        return outputs.float().amin(dim=1)

    def sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """`table` (K, C) int64, examples of each class in each cluster; `loss` float64."""
        classes = len(self.settings.labels)
        return {
            "table": contingency(self.predict(outputs, batch), batch.y, self.outputs, classes),
            "loss": self.loss(outputs, batch).double().sum().cpu(),
        }

    @cached_property
    def zeros(self) -> dict[str, Tensor]:
        """Sums of no examples."""
        return self.sums(torch.zeros(0, self.outputs), Batch(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64)))

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`nmi`, `ari`: see `shared_models.metrics.clusters`; `inertia` = `loss`, the mean squared distance."""
        sums = sums or self.zeros
        examples = sums["table"].sum()
        inertia = (sums["loss"] / examples).item()
        return {
            "nmi": normalized_mutual_information(sums["table"]),
            "ari": adjusted_rand_index(sums["table"]),
            "inertia": inertia,
            "loss": inertia,
            "examples": float(examples),
        }

    def predict(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The nearest cluster, (B,) int64."""
        return outputs.argmin(dim=1)

    def draw(self, shape: tuple[int, ...], count: int, source: torch.Generator) -> Batch:
        """Normal noise and uniform classes."""
        classes = torch.randint(len(self.settings.labels), (count,), generator=source)
        return Batch(torch.randn(count, *shape, generator=source), classes)
