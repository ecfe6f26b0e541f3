"""Autoencoder (Hinton & Salakhutdinov 2006): an example through a code of few numbers and back.

======  ================  ====  ==========================  ====
size    widths            code  parameters                  from
======  ================  ====  ==========================  ====
tiny    16, 32            16    16,289 at one channel, 8x8  ours
medium  32, 64, 128, 256  128   1,840,099 at 3x64x64        ours
======  ================  ====  ==========================  ====

Images go through 3x3 convolutions that halve the resolution, each followed by GroupNorm (Wu & He 2018) and ReLU, and
come back by nearest-neighbour enlargement and 3x3 convolutions (Odena et al. 2016, against chequered patterns); rows
of features go through fully connected layers. The last layer is linear: the numbers of an example are normalised.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import Annotated

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from shared_models.models import ModelSettings, Shape, model
from shared_models.zoo.resnet import norm_layer

Widths = tuple[Annotated[int, Field(gt=0, multiple_of=8)], ...]


class AutoencoderSettings(ModelSettings):
    """The network's form.

    Attributes:
        widths: of images, channels of each convolution of the encoder, each at half the resolution of the one before;
            of features, hidden layers. Multiples of 8; the decoder has them the other way round.
        code: numbers between encoder and decoder.
    """

    widths: Annotated[Widths, Field(min_length=1)]
    code: PositiveInt


class Autoencoder(nn.Module):
    """`decoder(encoder(x))`."""

    def __init__(self, settings: AutoencoderSettings, shape: Shape) -> None:
        super().__init__()
        self.encoder = make_encoder(settings.widths, shape, settings.code)
        self.decoder = make_decoder(settings.widths, settings.code, shape)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *shape) -> (B, *shape)."""
        again: Tensor = self.decoder(self.encoder(x))
        return again


def make_encoder(widths: Widths, shape: Shape, numbers: int) -> nn.Sequential:
    """(B, *shape) -> (B, numbers)."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if len(shape) == 1:
        for i, (before, after) in enumerate(pairwise((*shape, *widths)), start=1):
            layers[f"hidden{i}"] = nn.Linear(before, after)
            layers[f"relu{i}"] = nn.ReLU()
        layers["code"] = nn.Linear(widths[-1], numbers)
        return nn.Sequential(layers)
    for i, (before, after) in enumerate(pairwise((shape[0], *widths)), start=1):
        layers[f"conv{i}"] = nn.Conv2d(before, after, 3, stride=2, padding=1)  # (B, widths[i], H / 2^i, W / 2^i)
        layers[f"norm{i}"] = norm_layer("group", after)
        layers[f"relu{i}"] = nn.ReLU()
    layers["flatten"] = nn.Flatten()
    height, width = _sides(widths, shape)[-1]
    layers["code"] = nn.Linear(widths[-1] * height * width, numbers)
    return nn.Sequential(layers)


def make_decoder(widths: Widths, numbers: int, shape: Shape) -> nn.Sequential:
    """(B, numbers) -> (B, *shape)."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if len(shape) == 1:
        for i, (before, after) in enumerate(pairwise((numbers, *reversed(widths))), start=1):
            layers[f"hidden{i}"] = nn.Linear(before, after)
            layers[f"relu{i}"] = nn.ReLU()
        layers["head"] = nn.Linear(widths[0], *shape)
        return nn.Sequential(layers)
    sides = _sides(widths, shape)
    smallest = (widths[-1], *sides[-1])
    layers["start"] = nn.Linear(numbers, smallest[0] * smallest[1] * smallest[2])
    layers["unflatten"] = nn.Unflatten(1, smallest)
    for i, (before, after) in enumerate(pairwise((*reversed(widths), widths[0])), start=1):
        layers[f"up{i}"] = nn.Upsample(sides[-1 - i])  # (B, before, 2H, 2W), or one less where a side was odd
        layers[f"conv{i}"] = nn.Conv2d(before, after, 3, padding=1)
        layers[f"norm{i}"] = norm_layer("group", after)
        layers[f"relu{i}"] = nn.ReLU()
    layers["head"] = nn.Conv2d(widths[0], shape[0], 3, padding=1)
    return nn.Sequential(layers)


def _sides(widths: Widths, shape: Shape) -> list[tuple[int, int]]:
    """(H, W) of the image and behind each convolution of the encoder, rounded up."""
    sides = [(shape[1], shape[2])]
    for _ in widths:
        height, width = sides[-1]
        sides.append(((height + 1) // 2, (width + 1) // 2))
    return sides


@model(
    "autoencoder",
    settings=AutoencoderSettings,
    sizes={
        "tiny": {"widths": (16, 32), "code": 16},
        "medium": {"widths": (32, 64, 128, 256), "code": 128},
    },
    paper="Hinton & Salakhutdinov 2006, Reducing the Dimensionality of Data with Neural Networks",
    tasks=("reconstruction", "anomaly"),
    inputs=("image", "features"),
    heads=("decoder.head.*",),
    family="reconstruction",
    notes="Learns what examples have in common; what it cannot draw again is unlike them. A smaller code is stricter.",
    usual={"tiny": (1, 8, 8), "medium": (3, 64, 64)},
)
def build(settings: AutoencoderSettings, shape: Shape, outputs: int) -> nn.Module:
    """(B, *shape) -> (B, *shape), for images of any size and rows of features."""
    return Autoencoder(settings, shape)
