"""Language modelling: the next token from those before it (Radford et al. 2018, eq. 1)."""

from __future__ import annotations

from torch import nn

from shared_models.tasks.base import Batch, task
from shared_models.tasks.language import Language, Said


@task("language-modelling")
class LanguageModelling(Language):
    """The first token is said from `<begin>` alone; the model sees one position less than a text has."""

    metrics = ("bits_per_character", "perplexity", "accuracy")

    def shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        """(T - 1, V)."""
        return (sample[0] - 1, *sample[1:])

    def forward(self, model: nn.Module, batch: Batch) -> Said:
        """Logits for every token but the first."""
        return Said(model(batch.x[:, :-1]), batch.x[:, 1:])
