"""Zero-shot classification (Radford et al. 2021, section 3.1): the class whose description is nearest to the image."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import cast

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from shared_models.errors import ConfigError
from shared_models.image_text import ImageText
from shared_models.job_parts import DataPart
from shared_models.tasks.base import Batch, Task, task
from shared_models.tasks.classification import Classification, ClassificationSettings
from shared_models.tasks.contrastive import texts_of
from shared_models.tokens import BEGIN, END, PAD


class ZeroShotSettings(ClassificationSettings):
    """Settings of zero-shot classification.

    Attributes:
        width: of the space that images and texts share (E), as it was in contrastive learning.
        template: the description of a class, `{}` standing for its label (section 3.1.4).
        prompts: label -> its own description instead.
    """

    width: PositiveInt = 64
    template: str = "a photo of a {}."
    prompts: dict[str, str] = {}

    @model_validator(mode="after")
    def _a_text_for_each_label(self) -> ZeroShotSettings:
        if "{}" not in self.template:
            raise ValueError(f"template '{self.template}' has no {{}} for the label")
        for label in self.prompts:
            if label not in self.labels:
                raise ValueError(f"prompts describes '{label}', which is not a label")
        return self

    @property
    def texts(self) -> list[str]:
        """The description of each label, in their order."""
        return [self.prompts.get(label, self.template.replace("{}", label)) for label in self.labels]


@task("zero-shot")
class ZeroShot(Task):
    """Targets are class indices (B,); the model is an `ImageText`, e.g. the one of a contrastive stage before.

    An image's logits are its scaled cosines with the descriptions; they can be trained like any others. Loss and
    metrics are those of classification.
    """

    Settings = ZeroShotSettings
    chooses = True
    metrics = Classification.metrics

    def __init__(self, settings: ZeroShotSettings, data: DataPart | None = None) -> None:
        super().__init__(settings, data)
        self.choice = Classification(settings, data)
        if data is not None and data.form == "image-text":
            _ = self.prompts  # a description that does not fit is to be told of now

    @property
    def outputs(self) -> int:
        """Numbers of a point in the space of both."""
        return int(self.settings.width)

    @cached_property
    def prompts(self) -> Tensor:
        """(labels, T) int64, the ids of the descriptions as a reader would make them of captions.

        Raises:
            ConfigError: one is longer than `data.text_length`: cut off, several could become the same.
        """
        length, tokenizer = texts_of(self.data)
        ids = torch.full((len(self.settings.labels), length), PAD)
        for row, text in enumerate(self.settings.texts):
            said = torch.tensor([BEGIN, *tokenizer.encode(text), END])
            if len(said) > length:
                raise ConfigError(
                    f"the description of a class, '{text}', is of {len(said)} tokens, and data.text_length is {length}",
                    hint="Raise data.text_length, or shorten it in task.template or task.prompts",
                )
            ids[row, : len(said)] = said
        return ids

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B, labels)."""
        both = cast(ImageText, model)
        text = both.text(self.prompts.to(batch.x.device))
        return both.scale() * both.image(batch.x) @ text.T

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of each image's class, (B,)."""
        return self.choice.loss(outputs, batch)

    def sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """See `Classification.sums`."""
        return self.choice.sums(outputs, batch)

    @cached_property
    def zeros(self) -> dict[str, Tensor]:
        """Sums of no examples."""
        return self.choice.zeros

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """See `Classification.values`."""
        return self.choice.values(sums)

    def draw(self, shape: tuple[int, ...], count: int, source: torch.Generator) -> Batch:
        """Normal noise and uniform classes."""
        return self.choice.draw(shape, count, source)
