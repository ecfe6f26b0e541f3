"""The light half of Segment Anything (Kirillov et al. 2023, section 3 and appendix A): prompt encoder, mask decoder.

Module names are those of the published weights. Tokens attend to the image and the image attends to the tokens ("two
ways"); each mask token then becomes the weights of a linear classifier over the upscaled image embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_models.promptable import HIGH_CORNER, PADDING, Masks


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each pixel, (B, C, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.LayerNorm`, over dimension 1."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class FourierPositions(nn.Module):
    """Random Fourier features of a place (Tancik et al. 2020): sin and cos of 2 pi (2p - 1) G.

    G (2, D/2) is drawn once, from a normal distribution, and never trained.
    """

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, width // 2))

    def forward(self, points: Tensor) -> Tensor:
        """Points (..., 2), fractions of width and height -> (..., D).

        The product with G is written out, so that autocast leaves it in full precision.
        """
        x, y = (2 * points - 1).split(1, dim=-1)
        across, down = self.positional_encoding_gaussian_matrix
        angles = 2 * math.pi * (x * across + y * down)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def grid(self, height: int, width: int) -> Tensor:
        """Positions of the cells' centres, (D, height, width)."""
        device = self.positional_encoding_gaussian_matrix.device
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        centres = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)
        encoded: Tensor = self(centres)
        return encoded.movedim(-1, 0)


class PromptEncoder(nn.Module):
    """Points to tokens, a mask of an earlier answer to something that is added to the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pe_layer = FourierPositions(width)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, width) for _ in range(HIGH_CORNER + 1))
        self.not_a_point_embed = nn.Embedding(1, width)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, 4, 2, stride=2),
            ChannelNorm(4),
            nn.GELU(),
            nn.Conv2d(4, 16, 2, stride=2),
            ChannelNorm(16),
            nn.GELU(),
            nn.Conv2d(16, width, 1),
        )
        self.no_mask_embed = nn.Embedding(1, width)

    def forward(self, points: Tensor, labels: Tensor) -> Tensor:
        """Points (B, P, 2) and labels (B, P) -> tokens (B, P, D)."""
        zero = torch.zeros_like(labels[:1, :1])  # (1, 1)
        kinds = torch.cat([kind(zero) for kind in (self.not_a_point_embed, *self.point_embeddings)])  # (5, 1, D)
        places = self.pe_layer(points).masked_fill((labels == PADDING)[..., None], 0.0)  # (B, P, D)
        tokens: Tensor = places + kinds[:, 0][labels - PADDING]
        return tokens

    def dense(self, mask: Tensor | None, like: Tensor) -> Tensor:
        """What is added to the image embedding `like` (B, D, h, w): of a mask (B, 4h, 4w), or of none."""
        if mask is None:
            nothing: Tensor = self.no_mask_embed(torch.zeros_like(like[:, 0], dtype=torch.int64))  # (B, h, w, D)
            return nothing.movedim(-1, 1)
        scaled: Tensor = self.mask_downscaling(mask[:, None])
        return scaled


class CrossAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) in D / `shrink` numbers: (B, N, D) asks (B, M, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int, shrink: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width // shrink)
        self.k_proj = nn.Linear(width, width // shrink)
        self.v_proj = nn.Linear(width, width // shrink)
        self.out_proj = nn.Linear(width // shrink, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(d)) v, per head of d numbers."""
        q, k, v = self._split(self.q_proj(query)), self._split(self.k_proj(key)), self._split(self.v_proj(value))
        weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]), dim=-1)  # (B, heads, N, M)
        out: Tensor = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, heads * d) -> (B, heads, N, d)."""
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)


class MLP(nn.Module):
    """Linear layers with ReLU between them: (..., widths[0]) -> (..., widths[-1])."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """No ReLU after the last layer."""
        for i, layer in enumerate(self.layers):
            x = layer(F.relu(x) if i else x)
        return x


class TokenMLP(nn.Module):
    """lin2(activation(lin1(x))): (..., D) -> (..., D)."""

    def __init__(self, width: int, hidden: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """One hidden layer."""
        out: Tensor = self.lin2(self.activation(self.lin1(x)))
        return out


class TwoWayBlock(nn.Module):
    """Tokens attend to themselves, then to the image; an MLP; the image attends to the tokens (figure 14)."""

    def __init__(self, width: int, heads: int, hidden: int, *, first: bool) -> None:
        super().__init__()
        self.self_attn = CrossAttention(width, heads, 1)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attn_token_to_image = CrossAttention(width, heads, 2)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = TokenMLP(width, hidden, F.relu)
        self.norm3 = nn.LayerNorm(width)
        self.norm4 = nn.LayerNorm(width)
        self.cross_attn_image_to_token = CrossAttention(width, heads, 2)
        self.first = first

    def forward(self, tokens: Tensor, image: Tensor, prompt: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """One block.

        Args:
            tokens: (B, N, D).
            image: (B, M, D).
            prompt: the tokens as they were at the start, added wherever tokens are asked or matched, for they hold the
                places of the points. In the first block tokens are still those, and attention replaces them.
            places: positions of the image's cells, (B, M, D) or (1, M, D).

        Returns:
            Tokens and image, of the same shapes.
        """
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            asked = tokens + prompt
            tokens = tokens + self.self_attn(asked, asked, tokens)
        tokens = self.norm1(tokens)
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + prompt, image + places, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(image + places, tokens + prompt, tokens))
        return tokens, image


class TwoWayTransformer(nn.Module):
    """Blocks, and a last look of the tokens at the image."""

    def __init__(self, width: int, layers: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(width, heads, hidden, first=i == 0) for i in range(layers))
        self.final_attn_token_to_image = CrossAttention(width, heads, 2)
        self.norm_final_attn = nn.LayerNorm(width)

    def forward(self, prompt: Tensor, image: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, D), image (B, M, D) and its places -> tokens and image after all blocks."""
        tokens = prompt
        for layer in self.layers:
            tokens, image = layer(tokens, image, prompt, places)
        attended = self.final_attn_token_to_image(tokens + prompt, image + places, image)
        return self.norm_final_attn(tokens + attended), image


