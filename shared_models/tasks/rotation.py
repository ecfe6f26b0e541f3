"""Rotation (Gidaris et al. 2018): by how many quarter turns is an image turned? To know, one must see what it shows."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_models.errors import ConfigError
from shared_models.tasks.base import Batch, task
from shared_models.tasks.pretext import Pretext

TURNS = 4  # 0, 90, 180 and 270 degrees, anticlockwise


@task("rotation")
class Rotation(Pretext):
    """Every image is seen in all four turns, so a batch costs as much as one four times as large.

    Outputs are logits (B, 4, 4): of each image in each turn, for each turn.
    """

    metrics = ("accuracy",)

    @property
    def outputs(self) -> int:
        """One logit per turn."""
        return TURNS

    def shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        """The sample; raises a ConfigError where it is not square, for a model is built for one shape."""
        if sample[1] != sample[2]:
            raise ConfigError(
                f"the task 'rotation' turns images, and {sample[1]}x{sample[2]} pixels are not square",
                hint="Give data.shape equal sides; data.resize = 'pad' keeps the images' proportions",
            )
        return sample

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, 4, 4): all turns of the batch go through the model at once."""
        logits: Tensor = model(turned(batch.x).flatten(0, 1))
        turns: Tensor = logits.unflatten(0, (-1, TURNS))
        return turns

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy over the four turns, (B,) (eq. 3)."""
        return F.cross_entropy(outputs.transpose(1, 2), _truth(outputs), reduction="none").mean(dim=1)

    def sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """`hits` int64, turns that were told, of four an image; `loss` float64; `examples` int64, images."""
        outputs = outputs.float().cpu()
        return {
            "hits": (self.predict(outputs, batch) == _truth(outputs)).sum(),
            "loss": self.loss(outputs, batch).double().sum(),
            "examples": torch.tensor(len(batch)),
        }

    @cached_property
    def zeros(self) -> dict[str, Tensor]:
        """Sums of no examples."""
        return self.sums(torch.zeros(0, TURNS, TURNS), Batch(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64)))

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`accuracy` over all images and turns (chance: 1/4); mean `loss`; `examples`."""
        sums = sums or self.zeros
        return {
            "accuracy": (sums["hits"].double() / (TURNS * sums["examples"])).item(),
            "loss": (sums["loss"] / sums["examples"]).item(),
            "examples": float(sums["examples"]),
        }

    def predict(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The turn that each turned image seems to have, (B, 4) int64."""
        return outputs.argmax(dim=2)


def turned(x: Tensor) -> Tensor:
    """Square images (B, C, S, S) -> (B, 4, C, S, S), turned by 0, 90, 180 and 270 degrees anticlockwise."""
    return torch.stack([x.rot90(turn, (2, 3)) for turn in range(TURNS)], dim=1)


def _truth(outputs: Tensor) -> Tensor:
    """(B, 4): the turns as they were given."""
    return torch.arange(TURNS, device=outputs.device).expand(len(outputs), -1)
