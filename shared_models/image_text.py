"""What the tasks on images with texts ask of a model: one space for both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Features:
    """Images and texts of a batch as points of one space.

    Attributes:
        image: (B, E), of length 1.
        text: (B, E), of length 1; row i belongs to image i.
        scale: (), the inverse of the temperature, by which their products are multiplied.
    """

    image: Tensor
    text: Tensor
    scale: Tensor

    @property
    def logits(self) -> Tensor:
        """(B, B): the scaled cosine of every image (a row) with every text (a column)."""
        return self.scale * self.image @ self.text.T


class ImageText(nn.Module, ABC):
    """A model that puts images and texts into one space of E numbers."""

    @abstractmethod
    def image(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, E), of length 1."""

    @abstractmethod
    def text(self, ids: Tensor) -> Tensor:
        """(B, T) int64, see `shared_models.tokens` -> (B, E), of length 1."""

    @abstractmethod
    def scale(self) -> Tensor:
        """(), the inverse of the learned temperature."""

    def forward(self, x: Tensor) -> Tensor:
        """The images alone."""
        return self.image(x)
