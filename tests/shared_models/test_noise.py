"""The key stream, its numbers against their stated distributions, and that a key is all they depend on.

Statistical tests have a fixed error rate: each would fail by chance once in a million keys, and the keys are fixed.
"""

from __future__ import annotations

import hashlib
import hmac

import numpy as np
import pytest
import torch
from scipy import stats

from shared_models.noise import CHUNK, derive, normal, normal_like, uniform

ERROR = 1e-6
KEYS = [derive(b"secret", "test", i) for i in range(4)]


def test_a_key_depends_on_every_part_and_where_it_ends() -> None:
    keys = [derive(b"s", "a", 1), derive(b"t", "a", 1), derive(b"s", "b", 1), derive(b"s", "a", 2), derive(b"s", "a1")]
    keys += [derive(b"s", "a", "1", ""), derive(b"s", "a", "", "1"), derive(b"s")]
    assert len(set(keys)) == len(keys)
    assert derive(b"s", "a", 1) == derive(b"s", "a", "1")
    by_hand = b"".join(len(p).to_bytes(8, "big") + p for p in (b"round", b"3"))
    assert derive(b"k", "round", 3) == hmac.new(b"k", by_hand, hashlib.sha256).digest()


def test_the_stream_is_chacha20() -> None:
    """RFC 8439, appendix A.1, test vector 1: key, counter and nonce of zeros."""
    first = bytes.fromhex("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")
    expected = [(int.from_bytes(first[i : i + 8], "little") >> 11) * 2.0**-53 for i in range(0, 32, 8)]
    assert uniform(bytes(32), 4).tolist() == expected


@pytest.mark.parametrize("key", KEYS)
def test_numbers_are_uniform(key: bytes) -> None:
    found = uniform(key, 50_000).numpy()
    assert found.min() >= 0
    assert found.max() < 1
    assert stats.kstest(found, "uniform").pvalue > ERROR
    counts = np.histogram(found, bins=64, range=(0, 1))[0]
    assert stats.chisquare(counts).pvalue > ERROR


@pytest.mark.parametrize("key", KEYS)
def test_numbers_are_standard_normal(key: bytes) -> None:
    found = normal(key, 50_000).double().numpy()
    assert stats.kstest(found, "norm").pvalue > ERROR
    square = float((found**2).sum())  # chi-square with as many degrees of freedom
    low, high = stats.chi2.ppf([ERROR / 2, 1 - ERROR / 2], len(found))
    assert low < square < high
    pairs = stats.pearsonr(found[::2], found[1::2]).pvalue
    assert pairs > ERROR, "the two numbers of a pair are independent"


def test_a_wrong_scale_would_be_noticed() -> None:
    found = 1.05 * normal(KEYS[0], 50_000).double()
    assert float((found**2).sum()) > stats.chi2.ppf(1 - ERROR / 2, 50_000)


def test_chunks_do_not_show_and_the_same_key_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, odd = uniform(KEYS[0], 1000), normal(KEYS[0], 999)
    assert len(odd) == 999
    assert CHUNK % 2 == 0
    monkeypatch.setattr("shared_models.noise.CHUNK", 128)
    assert torch.equal(uniform(KEYS[0], 1000), whole)
    assert torch.equal(normal(KEYS[0], 999), odd)
    assert not torch.equal(normal(KEYS[1], 999), odd)
    assert len(uniform(KEYS[0], 0)) == len(normal(KEYS[0], 0)) == 0


def test_why_torch_s_own_generator_will_not_do() -> None:
    """Two seeds that differ by 2^32 are one: there are so few starts that all can be tried."""
    a, b = (torch.randn(5, generator=torch.Generator().manual_seed(s)) for s in (7, 7 + 2**32))
    assert torch.equal(a, b)


def test_tensors_are_filled_one_after_another() -> None:
    shapes = {"a": torch.zeros(2, 3), "b": torch.zeros(()), "c": torch.zeros(0)}
    found = normal_like(KEYS[0], shapes)
    flat = normal(KEYS[0], 7)
    assert torch.equal(found["a"].reshape(-1), flat[:6])
    assert found["b"] == flat[6]
    assert found["c"].shape == (0,)
