"""Single-label classification: cross-entropy and the confusion matrix, from which accuracy and macro-F1 follow."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_models.tasks.base import Batch, Task, task


@task("classification")
class Classification(Task):
    """Targets are class indices of the job's label list, (B,) int64; outputs are logits (B, C)."""

    headline = "accuracy"

    @property
    def outputs(self) -> int:
        """One logit per label."""
        return len(self.settings.labels)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """-log softmax(outputs)[y], (B,)."""
        return F.cross_entropy(outputs, batch.y, reduction="none")

    def sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """`confusion` (C, C) int64, row = truth, column = prediction; `loss` float64 sum over samples."""
        classes = self.outputs
        pairs = batch.y * classes + outputs.argmax(dim=1)
        return {
            "confusion": torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes).cpu(),
            "loss": self.loss(outputs, batch).double().sum().cpu(),
        }

    def no_sums(self) -> dict[str, Tensor]:
        """Zeros."""
        return self.sums(torch.zeros(0, self.outputs), Batch(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64)))

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """accuracy; macro_f1 over the classes that occur in truth or prediction; mean loss; number of examples."""
        sums = sums or self.no_sums()
        confusion = sums["confusion"].double()
        total = confusion.sum().item()
        if total == 0:
            return {"accuracy": float("nan"), "macro_f1": float("nan"), "loss": float("nan"), "examples": 0.0}
        hit, truth, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
        seen = (truth + predicted) > 0
        f1 = 2 * hit[seen] / (truth + predicted)[seen]
        return {
            "accuracy": hit.sum().item() / total,
            "macro_f1": f1.mean().item(),
            "loss": sums["loss"].item() / total,
            "examples": total,
        }
