"""What a task is: a target with a form, a loss with a declared unit, and metric sums that merge by addition.

| target  | y of a batch                   | values                                                              |
|---------|--------------------------------|---------------------------------------------------------------------|
| `class` | (B,) int64                     | index into the job's label list                                     |
| `mask`  | (B, H, W) uint8                | index into the label list at every pixel; 255 counts nowhere        |
| `box`   | (B, 4) float32                 | x0, y0, x1, y1 as fractions of the image's width and height         |
| `boxes` | (B, M, 5) float32              | class index, x0, y0, x1, y1; rows with class -1 are padding         |
| `tokens`| (B, T) int64                   | ids of the tokens of a text that belongs to the input; 0 is padding |
| `none`  | (B,) int64                     | nothing: zeros. What is to be found is made from the input          |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from shared_models.errors import ConfigError
from shared_models.job import Job
from shared_models.job_parts import DataPart
from shared_models.registry import Registry, nearest

Target = Literal["class", "mask", "box", "boxes", "tokens", "none"]
Supervision = Literal["supervised", "self-supervised", "unsupervised"]
IGNORED = 255  # the value of a mask's pixels that count nowhere


@dataclass(frozen=True)
class Past:
    """What a batch holds of earlier tasks, for methods that remember.

    Attributes:
        draw: (B,) int64: 0 for the batch's own examples, n for those of the n-th draw from what the site keeps.
        scale: (B,) float32, B / (examples of the same draw): times it, the mean over the batch is the draw's own.
        labels: targets of the batch's own examples, all of them also where it is cut into parts.
        outputs: (B, C) float32, what an earlier model said of the examples, zeros where none was asked; None: nowhere.
    """

    draw: Tensor
    scale: Tensor
    labels: Tensor
    outputs: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Inputs x (B, *shape) float32, or tokens (B, T) int64, and targets y as in the table above.

    Attributes:
        proposals: (B, R, 4) float32 regions that may hold an object, for models that ask for them (`Model.proposals`);
            x0, y0, x1, y1 as fractions, a row of zeros is padding.
        past: what it holds of earlier tasks; None: nothing.
    """

    x: Tensor
    y: Tensor
    proposals: Tensor | None = None
    past: Past | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice) -> Batch:
        """Some of its samples."""
        past = self.past
        if past is not None:
            said = None if past.outputs is None else past.outputs[rows]
            past = Past(past.draw[rows], past.scale[rows], past.labels, said)
        return Batch(self.x[rows], self.y[rows], None if self.proposals is None else self.proposals[rows], past)

    def pinned(self) -> Batch:
        """A copy in page-locked memory, from which a GPU reads while the CPU goes on."""
        regions = None if self.proposals is None else self.proposals.pin_memory()
        return Batch(self.x.pin_memory(), self.y.pin_memory(), regions)

    def to(self, device: torch.device) -> Batch:
        """The same on `device`; copies from pinned memory do not wait."""
        x, y = self.x.to(device, non_blocking=True), self.y.to(device, non_blocking=True)
        moved = None if self.proposals is None else self.proposals.to(device, non_blocking=True)
        return Batch(x, y, moved)


@dataclass(frozen=True)
class Measure:
    """How a metric is shown.

    Attributes:
        unit: behind the figure; `%` for a fraction of 1.
        factor: what the value is multiplied by.
        digits: behind the point.
        larger: whether a larger one is better.
    """

    unit: str = "%"
    factor: float = 100.0
    digits: int = 1
    larger: bool = True


PERCENT = Measure()


