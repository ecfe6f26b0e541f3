"""Epsilon by hand and by Opacus's own accountants, the noise for a target, and what a job may say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from opacus.accountants import create_accountant
from opacus.accountants.rdp import RDPAccountant
from opacus.accountants.utils import get_noise_multiplier
from pydantic import ValidationError
from scipy.optimize import brentq
from scipy.stats import norm

from shared_models.errors import PrivacyError
from shared_models.job import Job
from shared_models.job_parts import PrivacyPart
from shared_models.privacy import (
    Spend,
    bound,
    client_noise,
    client_spend,
    epsilon,
    find_noise,
    levels,
    merged,
    rest,
    statement,
    turns,
)

MakeJob = Callable[..., Job]
UNIFORM = {"name": "fedavg", "weighting": "uniform"}


def gaussian(noise: float, steps: int, delta: float) -> float:
    """By hand: the Renyi divergence of the Gaussian mechanism is alpha / (2 sigma^2), times the steps; the conversion
    is Balle et al. 2020, Theorem 21, minimised over Opacus's orders."""
    orders = RDPAccountant.DEFAULT_ALPHAS
    return min(
        steps * a / (2 * noise**2) + math.log((a - 1) / a) - (math.log(delta) + math.log(a)) / (a - 1) for a in orders
    )


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (4.0, 10), (2.0, 3)])
def test_without_sampling_it_is_the_gaussian_mechanism_by_hand(noise: float, steps: int) -> None:
    assert epsilon([Spend(noise, 1.0, steps)], 1e-5) == pytest.approx(gaussian(noise, steps, 1e-5), rel=1e-12)


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
@pytest.mark.parametrize(
    "spends",
    [
        [Spend(1.1, 0.01, 1000)],
        [Spend(1.0, 0.02, 50), Spend(2.0, 0.1, 7)],
        [Spend(0.8, 0.005, 300), Spend(3.0, 1.0, 4)],
    ],
)
def test_it_is_what_opacus_says(spends: list[Spend], accountant: Any) -> None:
    book = create_accountant(mechanism=accountant)
    for s in spends:
        for _ in range(s.steps):
            book.step(noise_multiplier=s.noise, sample_rate=s.rate)
    assert epsilon(spends, 1e-5, accountant) == pytest.approx(book.get_epsilon(delta=1e-5), rel=1e-9)


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (4.0, 10), (6.0, 30)])
def test_prv_without_sampling_is_the_exact_gaussian_curve(noise: float, steps: int) -> None:
    """Balle & Wang 2018, Theorem 8, with sigma / sqrt(steps): the bound is above it, and by less than its tolerance."""
    found, sigma = epsilon([Spend(noise, 1.0, steps)], 1e-5, "prv"), noise / math.sqrt(steps)

    def delta(e: float) -> float:
        a, b = 1 / (2 * sigma), e * sigma
        return float(norm.cdf(a - b) - math.exp(e) * norm.cdf(-a - b))

    exact = brentq(lambda e: delta(e) - 1e-5, 0, 50)
    assert exact <= found <= exact + 0.03


@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_prv_of_what_protects_nobody_is_bounded_by_rdp(noise: float) -> None:
    """Its grid grows with epsilon, to gigabytes here; Renyi orders bound the same epsilon in no memory at all."""
    spends = [Spend(noise, 0.5, 100)]
    assert epsilon(spends, 1e-5, "prv") == epsilon(spends, 1e-5) > 100


