"""Image and text (CLIP, Radford et al. 2021): which text belongs to which image, told from all others of the batch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from shared_models.errors import ConfigError
from shared_models.image_text import Features, ImageText
from shared_models.job_parts import DataPart
from shared_models.tasks.base import Batch, Target, Task, TaskSettings, task
from shared_models.tokens import Tokenizer, draw_ids, make_tokenizer

RANKS = (1, 5, 10)


class ContrastiveSettings(TaskSettings):
    """Settings of contrastive learning; it has no labels.

    Attributes:
        width: of the space that images and texts share (E).
        gallery: how many pairs there are to choose from when recall is measured.
    """

    labels: tuple[str, ...] = ()
    width: PositiveInt = 64
    gallery: int = Field(100, gt=max(RANKS))


@task("contrastive")
class Contrastive(Task):
    """Inputs are images, targets the ids of a text for each, (B, T) int64; the model is an `ImageText`.

    Recall at K is the share of images whose own text is among the K nearest of a gallery (`recall_at_K`), or of texts
    whose image is (`recall_at_K_text`); what is as near as the right one counts as nearer. A gallery is `gallery`
    examples that follow one another, and the rest that fills none counts in no recall: where no site has a whole
    gallery of test examples, `simulation.test = "shared"` gives each those of all. `percentile`, the share of the other
    texts (images) that lie farther away than the right one, needs no whole gallery: it serves for small validation
    parts. It and `recall_at_10_mean` are the means of both ways.

    Samples see each other as negatives. Those of a batch are drawn at random, so with K captions an image and N pairs
    about (B - 1) (K - 1) / N others of a batch of B show the same image and are negatives nevertheless. With
    `train.accumulate`, or where memory runs out, a sample sees only its own part of the batch.
    """

    Settings = ContrastiveSettings
    target: ClassVar[Target] = "tokens"
    supervision = "self-supervised"
    unit = "batch"
    metrics = (
        "recall_at_10_mean",
        *(f"recall_at_{k}" for k in RANKS),
        *(f"recall_at_{k}_text" for k in RANKS),
        "percentile",
    )

    @property
    def outputs(self) -> int:
        """Numbers of a point in the space of both."""
        return int(self.settings.width)

    def evaluation_batch(self, default: int) -> int:
        """A gallery."""
        return int(self.settings.gallery)

    def forward(self, model: nn.Module, batch: Batch) -> Features:
        """Both sides of every pair."""
        both = cast(ImageText, model)
        return Features(both.image(batch.x), both.text(batch.y), both.scale())

    def loss(self, outputs: Features, batch: Batch) -> Tensor:
        """Half the cross-entropy of each image's text among all texts, and half that of its text's image, (B,).

        The mean is the loss of the paper (Figure 3). A sample alone has nothing to be told from: 0.
        """
        logits, own = outputs.logits, torch.arange(len(batch), device=batch.x.device)
        return (F.cross_entropy(logits, own, reduction="none") + F.cross_entropy(logits.T, own, reduction="none")) / 2

    def sums(self, outputs: Features, batch: Batch) -> dict[str, Tensor]:
        """Sums over a batch that is a gallery, or the rest of one.

        `hits` (2, len(RANKS)) int64, of images and of texts whose own is among the K nearest, over `ranked` examples of
        whole galleries; `farther` float64, the mean share of others that are farther, summed over `compared` examples;
        `loss` float64, among the examples of the batch, and `examples` int64.
        """
        image, text = outputs.image.detach().double().cpu(), outputs.text.detach().double().cpu()
        nearness, count = image @ text.T, len(batch)
        own = nearness.diag()
        # how many are not farther than the right one, without itself; where there are numbers that are none: all
        before = [(~(nearness < own[:, None])).sum(1) - 1, (~(nearness < own[None])).sum(0) - 1]
        whole = count == self.settings.gallery
        hits = torch.stack([torch.stack([(place < k).sum() for k in RANKS]) for place in before])
        shares = [1 - place.double() / (count - 1) for place in before] if count > 1 else []
        return {
            "hits": hits if whole else torch.zeros_like(hits),
            "ranked": torch.tensor(count if whole else 0),
            "farther": torch.stack(shares).mean(dim=0).sum() if shares else torch.zeros((), dtype=torch.float64),
            "compared": torch.tensor(count if shares else 0),
            "loss": self.loss(outputs, batch).detach().double().sum().cpu(),
            "examples": torch.tensor(count),
        }

    @cached_property
    def zeros(self) -> dict[str, Tensor]:
        """Sums of no examples."""
        nothing = torch.zeros(0, self.outputs)
        return self.sums(
            Features(nothing, nothing, torch.ones(())), Batch(torch.zeros(0, 1), torch.zeros(0, 1, dtype=torch.int64))
        )

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Recalls over whole galleries, NaN where there is none; `percentile` and `loss` over all examples."""
        sums = sums or self.zeros
        shares = (sums["hits"].double() / sums["ranked"]).tolist()
        found = {f"recall_at_{k}": share for k, share in zip(RANKS, shares[0], strict=True)}
        found |= {f"recall_at_{k}_text": share for k, share in zip(RANKS, shares[1], strict=True)}
        return {
            "recall_at_10_mean": (found["recall_at_10"] + found["recall_at_10_text"]) / 2,
            **found,
            "percentile": (sums["farther"] / sums["compared"]).item(),
            "loss": (sums["loss"] / sums["examples"]).item(),
            "examples": float(sums["examples"]),
        }

    def predict(self, outputs: Features, batch: Batch) -> Tensor:
        """The text of the batch that is nearest to each image, (B, T) int64."""
        return batch.y[(outputs.image @ outputs.text.T).argmax(dim=1)]

    def draw(self, shape: tuple[int, ...], count: int, source: torch.Generator) -> Batch:
        """Normal noise and texts of random ids."""
        length, tokenizer = texts_of(self.data)
        x = torch.randn(count, *shape, generator=source)
        return Batch(x, draw_ids(length, tokenizer.size, count, source))


def texts_of(data: DataPart | None) -> tuple[int, Tokenizer]:
    """Tokens of a text at most, and the tokenizer; raises a ConfigError where [data] has no texts beside its images."""
    if data is None or data.form != "image-text":
        raise ConfigError(
            "this task is about images with texts, and [data] describes none",
            hint="E.g. shape = [3, 64, 64], tokenizer = 'bytes' and text_length = 96",
        )
    return data.text_length, make_tokenizer(data.tokenizer)
