"""Jigsaw puzzles (Noroozi & Favaro 2016): in which order do the tiles of an image lie?

The shuffled tiles are put together to one image again (Carlucci et al. 2019), so any classifier can be asked, and what
it learns has the shapes of the images themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import permutations
from math import factorial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from shared_models.errors import ConfigError
from shared_models.tasks.base import Batch, task
from shared_models.tasks.pretext import Pretext, PretextSettings


class JigsawSettings(PretextSettings):
    """The puzzle.

    Attributes:
        grid: tiles of a side.
        permutations: orders to tell apart; Carlucci et al. take 30, Noroozi & Favaro up to 1000.
        gap: share of a tile's side that is lost: the tile is cut out of its place at random, that much smaller, and
            enlarged again. Edges then do not go on from tile to tile, which would give the answer away; 11 of 75 pixels
            in Noroozi & Favaro, section 3.3.
        normalise: whether each tile gets mean 0 and deviation 1, against answers from its brightness alone (the same
            section).
    """

    grid: Literal[2, 3] = 3
    permutations: int = Field(30, ge=2)
    gap: float = Field(0.15, ge=0.0, lt=1.0)
    normalise: bool = False

    @model_validator(mode="after")
    def _that_many_there_are(self) -> JigsawSettings:
        if self.permutations > factorial(self.grid**2):
            raise ValueError(f"{self.grid**2} tiles have {factorial(self.grid**2)} orders, not {self.permutations}")
        return self


@dataclass(frozen=True)
class Puzzle:
    """What a model said of shuffled images.

    Attributes:
        logits: (B, permutations).
        answer: (B,) int64, the order that was drawn.
    """

    logits: Tensor
    answer: Tensor


@task("jigsaw")
class Jigsaw(Pretext):
    """An order is drawn for every image; outputs are a `Puzzle`. An edge that the grid does not fill is 0."""

    Settings = JigsawSettings
    metrics = ("accuracy",)
    draws = True

    @property
    def outputs(self) -> int:
        """One logit per order."""
        count: int = self.settings.permutations
        return count

    @cached_property
    def orders(self) -> Tensor:
        """(permutations, grid^2) int64; see `far_apart`."""
        return torch.from_numpy(far_apart(self.settings.grid**2, self.settings.permutations))

    def shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        """The sample; raises a ConfigError where it is too small for the grid."""
        if min(sample[1:]) < self.settings.grid:
            raise ConfigError(
                f"the task 'jigsaw' cannot cut {sample[1]}x{sample[2]} pixels into {self.settings.grid} tiles a side",
                hint="Enlarge data.shape",
            )
        return sample

    def forward(self, model: nn.Module, batch: Batch) -> Puzzle:
        """Draw an order and the tiles' places, as many numbers for every image, from torch's global CPU generator."""
        chosen: JigsawSettings = self.settings
        chance = torch.rand(len(batch), 1 + 2 * chosen.grid**2, dtype=torch.float64)
        answer = (chance[:, 0] * chosen.permutations).long()
        x = shuffled(batch.x, self.orders[answer], chance[:, 1:].unflatten(1, (2, -1)), chosen)
        return Puzzle(model(x), answer.to(batch.x.device))

    def loss(self, outputs: Puzzle, batch: Batch) -> Tensor:
        """Cross-entropy of the order, (B,)."""
        return F.cross_entropy(outputs.logits, outputs.answer, reduction="none")

    def sums(self, outputs: Puzzle, batch: Batch) -> dict[str, Tensor]:
        """`hits` int64; `loss` float64; `examples` int64."""
        outputs = Puzzle(outputs.logits.float().cpu(), outputs.answer.cpu())
        return {
            "hits": (self.predict(outputs, batch) == outputs.answer).sum(),
            "loss": self.loss(outputs, batch).double().sum(),
            "examples": torch.tensor(len(batch)),
        }

    @cached_property
    def zeros(self) -> dict[str, Tensor]:
        """Sums of no examples."""
        nothing = torch.zeros(0, dtype=torch.int64)
        return self.sums(Puzzle(torch.zeros(0, self.outputs), nothing), Batch(torch.zeros(0, 1), nothing))

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`accuracy` (chance: 1 of the permutations); mean `loss`; `examples`."""
        sums = sums or self.zeros
        return {
            "accuracy": (sums["hits"].double() / sums["examples"]).item(),
            "loss": (sums["loss"] / sums["examples"]).item(),
            "examples": float(sums["examples"]),
        }

    def predict(self, outputs: Puzzle, batch: Batch) -> Tensor:
        """The order that each image seems to have, (B,) int64."""
        return outputs.logits.argmax(dim=1)


