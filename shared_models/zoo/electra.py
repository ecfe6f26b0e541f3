"""ELECTRA (Clark et al. 2020): a small generator replaces tokens of a text, and a discriminator finds which.

=====  ======  =========  =====  ====  =====  =========  ============  ==============  =============================
size   layers  embedding  width  mlp   heads  generator  M parameters  with generator  from
=====  ======  =========  =====  ====  =====  =========  ============  ==============  =============================
tiny   2       64         64     256   4      1/2        0.1           0.2             ours
small  12      128        256    1024  4      1/4        13.5          14.2            Clark et al. 2020, Table 6
base   12      768        768    3072  12     1/3        109.5         119.4           Clark et al. 2020, Table 6
=====  ======  =========  =====  ====  =====  =========  ============  ==============  =============================

Parameters for replaced tokens at (T, V) = (512, 30522), for `tiny` at (64, 293). Both are encoders as BERT's, on one
embedding (section 3.2); the generator's width, hidden layer and heads are that part of the discriminator's. For classes
there is no generator.

Published discriminators load as they are. A generator's file calls its entries the same, and loads with `[weights]
rename = [["^encoder", "generator_encoder"]]`; the published small one is as wide as its discriminator: `generator = 1`.
"""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from shared_models.models import Shape, model
from shared_models.transformer import not_padding
from shared_models.zoo.bert import ENCODER, BERTSettings, Embeddings, Encoder, TokenHead
from shared_models.zoo.gpt import normal


class ElectraSettings(BERTSettings):
    """The columns of the table above, start values and dropout.

    Attributes:
        embedding: numbers that a token is embedded in, in both networks.
        generator: what the discriminator's width, hidden layer and heads are divided by.
    """

    embedding: PositiveInt
    generator: PositiveInt

    @model_validator(mode="after")
    def _generator_divides(self) -> ElectraSettings:
        for name in ("width", "mlp", "heads"):
            if getattr(self, name) % self.generator:
                raise ValueError(f"{name} {getattr(self, name)} should be a multiple of generator {self.generator}")
        return self

    @property
    def smaller(self) -> ElectraSettings:
        """The generator's."""
        sides = {name: getattr(self, name) // self.generator for name in ("width", "mlp", "heads")}
        return self.model_copy(update=sides)


class Electra(nn.Module):
    """The discriminator, and where every place is asked about also the generator."""

    def __init__(self, settings: ElectraSettings, shape: Shape, outputs: int, each: bool) -> None:
        super().__init__()
        self.each = each
        self.embeddings = Embeddings(shape, settings.embedding, settings.dropout)
        self.encoder = Encoder(settings, settings.embedding)
        self.dense = nn.Linear(settings.width, settings.width)
        self.head = nn.Linear(settings.width, outputs)
        self.dropout = nn.Dropout(0.0 if each else settings.dropout)
        if each:
            self.generator_encoder = Encoder(settings.smaller, settings.embedding)
            self.generator_head = TokenHead(settings.smaller.width, self.embeddings.tokens)
        normal(self, settings.std)

    def generator(self, x: Tensor) -> Tensor:
        """Tokens (B, T) int64, some of them masked -> (B, T, V): what they might be."""
        scores: Tensor = self.generator_head(self.generator_encoder(self.embeddings(x), not_padding(x)))
        return scores

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T) int64 -> (B, outputs) scores, or (B, T, outputs): with 1 whether each was replaced."""
        states = self.encoder(self.embeddings(x), not_padding(x))  # (B, T, D)
        states = self.dropout(states if self.each else states[:, 0])
        scores: Tensor = self.head(self.dropout(F.gelu(self.dense(states))))
        return scores


@model(
    "electra",
    settings=ElectraSettings,
    sizes={
        "tiny": {"layers": 2, "embedding": 64, "width": 64, "mlp": 256, "heads": 4, "generator": 2, "std": 0.1},
        "small": {
            "layers": 12, "embedding": 128, "width": 256, "mlp": 1024, "heads": 4, "generator": 4, "dropout": 0.1,
        },
        "base": {
            "layers": 12, "embedding": 768, "width": 768, "mlp": 3072, "heads": 12, "generator": 3, "dropout": 0.1,
        },
    },
    paper="Clark et al. 2020, ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators",
    tasks=("replaced-token-detection", "classification"),
    inputs=("tokens",),
    renames=(
        *ENCODER,
        (r"^embeddings_project\.", "encoder.project."),
        (r"^(discriminator_predictions|classifier)\.dense\.", "dense."),
        (r"^(discriminator_predictions\.dense_prediction|classifier\.out_proj)\.", "head."),
        (r"^generator_predictions\.", "generator_head."),
        (r"^generator_lm_head\.", "generator_head.output."),
    ),
    family="text",
    notes="Learns from every token of a text, where BERT learns from the few that are masked, and so from less text; "
    "it is two networks to train, and the discriminator alone is what one keeps.",
    usual={"tiny": (64, 293), "small": (512, 30_522), "base": (512, 30_522)},
)  # fmt: skip
def build(settings: ElectraSettings, shape: Shape, outputs: int, *, each: bool = False) -> nn.Module:
    """Tokens (B, at most T) -> (B, outputs) scores, or (B, T, outputs) with `each`, and then `generator` too."""
    return Electra(settings, shape, outputs, each)