class MaskDecoder(nn.Module):
    """Prompt tokens and image embedding to masks four times as fine, and the IoU expected of each.

    Mask 0 answers prompts that leave no doubt, masks 1 to `candidates` are alternatives for those that do.
    """

    def __init__(self, width: int, layers: int, heads: int, hidden: int, candidates: int) -> None:
        super().__init__()
        masks = 1 + candidates
        self.transformer = TwoWayTransformer(width, layers, heads, hidden)
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(masks, width)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(width, width // 4, 2, stride=2),
            ChannelNorm(width // 4),
            nn.GELU(),
            nn.ConvTranspose2d(width // 4, width // 8, 2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(width, width, width, width // 8) for _ in range(masks))
        self.iou_prediction_head = MLP(width, width, width, masks)

    def forward(self, image: Tensor, places: Tensor, prompt: Tensor, *, single: bool) -> Masks:
        """Masks of one prompt per image.

        Args:
            image: (B, D, h, w).
            places: (D, h, w), positions of its cells.
            prompt: (B, P, D) tokens.
            single: whether to give mask 0 alone, or all others.

        Returns:
            Logits (B, N, 4h, 4w) and scores (B, N).
        """
        b, d, h, w = image.shape
        count = self.mask_tokens.num_embeddings
        ids = torch.arange(count, device=image.device).expand(b, -1)  # (B, 1 + N)
        tokens = torch.cat([self.iou_token(ids[:, :1]), self.mask_tokens(ids), prompt], dim=1)
        tokens, cells = self.transformer(tokens, image.flatten(2).transpose(1, 2), places.flatten(1).T[None])
        pixels = self.output_upscaling(cells.transpose(1, 2).reshape(b, d, h, w))  # (B, D/8, 4h, 4w)
        weights = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1)
        logits = (weights @ pixels.flatten(2)).reshape(b, count, *pixels.shape[2:])
        scores = self.iou_prediction_head(tokens[:, 0])  # (B, 1 + N)
        chosen = slice(0, 1) if single else slice(1, None)
        return Masks(logits[:, chosen], scores[:, chosen])
