"""LSTM (Hochreiter & Schmidhuber 1997): reads a text token by token and keeps a memory of what it has read.

=====  ======  =====  ======  =======  ====  ============  ========================================
size   layers  width  hidden  project  tied  M parameters  from
=====  ======  =====  ======  =======  ====  ============  ========================================
tiny   1       64     128     yes      yes   0.1           ours
small  2       8      256     no       no    0.8           Reddi et al. 2021, Shakespeare's letters
base   1       96     670     yes      no    4.1           Reddi et al. 2021, words of Stack Overflow
=====  ======  =====  ======  =======  ====  ============  ========================================

Parameters for next tokens of a vocabulary of 293 (bytes), 90 and 10,004; torch's gates have two biases where the
paper's have one, which is 2,048 and 2,680 numbers more.

An output depends on its token and those before it, so padding behind a text changes nothing. Per-sample gradients need
a loop: `nn.LSTM` has no `vmap` rule, and hooks on modules do not see what happens at each token.
"""

from __future__ import annotations

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from shared_models.models import ModelSettings, Shape, model
from shared_models.tokens import PAD


class LSTMSettings(ModelSettings):
    """The columns of the table above, and dropout.

    Attributes:
        layers: of LSTM, one above the other.
        width: numbers that a token is embedded in.
        hidden: numbers of a layer's state.
        project: whether a linear layer brings the last state to `width` before the output layer.
        tied: whether the output layer for next tokens is the embedding (Press & Wolf 2017; Inan et al. 2017).
        dropout: of all that goes into and out of layers, never from token to token (Zaremba et al. 2014).
    """

    layers: PositiveInt
    width: PositiveInt
    hidden: PositiveInt
    project: bool
    tied: bool
    dropout: float = Field(0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _tied_widths_agree(self) -> LSTMSettings:
        if self.tied and not self.project and self.hidden != self.width:
            raise ValueError(f"tied needs project = true, or hidden {self.hidden} equal to width {self.width}")
        return self


def last(x: Tensor, ids: Tensor) -> Tensor:
    """What stands at each text's last token that is no padding: x (B, T, D), ids (B, T) -> (B, D)."""
    place = (torch.arange(ids.shape[1], device=ids.device) * (ids != PAD)).amax(dim=1)  # (B,)
    return x.take_along_dim(place[:, None, None], dim=1).squeeze(1)


def tied(tokens: nn.Embedding, bias: bool) -> nn.Linear:
    """An output layer, (..., D) -> (..., V), whose weight is the table of tokens (V, D)."""
    output = nn.Linear(tokens.embedding_dim, tokens.num_embeddings, bias)
    output.weight = tokens.weight
    return output


class LSTM(nn.Module):
    """Embedding, layers, and an output layer at the last token or at each."""

    def __init__(self, settings: LSTMSettings, vocabulary: int, outputs: int, each: bool) -> None:
        super().__init__()
        self.each = each
        self.tied = settings.tied and each and outputs == vocabulary
        self.tokens = nn.Embedding(vocabulary, settings.width)
        between = settings.dropout if settings.layers > 1 else 0.0
        self.lstm = nn.LSTM(settings.width, settings.hidden, settings.layers, batch_first=True, dropout=between)
        self.project = nn.Linear(settings.hidden, settings.width) if settings.project else nn.Identity()
        self.dropout = nn.Dropout(settings.dropout)
        if self.tied:
            self.output = tied(self.tokens, bias=True)
        else:
            self.head = nn.Linear(settings.width if settings.project else settings.hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T) int64 -> (B, outputs) scores, or (B, T, outputs) at each token."""
        states, _ = self.lstm(self.dropout(self.tokens(x)))  # (B, T, hidden)
        states = self.project(self.dropout(states if self.each else last(states, x)))
        scores: Tensor = self.output(states) if self.tied else self.head(states)
        return scores


@model(
    "lstm",
    settings=LSTMSettings,
    sizes={
        "tiny": {"layers": 1, "width": 64, "hidden": 128, "project": True, "tied": True},
        "small": {"layers": 2, "width": 8, "hidden": 256, "project": False, "tied": False},
        "base": {"layers": 1, "width": 96, "hidden": 670, "project": True, "tied": False},
    },
    paper="Hochreiter & Schmidhuber 1997, Long Short-Term Memory",
    tasks=("language-modelling", "classification"),
    stackable=False,
    inputs=("tokens",),
    per_sample_gradients=("loop",),
    family="text",
    notes="Small, and learns well from little text; it reads token by token, so long texts are slow and what stood far "
    "back is forgotten.",
    usual={"tiny": (64, 293), "small": (80, 90), "base": (20, 10_004)},
)
def build(settings: LSTMSettings, shape: Shape, outputs: int, *, each: bool = False) -> nn.Module:
    """Tokens (B, T) of a text of any length -> (B, outputs) scores, or (B, T, outputs) with `each`."""
    return LSTM(settings, shape[1], outputs, each)
