"""Keyed randomness: pinned, sensitive to every argument, free of collisions, and without a trace in global state."""

from __future__ import annotations

import itertools

import pytest
import torch

from shared_models.keys import chooser, generator, key, keyed_global


def test_values_are_pinned() -> None:
    """SHA-256 of the fields joined by 0x1f, the first 8 bytes, shifted by one: a change breaks every repeated run."""
    assert key(0, "init") == 0x28532835C5948404
    assert key(7, "order", site="hospital-a", task=1, round=2, step=3) == 0x388AB5C118AD354B


def test_every_argument_matters() -> None:
    base = {"seed": 1, "purpose": "order", "site": "a", "task": 1, "round": 1, "step": 1}
    changes = {"seed": 2, "purpose": "noise", "site": "b", "task": 2, "round": 2, "step": 2}
    keys = {key(**base)} | {key(**{**base, name: value}) for name, value in changes.items()}  # type: ignore[arg-type]
    assert len(keys) == 7
    assert all(0 <= k < 2**63 for k in keys)


def test_neighbouring_fields_do_not_run_together() -> None:
    sites = ("", "a", "a1", "a11", "\x1f", "\x1f\x1f", "a\x1f", "\x1fa", "a\x1f1", "a\x1f\x1f1", "1", "11")
    numbers = (0, 1, 11, 111)
    every = list(itertools.product((1, 11), ("p", "p1"), sites, numbers, numbers, numbers))
    keys = {key(seed, purpose, site=site, task=t, round=r, step=s) for seed, purpose, site, t, r, s in every}
    assert len(keys) == len(every)


def test_a_generator_repeats_and_does_not_touch_the_global_one() -> None:
    before = torch.get_rng_state()
    draws = [torch.randperm(50, generator=generator(3, "order", site="a", round=2)) for _ in range(2)]
    other = torch.randperm(50, generator=generator(3, "order", site="b", round=2))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_chooser_repeats() -> None:
    names = [f"site-{i}" for i in range(100)]
    assert chooser(1, "select", round=4).sample(names, 5) == chooser(1, "select", round=4).sample(names, 5)
    assert chooser(1, "select", round=4).sample(names, 5) != chooser(1, "select", round=5).sample(names, 5)
    assert chooser(1, "select", task=4).sample(names, 5) != chooser(1, "select", task=5).sample(names, 5)


def test_keyed_global_seeds_inside_and_restores_after() -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    with keyed_global(11):
        inside = torch.rand(4)
        torch.rand(1000)
    assert torch.equal(torch.rand(4), expected)
    with keyed_global(11):
        assert torch.equal(torch.rand(4), inside)
    assert not torch.equal(inside, expected)


def test_keyed_global_restores_after_an_exception() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), keyed_global(11):
        _ = 1 / 0
    assert torch.equal(torch.get_rng_state(), before)
