"""Random numbers that privacy rests on: the key stream of ChaCha20 under a key made of a secret and a purpose.

torch's generator will not do: whatever its seed, it has 2^32 states to start from, and whoever holds a noisy sum may
try them all. What is done here is not proof against attacks on floating-point numbers (Mironov 2012; see
docs/privacy.md).
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

CHUNK = 2**20  # numbers that are drawn at once


def derive(secret: bytes, *purpose: str | int) -> bytes:
    """A key of 32 bytes: HMAC-SHA256 of the purpose's parts, each with its length, under the secret."""
    parts = [str(part).encode() for part in purpose]
    text = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    return hmac.new(secret, text, hashlib.sha256).digest()


def uniform(key: bytes, count: int) -> Tensor:
    """(count,) float64, uniform in [0, 1): multiples of 2^-53."""
    return torch.from_numpy(np.concatenate([_fractions(block) for block in _blocks(key, count)]))


def normal(key: bytes, count: int) -> Tensor:
    """(count,) float32, standard normal, by Box and Muller's transform in float64."""
    found = []
    for block in _blocks(key, count + count % 2):
        pairs = _fractions(block).reshape(-1, 2)
        radius = np.sqrt(-2 * np.log1p(-pairs[:, 0]))
        angle = 2 * math.pi * pairs[:, 1]
        found.append(np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1))
    return torch.from_numpy(np.concatenate(found)[:count].astype(np.float32))


def normal_like(key: bytes, shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Standard normal tensors of these shapes on their devices, drawn in the order of the names given."""
    flat = normal(key, sum(t.numel() for t in shapes.values())).split([t.numel() for t in shapes.values()])
    return {n: part.reshape(t.shape).to(t.device) for part, (n, t) in zip(flat, shapes.items(), strict=True)}


def _blocks(key: bytes, count: int) -> Iterator[np.ndarray]:
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    yield np.empty(0, dtype=np.uint64)
    for start in range(0, count, CHUNK):
        yield np.frombuffer(stream.update(bytes(8 * min(CHUNK, count - start))), dtype="<u8")


def _fractions(block: np.ndarray) -> np.ndarray:
    return np.asarray((block >> np.uint64(11)).astype(np.float64) * 2.0**-53)
