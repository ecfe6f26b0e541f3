"""Boxes as tensors: x0, y0, x1, y1 unless a name says otherwise. Every function keeps leading dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

PADDING = -1.0  # the class of a row that holds no box


def to_corners(boxes: Tensor) -> Tensor:
    """(..., 4) centre x, centre y, width, height -> corners."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def to_centres(boxes: Tensor) -> Tensor:
    """(..., 4) corners -> centre x, centre y, width, height."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def area(boxes: Tensor) -> Tensor:
    """(..., 4) -> (...), 0 for an empty or inverted box."""
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    return size[..., 0] * size[..., 1]


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of two broadcastable sets of boxes, (..., 4) x (..., 4) -> (...); 0 for empty ones."""
    inner = torch.cat([torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])], dim=-1)
    shared = area(inner)
    union = area(a) + area(b) - shared
    return shared / union.clamp(min=1e-12)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """(..., N, 4) x (..., M, 4) -> (..., N, M)."""
    return iou(a[..., :, None, :], b[..., None, :, :])


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU in [-1, 1] (Rezatofighi et al. 2019, Algorithm 1), (..., 4) x (..., 4) -> (...); works under `vmap`."""
    inner = torch.cat([torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])], dim=-1)
    hull = torch.cat([torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], dim=-1)
    shared = area(inner)
    union = (area(a) + area(b) - shared).clamp(min=1e-7)
    around = area(hull).clamp(min=1e-7)
    return shared / union - (around - union) / around


def pad_rows(rows: list[Tensor], width: int, least: int = 1) -> Tensor:
    """Lists of boxes as one tensor: (n_i, width) each -> (B, max(n_i, least), width), padded with class -1 and zeros.

    The first column must be the class.
    """
    most = max([least, *(len(r) for r in rows)])
    out = torch.zeros(len(rows), most, width)
    out[..., 0] = PADDING
    for i, r in enumerate(rows):
        out[i, : len(r)] = r
    return out
