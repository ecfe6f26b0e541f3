"""Multinomial logistic regression: one linear layer, a convex problem, the first thing to try on any federation."""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import nn

from shared_models.models import ModelSettings, Shape, model


class LogisticSettings(ModelSettings):
    """Nothing to set."""


@model(
    "logistic",
    settings=LogisticSettings,
    sizes={"tiny": {}},
    paper="Cox 1958, The Regression Analysis of Binary Sequences",
    inputs=("image", "features"),
)
def build(settings: LogisticSettings, shape: Shape, outputs: int) -> nn.Module:
    """(B, *shape) -> (B, outputs) scores; an image is flattened."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),  # (B, F)
            head=nn.Linear(math.prod(shape), outputs),  # (B, outputs)
        )
    )
