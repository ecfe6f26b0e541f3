"""Promptable segmentation (Kirillov et al. 2023): the mask of one object that a point or a box names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import ClassVar, cast

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from shared_models.promptable import Masks, Promptable
from shared_models.prompts import DRAWS, NONE, Object, Prompt, by_box, by_chance, by_point, choose
from shared_models.tasks.base import IGNORED, Batch, Task, TaskSettings, task
from shared_models.tasks.segmentation import at_size


class PromptableSettings(TaskSettings):
    """Settings of promptable segmentation; the defaults of the three weights are the paper's.

    Attributes:
        background: labels whose pixels belong to no object; by default the first label alone.
        smallest: pixels that an object has at least; smaller components are passed over.
        focal: weight of the focal loss.
        alpha: weight of the object's pixels within the focal loss, that of the others is 1 - alpha. Where objects are
            small beside the image, more than the 0.25 of Lin et al. 2017 leads sooner past the answer "nothing".
        dice: weight of the Dice loss.
        overlap: weight of the squared error of the expected IoU.
    """

    background: tuple[str, ...] | None = None
    smallest: PositiveInt = 1
    focal: NonNegativeFloat = 20.0
    alpha: float = Field(0.25, gt=0.0, lt=1.0)
    dice: NonNegativeFloat = 1.0
    overlap: NonNegativeFloat = 1.0

    @model_validator(mode="after")
    def _something_to_find(self) -> PromptableSettings:
        if len(self.labels) > IGNORED:
            raise ValueError(f"a mask of bytes holds at most {IGNORED} labels, not {len(self.labels)}")
        for name in self.background or ():
            if name not in self.labels:
                raise ValueError(f"background names '{name}', which is not a label")
        if not self.classes:
            raise ValueError(f"there is no object where every label is background: {', '.join(self.labels)}")
        return self

    @model_validator(mode="after")
    def _something_to_learn(self) -> PromptableSettings:
        if not self.focal and not self.dice:
            raise ValueError("with focal and dice both 0 no mask is learned")
        return self

    @property
    def classes(self) -> list[int]:
        """Class indices that objects can have."""
        behind = self.labels[:1] if self.background is None else self.background
        return [i for i, name in enumerate(self.labels) if name not in behind]


@dataclass(frozen=True)
class Answers:
    """What a model said of one object in each image.

    Attributes:
        masks: in training the candidates for a random prompt, then the one mask that the best of them was improved to;
            in evaluation the candidates for the point, then those for the box.
        target: (B, H, W) bool, the object.
        classes: (B,) int64, the object's class; -1 where the image has no object.
    """

    masks: tuple[Masks, Masks]
    target: Tensor
    classes: Tensor


@task("promptable")
class PromptableSegmentation(Task):
    """Targets are masks (B, H, W) uint8, 255 counts nowhere; outputs are `Answers` of a `Promptable`.

    Images without an object have loss 0 and count in no metric.
    """

    Settings = PromptableSettings
    target = "mask"
    metrics = ("iou", "iou_point", "iou_box", "dice")
    candidates: ClassVar[int] = 3  # often whole, part and part of the part (section 3, "Resolving ambiguity")

    @property
    def outputs(self) -> int:
        """Candidate masks for a prompt, whatever the labels."""
        return self.candidates

    def forward(self, model: nn.Module, batch: Batch) -> Answers:
        """Make prompts from the masks and ask the model, which embeds each image once.

        In training a random object is named by a random point or box; the candidate with the highest score then goes
        back in beside the prompt, to be improved (appendix A, "Training algorithm"). Chance is torch's global CPU
        generator, with as many numbers for every image. In evaluation it is the largest object, named by its innermost
        point, and once more by its box.
        """
        segmenter = cast(Promptable, model)
        draws = torch.rand(len(batch), DRAWS).tolist() if model.training else []
        objects = self._objects(batch, [u[0] for u in draws])
        image = segmenter.encode(batch.x)
        if model.training:
            prompt = _stacked([by_chance(o, u[1:]) for o, u in zip(objects, draws, strict=True)], image.device)
            first = segmenter.decode(image, *prompt)
            answers = first, segmenter.decode(image, *prompt, best(first).detach(), single=True)
        else:
            point, box = (_stacked([name(thing) for thing in objects], image.device) for name in (by_point, by_box))
            answers = segmenter.decode(image, *point), segmenter.decode(image, *box)
        target = torch.stack([torch.from_numpy(thing.pixels) for thing in objects]).to(image.device)
        labels = torch.tensor([thing.label for thing in objects], device=image.device)
        return Answers(answers, target, labels)

    def _objects(self, batch: Batch, draws: Sequence[float]) -> list[Object]:
        """One object of each image, by numbers from [0, 1); without any, the largest."""
        classes, smallest = self.settings.classes, self.settings.smallest
        masks = batch.y.cpu().numpy()
        return [choose(mask, classes, smallest, u) for mask, u in zip(masks, draws or repeat(None), strict=False)]

    def loss(self, outputs: Answers, batch: Batch) -> Tensor:
        """Mean over both answers of: the least loss of a candidate, and the mean squared error of the scores, (B,).

        A candidate's loss is focal * FL + dice * (1 - soft Dice) over the pixels that count (section 3, "Losses and
        training"); every candidate's score is compared with its own IoU.
        """
        chosen, counted = self.settings, batch.y != IGNORED
        losses = []
        for logits, scores in outputs.masks:
            fine = at_size(logits, batch.y)  # (B, N, H, W)
            masks = chosen.focal * focal_loss(fine, outputs.target, counted, chosen.alpha)
            masks = masks + chosen.dice * dice_loss(fine, outputs.target, counted)  # (B, N)
            truth, _ = overlaps(fine, outputs.target, counted)
            error = (scores.float() - truth).square().mean(dim=1)
            losses.append(masks.amin(dim=1) + chosen.overlap * error)
        there = outputs.classes != NONE
        return torch.stack(losses).mean(dim=0) * there

    def sums(self, outputs: Answers, batch: Batch) -> dict[str, Tensor]:
        """Sums over the images of a batch, of outputs in evaluation mode.

        `iou` and `dice` (2,) float64, for the point and for the box, of the candidate with the highest score; `objects`
        int64, images with an object; `loss` float64; `examples` int64.
        """
        counted, there = batch.y != IGNORED, outputs.classes != NONE
        found = [overlaps(at_size(best(m)[:, None], batch.y), outputs.target, counted) for m in outputs.masks]
        iou, dice = (torch.cat(kind, dim=1).double()[there].sum(dim=0).cpu() for kind in zip(*found, strict=True))
        return {
            "iou": iou,
            "dice": dice,
            "objects": there.sum().cpu(),
            "loss": self.loss(outputs, batch).double().sum().cpu(),
            "examples": torch.tensor(len(batch)),
        }

    @cached_property
    def zeros(self) -> dict[str, Tensor]:
        """Sums of no examples."""
        none = Masks(torch.zeros(0, self.candidates, 1, 1), torch.zeros(0, self.candidates))
        nothing = Answers((none, none), torch.zeros(0, 1, 1, dtype=torch.bool), torch.zeros(0, dtype=torch.int64))
        return self.sums(nothing, Batch(torch.zeros(0, 1, 1, 1), torch.zeros(0, 1, 1, dtype=torch.uint8)))

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Means over the images with an object, each of them the same weight.

        `iou_point` and `iou_box` by what named it; `iou` and `dice` are the means of both. `loss` is that of these
        images too; `examples` are all.
        """
        sums = sums or self.zeros
        iou, dice = sums["iou"] / sums["objects"], sums["dice"] / sums["objects"]
        return {
            "iou": iou.mean().item(),
            "iou_point": iou[0].item(),
            "iou_box": iou[1].item(),
            "dice": dice.mean().item(),
            "loss": (sums["loss"] / sums["objects"]).item(),
            "examples": float(sums["examples"]),
        }

    def predict(self, outputs: Answers, batch: Batch) -> Tensor:
        """The object as the model sees it from the point, in the object's class; 255 elsewhere, (B, H, W) int64."""
        inside = at_size(best(outputs.masks[0])[:, None], batch.y)[:, 0] > 0
        named = inside & (outputs.classes != NONE)[:, None, None]
        return torch.where(named, outputs.classes[:, None, None], IGNORED)

    def draw(self, shape: tuple[int, ...], count: int, source: torch.Generator) -> Batch:
        """Noise with two bright rectangles, left and right, of random classes; a tenth of the background is ignored."""
        classes = torch.tensor(self.settings.classes)
        rest = [i for i in range(len(self.settings.labels)) if i not in self.settings.classes]
        y = torch.full((count, *shape[1:]), rest[0] if rest else IGNORED)
        y = y.masked_fill(torch.rand(y.shape, generator=source) < 0.1, IGNORED)
        down, across = ((torch.arange(side) + 0.5) / side for side in shape[1:])
        bright = torch.zeros(y.shape, dtype=torch.bool)
        for half in range(2):
            size = 0.4 + 0.4 * torch.rand(count, 2, generator=source)  # of the half's width, and of the height
            low = torch.rand(count, 2, generator=source) * (0.9 - size)
            high = low + size
            columns = (2 * across - half >= low[:, :1]) & (2 * across - half < high[:, :1])  # (B, W)
            rows = (down >= low[:, 1:]) & (down < high[:, 1:])  # (B, H)
            inside = rows[:, :, None] & columns[:, None]
            label = classes[torch.randint(len(classes), (count, 1, 1), generator=source)]
            y, bright = torch.where(inside, label, y), bright | inside
        return Batch(torch.randn(count, *shape, generator=source) + 3 * bright[:, None], y.to(torch.uint8))


