"""What a promptable segmenter is: the one contract between the promptable task and its models.

A prompt is a set of points, each with a label that says what the point is. Coordinates are x, y as fractions of the
image's width and height; the centre of the pixel in column c and row r of an image of W x H is ((c + 0.5) / W,
(r + 0.5) / H).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

PADDING = -1  # no point at all: its coordinates count nowhere
OUTSIDE = 0  # a point on the background
INSIDE = 1  # a point on the object
LOW_CORNER = 2  # x0, y0 of a box around the object
HIGH_CORNER = 3  # x1, y1 of the same box


class Masks(NamedTuple):
    """Candidates for one object per image; their order means nothing.

    Attributes:
        logits: (B, N, h, w), an object where above 0; h and w are the model's own output size.
        scores: (B, N), the IoU that the model expects of each candidate.
    """

    logits: Tensor
    scores: Tensor


class Promptable(nn.Module, ABC):
    """Embeds an image once and answers any number of prompts about it."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """(B, C, H, W) float32, normalised -> the images' embedding, (B, D, ...)."""

    @abstractmethod
    def decode(
        self, image: Tensor, points: Tensor, labels: Tensor, mask: Tensor | None = None, *, single: bool = False
    ) -> Masks:
        """The masks of one prompt per image.

        Args:
            image: what `encode` returned.
            points: (B, P, 2) float32.
            labels: (B, P) int64, of the constants above.
            mask: (B, h, w) logits of an earlier answer that is to be improved.
            single: whether to give one mask, for a prompt that leaves no doubt, in place of several.
        """

    def forward(self, x: Tensor, points: Tensor, labels: Tensor) -> Masks:
        """Candidates for one prompt per image."""
        return self.decode(self.encode(x), points, labels)
