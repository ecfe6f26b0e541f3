"""Texts -> token ids, and the store of them: what all readers of texts share.

An example's ids are `<begin>`, the text's tokens and, where the text ends within the job's length, `<end>`; padding
follows.
"""

from __future__ import annotations

import gzip
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from client.readers.base import Store, Tolerance, Wanted
from client.readers.folders import as_text, read_bytes, shown
from client.readers.samples import Sample, for_all
from shared_models.errors import ConfigError, DataError
from shared_models.tokens import BEGIN, END, PAD, Tokenizer, make_tokenizer

log = logging.getLogger("fedzoo.client")

A = TypeVar("A")

MAX_BYTES = 2**30  # of one file, unpacked


@dataclass(frozen=True)
class Text:
    """What one example says: the ids of its text, and a class or the ids of a second text."""

    ids: Tensor
    target: Tensor


def to_ids(text: str, tokenizer: Tokenizer, length: int) -> Tensor:
    """(length,) int64: the ids of one text; what is too long is cut off."""
    return padded([BEGIN, *tokenizer.encode(text), END], length)


def padded(ids: Sequence[int], length: int) -> Tensor:
    """(length,) int64: the first ids, padding behind them."""
    kept = list(ids[:length])
    return torch.tensor(kept + [PAD] * (length - len(kept)))


def say_cut(ids: Tensor) -> None:
    """Log how many texts did not fit, of (N, T) int64 as `to_ids` gives them."""
    cut = int(((ids[:, -1] != PAD) & (ids[:, -1] != END)).sum())
    if cut:
        log.info("%d of %d texts have more tokens than the job's %d and are cut off there", cut, *ids.shape)


def windows(text: str, tokenizer: Tokenizer, length: int) -> Iterator[Tensor]:
    """A long text in pieces of `length - 1` tokens that follow one another, each behind a `<begin>`; the last may be
    shorter.
    """
    ids = tokenizer.encode(text)
    for start in range(0, len(ids), length - 1):
        yield padded([BEGIN, *ids[start : start + length - 1]], length)


def tokenizer_of(wanted: Wanted) -> Tokenizer:
    """The job's; raises a ConfigError where it has none."""
    if wanted.data.form != "tokens":
        raise ConfigError(
            f"these data are texts, and [data] describes {wanted.data.form} of shape {list(wanted.data.shape)}",
            hint="E.g. tokenizer = 'bytes' and shape = [128]",
        )
    return make_tokenizer(wanted.data.tokenizer)


def text_store(
    samples: Sequence[Sample[A]],
    decode: Callable[[Sample[A]], Text],
    wanted: Wanted,
    bad: Tolerance,
    whole: bool = True,
) -> Store:
    """Decode all samples, in their order; `whole` where each is a text by itself, not a window of a longer one.

    Raises:
        DataError: there is none, or too many cannot be decoded.
    """
    found = bad.each(samples, decode)
    if not found:
        raise DataError("there is no text", hint="Each example needs at least one character")
    kept = [sample for sample, _ in found]
    ids, targets = (torch.stack(column) for column in zip(*((text.ids, text.target) for _, text in found), strict=True))
    if whole:
        say_cut(ids)
    if targets.dim() == 2:
        say_cut(targets)
    return Store(
        x=ids.int(),
        y=targets,
        names=[sample.name for sample in kept],
        data=wanted.data,
        parts=for_all([sample.part for sample in kept], "a part"),
        sites=for_all([sample.site for sample in kept], "a site"),
        skipped=bad.found,
    )


def read_plain(path: Path) -> str:
    """A text file, also one packed by gzip, a line feed at the end of each line; raises a DataError that names it."""
    raw = read_bytes(path)
    if path.suffix.lower() == ".gz":
        try:
            with gzip.open(path) as file:
                raw = file.read(MAX_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{shown(path)} cannot be unpacked: {error}", hint="Mend or remove the file") from None
        if len(raw) > MAX_BYTES:
            raise DataError(f"{shown(path)} unpacks to more than {MAX_BYTES / 2**30:g} GiB", hint="Split the file")
    return as_text(raw, path).replace("\r\n", "\n")
