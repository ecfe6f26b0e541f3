"""LSTM (Hochreiter & Schmidhuber 1997) for series: reads step by step; its last state says the answer.

=====  ======  ======  =======  ============  =====================================
size   layers  hidden  dropout  M parameters  from
=====  ======  ======  =======  ============  =====================================
tiny   1       64      0        0.02          ours
hydro  1       256     0.4      0.3           Kratzert et al. 2019, river discharge
=====  ======  ======  =======  ============  =====================================

Parameters at (T, C) = (48, 3) with 10 outputs, and at (270, 32) with one. The number of steps does not change them.

A forecast follows from the last state. A class may not: with `pool = "max"` the head sees the largest of each number
of the state over all steps.

Per-sample gradients need a loop: `nn.LSTM` has no `vmap` rule for stacked weights, falls back to slow kernels where
only the series are stacked, and hooks on modules do not see what happens at each step.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from shared_models.models import ModelSettings, Shape, model


class SeriesLSTMSettings(ModelSettings):
    """The columns of the table above.

    Attributes:
        layers: of LSTM, one above the other.
        hidden: numbers of a layer's state.
        pool: what the head sees: the `last` state, or of each of its numbers the `max` over all steps.
        dropout: between layers and before the head, never from step to step (Zaremba et al. 2014).
    """

    layers: PositiveInt
    hidden: PositiveInt
    pool: Literal["last", "max"] = "last"
    dropout: float = Field(0.0, ge=0.0, lt=1.0)


class SeriesLSTM(nn.Module):
    """Layers of LSTM and a linear layer on what is left of their states."""

    def __init__(self, settings: SeriesLSTMSettings, channels: int, outputs: int) -> None:
        super().__init__()
        between = settings.dropout if settings.layers > 1 else 0.0
        self.pool = settings.pool
        self.lstm = nn.LSTM(channels, settings.hidden, settings.layers, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(settings.dropout)
        self.head = nn.Linear(settings.hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, outputs)."""
        states, _ = self.lstm(x)  # (B, T, hidden)
        kept = states[:, -1] if self.pool == "last" else states.amax(dim=1)
        said: Tensor = self.head(self.dropout(kept))
        return said


@model(
    "series-lstm",
    settings=SeriesLSTMSettings,
    sizes={
        "tiny": {"layers": 1, "hidden": 64},
        "hydro": {"layers": 1, "hidden": 256, "dropout": 0.4},
    },
    paper="Hochreiter & Schmidhuber 1997, Long Short-Term Memory",
    tasks=("forecasting", "classification"),
    stackable=False,
    inputs=("series",),
    per_sample_gradients=("loop",),
    family="series",
    notes="Few parameters, whatever the length, and no patch to choose; it reads step by step, so long series are slow "
    "and what happened far back is forgotten. For classes try pool = 'max'.",
    usual={"tiny": (48, 3), "hydro": (270, 32)},
)
def build(settings: SeriesLSTMSettings, shape: Shape, outputs: int) -> nn.Module:
    """Series (B, T, C) of any length -> (B, outputs)."""
    return SeriesLSTM(settings, shape[1], outputs)
