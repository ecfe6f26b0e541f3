"""Translation: a text from another, by an encoder and a decoder; BLEU, chrF and ROUGE of what is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from shared_models.metrics.bleu import bleu, bleu_sums, no_bleu
from shared_models.metrics.chrf import chrf, chrf_sums, no_chrf
from shared_models.metrics.rouge import no_rouge, rouge, rouge_sums
from shared_models.tasks.base import Batch, Target, task
from shared_models.tasks.language import Language, Said, TextSettings
from shared_models.tokens import BEGIN, END, PAD, UNKNOWN, draw_ids

STRANGE = "\N{REPLACEMENT CHARACTER}"


class TranslationSettings(TextSettings):
    """Settings of translation.

    Attributes:
        longest: tokens that are written for a text at most when the model is measured; 0: as many as a text may have,
            which is the most in any case.
    """

    longest: NonNegativeInt = 0


@dataclass(frozen=True)
class Written(Said):
    """What a model says of given translations, and those that it writes itself.

    Attributes:
        texts: one for each, where they were written.
    """

    texts: tuple[str, ...] | None = None


@task("translation")
class Translation(Language):
    """The texts are written greedily, on the test part alone, for that takes long; elsewhere their metrics are NaN.

    A given translation that was cut off, being longer than the job's length, is no reference: BLEU, chrF and ROUGE are
    of the others. A word that the tokenizer does not know stands in a reference as a sign that nobody writes.
    """

    Settings = TranslationSettings
    each = False
    target: ClassVar[Target] = "tokens"
    supervision = "supervised"
    metrics = ("perplexity", "accuracy", "bleu", "chrf", "rouge1", "rouge2", "rougeL")

    def forward(self, model: Any, batch: Batch) -> Written:
        """Logits for every token of the translation, each from those before it and the whole source."""
        return Written(model(batch.x, batch.y[:, :-1]), batch.y[:, 1:])

    def examine(self, model: Any, batch: Batch, part: Literal["validation", "test"]) -> Written:
        """The same, and on the test part what the model writes."""
        said = self.forward(model, batch)
        if part != "test":
            return said
        most = batch.y.shape[1] - 1  # beside <begin>
        ids = write(model, batch.x, 1 + min(self.settings.longest or most, most))
        return Written(said.logits, said.truth, texts=tuple(map(self.tokenizer.decode, ids)))

    def sums(self, outputs: Said, batch: Batch) -> dict[str, Tensor]:
        """Those of every task on texts, and those of BLEU, chrF and ROUGE."""
        sums = super().sums(outputs, batch)
        texts = outputs.texts if isinstance(outputs, Written) else None
        if texts is None:
            return sums | {name: value for name, value in self.zeros.items() if name not in sums}
        rows = [(row, text) for row, text in zip(batch.y.tolist(), texts, strict=True) if END in row]
        truth, said = [self._reference(row) for row, _ in rows], [text for _, text in rows]
        return sums | bleu_sums(said, truth) | chrf_sums(said, truth) | rouge_sums(said, truth)

    def _reference(self, ids: list[int]) -> str:
        parts = [list(part) for unknown, part in groupby(ids, lambda i: i == UNKNOWN) if not unknown]
        return f" {STRANGE} ".join(map(self.tokenizer.decode, parts))

    @cached_property
    def zeros(self) -> dict[str, Tensor]:
        """Sums of no texts."""
        return super().zeros | no_bleu() | no_chrf() | no_rouge()

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Those of every task on texts, and the corpus scores, NaN where nothing was written."""
        sums = sums or self.zeros
        found = super().values(sums)
        del found["bits_per_character"]
        return {**found, "bleu": bleu(sums), "chrf": chrf(sums), **rouge(sums)}

    def quote(self, outputs: Said, batch: Batch) -> list[tuple[str, str, str]]:
        """Source, given translation and the one that was written."""
        texts = (outputs.texts if isinstance(outputs, Written) else None) or ()
        pairs = zip(batch.x.tolist(), batch.y.tolist(), texts, strict=False)
        return [(self.tokenizer.decode(source), self.tokenizer.decode(truth), said) for source, truth, said in pairs]

    def draw(self, shape: tuple[int, ...], count: int, source: torch.Generator) -> Batch:
        """Pairs of random texts."""
        x, y = (draw_ids(shape[0], self.tokenizer.size, count, source) for _ in range(2))
        return Batch(x, y)


@torch.no_grad()
def write(model: Any, source: Tensor, longest: int) -> list[list[int]]:
    """The likeliest token after another until `<end>`, for each source; ids without `<begin>` and `<end>`.

    Args:
        model: with `encode(source)` and `decode(memory, source, target)`.
        source: (B, T) int64.
        longest: tokens at most, `<begin>` included.
    """
    memory = model.encode(source)
    ids = torch.full((len(source), 1), BEGIN, device=source.device)
    done = torch.zeros(len(source), dtype=torch.bool, device=source.device)
    while ids.shape[1] < longest and not bool(done.all()):
        found = model.decode(memory, source, ids)[:, -1].argmax(dim=1)
        found = torch.where(done, PAD, found)
        ids, done = torch.cat([ids, found[:, None]], dim=1), done | (found == END)
    return [row[1 : row.index(END) if END in row else len(row)] for row in ids.tolist()]
