"""Fully connected network with ReLU; an image is flattened.

======  ===========  =============================  ==========
size    hidden       parameters at 28x28x1, 10 out  from
======  ===========  =============================  ==========
tiny    64           50,890                         ours
2nn     200, 200     199,210                        McMahan et al. 2017, "MNIST 2NN"
======  ===========  =============================  ==========
"""

from __future__ import annotations

import math
from collections import OrderedDict
from itertools import pairwise
from typing import Annotated

from pydantic import Field, PositiveInt
from torch import nn

from shared_models.models import ModelSettings, Shape, model


class MLPSettings(ModelSettings):
    """`hidden`: the width of each hidden layer, first to last."""

    hidden: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


@model(
    "mlp",
    settings=MLPSettings,
    sizes={"tiny": {"hidden": (64,)}, "2nn": {"hidden": (200, 200)}},
    paper="McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data",
    inputs=("image", "features"),
)
def build(settings: MLPSettings, shape: Shape, outputs: int) -> nn.Module:
    """(B, *shape) -> (B, outputs) scores."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())  # (B, F)
    for i, (before, after) in enumerate(pairwise((math.prod(shape), *settings.hidden)), start=1):
        layers[f"hidden{i}"] = nn.Linear(before, after)  # (B, hidden[i])
        layers[f"relu{i}"] = nn.ReLU()
    layers["head"] = nn.Linear(settings.hidden[-1], outputs)  # (B, outputs)
    return nn.Sequential(layers)
