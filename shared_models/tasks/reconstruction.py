"""To draw an example again: `reconstruction` measures how well, `anomaly` how well the error tells what is unusual.

A model answers with the example again, (B, *shape), or with a pair of it and a term (B,) of its own that belongs to the
loss (the KL divergence of a variational autoencoder). Per example of D numbers

    error = |x - y|^2 / D,    loss = error + term
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar

import torch
from pydantic import model_validator
from torch import Tensor

from shared_models.metrics.auroc import auroc, roc_histograms
from shared_models.tasks.base import Batch, Measure, Target, Task, TaskSettings, task

Outputs = Tensor | tuple[Tensor, Tensor]


class ReconstructionSettings(TaskSettings):
    """Nothing beside `headline`; labels may be left out, for none is used."""

    labels: tuple[str, ...] = ()


@task("reconstruction")
class Reconstruction(Task):
    """There are no targets."""

    Settings: ClassVar[type[TaskSettings]] = ReconstructionSettings
    target: ClassVar[Target] = "none"
    supervision = "unsupervised"
    metrics: ClassVar[tuple[str, ...]] = ("mse", "r2")
    measures: ClassVar[Mapping[str, Measure]] = {"mse": Measure(unit="", factor=1.0, digits=4, larger=False)}

    @property
    def outputs(self) -> int:
        """The shape of an example says it all."""
        return 1

    def counted(self, batch: Batch) -> Tensor:
        """Which examples the model learns from, (B,) bool: all."""
        return torch.ones(len(batch), dtype=torch.bool, device=batch.x.device)

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Mean squared error of its numbers, and the model's own term, (B,); 0 for an example that is not counted."""
        return full_loss(outputs, batch) * self.counted(batch)

    def sums(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Float64, added over examples: `error`, `loss`, the mean of the `numbers`, and that of their `squares`."""
        numbers = batch.x.flatten(1)  # (B, D)
        found = {
            "error": errors(outputs, batch),
            "loss": self.loss(outputs, batch),
            "numbers": numbers.double().mean(dim=1),
            "squares": numbers.double().square().mean(dim=1),
        }
        return {n: v.double().sum().cpu() for n, v in found.items()} | {"examples": torch.tensor(len(batch))}

    @cached_property
    def zeros(self) -> dict[str, Tensor]:
        """Sums of no examples."""
        return self.sums(torch.zeros(0, 1), nothing())

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`mse`; `r2`, the share of the variance of all numbers, about the one mean of all, that is not lost; `loss`.

        What PCA calls explained variance is about the mean of each number instead; the sums for that would be the mean
        example of a site, which is an example where a site measures one.
        """
        sums = sums or self.zeros
        mean = {n: sums[n] / sums["examples"] for n in ("error", "loss", "numbers", "squares")}
        variance = mean["squares"] - mean["numbers"] ** 2
        return {
            "mse": mean["error"].item(),
            "r2": (1 - mean["error"] / variance).item(),
            "loss": mean["loss"].item(),
            "examples": float(sums["examples"]),
        }

    def predict(self, outputs: Outputs, batch: Batch) -> Tensor:
        """The example again, (B, *shape)."""
        return drawn(outputs)

    def draw(self, shape: tuple[int, ...], count: int, source: torch.Generator) -> Batch:
        """Normal noise and no targets."""
        return Batch(torch.randn(count, *shape, generator=source), torch.zeros(count, dtype=torch.int64))


class AnomalySettings(TaskSettings):
    """Settings of anomaly.

    Attributes:
        anomalous: the labels that are anomalies; by default the last one.
    """

    anomalous: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _some_of_the_labels(self) -> AnomalySettings:
        for label in self.anomalous:
            if label not in self.labels:
                raise ValueError(f"'{label}' in anomalous is not a label")
        if len(self.labels) < 2 or set(self.anomalous) == set(self.labels):
            raise ValueError("at least one label should be normal and one anomalous")
        return self

    @property
    def indices(self) -> tuple[int, ...]:
        """The class indices of the anomalies."""
        return tuple(self.labels.index(label) for label in self.anomalous or self.labels[-1:])


@task("anomaly")
class Anomaly(Reconstruction):
    """Targets are class indices, (B,) int64; labels are used to leave anomalies out of training, and to measure.

    An anomaly among the training examples has the loss 0. It is not learnt from, but its place in the batch stays
    empty: a step on a batch of which a share s is normal is s times the step on those alone, and a site's weight counts
    it as an example. Readers that leave them out of the training part lose nothing.
    """

    Settings = AnomalySettings
    target = "class"
    metrics = ("auroc",)
    measures: ClassVar[Mapping[str, Measure]] = {}
    bins: ClassVar[int] = 2048  # of each score histogram: 1.6 % of the loss wide

    @property
    def always(self) -> tuple[int, ...]:
        """The anomalies: from them the normal examples of every task are to be told."""
        indices: tuple[int, ...] = self.settings.indices
        return indices

    def counted(self, batch: Batch) -> Tensor:
        """The normal examples, (B,) bool."""
        return ~torch.isin(batch.y, torch.tensor(self.settings.indices, device=batch.y.device))

    def sums(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """`scores` (1, 2, bins) int64, histograms of the loss of normal and of anomalous examples; `loss` float64.

        The loss l >= 0 (of a variational autoencoder the negative ELBO) is binned as the probability l / (1 + l), whose
        log-odds are log l: the bins are equally wide in log l, between e^-16 and e^16.
        """
        loss = full_loss(outputs, batch).double()
        normal = self.counted(batch)
        histograms = roc_histograms((1 - 1 / (1 + loss))[:, None], normal.long(), self.bins)
        return {"scores": histograms.cpu(), "loss": (loss * normal).sum().cpu()}

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`auroc`: P(loss of an anomaly > loss of a normal example), as near as `auroc_error` says of the histograms.

        `loss` is the mean over the normal examples.
        """
        sums = sums or self.zeros
        normal, anomalous = sums["scores"][0].sum(dim=1)
        return {
            "auroc": auroc(sums["scores"]).item(),
            "loss": (sums["loss"] / normal).item(),
            "examples": float(normal + anomalous),
        }

    def predict(self, outputs: Outputs, batch: Batch) -> Tensor:
        """How unusual each example is: its loss, (B,)."""
        return full_loss(outputs, batch)

    def draw(self, shape: tuple[int, ...], count: int, source: torch.Generator) -> Batch:
        """Normal noise and uniform classes."""
        classes = torch.randint(len(self.settings.labels), (count,), generator=source)
        return Batch(torch.randn(count, *shape, generator=source), classes)


def drawn(outputs: Outputs) -> Tensor:
    """The example again."""
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def errors(outputs: Outputs, batch: Batch) -> Tensor:
    """|x - y|^2 / D of each example, (B,) float32."""
    return (drawn(outputs).float() - batch.x).square().flatten(1).mean(dim=1)


def full_loss(outputs: Outputs, batch: Batch) -> Tensor:
    """The error plus the model's own term, (B,), of every example."""
    error = errors(outputs, batch)
    return error if isinstance(outputs, Tensor) else error + outputs[1].float()


def nothing() -> Batch:
    """A batch of no examples."""
    return Batch(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64))
