"""What stands on a backbone's feature maps while a pretext task trains it; see `shared_models.backbone.crown`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GridDecoder(nn.Module):
    """Two 3x3 convolutions with ReLU and a 1x1 convolution: (B, D, h, w) -> (B, outputs, *grid).

    Between the first two the maps are interpolated to the grid.
    """

    def __init__(self, depth: int, width: int, outputs: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.before = nn.Conv2d(depth, width, 3, padding=1)
        self.after = nn.Conv2d(width, width, 3, padding=1)
        self.scores = nn.Conv2d(width, outputs, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """`outputs` numbers at every place of the grid."""
        x = F.relu(self.before(maps))
        x = F.interpolate(x, self.grid, mode="bilinear", align_corners=False)
        scores: Tensor = self.scores(F.relu(self.after(x)))
        return scores


class PixelDecoder(nn.Module):
    """The colour of what is hidden, and a 1x1 convolution from maps to pixels (Xie et al. 2022, SimMIM, section 3.3).

    Every step of the feature map paints a square of its own: (B, D, h, w) -> (B, C, H, W).

    Args:
        maps: (D, h, w) of the feature maps.
        sample: (C, H, W) of an image.
        patch: side of the patches that are hidden, in pixels.
    """

    def __init__(self, maps: tuple[int, int, int], sample: tuple[int, ...], patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.size = sample[1:]
        self.square = (sample[0], *(math.ceil(side / steps) for side, steps in zip(self.size, maps[1:], strict=True)))
        self.token = nn.Embedding(1, sample[0])
        self.pixels = nn.Conv2d(maps[0], math.prod(self.square), 1)
        nn.init.zeros_(self.token.weight)  # of normalised images the mean

    def cover(self, x: Tensor, hidden: Tensor) -> Tensor:
        """The images (B, C, H, W) with that colour in every hidden pixel, (B, 1, H, W) bool."""
        colour = self.token(torch.zeros(len(x), dtype=torch.int64, device=x.device))  # (B, C)
        return torch.where(hidden, colour[:, :, None, None], x)

    def forward(self, maps: Tensor) -> Tensor:
        """The squares side by side; what reaches beyond the image is cut off."""
        squares = self.pixels(maps).unflatten(1, self.square)  # (B, C, square, square, h, w)
        whole: Tensor = squares.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
        return whole[:, :, : self.size[0], : self.size[1]]
