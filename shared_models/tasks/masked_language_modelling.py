"""Masked language modelling (Devlin et al. 2019, section 3.1): tokens that were hidden are found from all others."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from shared_models.tasks.base import Batch, task
from shared_models.tasks.language import Language, Said, TextSettings
from shared_models.tokens import MASK, PAD, TEXT


class MaskingSettings(TextSettings):
    """Settings of tasks that hide tokens.

    Attributes:
        hidden: share of a text's tokens that are to be found, at least one of them.
    """

    hidden: float = Field(0.15, gt=0.0, lt=1.0)


@task("masked-language-modelling")
class MaskedLanguageModelling(Language):
    """Of the hidden tokens 80 % are `<mask>`, 10 % another token and 10 % what they were, as in the paper."""

    Settings = MaskingSettings
    metrics = ("accuracy", "perplexity")
    draws = True

    def forward(self, model: nn.Module, batch: Batch) -> Said:
        """Logits everywhere; the truth is padding where nothing was hidden."""
        hidden = choose(batch.x, self.settings.hidden)
        return Said(model(hide(batch.x, hidden, self.tokenizer.size)), batch.x.masked_fill(~hidden, PAD))


def choose(ids: Tensor, share: float) -> Tensor:
    """(B, T) bool: `max(1, round(share * n))` of a text's n tokens, drawn without replacement; never a special one."""
    text = ids >= TEXT
    count = (text.sum(dim=1, keepdim=True).double() * share).round().clamp(min=1)
    drawn = torch.rand(ids.shape, device=ids.device).masked_fill(~text, 2.0)
    return (drawn.argsort(dim=1).argsort(dim=1) < count) & text


def hide(ids: Tensor, chosen: Tensor, size: int) -> Tensor:
    """The ids with 80 % of the chosen ones masked and 10 % replaced by one drawn among all tokens of text."""
    dice = torch.rand(ids.shape, device=ids.device)
    other = torch.randint(TEXT, size, ids.shape, device=ids.device)
    ids = torch.where(chosen & (dice < 0.8), MASK, ids)
    return torch.where(chosen & (dice >= 0.9), other, ids)
