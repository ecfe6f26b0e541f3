"""What pretext tasks have in common: the right answer is made from the image itself, and nothing else is read."""

from __future__ import annotations

from typing import ClassVar

import torch

from shared_models.tasks.base import Batch, Task, TaskSettings


class PretextSettings(TaskSettings):
    """Base of their settings. There are no labels; those of a job that has some mean nothing here."""

    labels: tuple[str, ...] = ()


class Pretext(Task):
    """Base of tasks whose targets are `none`."""

    Settings: ClassVar[type[TaskSettings]] = PretextSettings
    target = "none"
    supervision = "self-supervised"

    def draw(self, shape: tuple[int, ...], count: int, source: torch.Generator) -> Batch:
        """Normal noise."""
        return Batch(torch.randn(count, *shape, generator=source), torch.zeros(count, dtype=torch.int64))
