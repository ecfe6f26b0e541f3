"""Small convolutional networks: blocks of convolution, ReLU and 2x2 max pooling, then fully connected layers.

===========  ========  ==================  ========  =========================  =========================
size         channels  kernel              hidden    parameters                 from
===========  ========  ==================  ========  =========================  =========================
tiny         16, 32    3, side kept        64        13,706 at 8x8x1, 10 out    ours
mcmahan      32, 64    5, side kept        512       1,663,370 at 28x28x1, 10   McMahan et al. 2017, section 3
niid-bench   6, 16     5, side minus 4     120, 84   62,006 at 32x32x3, 10      Li et al. 2022, NIID-Bench
===========  ========  ==================  ========  =========================  =========================
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import Annotated

from pydantic import Field, PositiveInt, field_validator
from torch import Tensor, nn

from shared_models.errors import ConfigError
from shared_models.models import ModelSettings, Shape, model


class CNNSettings(ModelSettings):
    """The convolutions and the fully connected layers after them.

    Attributes:
        channels: of each convolution; a 2x2 max pooling follows each.
        kernel: side of the filters, odd.
        padded: whether zero padding keeps the side; else each convolution shortens it by kernel - 1.
        hidden: widths of the fully connected layers before the head; may be empty.
    """

    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    kernel: PositiveInt
    padded: bool
    hidden: tuple[PositiveInt, ...]

    @field_validator("kernel")
    @classmethod
    def _odd(cls, kernel: int) -> int:
        if kernel % 2 == 0:
            raise ValueError(f"should be odd, not {kernel}")
        return kernel


class CNN(nn.Sequential):
    """The layers in a row; see `shared_models.backbone` for `top` and `maps`."""

    def __init__(self, layers: OrderedDict[str, nn.Module]) -> None:
        super().__init__(layers)
        names = list(layers)
        self.top = tuple(names[names.index("flatten") :])

    def maps(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, channels[-1], h, w) after the last pooling."""
        for name, layer in self.named_children():
            if name in self.top:
                break
            x = layer(x)
        return x


@model(
    "cnn",
    settings=CNNSettings,
    sizes={
        "tiny": {"channels": (16, 32), "kernel": 3, "padded": True, "hidden": (64,)},
        "mcmahan": {"channels": (32, 64), "kernel": 5, "padded": True, "hidden": (512,)},
        "niid-bench": {"channels": (6, 16), "kernel": 5, "padded": False, "hidden": (120, 84)},
    },
    paper="McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data",
    tasks=("classification", "rotation", "jigsaw", "colorization", "masked-autoencoding"),
    notes="Colorization and masked autoencoding train the convolutions alone: train a probe after them with "
    "`[share] base = ['conv*']`, for the fully connected layers start anew like the head.",
)
def build(settings: CNNSettings, shape: Shape, outputs: int) -> nn.Module:
    """(B, C, H, W) -> (B, outputs) scores.

    Raises:
        ConfigError: the image is too small for that many convolutions; names the smallest that fits.
    """
    channels, height, width = shape
    lost = 0 if settings.padded else settings.kernel - 1  # pixels of a side that one convolution takes
    smallest = 1
    for _ in settings.channels:
        smallest = 2 * smallest + lost
    if min(height, width) < smallest:
        raise ConfigError(
            f"model 'cnn' of size '{settings.size}' cannot take an image of {height}x{width} pixels: "
            f"its smallest is {smallest}x{smallest}",
            hint="Enlarge the images, or use fewer channels, a smaller kernel or padded = true",
        )

    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (before, after) in enumerate(pairwise((channels, *settings.channels)), start=1):
        layers[f"conv{i}"] = nn.Conv2d(before, after, settings.kernel, padding="same" if settings.padded else 0)
        layers[f"relu{i}"] = nn.ReLU()
        layers[f"pool{i}"] = nn.MaxPool2d(2)  # (B, channels[i], H', W')
        height, width = (height - lost) // 2, (width - lost) // 2
    layers["flatten"] = nn.Flatten()  # (B, channels[-1] H' W')
    widths = (settings.channels[-1] * height * width, *settings.hidden)
    for i, (before, after) in enumerate(pairwise(widths), start=1):
        layers[f"hidden{i}"] = nn.Linear(before, after)  # (B, hidden[i])
        layers[f"hidden_relu{i}"] = nn.ReLU()
    layers["head"] = nn.Linear(widths[-1], outputs)  # (B, outputs)
    return CNN(layers)
