"""What a task is: a loss with a declared unit, and metric sums that merge by addition."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from shared_models.job import Job
from shared_models.registry import Registry


@dataclass(frozen=True)
class Batch:
    """Inputs x (B, *shape) float32 and targets y (B, ...)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)


class TaskSettings(BaseModel):
    """Base of a task's own settings beside its name and labels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    labels: tuple[str, ...]


class Task(ABC):
    """Turns outputs and targets into a loss and metric sums. Stateless.

    Attributes:
        unit: what one loss value belongs to. `sample`: `loss` returns (B,) and samples do not mix; `batch`: it returns
            one value for the whole batch, which methods that need per-sample values refuse.
        headline: the metric that tables show.
    """

    Settings: ClassVar[type[TaskSettings]] = TaskSettings
    unit: ClassVar[Literal["sample", "group", "batch"]] = "sample"
    headline: ClassVar[str]

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Width of the model's last layer."""

    @abstractmethod
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """One value per sample, (B,)."""

    @abstractmethod
    def sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Metric sums of one batch; those of several batches or sites are added."""

    @abstractmethod
    def no_sums(self) -> dict[str, Tensor]:
        """Metric sums of no examples, on the CPU: the names, shapes and dtypes that all sums have."""

    @abstractmethod
    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics from added sums; equal to the metrics of the pooled predictions, NaN for none."""


tasks: Registry[type[Task]] = Registry("task", "shared_models.tasks")


def task(name: str) -> Any:
    """Decorator that registers a Task class under a name."""
    return tasks.register(name)


def make_task(job: Job) -> Task:
    """The job's task."""
    declared = tasks[job.task.name]
    return declared(declared.Settings(labels=job.task.labels, **job.task.keys))


def add_sums(into: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Merge metric sums in place."""
    for name, value in more.items():
        into[name] = into[name] + value if name in into else value
