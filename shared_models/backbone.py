"""What a task may ask of a model whose last feature maps it wants to see: one contract between such tasks and the zoo.

A task that predicts something at every place of an image (its colour, its hidden pixels) builds on the feature maps and
has no use for what stands above them. `crown` puts its decoder there, under the head's own name: the decoder is then
what `Model.heads` and `@head` mean, it starts anew in another task, and nothing is sent that nothing trains. All that
is below keeps its names, so that its weights carry over.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from shared_models.errors import ConfigError
from shared_models.models import models


@runtime_checkable
class Backbone(Protocol):
    """A module with feature maps below its head.

    Attributes:
        top: names of the children that `maps` does not use, the head last.
    """

    @property
    def top(self) -> tuple[str, ...]: ...  # noqa: D102

    def maps(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, h, w): the last feature maps before pooling and head."""
        ...


class MaskedAutoencoder(nn.Module, ABC):
    """A module that sees some patches of an image and tells the others.

    Attributes:
        patch: side of a square patch in pixels.
    """

    patch: int

    @abstractmethod
    def reconstruct(self, x: Tensor, order: Tensor, visible: int) -> Tensor:
        """(B, C, H, W) -> the whole image as it is told from its visible patches, (B, C, H, W).

        Args:
            x: images; what the hidden patches hold is not read.
            order: (B, N) int64, a permutation of the patches (row by row) for every image.
            visible: how many of them, the first in that order, are seen.
        """


def backbone(model: nn.Module, task: str) -> Backbone:
    """The model as a `Backbone`; a ConfigError names the models that serve the task where it is none."""
    if isinstance(model, Backbone):
        return model
    serve = ", ".join(name for name in models if task in models[name].tasks)
    raise ConfigError(
        f"the task '{task}' builds on a model's feature maps, which {type(model).__name__} does not show",
        hint=f"Models that do: {serve}",
    )


def map_shape(model: Backbone, sample: tuple[int, ...]) -> tuple[int, int, int]:
    """(D, h, w) of the feature maps of one image of shape `sample`."""
    module = cast(nn.Module, model)
    training = module.training
    module.eval()
    with torch.no_grad():
        _, depth, height, width = model.maps(torch.zeros(1, *sample)).shape
    module.train(training)
    return depth, height, width


def crown(model: Backbone, decoder: nn.Module) -> None:
    """Put a decoder in the place of the model's head, and drop what else stands above the feature maps."""
    *rest, head = model.top
    for name in rest:
        delattr(model, name)
    setattr(model, head, decoder)


def crowned(model: Backbone) -> nn.Module:
    """What `crown` has put there."""
    return cast(nn.Module, model).get_submodule(model.top[-1])
