"""What a detector is: the one contract between the detection task and very different models.

A detector carries its own loss, because what is compared with the boxes differs from model to model (cells of a grid,
matched queries, sampled regions). Coordinates are fractions of the image's width and height everywhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from shared_models.boxes import PADDING


class Detector(nn.Module, ABC):
    """Maps images and (for the loss) their boxes to losses and detections."""

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor, proposals: Tensor | None = None) -> dict[str, Tensor]:
        """One pass.

        Args:
            x: (B, C, H, W) float32, normalised.
            y: (B, M, 5) float32: class, x0, y0, x1, y1; class -1 pads. May have M = 0 and images without any box.
            proposals: (B, R, 4) float32 for models declared with `proposals=True`; a row of zeros is padding.

        Returns:
            `loss`: (B,), each image's own, normalised by that image's own boxes, so that samples do not mix.
            `found`, in evaluation mode only: (B, D, 6) float32: class, x0, y0, x1, y1, score in [0, 1], best first;
            class -1 pads. D is fixed by the model's settings.
        """


def best_boxes(boxes: Tensor, scores: Tensor, *, keep: int, overlap: float, least: float = 0.001) -> Tensor:
    """Detections of one image after non-maximum suppression per class.

    Args:
        boxes: (N, 4) one box for all classes, or (N, K, 4) one for each.
        scores: (N, K) probability of each of K classes (no background column).
        keep: how many to return at most.
        overlap: IoU above which the lower score of one class goes.
        least: scores below it are no detection.

    Returns:
        (keep, 6): class, x0, y0, x1, y1, score, best first, padded with class -1.
    """
    count, classes = scores.shape
    found = torch.zeros(keep, 6, device=boxes.device)
    found[:, 0] = PADDING
    spread = boxes[:, None].expand(count, classes, 4) if boxes.dim() == 2 else boxes
    rows, columns = torch.nonzero(scores >= least, as_tuple=True)
    if not len(rows):
        return found
    chosen, score = spread[rows, columns].clamp(0, 1), scores[rows, columns]
    kept = batched_nms(chosen.float(), score.float(), columns, overlap)[:keep]
    found[: len(kept)] = torch.cat(
        [columns[kept, None].float(), chosen[kept].float(), score[kept, None].float()], dim=1
    )
    return found
