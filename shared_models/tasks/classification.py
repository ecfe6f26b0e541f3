"""Single-label classification: cross-entropy; accuracy, macro-F1, AUROC and calibration from sums that merge."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, field_validator, model_validator
from torch import Tensor

from shared_models.metrics.auroc import auroc, roc_histograms
from shared_models.metrics.calibration import expected_calibration_error, overconfidence
from shared_models.metrics.confusion import accuracy, confusion, dice
from shared_models.metrics.histograms import bins_that_fit
from shared_models.tasks.base import Batch, Task, TaskSettings, task
from shared_models.tokens import draw_ids


class ChoiceSettings(TaskSettings):
    """Settings of the tasks that choose one of at least two labels.

    Attributes:
        class_weights: a factor per label for the loss of what it is the truth of; empty: all are 1. They stand in the
            job, for how often each label occurs at the sites is not known when it is written.
    """

    class_weights: tuple[PositiveFloat, ...] = ()

    @field_validator("labels")
    @classmethod
    def _at_least_two(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        if len(labels) < 2:
            raise ValueError(f"there is nothing to choose with one label alone, '{labels[0]}'")
        return labels

    @model_validator(mode="after")
    def _one_weight_per_label(self) -> ChoiceSettings:
        if self.class_weights and len(self.class_weights) != len(self.labels):
            raise ValueError(f"{len(self.class_weights)} class_weights for {len(self.labels)} labels")
        return self

    def weights(self, device: torch.device) -> Tensor | None:
        """`class_weights` as (C,) float32."""
        return torch.tensor(self.class_weights, device=device) if self.class_weights else None


class ClassificationSettings(ChoiceSettings):
    """Settings of classification.

    Attributes:
        label_smoothing: share of the target that is spread evenly over all labels (Szegedy et al. 2016, section 7).
    """

    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)


@task("classification")
class Classification(Task):
    """Targets are class indices of the job's label list, (B,) int64; outputs are logits (B, C)."""

    Settings = ClassificationSettings
    metrics = ("accuracy", "macro_f1", "auroc", "calibration")
    chooses = True
    most_bins: ClassVar[int] = 512  # of a score histogram
    room: ClassVar[int] = 2**20  # bytes that all score histograms may take

    @property
    def outputs(self) -> int:
        """One logit per label."""
        return len(self.settings.labels)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """-log softmax(outputs)[y], times the weight of y, (B,)."""
        return F.cross_entropy(
            outputs,
            batch.y,
            weight=self.settings.weights(outputs.device),
            reduction="none",
            label_smoothing=self.settings.label_smoothing,
        )

    def sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Sums over the examples of a batch.

        `confusion` (C, C) int64, row = truth, column = prediction; `scores` (C, 2, bins) int64, for each class the
        histograms of its probability over the examples that are not of it and over those that are; `overconfidence`
        (16,) float64, confidence minus hit per bin of confidence; `loss` float64.
        """
        outputs, truth = outputs.float().cpu(), batch.y.cpu()
        guess = outputs.argmax(dim=1)
        bins = bins_that_fit(2 * self.outputs, self.most_bins, self.room)
        return {
            "confusion": confusion(truth, guess, self.outputs),
            "scores": roc_histograms(outputs.double().softmax(dim=1), truth, bins),
            "overconfidence": overconfidence(outputs.softmax(dim=1).amax(dim=1), guess == truth),
            "loss": self.loss(outputs, Batch(batch.x, truth)).double().sum(),
        }

    @cached_property
    def zeros(self) -> dict[str, Tensor]:
        """Sums of no examples."""
        return self.sums(torch.zeros(0, self.outputs), Batch(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64)))

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics of the pooled predictions.

        `macro_f1` is the mean over the classes that occur in truth or prediction; `auroc` that over the classes with
        positives and negatives, one against the rest, of two labels the second's, as near as
        `shared_models.metrics.auroc.auroc_error` says; `calibration` is 1 - ECE.
        """
        sums = sums or self.zeros
        examples = sums["confusion"].sum()
        areas = auroc(sums["scores"])
        return {
            "accuracy": accuracy(sums["confusion"]).item(),
            "macro_f1": dice(sums["confusion"]).nanmean().item(),
            "auroc": (areas[1] if self.outputs == 2 else areas.nanmean()).item(),
            "calibration": 1.0 - expected_calibration_error(sums["overconfidence"], examples).item(),
            "loss": (sums["loss"] / examples).item(),
            "examples": float(examples),
        }

    def draw(self, shape: tuple[int, ...], count: int, source: torch.Generator) -> Batch:
        """Normal noise, or random texts, and uniform classes."""
        if self.data is not None and self.data.form == "tokens":
            x = draw_ids(shape[0], self.data.sample[-1], count, source)
        else:
            x = torch.randn(count, *shape, generator=source)
        return Batch(x, torch.randint(self.outputs, (count,), generator=source))
