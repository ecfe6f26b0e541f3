"""What the tasks on texts share: a loss per text, and sums from which perplexity and bits per character follow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_models.errors import ConfigError
from shared_models.tasks.base import Batch, Measure, Supervision, Target, Task, TaskSettings
from shared_models.tokens import PAD, Tokenizer, draw_ids, make_tokenizer

PERPLEXITY = Measure(unit="", factor=1.0, digits=2, larger=False)
BITS = Measure(unit="bits", factor=1.0, digits=3, larger=False)


class TextSettings(TaskSettings):
    """Settings of a task on texts, which has no labels."""

    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Said:
    """What a model says of a batch of texts.

    Attributes:
        logits: (B, T, V).
        truth: (B, T) int64, the ids that should have been said; padding counts nowhere.
        scored: (B, T) bool, the positions that accuracy, perplexity and characters are counted over; None: all that
            are no padding.
    """

    logits: Tensor
    truth: Tensor
    scored: Tensor | None = None


class TextTask(Task):
    """A task on the tokens of texts, with a model that answers at every position."""

    Settings: ClassVar[type[TaskSettings]] = TextSettings
    target: ClassVar[Target] = "none"
    supervision: ClassVar[Supervision] = "self-supervised"
    each = True

    @property
    def outputs(self) -> int:
        """One logit per id of the vocabulary."""
        return self.tokenizer.size

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The job's; raises a ConfigError where it has none."""
        if self.data is None or not self.data.tokenizer:
            raise ConfigError("this task is about texts, and [data] has no tokenizer", hint="E.g. tokenizer = 'bytes'")
        return make_tokenizer(self.data.tokenizer)

    def draw(self, shape: tuple[int, ...], count: int, source: torch.Generator) -> Batch:
        """Texts of random ids and lengths."""
        return Batch(draw_ids(shape[0], self.tokenizer.size, count, source), torch.zeros(count, dtype=torch.int64))


class Language(TextTask):
    """A task whose model names a token at every position."""

    measures: ClassVar[Mapping[str, Measure]] = {"perplexity": PERPLEXITY, "bits_per_character": BITS}

    def loss(self, outputs: Said, batch: Batch) -> Tensor:
        """Mean of -log p(token) over a text's own tokens, (B,)."""
        return mean_surprise(outputs)

    def sums(self, outputs: Said, batch: Batch) -> dict[str, Tensor]:
        """`surprise` (nats, float64) and `hits` over `tokens` of which `characters` are written, all where scored.

        `loss` float64 and `examples` are over texts, as in every task.
        """
        scored = outputs.truth != PAD if outputs.scored is None else outputs.scored & (outputs.truth != PAD)
        each = surprise(outputs)
        hits = (outputs.logits.argmax(dim=2) == outputs.truth) & scored
        pairs = zip(outputs.truth.cpu(), scored.cpu(), strict=True)
        characters = sum(self.tokenizer.characters(row[keep].tolist()) for row, keep in pairs)
        return {
            "surprise": (each * scored).double().sum().cpu(),
            "hits": hits.sum().cpu(),
            "tokens": scored.sum().cpu(),
            "characters": torch.tensor(characters),
            "loss": self.loss(outputs, batch).double().sum().cpu(),
            "examples": torch.tensor(len(batch)),
        }

    @cached_property
    def zeros(self) -> dict[str, Tensor]:
        """Sums of no texts."""
        real, whole = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
        return {
            "surprise": real, "hits": whole, "tokens": whole, "characters": whole, "loss": real, "examples": whole,
        }  # fmt: skip

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`perplexity` exp(nats / tokens), `bits_per_character`, `accuracy` of the likeliest token."""
        sums = sums or self.zeros
        tokens, nats = int(sums["tokens"]), float(sums["surprise"])
        characters, examples = int(sums["characters"]), int(sums["examples"])
        return {
            "perplexity": math.exp(min(nats / tokens, 700.0)) if tokens else math.nan,
            "bits_per_character": nats / math.log(2) / characters if characters else math.nan,
            "accuracy": int(sums["hits"]) / tokens if tokens else math.nan,
            "loss": float(sums["loss"]) / examples if examples else math.nan,
            "examples": float(examples),
        }

    def predict(self, outputs: Said, batch: Batch) -> Tensor:
        """The likeliest id at every position, (B, T) int64."""
        found: Tensor = outputs.logits.argmax(dim=2)
        return found


def mean_surprise(outputs: Said) -> Tensor:
    """Mean of -log p(token) over a text's own tokens, (B,): a text of padding alone has none."""
    return surprise(outputs).sum(dim=1) / (outputs.truth != PAD).sum(dim=1).clamp(min=1)


def surprise(outputs: Said) -> Tensor:
    """-log p of the truth at every position, (B, T); 0 at padding."""
    logits: Any = outputs.logits.float().transpose(1, 2)  # (B, V, T)
    return F.cross_entropy(logits, outputs.truth, ignore_index=PAD, reduction="none")
