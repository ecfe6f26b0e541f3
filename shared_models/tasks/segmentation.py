"""Semantic segmentation: a class at every pixel; cross-entropy and soft Dice; Dice and IoU of all pixels pooled."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import field_validator, model_validator
from torch import Tensor

from shared_models.metrics.confusion import accuracy, confusion, dice, iou
from shared_models.tasks.base import IGNORED, Batch, Task, task
from shared_models.tasks.classification import ChoiceSettings


class SegmentationSettings(ChoiceSettings):
    """Settings of segmentation; `class_weights` weigh pixels in the cross-entropy.

    Attributes:
        score: labels that the means of Dice and IoU, and the Dice loss, are over; empty: all. Leave the background out.
        loss: `both` is the sum (Isensee et al. 2021, nnU-Net).
    """

    score: tuple[str, ...] = ()
    loss: Literal["cross-entropy", "dice", "both"] = "cross-entropy"

    @field_validator("labels")
    @classmethod
    def _fit_into_a_mask(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        if len(labels) > IGNORED:
            raise ValueError(f"a mask of bytes holds at most {IGNORED} labels, not {len(labels)}")
        return labels

    @model_validator(mode="after")
    def _scores_are_labels(self) -> SegmentationSettings:
        for i, name in enumerate(self.score):
            if name not in self.labels:
                raise ValueError(f"score names '{name}', which is not a label")
            if name in self.score[:i]:
                raise ValueError(f"score names '{name}' twice")
        return self

    @model_validator(mode="after")
    def _weights_are_used(self) -> SegmentationSettings:
        if self.class_weights and self.loss == "dice":
            raise ValueError("class_weights weigh the cross-entropy, which loss = 'dice' leaves out")
        return self

    @property
    def scored(self) -> list[int]:
        """Class indices of `score`."""
        return [self.labels.index(name) for name in self.score or self.labels]


@task("segmentation")
class Segmentation(Task):
    """Targets are masks (B, H, W) uint8, 255 counts nowhere; outputs are logits (B, K, H', W').

    Logits of another size than the mask are interpolated to it.
    """

    Settings = SegmentationSettings
    target = "mask"
    metrics = ("dice", "iou", "pixel_accuracy")

    @property
    def outputs(self) -> int:
        """One logit per label at every pixel."""
        return len(self.settings.labels)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy, 1 - soft Dice or their sum, (B,); 0 for an image without a pixel that counts."""
        logits = at_size(outputs, batch.y)
        kind = self.settings.loss
        loss = logits.new_zeros(len(batch))
        if kind != "dice":
            loss = loss + pixel_cross_entropy(logits, batch.y, self.settings.weights(logits.device))
        if kind != "cross-entropy":
            loss = loss + 1 - soft_dice(logits, batch.y)[:, self.settings.scored].mean(dim=1)
        return loss

    def sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """`confusion` (K, K) int64 over pixels, row = truth, column = prediction; `loss` float64; `examples` int64."""
        logits = at_size(outputs, batch.y)
        guess = logits.max(dim=1).indices  # on a CPU several times as fast as argmax over this dimension
        return {
            "confusion": confusion(batch.y, guess, self.outputs, IGNORED),
            "loss": self.loss(logits, batch).double().sum().cpu(),
            "examples": torch.tensor(len(batch)),
        }

    @cached_property
    def zeros(self) -> dict[str, Tensor]:
        """Sums of no examples."""
        nothing = Batch(torch.zeros(0, 1, 1, 1), torch.zeros(0, 1, 1, dtype=torch.uint8))
        return self.sums(torch.zeros(0, self.outputs, 1, 1), nothing)

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics of all pixels pooled.

        `dice` and `iou` are means over the scored classes that occur in truth or prediction, `dice:<label>` and
        `iou:<label>` those of each label, `pixel_accuracy` is over all labels.
        """
        sums = sums or self.zeros
        per_class = {"dice": dice(sums["confusion"]), "iou": iou(sums["confusion"])}
        means = {name: each[self.settings.scored].nanmean().item() for name, each in per_class.items()}
        labelled = {
            f"{name}:{label}": value
            for name, each in per_class.items()
            for label, value in zip(self.settings.labels, each.tolist(), strict=True)
        }
        return {
            **means,
            "pixel_accuracy": accuracy(sums["confusion"]).item(),
            "loss": (sums["loss"] / sums["examples"]).item(),
            "examples": float(sums["examples"]),
            **labelled,
        }

    def predict(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The class of every pixel, (B, H, W) int64."""
        return at_size(outputs, batch.y).argmax(dim=1)

    def draw(self, shape: tuple[int, ...], count: int, source: torch.Generator) -> Batch:
        """Normal noise; a uniform class at every pixel, one in ten is ignored."""
        x = torch.randn(count, *shape, generator=source)
        y = torch.randint(self.outputs, (count, *shape[1:]), generator=source)
        ignored = torch.rand(y.shape, generator=source) < 0.1
        return Batch(x, y.masked_fill(ignored, IGNORED).to(torch.uint8))


def at_size(outputs: Tensor, mask: Tensor) -> Tensor:
    """Logits (B, K, H', W') as float32 at the mask's size, (B, K, H, W), by bilinear interpolation."""
    logits = outputs.float()
    if logits.shape[2:] == mask.shape[1:]:
        return logits
    return F.interpolate(logits, size=mask.shape[1:], mode="bilinear", align_corners=False)


def pixel_cross_entropy(logits: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of each image over its pixels that count, by the weights of their classes.

    Args:
        logits: (B, K, H, W).
        mask: (B, H, W).
        weights: (K,).

    Returns:
        (B,), 0 for an image without such a pixel.
    """
    truth = mask.long()
    weight = (truth != IGNORED).to(logits.dtype)  # (B, H, W)
    if weights is not None:
        weight = weight * weights[truth.where(truth != IGNORED, 0)]
    losses = F.cross_entropy(logits, truth, ignore_index=IGNORED, reduction="none")  # (B, H, W), 0 where ignored
    return (weight * losses).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp(min=1e-12)


def soft_dice(logits: Tensor, mask: Tensor) -> Tensor:
    """(2 sum p g + 1) / (sum p + sum g + 1) over the pixels of each image that count (Milletari et al. 2016, V-Net).

    The one pixel added on both sides makes it 1 where a class is neither there nor predicted.

    Args:
        logits: (B, K, H, W), p is their softmax.
        mask: (B, H, W), g is 1 where it holds the class.

    Returns:
        (B, K).
    """
    classes = torch.arange(logits.shape[1], device=logits.device)
    truth = (mask[:, None] == classes[:, None, None]).to(logits.dtype)  # (B, K, H, W)
    guess = logits.softmax(dim=1) * (mask != IGNORED)[:, None]
    shared, both = (guess * truth).sum(dim=(2, 3)), (guess + truth).sum(dim=(2, 3))
    return (2 * shared + 1) / (both + 1)