class TaskSettings(BaseModel):
    """Base of a task's own settings beside its name.

    Attributes:
        labels: fix every class index, at every site; a task without classes has none.
        aliases: a word of the data (class folder, CSV value, object name, grey value `"255"`, colour `"#ff0000"`) ->
            the label it stands for. A site's own `client.toml` may say more.
        headline: the metric that tables show and `federation.select = "best"` goes by; by default the task's own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    labels: tuple[str, ...] = Field(min_length=1)
    aliases: dict[str, str] = {}
    headline: str | None = None

    @model_validator(mode="after")
    def _aliases_name_labels(self) -> TaskSettings:
        for word, label in self.aliases.items():
            if label not in self.labels:
                raise ValueError(f"alias '{word}' stands for '{label}', which is not a label")
        return self


class Task(ABC):
    """Loss and metrics of one kind of problem.

    Attributes:
        Settings: the pydantic model of its keys in `[task]`.
        target: what a reader must give for every example.
        supervision: what is learned from: labels that were given (`supervised`), answers made from the examples
            themselves (`self-supervised`), or none (`unsupervised`).
        unit: `sample`: `loss` returns one value per sample and samples do not mix; `batch`: it returns
            one value for the whole batch, which methods that need per-sample values refuse.
        metrics: names of the metrics that `values` has for every job, the default headline first.
        measures: how those of them are shown that are no fractions of which a larger one is better.
        each: whether the model is asked for `outputs` numbers at every position of a text or series.
        chooses: whether the outputs are one logit a label, (B, C).
        draws: whether `forward` draws random numbers in evaluation too; they are then the same in every round.
    """

    Settings: ClassVar[type[TaskSettings]] = TaskSettings
    target: ClassVar[Target] = "class"
    supervision: ClassVar[Supervision] = "supervised"
    unit: ClassVar[Literal["sample", "group", "batch"]] = "sample"
    metrics: ClassVar[tuple[str, ...]]
    measures: ClassVar[Mapping[str, Measure]] = {}
    each: ClassVar[bool] = False
    chooses: ClassVar[bool] = False
    draws: ClassVar[bool] = False

    def __init__(self, settings: Any, data: DataPart | None = None) -> None:
        self.settings = settings
        self.data = data

    def measure(self, metric: str) -> Measure:
        """How a metric of `values` is shown."""
        return self.measures.get(metric.partition(":")[0], PERCENT)

    @property
    def headline(self) -> str:
        """The metric that tables show."""
        return self.settings.headline or self.metrics[0]

    @property
    @abstractmethod
    def outputs(self) -> int:
        """What the model is built for: classes, or numbers per example."""

    @property
    def always(self) -> tuple[int, ...]:
        """Classes whose examples each task of a stream of classes is measured with, beside its own."""
        return ()

    def shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        """What the model is built for, where it sees something else than the whole sample (`DataPart.sample`)."""
        return sample

    def attach(self, model: nn.Module, sample: tuple[int, ...]) -> nn.Module:
        """The model with what the task alone needs added to it, e.g. a decoder; here as it is."""
        return model

    def evaluation_batch(self, default: int) -> int:
        """How many examples are measured at once, where a metric depends on it."""
        return default

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """The model's outputs for a batch: what `loss` and `sums` take."""
        return model(batch.x)

    def examine(self, model: nn.Module, batch: Batch, part: Literal["validation", "test"]) -> Any:
        """The outputs when the model is measured; what takes long (to write a text) is done on the test part alone."""
        return self.forward(model, batch)

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """One value per sample, (B,)."""

    @abstractmethod
    def sums(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Metric sums of one batch, on the CPU; those of several batches or sites are added."""

    @cached_property
    @abstractmethod
    def zeros(self) -> dict[str, Tensor]:
        """Metric sums of no examples, on the CPU: the names, shapes and dtypes that all sums have."""

    def no_sums(self) -> dict[str, Tensor]:
        """The same; tensors must not be written to."""
        return self.zeros

    @abstractmethod
    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics from added sums; equal to the metrics of the pooled predictions, NaN for none.

        `loss` (mean per example) and `examples` are always there beside `metrics`.
        """

    def predict(self, outputs: Any, batch: Batch) -> Tensor:
        """What the model says, in the form of the targets: here the class with the largest output, (B, ...) int64."""
        found: Tensor = outputs.argmax(dim=1)
        return found

    def quote(self, outputs: Any, batch: Batch) -> list[tuple[str, str, str]]:
        """(given, wanted, said) of each example, for tasks whose model writes; `outputs` are those of the test part."""
        return []

    @abstractmethod
    def draw(self, shape: tuple[int, ...], count: int, source: torch.Generator) -> Batch:
        """A random batch of this task's form, for measuring a model and for tests."""


tasks: Registry[type[Task]] = Registry("task", "shared_models.tasks")


def task(name: str) -> Any:
    """Decorator that registers a Task class under a name."""
    return tasks.register(name)


def make_task(job: Job) -> Task:
    """The job's task; made once for a job, because every contribution is checked against its empty sums."""
    made: Task | None = job.__dict__.get("_made_task")
    if made is None:
        declared = tasks[job.task.name]
        made = job.__dict__["_made_task"] = declared(
            declared.Settings(labels=job.task.labels, **job.task.keys), job.data
        )
    return made


def require_headline(job: Job, where: str) -> None:
    """Raise a ConfigError where `[task] headline` is no metric of the task."""
    chosen, known = job.task.keys.get("headline"), tasks[job.task.name].metrics
    if chosen is not None and chosen not in known:
        raise ConfigError(
            f"{where}: 'headline': task '{job.task.name}' has no metric '{chosen}'", hint=nearest(chosen, list(known))
        )


def add_sums(into: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Merge metric sums in place."""
    for name, value in more.items():
        into[name] = into[name] + value if name in into else value
