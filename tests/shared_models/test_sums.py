"""The pairwise mean against numbers worked out by hand, a float64 oracle, and every order of arrival."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from shared_models.sums import Groups, PairwiseMean


def client(seed: int) -> dict[str, dict[str, Tensor]]:
    """Two groups with awkward shapes: odd sizes, zero-dimensional, empty."""
    source = torch.Generator().manual_seed(seed)
    shapes = {"w": (5, 7), "b": (), "none": (0, 3)}
    return {
        group: {name: torch.randn(shape, generator=source) * 10.0 ** (seed % 5 - 2) for name, shape in shapes.items()}
        for group in ("model", "control")
    }


def mean(
    updates: dict[int, Groups], weights: dict[int, dict[str, float]], slots: int, order: list[int]
) -> dict[str, dict[str, Tensor]] | None:
    total = PairwiseMean(slots)
    for slot in order:
        if slot in updates:
            total.add(slot, updates[slot], weights[slot])
        else:
            total.skip(slot)
    return total.result()


def same(a: Groups, b: Groups) -> bool:
    return a.keys() == b.keys() and all(
        list(a[g]) == list(b[g]) and all(torch.equal(a[g][n], b[g][n]) for n in a[g]) for g in a
    )


def test_three_clients_by_hand() -> None:
    """(1 * 1 + 2 * 4 + 5 * 10) / 8 = 7.375 by examples, (1 + 4 + 10) / 3 = 5 uniformly: a group has its own weights."""
    total = PairwiseMean(3)
    for slot, (value, examples) in enumerate([(1.0, 1), (4.0, 2), (10.0, 5)]):
        tensors = {"x": torch.tensor([value, -value])}
        total.add(slot, {"model": tensors, "control": tensors}, {"model": examples, "control": 1})
    found = total.result()
    assert found is not None
    torch.testing.assert_close(found["model"]["x"], torch.tensor([7.375, -7.375]))
    torch.testing.assert_close(found["control"]["x"], torch.tensor([5.0, -5.0]))


@pytest.mark.parametrize("slots", range(1, 18))
def test_any_order_of_arrival_gives_the_same_bits_and_the_float64_mean(slots: int) -> None:
    shuffle = random.Random(slots)
    for skipped in (0, slots // 3, slots - 1):
        gone = set(shuffle.sample(range(slots), skipped))
        updates: dict[int, Groups] = {k: client(k) for k in range(slots) if k not in gone}
        weights = {k: {"model": float(3 * k + 1), "control": 1.0 + (k % 2)} for k in updates}
        first = mean(updates, weights, slots, list(range(slots)))
        assert first is not None
        for order in [list(reversed(range(slots))), *(shuffle.sample(range(slots), slots) for _ in range(8))]:
            again = mean(updates, weights, slots, order)
            assert again is not None
            assert same(first, again)
        for group in ("model", "control"):
            total = sum(w[group] for w in weights.values())
            for name, value in first[group].items():
                oracle = sum(updates[k][group][name].double() * weights[k][group] / total for k in updates)
                scale = max((float(u[group][name].abs().max()) for u in updates.values() if value.numel()), default=0.0)
                assert isinstance(oracle, Tensor)
                torch.testing.assert_close(value.double(), oracle, rtol=0, atol=1e-6 * scale)


def test_the_mean_of_one_client_is_its_tensors_to_the_bit() -> None:
    for slots in range(1, 9):
        for slot in range(slots):
            found = mean({slot: client(4)}, {slot: {"model": 7.0, "control": 0.1}}, slots, list(range(slots)))
            assert found is not None
            assert same(found, client(4))


def test_equal_updates_stay_equal_whatever_their_weights() -> None:
    weights = {k: {"model": 1.0 + k * k, "control": 0.3 * (k + 1)} for k in range(7)}
    found = mean(dict.fromkeys(range(7), client(1)), weights, 7, list(range(7)))
    assert found is not None
    assert same(found, client(1))


def test_strided_tensors_give_the_bits_of_contiguous_ones() -> None:
    plain = {k: {"m": {"w": torch.randn(65, 33, generator=torch.Generator().manual_seed(k))}} for k in range(5)}
    strided = {k: {"m": {"w": g["m"]["w"].t().contiguous().t()}} for k, g in plain.items()}
    weights = {k: {"m": k + 0.7} for k in range(5)}
    a, b = (mean(dict(u), weights, 5, list(range(5))) for u in (plain, strided))
    assert a is not None
    assert b is not None
    assert not strided[0]["m"]["w"].is_contiguous()
    assert same(a, b)


def test_waiting_nodes_are_logarithmic_when_replies_come_in_order() -> None:
    total = PairwiseMean(1000)
    most = 0
    for slot in range(1000):
        total.add(slot, {"m": {"x": torch.tensor([float(slot)])}}, {"m": 1.0})
        most = max(most, len(total._waiting))
        assert len(total._waiting) <= bin(slot + 1).count("1")  # one node per complete subtree
    assert most == 9  # after 511 = 0b111111111 replies
    found = total.result()
    assert found is not None
    assert float(found["m"]["x"]) == pytest.approx(499.5, rel=1e-6)


def test_inputs_are_never_modified_and_never_kept() -> None:
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [1, 4, 0, 3, 2]):
        total = PairwiseMean(5)
        for slot in order:
            given = client(slot)
            total.add(slot, given, {"model": slot + 1.0, "control": 1.0})
            assert same(given, client(slot))
            for tensors in given.values():
                for tensor in tensors.values():
                    tensor.fill_(float("nan"))  # the caller's memory is used for something else
        found = total.result()
        weights = {k: {"model": k + 1.0, "control": 1.0} for k in range(5)}
        expected = mean({k: client(k) for k in range(5)}, weights, 5, [0, 1, 2, 3, 4])
        assert found is not None
        assert expected is not None
        assert same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_averaged_in_float32(dtype: torch.dtype) -> None:
    """1 + 2**-7 exists in both types; the mean with two ones, 1 + 2**-7 / 3, in neither."""
    total = PairwiseMean(3)
    for slot, value in enumerate([1.0, 1.0, 1 + 2**-7]):
        total.add(slot, {"m": {"x": torch.tensor([value], dtype=dtype)}}, {"m": 1.0})
    found = total.result()
    assert found is not None
    assert found["m"]["x"].dtype == torch.float32
    assert float(found["m"]["x"]) == pytest.approx(1 + 2**-7 / 3, abs=1e-7)


def test_tensors_that_require_grad_give_a_mean_that_does_not() -> None:
    total = PairwiseMean(2)
    for slot in range(2):
        total.add(slot, {"m": {"x": torch.ones(2, requires_grad=True)}}, {"m": 1.0})
    found = total.result()
    assert found is not None
    assert not found["m"]["x"].requires_grad


def test_a_cohort_of_which_all_are_skipped_has_no_mean() -> None:
    for slots in range(6):
        assert mean({}, {}, slots, list(range(slots))) is None


def test_misuse_raises() -> None:
    total = PairwiseMean(3)
    total.add(0, client(0), {"model": 1.0, "control": 1.0})
    for bad in (0, 3, -1):
        with pytest.raises(ValueError, match=f"slot {bad} was used before or does not exist"):
            total.add(bad, client(1), {"model": 1.0, "control": 1.0})
    with pytest.raises(ValueError, match="slot 0 was used before"):
        total.skip(0)
    with pytest.raises(ValueError, match="2 of 3 slots are still open"):
        total.result()
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="slot 1: a weight must be positive"):
            total.add(1, client(1), {"model": 1.0, "control": weight})
    total.add(1, client(0), {"model": 2.0, "control": 2.0})  # a refused slot is still free
    total.skip(2)
    found = total.result()
    assert found is not None
    assert same(found, client(0))
