"""Text <-> token ids. The first ids mean the same with every tokenizer, so that tasks need not know which one is used.

By default a token is a byte: nothing is learned from anybody's text. A tokenizer file (of the library `tokenizers`) is
part of the job, word for word, and so of its hash and of the model's fingerprint.

=========  =============  ==================================================================
id         written        meaning
=========  =============  ==================================================================
0          (nothing)      padding: counts nowhere
1          `<begin>`      before the first token that a model has to say; in front of a text
2          `<end>`        after the last
3          `<mask>`       stands for a token that is to be found
4          `<unknown>`    what a tokenizer file has no token for
5 to 36    `<gap 0>` ...  stands for a span that is to be found (T5's sentinels)
from 37    the text       a byte, or a token of the file
=========  =============  ==================================================================
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from shared_models.errors import ConfigError

PAD, BEGIN, END, MASK, UNKNOWN, GAP = range(6)
GAPS = 32
TEXT = GAP + GAPS  # the first id that stands for text
BYTES = "bytes"
LARGEST = 2**22  # ids of a vocabulary: one more is a damaged file, and an embedding of that many fits nowhere


class Tokenizer(ABC):
    """Text <-> ids; `size` is how many ids there are, special ones included."""

    size: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text, without any that mark its begin or end."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special ones are left out."""

    def characters(self, ids: Sequence[int]) -> int:
        """How many characters of a text these ids are."""
        return len(self.decode(ids))


class Bytes(Tokenizer):
    """A token is a byte of the text in UTF-8."""

    size = TEXT + 256

    def encode(self, text: str) -> list[int]:
        """One id a byte; a half of a surrogate pair becomes a question mark."""
        return [TEXT + byte for byte in text.encode("utf-8", "replace")]

    def decode(self, ids: Sequence[int]) -> str:
        """Bytes that are no UTF-8 become U+FFFD."""
        return bytes(i - TEXT for i in ids if i >= TEXT).decode("utf-8", "replace")

    def characters(self, ids: Sequence[int]) -> int:
        """Those that begin here: one that is cut in two is counted once."""
        return sum(i >= TEXT and (i - TEXT) & 0xC0 != 0x80 for i in ids)


class File(Tokenizer):
    """A tokenizer of the library `tokenizers`, from its JSON; its own ids come after the special ones.

    Texts are neither cut nor padded, and no merge is dropped at random, whatever the file says. What it calls unknown
    is `UNKNOWN`.

    Raises:
        ConfigError: the library is not there, cannot read the JSON, or finds no token in it.
    """

    def __init__(self, content: str) -> None:
        try:
            import tokenizers
        except ImportError:
            raise ConfigError(
                "a tokenizer file needs the library tokenizers", hint="pip install 'fedzoo[text]'"
            ) from None
        try:
            self._own: Any = tokenizers.Tokenizer.from_str(content)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library's Rust half raises nothing narrower
            raise ConfigError(f"data.tokenizer is no tokenizer's JSON: {error}") from None
        self._own.no_truncation()
        self._own.no_padding()
        if getattr(self._own.model, "dropout", None):
            self._own.model.dropout = None
        ids = self._own.get_vocab().values()
        if not ids:
            raise ConfigError("data.tokenizer is a tokenizer that has no tokens", hint="Train it on some text")
        self.size = TEXT + max(ids) + 1  # there may be holes
        if self.size == Bytes.size:  # by which a model tells that a token is a byte
            self.size += 1
        if self.size > LARGEST:
            raise ConfigError(f"data.tokenizer has an id of {max(ids)}, the limit is {LARGEST}", hint="Number it anew")
        model = json.loads(content)["model"]
        unknown = model.get("unk_token")
        self._unknown = model.get("unk_id") if unknown is None else self._own.token_to_id(unknown)

    def encode(self, text: str) -> list[int]:
        """Its own ids, moved behind the special ones; a half of a surrogate pair is a question mark to it."""
        ids = self._own.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids
        return [UNKNOWN if i == self._unknown else TEXT + i for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of what is no special id."""
        text: str = self._own.decode([i - TEXT for i in ids if i >= TEXT])
        return text


@lru_cache(maxsize=4)
def make_tokenizer(written: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` means; raises a ConfigError where it means none."""
    if written == BYTES:
        return Bytes()
    if written.lstrip().startswith("{"):
        return File(written)
    raise ConfigError(f"data.tokenizer = {written[:80]!r} is neither '{BYTES}' nor a tokenizer's JSON")


def draw_ids(length: int, size: int, count: int, source: torch.Generator) -> Tensor:
    """(count, length) int64: `<begin>`, at least one random id of text, `<end>` where there is room, padding."""
    ids = torch.randint(TEXT, size, (count, length), generator=source)
    ends = torch.randint(2, length + 1, (count, 1), generator=source)
    place = torch.arange(length)
    ids = torch.where(place == ends, END, ids.masked_fill(place > ends, PAD))
    return ids.masked_fill(place == 0, BEGIN)
