"""Masked autoencoding: most patches of an image are hidden, and the model paints them from the others.

A `MaskedAutoencoder` (the model `mae`) does not compute the hidden ones at all (He et al. 2022). A `Backbone` sees them
in one colour, which is learned, and every step of its last feature map paints its own square of pixels (Xie et al.
2022, SimMIM; there the token stands in the place of an embedded patch, which only transformers have).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, cast

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from shared_models.backbone import MaskedAutoencoder, backbone, crown, crowned, map_shape
from shared_models.decoders import PixelDecoder
from shared_models.errors import ConfigError
from shared_models.tasks.base import Batch, Measure, task
from shared_models.tasks.pretext import Pretext, PretextSettings

NAME = "masked-autoencoding"


class MaskedAutoencodingSettings(PretextSettings):
    """What is hidden, and what is to be painted.

    Attributes:
        ratio: share of the patches that is hidden; 0.75 in He et al., 0.6 in Xie et al.
        patch: side of a patch in pixels, for backbones; by default as many as a step of their last feature map is wide.
            `mae` hides its own patches.
        normalise: whether each patch is to be painted as it is once it has mean 0 and deviation 1: better features in
            He et al., section 4.1, and no picture that one could show.
    """

    ratio: float = Field(0.75, gt=0.0, lt=1.0)
    patch: PositiveInt | None = None
    normalise: bool = False


@dataclass(frozen=True)
class Picture:
    """What a model painted.

    Attributes:
        pixels: (B, C, H, W), those of visible patches too.
        hidden: (B, 1, H, W) bool, where they count.
        patch: side of the patches.
    """

    pixels: Tensor
    hidden: Tensor
    patch: int


@task(NAME)
class MaskedAutoencoding(Pretext):
    """In every image equally many patches are drawn and hidden; outputs are a `Picture`."""

    Settings = MaskedAutoencodingSettings
    metrics = ("error", "explained")
    measures: ClassVar[Mapping[str, Measure]] = {"error": Measure(unit="", factor=1.0, digits=3, larger=False)}
    draws = True

    @property
    def outputs(self) -> int:
        """One: a backbone's head is replaced, and `mae` has none."""
        return 1

    def attach(self, model: nn.Module, sample: tuple[int, ...]) -> nn.Module:
        """A backbone gets a `PixelDecoder` for its head.

        Raises:
            ConfigError: the model is of neither kind, the patch does not divide the image, all of it or nothing would
                be hidden, or a patch is a single number and cannot be normalised.
        """
        chosen: MaskedAutoencodingSettings = self.settings
        if isinstance(model, MaskedAutoencoder):
            patch = model.patch
            if chosen.patch not in (None, patch):
                raise ConfigError(
                    f"task.patch = {chosen.patch}, and the model has patches of side {patch} of its own",
                    hint="Leave task.patch out",
                )
        else:
            net = backbone(model, NAME)
            maps = map_shape(net, sample)
            patch = chosen.patch or math.ceil(sample[1] / maps[1])
            crown(net, PixelDecoder(maps, sample, patch))
        common = math.gcd(*sample[1:])
        if common % patch:
            fitting = ", ".join(str(p) for p in range(1, common + 1) if common % p == 0)
            raise ConfigError(
                f"the task '{NAME}' cannot cut an image of {sample[1]}x{sample[2]} pixels into patches of side {patch}",
                hint=f"Set task.patch to one of {fitting}",
            )
        count = math.prod(sample[1:]) // patch**2
        if not 0 < self._visible(count) < count:
            raise ConfigError(
                f"task.ratio = {chosen.ratio} of {count} patches of side {patch} hides the whole image, or nothing",
                hint="Set another ratio or smaller patches",
            )
        if chosen.normalise and sample[0] * patch**2 == 1:
            raise ConfigError(
                "task.normalise = true divides by a patch's deviation, and a patch of one grey pixel has no deviation",
                hint="Set larger patches, or leave task.normalise out",
            )
        return model

    def forward(self, model: nn.Module, batch: Batch) -> Picture:
        """An order of the patches is drawn for every image, from torch's global CPU generator; the first are seen."""
        net = None if isinstance(model, MaskedAutoencoder) else backbone(model, NAME)
        decoder = cast(PixelDecoder | MaskedAutoencoder, model if net is None else crowned(net))
        grid = [side // decoder.patch for side in batch.x.shape[2:]]
        order = torch.rand(len(batch), math.prod(grid)).argsort(dim=1)
        visible = self._visible(order.shape[1])
        hidden = (order.argsort(dim=1) >= visible).unflatten(1, (1, *grid)).to(batch.x.device)  # (B, 1, h, w)
        hidden = hidden.repeat_interleave(decoder.patch, 2).repeat_interleave(decoder.patch, 3)
        if isinstance(decoder, MaskedAutoencoder):
            pixels = decoder.reconstruct(batch.x, order.to(batch.x.device), visible)
        else:
            assert net is not None
            pixels = decoder(net.maps(decoder.cover(batch.x, hidden)))
        return Picture(pixels, hidden, decoder.patch)

    def loss(self, outputs: Picture, batch: Batch) -> Tensor:
        """Mean squared error over the numbers of the hidden patches, (B,)."""
        squares, _, numbers = self._errors(outputs, batch)
        return squares / numbers

    def sums(self, outputs: Picture, batch: Batch) -> dict[str, Tensor]:
        """Over the hidden numbers (pixels times channels) of all images.

        `squares` float64, squared errors; `spread` float64, those of an answer that knows nothing (see `values`);
        `numbers` int64, how many; `loss` float64; `examples` int64.
        """
        squares, spread, numbers = self._errors(outputs, batch)
        return {
            "squares": squares.double().sum().cpu(),
            "spread": spread.double().sum().cpu(),
            "numbers": numbers.sum().cpu(),
            "loss": (squares / numbers).double().sum().cpu(),
            "examples": torch.tensor(len(batch)),
        }

    @cached_property
    def zeros(self) -> dict[str, Tensor]:
        """Sums of no examples."""
        none = torch.zeros(0, 1, 1, 1)
        return self.sums(Picture(none, none.bool(), 1), Batch(none, torch.zeros(0, dtype=torch.int64)))

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`error`, the root of the mean squared error, in units of the normalised images; `explained`; and the usual.

        `explained` is 1 - squares / spread: 1 for the very pixels, 0 for an answer in one colour, the mean of the
        image's visible pixels (with `normalise`: the hidden patch's own mean), below 0 for a worse one.
        """
        sums = sums or self.zeros
        return {
            "error": (sums["squares"] / sums["numbers"]).sqrt().item(),
            "explained": (1 - sums["squares"] / sums["spread"]).item(),
            "loss": (sums["loss"] / sums["examples"]).item(),
            "examples": float(sums["examples"]),
        }

    def predict(self, outputs: Picture, batch: Batch) -> Tensor:
        """The images with what was painted in their hidden patches, (B, C, H, W), normalised as they are."""
        return torch.where(outputs.hidden, outputs.pixels, batch.x)

    def _visible(self, patches: int) -> int:
        hidden: float = self.settings.ratio
        return round(patches * (1 - hidden))

    def _errors(self, outputs: Picture, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Of each image, (B,): squared errors, those of an answer that knows nothing, and the hidden numbers."""
        hidden, x = outputs.hidden, batch.x
        if self.settings.normalise:
            target, blind = standardised(x, outputs.patch), x.new_zeros(())
        else:
            seen = (~hidden).sum(dim=(2, 3), keepdim=True)
            target, blind = x, (x * ~hidden).sum(dim=(2, 3), keepdim=True) / seen
        squares = ((outputs.pixels.float() - target).square() * hidden).sum(dim=(1, 2, 3))
        spread = ((blind - target).square() * hidden).sum(dim=(1, 2, 3))
        return squares, spread, x.shape[1] * hidden.sum(dim=(1, 2, 3))


def standardised(x: Tensor, patch: int) -> Tensor:
    """Images (B, C, H, W) whose patches have mean 0 and deviation 1, over all channels (He et al. 2022, section 3)."""
    height, width = x.shape[2:]
    cut = x.unflatten(3, (width // patch, patch)).unflatten(2, (height // patch, patch))  # (B, C, h, p, w, p)
    numbers = (1, 3, 5)
    mean, variance = cut.mean(numbers, keepdim=True), cut.var(numbers, keepdim=True)
    whole: Tensor = ((cut - mean) / (variance + 1e-6).sqrt()).flatten(4, 5).flatten(2, 3)
    return whole