@lru_cache
def far_apart(tiles: int, count: int) -> np.ndarray:
    """Permutations that are far from each other, so that none is nearly another (Noroozi & Favaro 2016, Algorithm 1).

    The first is the identity; each further one has the largest sum of Hamming distances to those before it, of several
    such ones the first in alphabetical order. Nothing is drawn: every site has the same.

    Returns:
        (count, tiles) int64; `[i, p]` is the tile that lies in place p.
    """
    every = np.array(list(permutations(range(tiles))), dtype=np.int8).T.copy()  # (tiles, tiles!)
    total = np.zeros(every.shape[1], dtype=np.int32)
    chosen = [0]
    while len(chosen) < count:
        total += (every != every[:, chosen[-1:]]).sum(axis=0, dtype=np.int32)
        total[chosen[-1]] = np.iinfo(np.int32).min // 2  # never again
        chosen.append(int(total.argmax()))
    return every[:, chosen].T.astype(np.int64)


def shuffled(x: Tensor, orders: Tensor, places: Tensor, settings: JigsawSettings) -> Tensor:
    """Images whose tiles lie in another order.

    Args:
        x: (B, C, H, W). Rows and columns beyond a multiple of `grid` are cut off evenly at both ends.
        orders: (B, grid^2), the tile that lies in each place, row by row.
        places: (B, 2, grid^2) in [0, 1), where each place's tile is cut out, down and across.
        settings: of the puzzle.

    Returns:
        (B, C, H, W), with 0 where the grid does not reach.
    """
    grid, sides = settings.grid, x.shape[2:]
    cell = [side // grid for side in sides]
    tile = [max(1, side - round(settings.gap * side)) for side in cell]
    edge = [(side - grid * inner) // 2 for side, inner in zip(sides, cell, strict=True)]
    pixels = []  # of every place's tile: rows (B, n, tile height), columns (B, n, tile width)
    for i, index in enumerate((orders // grid, orders % grid)):
        start = edge[i] + cell[i] * index + (places[:, i] * (cell[i] - tile[i] + 1)).long()
        pixels.append((start[:, :, None] + torch.arange(tile[i])).to(x.device))
    image = torch.arange(len(x), device=x.device)[:, None, None, None]
    tiles = x[image, :, pixels[0][:, :, :, None], pixels[1][:, :, None, :]].movedim(-1, 2)  # (B, n, C, tile, tile)
    if settings.normalise:
        numbers = (2, 3, 4)
        mean, deviation = tiles.mean(numbers, keepdim=True), tiles.std(numbers, correction=0, keepdim=True)
        tiles = (tiles - mean) / (deviation + 1e-5)
    if tile != cell:
        enlarged = F.interpolate(tiles.flatten(0, 1), cell, mode="bilinear", align_corners=False)
        tiles = enlarged.unflatten(0, (len(x), grid**2))
    whole = tiles.unflatten(1, (grid, grid)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    rest = [side - inner - before for side, inner, before in zip(sides, whole.shape[2:], edge, strict=True)]
    return F.pad(whole, (edge[1], rest[1], edge[0], rest[0]))
