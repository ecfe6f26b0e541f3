"""How the metrics of a comparison are shown and spoken of: unit, digits, and whether a larger one is better."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from shared_models.tasks.base import Task


class Measure(BaseModel):
    """A task's `Measure` as it stands in `comparison.json`.

    Attributes:
        unit: behind a figure; `%` for a fraction of 1, empty for a plain number.
        factor: what the value is multiplied by.
        digits: behind the point.
        larger: whether a larger one is better.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: str = "%"
    factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 100.0
    digits: Annotated[int, Field(ge=0, le=9)] = 1
    larger: bool = True

    @property
    def percent(self) -> bool:
        """Whether it is a fraction of 1."""
        return self.unit == "%"

    @property
    def lower(self) -> str:
        """`lower is better`, or nothing where a larger one is."""
        return "" if self.larger else "lower is better"

    def figure(self, value: float) -> str:
        """A value or difference without its unit: 0.123 -> `12.3` in percent; never `-0.0`."""
        return f"{self.factor * value:z,.{self.digits}f}".replace("-", "−")

    def title(self, metric: str) -> str:
        """The head of a column: `accuracy %`, `bits_per_character, bits (lower is better)`."""
        unit = " %" if self.percent else f", {self.unit}" if self.unit else ""
        return f"{metric}{unit}" + (f" ({self.lower})" if self.lower else "")

    def step(self, metric: str) -> str:
        """What differences are counted in: `points` of percent, the unit, or the metric itself where it has none."""
        return "points" if self.percent else self.unit or words(metric)

    def judged(self, difference: float) -> str:
        """`, which is better` or `, which is worse`; nothing where a larger one is better, as everybody expects."""
        return "" if self.larger else f", which is {'better' if difference < 0 else 'worse'}"


PERCENT = Measure()


def words(metric: str) -> str:
    """`bits_per_character` -> `bits per character`."""
    return metric.replace("_", " ")


def measures_of(task: Task) -> dict[str, Measure]:
    """How every metric of a task is shown."""
    names = dict.fromkeys([*task.metrics, *task.measures])
    return {name: Measure(**asdict(task.measure(name))) for name in names}
