"""Localization: where the one object of an image is; smooth L1 and generalized IoU; the mean IoU."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, model_validator
from torch import Tensor

from shared_models.boxes import generalized_iou, iou, to_centres, to_corners
from shared_models.tasks.base import Batch, Task, TaskSettings, task


class LocalizationSettings(TaskSettings):
    """Settings of localization; the defaults of the two weights are those of DETR (Carion et al. 2020).

    Attributes:
        distance: weight of the smooth L1 distance between the two centres and sizes.
        overlap: weight of 1 - GIoU.
        beta: distance, a share of the image's side, below which an error counts quadratically; 0 is L1.
    """

    distance: NonNegativeFloat = 5.0
    overlap: NonNegativeFloat = 2.0
    beta: float = Field(0.1, ge=0.0)

    @model_validator(mode="after")
    def _something_to_learn(self) -> LocalizationSettings:
        if not self.distance and not self.overlap:
            raise ValueError("with distance and overlap both 0 there is no loss")
        return self


@task("localization")
class Localization(Task):
    """Targets are boxes (B, 4) as fractions of the image; outputs are four numbers per image, see `to_box`."""

    Settings = LocalizationSettings
    target = "box"
    metrics = ("iou", "within50")

    @property
    def outputs(self) -> int:
        """Four, whatever the labels."""
        return 4

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """distance * smooth L1, summed over centre and size, + overlap * (1 - GIoU), (B,)."""
        box = to_box(outputs)
        chosen: LocalizationSettings = self.settings
        off = F.smooth_l1_loss(to_centres(box), to_centres(batch.y), reduction="none", beta=chosen.beta).sum(dim=1)
        return chosen.distance * off + chosen.overlap * (1 - generalized_iou(box, batch.y))

    def sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """`iou` float64; `within50` int64, the examples with IoU >= .5; `loss` float64; `examples` int64."""
        outputs, truth = outputs.float().cpu(), batch.y.cpu()
        overlap = iou(to_box(outputs), truth).double()
        return {
            "iou": overlap.sum(),
            "within50": (overlap >= 0.5).sum(),
            "loss": self.loss(outputs, Batch(batch.x, truth)).double().sum(),
            "examples": torch.tensor(len(batch)),
        }

    @cached_property
    def zeros(self) -> dict[str, Tensor]:
        """Sums of no examples."""
        return self.sums(torch.zeros(0, 4), Batch(torch.zeros(0, 1), torch.zeros(0, 4)))

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`iou`, the mean; `within50`, the share of examples with IoU >= .5; mean `loss`; `examples`."""
        sums = sums or self.zeros
        means = {name: (sums[name].double() / sums["examples"]).item() for name in ("iou", "within50", "loss")}
        return {**means, "examples": float(sums["examples"])}

    def predict(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The box, (B, 4)."""
        return to_box(outputs)

    def draw(self, shape: tuple[int, ...], count: int, source: torch.Generator) -> Batch:
        """Normal noise and boxes anywhere."""
        return Batch(torch.randn(count, *shape, generator=source), draw_boxes((count,), source))


def to_box(outputs: Tensor) -> Tensor:
    """Four numbers of any size -> sigmoid -> centre x, centre y, width, height -> corners; (..., 4) -> (..., 4)."""
    return to_corners(outputs.float().sigmoid())


def draw_boxes(shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    """Boxes inside the image whose sides are between a tenth and a half of it, (*shape, 4)."""
    size = 0.1 + 0.4 * torch.rand(*shape, 2, generator=source)
    low = torch.rand(*shape, 2, generator=source) * (1 - size)
    return torch.cat([low, low + size], dim=-1)