def best(masks: Masks) -> Tensor:
    """The candidates with the highest score, (B, h, w)."""
    rows = torch.arange(len(masks.scores), device=masks.scores.device)
    return masks.logits[rows, masks.scores.argmax(dim=1)]


def focal_loss(logits: Tensor, target: Tensor, counted: Tensor, alpha: float) -> Tensor:
    """-alpha_t (1 - p_t)^2 log p_t (Lin et al. 2017, eq. 5), mean over the pixels that count.

    Args:
        logits: (B, N, H, W).
        target: (B, H, W) bool.
        counted: (B, H, W) bool.
        alpha: of the object's pixels; 1 - alpha of the others.

    Returns:
        (B, N), 0 where no pixel counts.
    """
    truth = target[:, None].to(logits.dtype).expand_as(logits)
    losses = sigmoid_focal_loss(logits, truth, alpha, gamma=2.0) * counted[:, None]
    mean: Tensor = losses.sum(dim=(2, 3)) / counted.sum(dim=(1, 2)).clamp(min=1)[:, None]
    return mean


def dice_loss(logits: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """1 - (2 sum p g + 1) / (sum p + sum g + 1) over the pixels that count (Milletari et al. 2016); as above."""
    truth = target[:, None]
    guess = logits.sigmoid() * counted[:, None]
    shared = (guess * truth).sum(dim=(2, 3))
    return 1 - (2 * shared + 1) / (guess.sum(dim=(2, 3)) + truth.sum(dim=(2, 3)) + 1)


def overlaps(logits: Tensor, target: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and Dice of logits > 0 over the pixels that count, (B, N) each, 0 where both sides are empty; as above."""
    truth, guess = target[:, None], (logits > 0) & counted[:, None]
    shared = (guess & truth).sum(dim=(2, 3))
    both = guess.sum(dim=(2, 3)) + truth.sum(dim=(2, 3))
    return shared / (both - shared).clamp(min=1), 2 * shared / both.clamp(min=1)


def _stacked(prompts: Sequence[Prompt], device: torch.device) -> tuple[Tensor, Tensor]:
    """Points (B, 2, 2) float32 and labels (B, 2) int64."""
    points = torch.stack([torch.from_numpy(prompt.points) for prompt in prompts])
    return points.float().to(device), torch.tensor([prompt.labels for prompt in prompts], device=device)
