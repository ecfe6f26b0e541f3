"""Forecasting: the last steps of a series from those before them; the errors, and what they are beside a naive one's.

A window of T steps is cut at T - H: the model sees what comes before and says the H steps that follow. All errors are
in normalised units, those of `data.std` or of the sites' own deviation. A number that is missing in the data is 0 after
normalisation (`data.missing = "mean"`), in the truth as well, and is scored as if it were known.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from shared_models.errors import ConfigError
from shared_models.job_parts import DataPart
from shared_models.registry import nearest
from shared_models.tasks.base import Batch, Measure, Task, TaskSettings, task

ERROR = Measure(unit="", factor=1.0, digits=4, larger=False)


class ForecastingSettings(TaskSettings):
    """Settings of forecasting.

    Attributes:
        horizon: H, steps to say; the model sees the T - H before them.
        targets: of `data.features`, those to say; empty: all. The model sees all of them.
        loss: the mean of the squared errors (`mse`) or of the absolute ones (`mae`).
    """

    labels: tuple[str, ...] = ()
    horizon: PositiveInt = 1
    targets: tuple[str, ...] = ()
    loss: Literal["mse", "mae"] = "mse"


@task("forecasting")
class Forecasting(Task):
    """Outputs are (B, H K): for each of H steps its K numbers. Batches have no targets: the truth is in the series."""

    Settings = ForecastingSettings
    target = "none"
    supervision = "self-supervised"
    metrics = ("skill", "mse", "mae")
    measures = {"mse": ERROR, "mae": ERROR}

    def __init__(self, settings: ForecastingSettings, data: DataPart | None = None) -> None:
        super().__init__(settings, data)
        self.horizon = settings.horizon
        self.window, names = (data.shape, data.features) if data else ((), ())
        if len(self.window) != 2 or self.window[0] <= self.horizon:
            raise ConfigError(
                f"task.horizon = {self.horizon} leaves no step to see of data.shape = {list(self.window)}",
                hint="shape is (T, C) of a series, and T counts the steps seen and those of the horizon",
            )
        if unknown := [name for name in settings.targets if name not in names]:
            raise ConfigError(
                f"task.targets names '{unknown[0]}', which is not in data.features",
                hint=nearest(unknown[0], list(names)),
            )
        self.channels = [names.index(name) for name in settings.targets] or list(range(self.window[1]))

    @property
    def outputs(self) -> int:
        """H K."""
        return self.horizon * len(self.channels)

    def shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        """(T - H, C)."""
        return (sample[0] - self.horizon, sample[1])

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the model says of a series without its last H steps, (B, H K)."""
        said: Tensor = model(batch.x[:, : -self.horizon])
        return said

    def truth(self, x: Tensor) -> Tensor:
        """The last H steps, (B, T, C) -> (B, H K)."""
        return x[:, -self.horizon :, self.channels].flatten(1)

    def naive(self, x: Tensor) -> Tensor:
        """The last step that is seen, H times, (B, T, C) -> (B, H K)."""
        return x[:, -self.horizon - 1, self.channels].repeat(1, self.horizon)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Mean of the squared or absolute errors of a series, (B,)."""
        off = outputs - self.truth(batch.x)
        return (off.square() if self.settings.loss == "mse" else off.abs()).mean(dim=1)

    def sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Sums over series of their mean errors, float64: `squared`, `absolute`, and `naive`, squared of the naive one.

        `loss` float64; `examples` int64.
        """
        outputs, x = outputs.float().cpu(), batch.x.cpu()
        truth = self.truth(x).double()
        return {
            "squared": (outputs - truth).square().mean(dim=1).sum(),
            "absolute": (outputs - truth).abs().mean(dim=1).sum(),
            "naive": (self.naive(x) - truth).square().mean(dim=1).sum(),
            "loss": self.loss(outputs, Batch(x, batch.y)).double().sum(),
            "examples": torch.tensor(len(batch)),
        }

    @cached_property
    def zeros(self) -> dict[str, Tensor]:
        """Sums of no series."""
        nothing = Batch(torch.zeros(0, *self.window), torch.zeros(0, dtype=torch.int64))
        return self.sums(torch.zeros(0, self.outputs), nothing)

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`mse` and `mae`; `skill`, 1 - mse / that of repeating the last step seen: 0 is no better, 1 is no error.

        It may be negative, and is NaN where nothing ever changes.
        """
        sums = sums or self.zeros
        mse, mae, naive, loss = ((sums[n] / sums["examples"]).item() for n in ("squared", "absolute", "naive", "loss"))
        skill = 1 - mse / naive if naive else torch.nan
        return {"skill": skill, "mse": mse, "mae": mae, "loss": loss, "examples": float(sums["examples"])}

    def predict(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The forecast, (B, H, K)."""
        forecast: Tensor = outputs.unflatten(1, (self.horizon, -1))
        return forecast

    def draw(self, shape: tuple[int, ...], count: int, source: torch.Generator) -> Batch:
        """Random walks that end about 1 away."""
        steps = torch.randn(count, *shape, generator=source) * shape[0] ** -0.5
        return Batch(steps.cumsum(dim=1), torch.zeros(count, dtype=torch.int64))
