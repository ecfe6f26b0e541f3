"""Random changes of training images (torchvision's transforms v2); masks, boxes and proposals move along.

Every sample draws its own change from torch's global CPU generator, which the trainer seeds by key: the same job gives
the same changed images at the same site, in any engine.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from shared_models.boxes import PADDING, area
from shared_models.job_parts import AugmentPart
from shared_models.tasks.base import IGNORED, Batch, Target

KEPT_SHARE = 0.25  # of a box's area that must stay inside the image; what is left of it else is no object any more


class Augment:
    """Changes a batch of raw images, (B, C, H, W) uint8, before they are normalised.

    Args:
        part: the job's `[augment]`.
        target: form of the targets.
        shape: of one image, (C, H, W).
        change: what is done to each, instead of what `part` says.
    """

    def __init__(
        self, part: AugmentPart, target: Target, shape: tuple[int, ...], change: v2.Transform | None = None
    ) -> None:
        height, width = shape[1:]
        self.target = target
        self.size = (height, width)
        fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}
        steps: list[v2.Transform] = []
        if part.flip:
            steps.append(v2.RandomHorizontalFlip())
        if part.flip_vertical:
            steps.append(v2.RandomVerticalFlip())
        if part.quarter_turns:
            turns = [v2.RandomRotation((angle, angle), fill=fill) for angle in (0, 90, 180, 270)]
            steps.append(v2.RandomChoice(turns))
        if part.rotate or part.scale:
            scale = (1 - part.scale, 1 + part.scale) if part.scale else None
            steps.append(v2.RandomAffine(part.rotate, scale=scale, fill=fill))
        if part.crop:
            steps.append(v2.RandomCrop(self.size, padding=part.crop, fill=fill))
        if part.brightness or part.contrast:
            steps.append(v2.ColorJitter(part.brightness or None, part.contrast or None))
        self.change = change or v2.Compose(steps)

    def __call__(self, batch: Batch) -> Batch:
        """Each sample changed on its own."""
        regions: Iterable[Tensor | None] = [None] * len(batch) if batch.proposals is None else batch.proposals
        samples = [self._one(*sample) for sample in zip(batch.x, batch.y, regions, strict=True)]
        x, y, moved = zip(*samples, strict=True)
        return Batch(torch.stack(x), torch.stack(y), None if batch.proposals is None else torch.stack(moved))

    def _one(self, x: Tensor, y: Tensor, proposals: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        image = tv_tensors.Image(x)
        if self.target in ("class", "tokens", "none"):  # nothing that has a place in the image
            return self.change(image).as_subclass(Tensor), y, proposals
        if self.target == "mask":
            image, mask = self.change(image, tv_tensors.Mask(y))
            return image.as_subclass(Tensor), mask.as_subclass(Tensor), proposals
        boxes = y.reshape(1, -1) if self.target == "box" else y[:, 1:]
        every = boxes if proposals is None else torch.cat([boxes, proposals])
        image, moved = self.change(image, self._to_pixels(every))
        moved = self._to_fractions(moved.as_subclass(Tensor))
        count = len(boxes)
        if self.target == "box":
            return image.as_subclass(Tensor), moved[0], None
        there = (y[:, 0] >= 0) & (area(moved[:count]) >= KEPT_SHARE * area(y[:, 1:]))
        rows = torch.where(there[:, None], torch.cat([y[:, :1], moved[:count]], dim=1), 0.0)
        rows[:, 0] = torch.where(there, y[:, 0], torch.tensor(PADDING))
        if proposals is None:
            return image.as_subclass(Tensor), rows, None
        known = area(proposals) > 0  # padding stays padding
        return image.as_subclass(Tensor), rows, torch.where(known[:, None], moved[count:], 0.0)

    def _to_pixels(self, boxes: Tensor) -> tv_tensors.BoundingBoxes:
        height, width = self.size
        pixels = boxes * torch.tensor([width, height, width, height])
        return tv_tensors.BoundingBoxes(pixels, format="XYXY", canvas_size=self.size)

    def _to_fractions(self, boxes: Tensor) -> Tensor:
        height, width = self.size
        return (boxes / torch.tensor([width, height, width, height])).clamp(0, 1)
