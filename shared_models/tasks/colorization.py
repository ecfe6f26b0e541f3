"""Colorization (Zhang et al. 2016): from how bright every place of an image is, the colour it has.

In CIE Lab the lightness L goes in, in all three channels of the model, as a grey image that is normalised like the
images themselves. What comes out is a distribution over 313 bins of a and b at every cell of a grid: one colour would
be the mean of those that are possible, which is grey.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, field_validator
from torch import Tensor, nn

from shared_models.backbone import backbone, crown, crowned, map_shape
from shared_models.decoders import GridDecoder
from shared_models.errors import ConfigError
from shared_models.lab import CENTRES, centres, rgb_to_lab
from shared_models.tasks.base import Batch, Measure, task
from shared_models.tasks.pretext import Pretext, PretextSettings

NAME = "colorization"
NEIGHBOURS, SIGMA = 5, 5.0  # bins that a colour is spread over, and how far (section 2.1)
TEMPERATURE = 0.38  # of the annealed mean (eq. 5)
FARTHEST = 150  # of the thresholds of the area under the curve (section 3.1)


class ColorizationSettings(PretextSettings):
    """The grid, the decoder and the weights of rare colours.

    Attributes:
        cell: side of a cell in pixels; 4 in the paper. The colour of a cell is the mean a and b of its pixels.
        width: channels of the decoder.
        uniform: share of the uniform distribution in the one whose inverse weighs the bins, lambda of eq. 4; 1 weighs
            all of them alike.
        prior: how often each of the 313 bins occurs (`shared_models.lab.CENTRES`), the other share. The paper counts
            ImageNet's; the colours at the sites are private, and pooled they would mix samples. By default it falls
            off exponentially with the distance from grey, which needs no data at all.
        decay: of that default: the distance over which it falls to 1/e. With 10 a seventh of all cells is grey; the
            authors find a fifth in ImageNet. Pictures of one kind (slides in pink and violet) are far from it.
    """

    cell: PositiveInt = 4
    width: PositiveInt = 128
    uniform: float = Field(0.5, gt=0.0, le=1.0)
    prior: tuple[float, ...] = ()
    decay: PositiveFloat = 10.0

    @field_validator("prior")
    @classmethod
    def _one_for_each_bin(cls, prior: tuple[float, ...]) -> tuple[float, ...]:
        if prior and len(prior) != len(CENTRES):
            raise ValueError(f"should have {len(CENTRES)} numbers, one for each bin, not {len(prior)}")
        if prior and (min(prior) < 0 or sum(prior) <= 0):
            raise ValueError("should be frequencies, none below 0 and not all of them 0")
        return prior


@task(NAME)
class Colorization(Pretext):
    """Outputs are logits (B, 313, h, w) of the bins at every cell. Colour images, `normalise_by = "job"`."""

    Settings = ColorizationSettings
    metrics = ("accuracy", "auc", "distance")
    measures: ClassVar[Mapping[str, Measure]] = {"distance": Measure(unit="", factor=1.0, digits=1, larger=False)}

    @property
    def outputs(self) -> int:
        """One: the backbone's head is replaced."""
        return 1

    def attach(self, model: nn.Module, sample: tuple[int, ...]) -> nn.Module:
        """The backbone with a `GridDecoder` for its head.

        Raises:
            ConfigError: grey images, statistics that are measured at the sites, or a model that is no backbone.
        """
        if sample[0] != 3:
            raise ConfigError(f"the task '{NAME}' needs colours, and data.shape = {list(sample)} has none")
        if self.data is None or self.data.normalise_by != "job":
            raise ConfigError(
                f"the task '{NAME}' undoes the normalisation to see colours, and data.normalise_by = 'sites' does not "
                "tell it how",
                hint="Give data.mean and data.std, or leave all three out",
            )
        net = backbone(model, NAME)
        grid = math.ceil(sample[1] / self.settings.cell), math.ceil(sample[2] / self.settings.cell)
        crown(net, GridDecoder(map_shape(net, sample)[0], self.settings.width, len(CENTRES), grid))
        return model

    @cached_property
    def weights(self) -> Tensor:
        """(313,) of each bin: 1 / ((1 - lambda) prior + lambda / 313), such that their mean under the prior is 1."""
        chosen: ColorizationSettings = self.settings
        far = centres().double().norm(dim=1)
        prior = torch.tensor(chosen.prior).double() if chosen.prior else (-far / chosen.decay).exp()
        prior = prior / prior.sum()
        weights = 1 / ((1 - chosen.uniform) * prior + chosen.uniform / len(prior))
        return (weights / (prior * weights).sum()).float()

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model sees the lightness alone."""
        net = backbone(model, NAME)
        light = rgb_to_lab(self._rgb(batch.x))[:, :1] / 100  # (B, 1, H, W) in [0, 1]
        mean, std = self._normalisation(batch.x)
        logits: Tensor = crowned(net)(net.maps(((light - mean) / std).expand_as(batch.x)))
        return logits

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """-sum z log p over the bins, by the weight of the nearest bin (eq. 2 and 3), mean over the cells, (B,)."""
        near, shares = soft_bins(self._colours(batch.x))  # (B, 5, h, w)
        spread = (shares * outputs.float().log_softmax(dim=1).gather(1, near)).sum(dim=1)
        return (-self.weights.to(outputs.device)[near[:, 0]] * spread).mean(dim=(1, 2))

    def sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Over the cells of all images.

        `hits` int64, of the nearest bin; `distances` (152,) int64, cells whose colour is told to within 0, 1, ..., 150
        and no nearer, the others in the last, as are those of a model that has diverged; `distance` float64, their sum,
        then NaN; `cells`, `examples` int64; `loss` float64.
        """
        truth = self._colours(batch.x)
        near, _ = soft_bins(truth)
        distance = (self.predict(outputs, batch) - truth).norm(dim=1)  # (B, h, w)
        within = distance.nan_to_num(FARTHEST + 1).ceil().long().clamp(max=FARTHEST + 1)
        return {
            "hits": (outputs.argmax(dim=1) == near[:, 0]).sum().cpu(),
            "distances": torch.bincount(within.cpu().flatten(), minlength=FARTHEST + 2),
            "distance": distance.double().sum().cpu(),
            "cells": torch.tensor(distance.numel()),
            "loss": self.loss(outputs, batch).double().sum().cpu(),
            "examples": torch.tensor(len(batch)),
        }

    @cached_property
    def zeros(self) -> dict[str, Tensor]:
        """Sums of no examples."""
        nothing = Batch(torch.zeros(0, 3, 1, 1), torch.zeros(0, dtype=torch.int64))
        return self.sums(torch.zeros(0, len(CENTRES), 1, 1), nothing)

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Means over all cells, each the same weight.

        `accuracy` of the nearest bin; `auc`, the mean over 0, 1, ..., 150 of the share of cells whose colour is told to
        within that (section 3.1; grey alone gets about 0.9 of it on photographs); `distance`, the mean, in units of
        a and b. Mean `loss` per image; `examples`.
        """
        sums = sums or self.zeros
        cells = sums["cells"].double()
        within = sums["distances"][:-1].cumsum(dim=0) / cells
        return {
            "accuracy": (sums["hits"] / cells).item(),
            "auc": within.mean().item(),
            "distance": (sums["distance"] / cells).item(),
            "loss": (sums["loss"] / sums["examples"]).item(),
            "examples": float(sums["examples"]),
        }

    def predict(self, outputs: Tensor, batch: Batch) -> Tensor:
        """a and b of every cell, (B, 2, h, w): the annealed mean of the distribution (eq. 5)."""
        share = (outputs.float() / TEMPERATURE).softmax(dim=1)
        return torch.einsum("bqhw,qc->bchw", share, centres(outputs.device))

    def _normalisation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the job, each (C, 1, 1) or (1, 1, 1)."""
        assert self.data is not None
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.data.mean, self.data.std))
        return mean, std

    def _rgb(self, x: Tensor) -> Tensor:
        """Normalised images as they were, in [0, 1]."""
        mean, std = self._normalisation(x)
        return (x * std + mean).clamp(0, 1)

    def _colours(self, x: Tensor) -> Tensor:
        """a and b of every cell, (B, 2, h, w)."""
        return F.avg_pool2d(rgb_to_lab(self._rgb(x))[:, 1:], self.settings.cell, ceil_mode=True)


def soft_bins(ab: Tensor) -> tuple[Tensor, Tensor]:
    """A colour as a distribution over the bins near it (section 2.1).

    Args:
        ab: (B, 2, h, w).

    Returns:
        The five nearest bins, the nearest first, (B, 5, h, w) int64, and their shares exp(-d^2 / (2 sigma^2)), which
        add up to 1.
    """
    bins = centres(ab.device)
    away = (ab[:, 0, None] - bins[:, 0, None, None]).square() + (ab[:, 1, None] - bins[:, 1, None, None]).square()
    nearest = away.topk(NEIGHBOURS, dim=1, largest=False)  # of (B, 313, h, w)
    return nearest.indices, (-nearest.values / (2 * SIGMA**2)).softmax(dim=1)
