"""What CLIP is put together from: encoders of images and of texts, each ending in a point of E numbers.

Two of each kind: transformers as in the paper (Radford et al. 2021, section 2.4), and what learns from a thousand
images on a CPU: convolutions for the image, a bag of words for the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_models.models import Shape
from shared_models.tokens import TEXT, Bytes
from shared_models.transformer import BlockSettings, EncoderBlock, Positions, causal, not_padding
from shared_models.zoo.lstm import last
from shared_models.zoo.resnet import norm_layer

MODULUS, FACTOR = 2**31 - 1, 1_000_003  # of the hash of a word: products stay within int64


class VisionTransformer(nn.Module):
    """Patches and a class token, a norm before the blocks and one after; the class token's: (B, C, H, W) -> (B, E)."""

    def __init__(self, block: BlockSettings, layers: int, patch: int, shape: Shape, outputs: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.patches = nn.Conv2d(channels, block.width, patch, stride=patch, bias=False)
        self.class_token = nn.Parameter(block.width**-0.5 * torch.randn(block.width))
        self.positions = Positions("learnable", 1 + (height // patch) * (width // patch), block.width)
        self.first_norm = block.make_norm()
        self.blocks = nn.ModuleList(EncoderBlock(block) for _ in range(layers))
        self.norm = block.make_norm()
        self.head = nn.Linear(block.width, outputs, bias=False)
        initialise(self, block.width, layers)
        nn.init.normal_(self.positions.table.weight, std=block.width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """One point an image."""
        x = self.patches(x).flatten(2).transpose(1, 2)  # (B, N, D)
        x = torch.cat([self.class_token.expand(len(x), 1, -1).to(x.dtype), x], dim=1)  # (B, 1 + N, D)
        x = self.first_norm(self.positions(x))
        for block in self.blocks:
            x = block(x)
        point: Tensor = self.head(self.norm(x[:, 0]))
        return point


class TextTransformer(nn.Module):
    """Causal blocks, and what stands at a text's last token, `<end>` where it is whole: (B, T) -> (B, E)."""

    def __init__(self, block: BlockSettings, layers: int, length: int, vocabulary: int, outputs: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, block.width)
        self.positions = Positions("learnable", length, block.width)
        self.blocks = nn.ModuleList(EncoderBlock(block) for _ in range(layers))
        self.norm = block.make_norm()
        self.head = nn.Linear(block.width, outputs, bias=False)
        initialise(self, block.width, layers)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.table.weight, std=0.01)

    def forward(self, ids: Tensor) -> Tensor:
        """One point a text."""
        keep = causal(ids.shape[1], ids.device) & not_padding(ids)
        x = self.positions(self.tokens(ids))
        for block in self.blocks:
            x = block(x, keep)
        point: Tensor = self.head(self.norm(last(x, ids)))
        return point


class Convolutions(nn.Module):
    """Stages of a 3x3 convolution, GroupNorm, ReLU and 2x2 max pooling; the first convolution has stride 2.

    The point is made of the mean of every channel of every stage over each quarter of the image: of what is where in
    edges and in what is made of these; and of colours, pixel by pixel, which the stages' norms take out.
    (B, C, H, W) -> (B, E).

    Args:
        channels: of each convolution.
        colours: half-spaces of colour (a 1x1 convolution and ReLU), whose means are a soft histogram; 0: none.
        norm: of the means: over those of one image (`layer`), or each over the images of a batch (`batch`).
        dropout: of the normalised means.
        shape: of an image, (C, H, W).
        outputs: E.
    """

    def __init__(
        self,
        channels: Sequence[int],
        colours: int,
        norm: Literal["layer", "batch"],
        dropout: float,
        shape: Shape,
        outputs: int,
    ) -> None:
        super().__init__()
        self.colours = nn.Conv2d(shape[0], colours, 1) if colours else None
        self.stages = nn.ModuleList()
        for i, (before, after) in enumerate(pairwise((shape[0], *channels))):
            convolution = nn.Conv2d(before, after, 3, stride=1 if i else 2, padding=1)
            self.stages.append(nn.Sequential(convolution, norm_layer("group", after), nn.ReLU(), nn.MaxPool2d(2)))
        found = 4 * (colours + sum(channels))
        self.norm = BatchNorm(found) if norm == "batch" else nn.LayerNorm(found)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(found, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """One point an image."""
        means = [] if self.colours is None else [quarters(F.relu(self.colours(x)))]
        for stage in self.stages:
            x = stage(x)
            means.append(quarters(x))
        point: Tensor = self.head(self.dropout(self.norm(torch.cat(means, dim=1))))
        return point


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation, (B, F) -> (B, F); an image that is alone in its batch takes the running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        """Of a single image no deviation can be had, where torch's own raises."""
        if len(x) > 1 or not self.training:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def quarters(x: Tensor) -> Tensor:
    """The mean of each channel over each quarter, (B, C, H, W) -> (B, 4 C); a middle row or column belongs to both."""
    height, width = x.shape[2:]
    if height % 2 == 0 and width % 2 == 0:  # in one pass; each slice's backward fills a whole map with zeros
        means = x.unflatten(3, (2, -1)).unflatten(2, (2, -1)).mean(dim=(3, 5))  # (B, C, 2, 2)
        turned: Tensor = means.permute(0, 2, 3, 1).flatten(1)
        return turned
    rows, columns = ((slice((n + 1) // 2), slice(n // 2, n)) for n in (height, width))
    return torch.cat([x[:, :, row, column].mean(dim=(2, 3)) for row in rows for column in columns], dim=1)


class Bag(nn.Module):
    """The sum of the vectors of a text's words, which have their row of one table by their hash: (B, T) -> (B, E).

    No list of words is needed (Weinberger et al. 2009); two words may share a row. In bytes a word is a run of letters
    and digits, capital or not, and of whatever is not ASCII; a token of a file, which never has as many ids as there
    are of bytes, is a word. A row that starts near zero says next to nothing before it was trained.
    """

    def __init__(self, buckets: int, dropout: float, vocabulary: int, outputs: int, std: float = 0.01) -> None:
        super().__init__()
        self.dropout = dropout
        self.bytes = vocabulary == Bytes.size
        self.table = nn.Embedding(buckets, outputs)
        nn.init.normal_(self.table.weight, std=std)

    def rows(self, ids: Tensor) -> Tensor:
        """(B, T) int64: at the last token of each word its row, else -1."""
        if not self.bytes:
            return torch.where(ids >= TEXT, ids * FACTOR % MODULUS % self.table.num_embeddings, -1)
        ids = torch.where(_between(ids, "A", "Z"), ids + (ord("a") - ord("A")), ids)
        within = (ids >= TEXT + 128) | _between(ids, "a", "z") | _between(ids, "0", "9")
        codes, code = [], torch.zeros_like(ids[:, 0])
        for place in range(ids.shape[1]):
            code = torch.where(within[:, place], (code * FACTOR + ids[:, place]) % MODULUS, 0)
            codes.append(code)
        follows = torch.cat([within[:, 1:], torch.zeros_like(within[:, :1])], dim=1)
        return torch.where(within & ~follows, torch.stack(codes, dim=1) % self.table.num_embeddings, -1)

    def forward(self, ids: Tensor) -> Tensor:
        """One point a text, divided by the root of how many words count."""
        rows = self.rows(ids)
        there = rows >= 0
        if self.training and self.dropout:
            there = there & (torch.rand(rows.shape, device=rows.device) >= self.dropout)
        total: Tensor = (self.table(rows.clamp(min=0)) * there[..., None]).sum(dim=1)
        return total / there.sum(dim=1, keepdim=True).clamp(min=1).sqrt()


def _between(ids: Tensor, first: str, last: str) -> Tensor:
    return (ids >= TEXT + ord(first)) & (ids <= TEXT + ord(last))


def initialise(tower: nn.Module, width: int, layers: int) -> None:
    """Start values of a transformer's linear layers, as in the authors' code: smaller where it is deeper, biases 0."""
    for name, module in tower.named_modules():
        if isinstance(module, nn.Linear):
            hidden, added = name.endswith("mlp.hidden"), name.endswith(".out")
            std = (2 * width) ** -0.5 if hidden else width**-0.5 * ((2 * layers) ** -0.5 if added else 1.0)
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