def test_prv_of_more_steps_than_fit_into_memory_is_bounded_by_rdp() -> None:
    """A site that claims so many steps would else end the server."""
    spends = [Spend(1.0, 1e-9, 10**12)]
    assert epsilon(spends, 1e-5, "prv") == epsilon(spends, 1e-5) < 100


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_an_epsilon_that_is_no_number_counts_as_infinite(accountant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opacus.accountants.analysis.rdp.get_privacy_spent", lambda **_: (math.nan, 2.0))
    assert epsilon([Spend(1.2345, 0.5, 1)], 1e-5, accountant) == math.inf


def test_order_and_pieces_do_not_matter_and_more_costs_more() -> None:
    a, b = Spend(1.0, 0.02, 50), Spend(2.0, 0.1, 7)
    whole = epsilon([a, b], 1e-5)
    assert epsilon([b, Spend(1.0, 0.02, 20), Spend(1.0, 0.02, 30)], 1e-5) == whole
    assert merged([a, b, a]) == [Spend(1.0, 0.02, 100), b]
    assert epsilon([a], 1e-5) < whole < epsilon([a, a, b], 1e-5)
    assert epsilon([a, b], 1e-6) > whole
    assert epsilon([], 1e-5) == 0.0
    assert epsilon([a, Spend(0.0, 0.1, 1)], 1e-5) == math.inf


@pytest.mark.parametrize(
    ("target", "rate", "steps", "accountant"),
    [(1.2, 0.01, 500, "rdp"), (3.0, 0.05, 100, "rdp"), (8.0, 0.2, 20, "rdp"), (1.2, 0.01, 500, "prv")],
)
def test_the_noise_for_a_target_is_opacus_s(target: float, rate: float, steps: int, accountant: Any) -> None:
    found = find_noise(((rate, steps),), target, 1e-5, accountant)
    theirs = get_noise_multiplier(
        target_epsilon=target, target_delta=1e-5, sample_rate=rate, steps=steps, accountant=accountant
    )
    assert found == pytest.approx(theirs, rel=1e-12)
    assert target - 0.01 <= epsilon([Spend(found, rate, steps)], 1e-5, accountant) <= target


def test_noise_for_rounds_of_different_rates_meets_the_target_together() -> None:
    mixed = ((0.01, 100), (0.3, 10))
    noise = find_noise(mixed, 2.0, 1e-5, "rdp")
    assert 1.99 <= epsilon([Spend(noise, q, n) for q, n in mixed], 1e-5) <= 2.0
    with pytest.raises(PrivacyError, match=r"no noise gives epsilon 0\.001 at delta 1e-05"):
        find_noise(((1.0, 10),), 1e-3, 1e-5, "rdp")


def test_a_site_is_taken_by_chance_or_in_turn(make_job: MakeJob) -> None:
    def job(**privacy: object) -> Job:
        part = {"mode": "client", "noise": 2.0, **privacy}
        return make_job(privacy=part, method=UNIFORM, federation={"rounds": 7, "fraction": 0.25})

    assert client_spend(job(), 7) == Spend(2.0, 0.25, 7)
    tree = job(mechanism="ftrl")
    assert (turns(tree), levels(tree)) == (4, 3)
    assert client_spend(tree, 4) == Spend(2.0 / math.sqrt(3), 1.0, 1), "a leaf changes three nodes of its tree"
    assert client_spend(tree, 5).steps == 2
    every = make_job(privacy={"mode": "client", "noise": 2.0, "mechanism": "ftrl"}, method=UNIFORM)
    assert client_spend(every, 7) == Spend(2.0, 1.0, 7), "a tree with one leaf is the Gaussian mechanism"
    aimed = make_job(
        privacy={"mode": "client", "epsilon": 4.0, "mechanism": "ftrl"}, method=UNIFORM,
        federation={"rounds": 7, "fraction": 0.25},
    )  # fmt: skip
    assert 3.99 <= epsilon([client_spend(aimed, 7)], 1e-5) <= 4.0
    assert client_noise(aimed) == pytest.approx(math.sqrt(3) * find_noise(((1.0, 2),), 4.0, 1e-5, "rdp"))


def test_a_guarantee_is_never_said_without_its_terms() -> None:
    said = statement("sample", 2.345, 1e-5, "rdp")
    assert said == (
        "epsilon 2.35 at delta 1e-05, unit sample, neighbours: one training example added or removed (RDP accountant)"
    )
    shown = {
        2.341: "2.35",
        2.34: "2.34",
        0.01201: "0.0121",
        123.4: "124",
        7.9921: "8",
        0.0: "0",
        999.2: "1000",
        1231: "1240",
    }
    assert {value: bound(value) for value in shown} == shown
    left = {2.349: "2.34", 2.34: "2.34", 0.01209: "0.012", 123.9: "123", 0.0: "0", 1239: "1230", math.inf: "infinite"}
    assert {value: rest(value) for value in left} == left
    assert bound(math.inf) == "infinite"
    assert "one site added or removed" in statement("client", 1.0, 1e-5, "prv")
    assert statement("sample", math.inf, 1e-5, "rdp").startswith("no differential privacy")
    assert statement("sample", None, 1e-5, "rdp").startswith("no differential privacy")


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"epsilon": 3.0}, "mode is 'none', and then nothing else may be set"),
        ({"mode": "sample"}, "needs either epsilon, the target of the whole run, or noise"),
        ({"mode": "sample", "epsilon": 3.0, "noise": 1.0}, "needs either epsilon"),
        ({"mode": "sample", "noise": 1.0, "clip": 0}, "clip = 0 has no guarantee and goes with noise = 0 only"),
        ({"mode": "sample", "epsilon": 1.0, "sampling": "shuffle"}, "sampling = 'shuffle' has no guarantee"),
        ({"mode": "sample", "noise": 1.0, "mechanism": "ftrl"}, "mechanism means nothing in mode 'sample'"),
        ({"mode": "client", "noise": 1.0, "gradients": "loop"}, "gradients means nothing in mode 'client'"),
        ({"mode": "client", "noise": 0, "clip": 0, "quantile": 0.5}, "quantile needs a clip to begin with"),
        ({"mode": "client", "noise": 1.0, "delta": 0}, "greater than 0"),
        ({"mode": "sample", "noise": math.inf}, "finite number"),
        ({"mode": "sample", "epsilon": math.inf}, "finite number"),
        ({"mode": "client", "noise": 1.0, "clip": math.inf}, "finite number"),
        ({"mode": "client", "noise": 1.0, "quantile": 0.5, "clip_rate": math.inf}, "finite number"),
    ],
)
def test_what_means_nothing_is_refused(part: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        PrivacyPart(**part)  # type: ignore[arg-type]


def test_what_means_something_is_taken(make_job: MakeJob) -> None:
    assert make_job(privacy={"mode": "none"}).privacy == PrivacyPart()
    job = make_job(privacy={"mode": "sample", "noise": 0, "clip": 0, "sampling": "shuffle"})
    assert job.privacy.noise == 0
    assert Job.resolve(job.model_dump(mode="json")) == job
