"""Replaced token detection (Clark et al. 2020, ELECTRA): which tokens has a small generator put in place of others?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor, nn

from shared_models.tasks.base import Batch, task
from shared_models.tasks.language import Said, TextTask, mean_surprise
from shared_models.tasks.masked_language_modelling import MaskingSettings, choose
from shared_models.tokens import MASK, PAD


class DetectionSettings(MaskingSettings):
    """Settings of replaced token detection.

    Attributes:
        weight: of the discriminator's loss beside the generator's (lambda in eq. 3; the paper's 50).
    """

    weight: PositiveFloat = 50.0


@dataclass(frozen=True)
class Detected:
    """What generator and discriminator say.

    Attributes:
        generated: what the generator says of the hidden tokens.
        logits: (B, T), above 0 where the discriminator takes a token for a replaced one.
        replaced: (B, T) bool, where it is one.
        counted: (B, T) bool, where there is a token.
    """

    generated: Said
    logits: Tensor
    replaced: Tensor
    counted: Tensor


@task("replaced-token-detection")
class ReplacedTokenDetection(TextTask):
    """A token that the generator guessed right counts as original, as in the paper.

    The generator learns from its own loss alone: drawing from it passes no gradient on.
    """

    Settings = DetectionSettings
    metrics = ("balanced_accuracy", "accuracy", "generator_accuracy")
    draws = True

    @property
    def outputs(self) -> int:
        """One logit at every position."""
        return 1

    def forward(self, model: Any, batch: Batch) -> Detected:
        """Hide, let the generator guess, and ask the discriminator."""
        hidden = choose(batch.x, self.settings.hidden)
        guessed: Tensor = model.generator(torch.where(hidden, MASK, batch.x))  # (B, T, V)
        noise = -torch.log(-torch.log(torch.rand_like(guessed.detach().float()).clamp(1e-20, 1 - 1e-7)))
        chances = (guessed.detach().float() + noise)[..., PAD + 1 :]  # all ids but padding, which would hide a token
        drawn = chances.argmax(dim=2) + PAD + 1  # (B, T): a draw from their softmax
        seen = torch.where(hidden, drawn, batch.x)
        judge: nn.Module = model
        generated = Said(guessed, batch.x.masked_fill(~hidden, PAD))
        return Detected(generated, judge(seen)[..., 0], seen != batch.x, batch.x != PAD)

    def loss(self, outputs: Detected, batch: Batch) -> Tensor:
        """The generator's mean surprise over hidden tokens plus `weight` times the mean cross-entropy, (B,) (eq. 3)."""
        each = _detection_loss(outputs).sum(dim=1) / outputs.counted.sum(dim=1).clamp(min=1)
        loss: Tensor = mean_surprise(outputs.generated) + self.settings.weight * each
        return loss

    def sums(self, outputs: Detected, batch: Batch) -> dict[str, Tensor]:
        """Right answers among `replaced` and among `original` tokens; of the `hidden` those that were `guessed`."""
        right = ((outputs.logits > 0) == outputs.replaced) & outputs.counted
        truth = outputs.generated.truth
        hidden = truth != PAD
        guessed = (outputs.generated.logits.argmax(dim=2) == truth) & hidden
        return {
            "found": (right & outputs.replaced).sum().cpu(),
            "replaced": (outputs.replaced & outputs.counted).sum().cpu(),
            "left": (right & ~outputs.replaced).sum().cpu(),
            "original": (~outputs.replaced & outputs.counted).sum().cpu(),
            "guessed": guessed.sum().cpu(),
            "hidden": hidden.sum().cpu(),
            "loss": self.loss(outputs, batch).double().sum().cpu(),
            "examples": torch.tensor(len(batch)),
        }

    @cached_property
    def zeros(self) -> dict[str, Tensor]:
        """Sums of no texts."""
        whole = torch.zeros((), dtype=torch.int64)
        counts = dict.fromkeys(("found", "replaced", "left", "original", "guessed", "hidden"), whole)
        return {**counts, "loss": whole.double(), "examples": whole}

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`balanced_accuracy`: the mean of the shares found among replaced and left among original; chance is 1/2."""
        n = {name: float(value) for name, value in (sums or self.zeros).items()}
        both = [_share(n["found"], n["replaced"]), _share(n["left"], n["original"])]
        return {
            "balanced_accuracy": sum(both) / 2,
            "accuracy": _share(n["found"] + n["left"], n["replaced"] + n["original"]),
            "generator_accuracy": _share(n["guessed"], n["hidden"]),
            "loss": _share(n["loss"], n["examples"]),
            "examples": n["examples"],
        }

    def predict(self, outputs: Detected, batch: Batch) -> Tensor:
        """1 where a token is taken for a replaced one, (B, T) int64."""
        return (outputs.logits > 0).long()


def _detection_loss(outputs: Detected) -> Tensor:
    """Cross-entropy at every position, (B, T); 0 at padding."""
    each = F.binary_cross_entropy_with_logits(outputs.logits.float(), outputs.replaced.float(), reduction="none")
    return each * outputs.counted


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
