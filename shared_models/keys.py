"""Keyed randomness: every random number is drawn from a generator named by what it is for.

A key is (job seed, site, task, round, step, purpose) hashed to 64 bits, so a draw does not depend on what was drawn
before it, on the engine, or on how many clients share a process. The run's id is not part of a key: the same job with
the same seed gives the same model in any engine, and paradigms that are compared see the same batches.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def key(seed: int, purpose: str, *, site: str = "", task: int = 0, round: int = 0, step: int = 0) -> int:
    """A 63-bit integer that depends on every argument (SHA-256 of their unambiguous encoding)."""
    text = "\x1f".join((str(seed), purpose, site.replace("\x1f", "\x1f\x1f"), str(task), str(round), str(step)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(
    seed: int, purpose: str, *, site: str = "", task: int = 0, round: int = 0, step: int = 0
) -> torch.Generator:
    """A CPU torch generator seeded by the key."""
    source = torch.Generator()
    source.manual_seed(key(seed, purpose, site=site, task=task, round=round, step=step))
    return source


def chooser(seed: int, purpose: str, *, round: int = 0, task: int = 0) -> random.Random:
    """A `random.Random` seeded by the key, for choices among names."""
    return random.Random(key(seed, purpose, round=round, task=task))


@contextmanager
def keyed_global(value: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's global generators inside the block (initialisation, dropout) and restore them after it.

    `torch.manual_seed` is not used: without a GPU each call of it queues a seed, with a stack trace, for one that may
    come.
    """
    gpu = device if device is not None and device.type == "cuda" else None
    before, before_gpu = torch.get_rng_state(), torch.cuda.get_rng_state(gpu) if gpu else None
    torch.default_generator.manual_seed(value)
    if gpu:
        with torch.cuda.device(gpu):
            torch.cuda.manual_seed(value)
    try:
        yield
    finally:
        torch.set_rng_state(before)
        if gpu and before_gpu is not None:
            torch.cuda.set_rng_state(before_gpu, gpu)
