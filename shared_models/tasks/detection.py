"""Detection: every object of an image, its box and its class; mean average precision (COCO) from sums that merge."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from shared_models.boxes import PADDING
from shared_models.metrics.average_precision import average_precision
from shared_models.metrics.histograms import bins_that_fit, score_bins
from shared_models.metrics.matching import match
from shared_models.tasks.base import Batch, Task, task
from shared_models.tasks.localization import draw_boxes

OVERLAPS = torch.from_numpy(np.linspace(0.5, 0.95, 10))  # IoU from which on a box counts as found: COCO's ten


@task("detection")
class Detection(Task):
    """Targets are boxes (B, M, 5) of class and corners; outputs are those of `shared_models.detection.Detector`."""

    target = "boxes"
    metrics = ("map50", "map", "recall")
    most_bins: ClassVar[int] = 1024  # of a score histogram
    room: ClassVar[int] = 4 * 2**20  # bytes that all score histograms may take

    @property
    def outputs(self) -> int:
        """One per label; background is the model's own affair."""
        return len(self.settings.labels)

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """The detector's losses, and in evaluation mode its detections."""
        return model(batch.x, batch.y, batch.proposals)

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The detector's own, (B,)."""
        return outputs["loss"]

    def sums(self, outputs: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Sums over the images of a batch, of outputs in evaluation mode.

        `detections` (K, bins) int64, per class the histogram of the scores; `hits` (K, 10, bins) int64, of those that
        found a true box at IoU .50, .55, ..., .95; `truths` (K,) int64; `loss` float64; `examples` int64.
        """
        classes, levels = self.outputs, len(OVERLAPS)
        bins = bins_that_fit(classes * (1 + levels), self.most_bins, self.room)
        truth = batch.y.cpu()
        matches = match(outputs["found"].float().cpu(), truth, OVERLAPS)
        counted = matches.classes >= 0
        cells = matches.classes[counted] * bins + score_bins(matches.scores[counted], bins)  # (N,) in (K, bins)
        kind, place = cells // bins, cells % bins
        columns = (kind[:, None] * levels + torch.arange(levels)) * bins + place[:, None]  # (N, 10) in (K, 10, bins)
        hits = torch.bincount(columns[matches.hits[counted]], minlength=classes * levels * bins)
        labels = truth[..., 0][truth[..., 0] >= 0].long()
        return {
            "detections": torch.bincount(cells, minlength=classes * bins).reshape(classes, bins),
            "hits": hits.reshape(classes, levels, bins),
            "truths": torch.bincount(labels, minlength=classes),
            "loss": outputs["loss"].double().sum().cpu(),
            "examples": torch.tensor(len(batch)),
        }

    @cached_property
    def zeros(self) -> dict[str, Tensor]:
        """Sums of no examples."""
        nothing = {"loss": torch.zeros(0), "found": torch.zeros(0, 1, 6)}
        return self.sums(nothing, Batch(torch.zeros(0, 1, 1, 1), torch.zeros(0, 1, 5)))

    def average_precisions(self, sums: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Lowest and highest AP that the histograms allow, of each class at each IoU; NaN for a class without truth.

        Returns:
            Two tensors (K, 10) float64. Where no bin of a class holds a hit and a miss they are equal, and exact.
        """
        hits = sums["hits"]
        misses = (sums["detections"][:, None] - hits).clamp(min=0)
        return average_precision(hits, misses, sums["truths"][:, None].expand(-1, len(OVERLAPS)))

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics of the pooled detections, at most 100 of a class and image.

        `map50` and `map` are the means over the classes with truth of AP at IoU .5 and of its mean over .50:.05:.95,
        `ap50:<label>` the AP of each; an AP is the middle of what the histograms allow (`average_precisions`).
        `recall` is the share of all true boxes that were found at IoU .5.
        """
        sums = sums or self.zeros
        precision = torch.stack(self.average_precisions(sums)).mean(dim=0)  # (K, 10)
        found = sums["hits"][:, 0].sum().double() / sums["truths"].sum()
        return {
            "map50": precision[:, 0].nanmean().item(),
            "map": precision.nanmean().item(),
            "recall": found.item(),
            "loss": (sums["loss"] / sums["examples"]).item(),
            "examples": float(sums["examples"]),
            **{f"ap50:{label}": ap for label, ap in zip(self.settings.labels, precision[:, 0].tolist(), strict=True)},
        }

    def predict(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The detections, (B, D, 6): class, corners, score."""
        return outputs["found"]

    def draw(self, shape: tuple[int, ...], count: int, source: torch.Generator) -> Batch:
        """Normal noise, images with no box to three, and 64 proposals each, its own boxes among them."""
        boxes = draw_boxes((count, 3), source)
        classes = torch.randint(self.outputs, (count, 3, 1), generator=source).float()
        there = torch.arange(3) < torch.randint(4, (count, 1), generator=source)
        y = torch.cat([classes, boxes], dim=-1).where(there[..., None], 0.0)
        y[..., 0] = y[..., 0].where(there, PADDING)
        proposals = torch.cat([y[..., 1:], draw_boxes((count, 61), source)], dim=1)
        return Batch(torch.randn(count, *shape, generator=source), y, proposals)
