"""Denoising: a text is found again from what noise left of it, by an encoder and a decoder.

========  ==================================  =========================================  ==============================
noise     what is read                        what is written                            from
========  ==================================  =========================================  ==============================
`infill`  spans gone, one `<mask>` for each   the whole text                             Lewis et al. 2020, section 2.2
`spans`   spans gone, `<gap i>` for the i-th  for each i `<gap i>` and what stood there  Raffel et al. 2020, section 3.1
========  ==================================  =========================================  ==============================

Accuracy and perplexity count the tokens that were gone, not those that are copied.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from shared_models.tasks.base import Batch, task
from shared_models.tasks.language import Language, Said, TextSettings
from shared_models.tokens import BEGIN, END, GAP, GAPS, MASK, PAD, TEXT, UNKNOWN


class DenoisingSettings(TextSettings):
    """Settings of denoising.

    Attributes:
        noise: see the table above.
        hidden: share of a text's tokens that is gone, at least one (BART's 0.3; T5's is 0.15).
        span: mean length of a span that is gone, in tokens (3 in both papers). There are 32 gaps: with noise `spans` a
            text of which more than 32 * `span` tokens are gone has longer ones.
    """

    noise: Literal["infill", "spans"] = "infill"
    hidden: float = Field(0.3, gt=0.0, lt=1.0)
    span: float = Field(3.0, ge=1.0)


@task("denoising")
class Denoising(Language):
    """Spans are drawn anew each time a text is read.

    As in T5's code a text's hidden tokens are cut into spans at random, and so are those that stay; other than there, a
    text may end with what stays, for a short one with a single span would always lose its end. BART's empty spans, a
    mask where nothing is gone, are left out.
    """

    Settings = DenoisingSettings
    each = False
    metrics = ("accuracy", "perplexity")
    draws = True

    def forward(self, model: Any, batch: Batch) -> Said:
        """Logits for what is to be written, from what is left."""
        spans = self.settings.noise == "spans"
        noisy = [corrupt(ids, self.settings.hidden, self.settings.span, spans) for ids in batch.x.cpu()]
        read, write, gone = (torch.stack(parts).to(batch.x.device) for parts in zip(*noisy, strict=True))
        return Said(model(read, write[:, :-1]), write[:, 1:], gone[:, 1:])


def corrupt(ids: Tensor, share: float, mean: float, spans: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(read, write, gone) of one text, each (T,): ids, ids, and where `write` holds a token that is gone."""
    length = len(ids)
    text = ids[(ids >= TEXT) | (ids == UNKNOWN)].tolist()
    hidden = min(max(1, round(len(text) * share)), max(1, len(text) - 1), len(text))
    count = min(max(1, round(hidden / mean)), hidden, max(1, len(text) - hidden), GAPS if spans else hidden)
    read, write, gone = [BEGIN], [BEGIN], [False]
    done = 0
    for i, (start, end) in enumerate(draw_spans(len(text), hidden, count)):
        stays, goes = text[done:start], text[start:end]
        read += [*stays, GAP + i if spans else MASK]
        write += [GAP + i] if spans else stays
        gone += [False] * (1 if spans else len(stays))
        write += goes
        gone += [True] * len(goes)
        done = end
    last = [END] if END in ids else []
    read += text[done:] + last
    write += last if spans else text[done:] + last
    return _fill(read, length, PAD), _fill(write, length, PAD), _fill(gone, length, False)


def draw_spans(tokens: int, hidden: int, count: int) -> list[tuple[int, int]]:
    """(start, end) of `count` spans, with a token between them, of `hidden` tokens in all; each choice is as likely."""
    if not count:
        return []
    spans, place = [], -1
    stay = _pieces(tokens - hidden + 2, count + 1)  # with one more in front and behind, where there may be none
    for before, lost in zip(stay, _pieces(hidden, count), strict=False):
        spans.append((place + before, place + before + lost))
        place += before + lost
    return spans


def _pieces(whole: int, count: int) -> list[int]:
    """`whole` cut into `count` pieces at random, each at least 1."""
    cuts = torch.randperm(whole - 1)[: count - 1].sort().values + 1
    return [b - a for a, b in pairwise([0, *cuts.tolist(), whole])]


def _fill(values: list[Any], length: int, filler: Any) -> Tensor:
    return torch.tensor((values + [filler] * length)[:length])
