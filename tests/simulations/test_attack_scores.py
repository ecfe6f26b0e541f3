"""The likelihood ratio, the ROC, the bounds and what an attack proves, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from scipy.stats import beta, binom

from simulations.attacks.audit import auc, least_epsilon, least_of_guesses, most_auc, most_tpr, roc
from simulations.attacks.lira import OWN_VARIANCE, log_ratio, scaled_confidence


def test_the_confidence_is_the_logit_of_the_right_class() -> None:
    logits = torch.tensor([[math.log(3), 0.0, 0.0], [0.0, math.log(3), 0.0], [1000.0, 0.0, 0.0], [-1000.0, 0.0, 0.0]])
    found = scaled_confidence(logits, torch.tensor([0, 0, 0, 0]))
    # p = 3/5 gives 3/2; p = 1/5 gives 1/4; where p rounds to 1 or 0 it stays finite
    assert found.tolist() == pytest.approx([math.log(3 / 2), math.log(1 / 4), 1000 - math.log(2), -1000 - math.log(2)])


def test_the_likelihood_ratio_by_hand() -> None:
    shadows = torch.tensor([[3.0], [5.0], [-1.0], [1.0]]).double()
    seen = torch.tensor([[True], [True], [False], [False]])
    # in: mean 4, variance 2; out: mean 0, variance 2: log ratio = (phi^2 - (phi - 4)^2) / 4
    found = log_ratio(torch.tensor([[4.0], [2.0], [0.0]]).double(), shadows, seen)
    assert found[:, 0].tolist() == pytest.approx([4.0, 0.0, -4.0])


def test_few_shadow_models_share_one_variance_and_many_have_each_their_own() -> None:
    shadows = torch.tensor([[3.0, 0.0], [5.0, 0.0], [-1.0, -1.0], [1.0, 1.0]]).double()
    seen = torch.tensor([[True, True], [True, True], [False, False], [False, False]])
    phi = torch.tensor([[4.0, 0.0]]).double()
    # in: variances 2 and 0, shared 1; out: 2 and 2
    shared = log_ratio(phi, shadows, seen)[0]
    assert shared.tolist() == pytest.approx([4 + math.log(2) / 2, math.log(2) / 2])
    many = OWN_VARIANCE // 4
    own = log_ratio(phi, shadows.repeat(many, 1), seen.repeat(many, 1))[0]
    variance = 2 * many / (2 * many - 1)  # of 3 and 5, or -1 and 1, each 16 times
    assert own[0].item() == pytest.approx(8 / variance)


def test_the_roc_passes_equal_scores_together() -> None:
    scores, members = np.array([3.0, 2.0, 2.0, 1.0]), np.array([True, False, True, False])
    curve = roc(scores, members)
    assert curve.fpr.tolist() == [0.0, 0.0, 0.5, 1.0]
    assert curve.tpr.tolist() == [0.0, 0.5, 1.0, 1.0]
    assert auc(scores, members) == 3.5 / 4
    assert trapezoid(curve.tpr, curve.fpr) == 3.5 / 4


def test_a_rate_is_measured_only_where_ten_non_members_carry_it() -> None:
    scores = np.arange(2000.0)[::-1]
    members = np.arange(2000) % 2 == 0  # member, non-member, member, ...
    curve = roc(scores, members)
    assert curve.tpr_at(0.01) == pytest.approx(11 / 1000)
    assert curve.tpr_at(0.009) is None
    assert curve.tpr_at(0.001) is None


def test_the_bound_by_hand() -> None:
    found = most_tpr(np.array([0.0, 0.2, 0.8, 1.0]), math.log(2), 0.1)
    assert found.tolist() == pytest.approx([0.1, 0.5, 0.95, 1.0])
    assert most_tpr(np.array([0.3]), 0.0, 0.0).tolist() == [0.3]
    assert most_tpr(np.array([0.0]), 1e9, 0.0).tolist() == [1.0]


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.0), (1.0, 0.0), (0.5, 0.05), (3.0, 1e-4)])
def test_the_area_allowed_is_that_below_the_bound(epsilon: float, delta: float) -> None:
    fpr = np.linspace(0, 1, 200_001)
    assert most_auc(epsilon, delta) == pytest.approx(trapezoid(most_tpr(fpr, epsilon, delta), fpr), abs=1e-4)


def test_randomised_response_attains_the_bound() -> None:
    """It says the truth with e^eps / (1 + e^eps): no mechanism tells more at that epsilon."""
    truth = math.exp(1.5) / (1 + math.exp(1.5))
    assert most_tpr(np.array([1 - truth]), 1.5, 0.0)[0] == pytest.approx(truth)
    # its ROC is one corner, and the area below it (1 + TPR - FPR) / 2
    assert most_auc(1.5, 0.0) == pytest.approx((1 + truth - (1 - truth)) / 2)


def test_without_delta_the_proof_is_the_binomial_bound_of_right_guesses() -> None:
    p = beta.ppf(0.05, 80, 100 - 80 + 1)  # Clopper-Pearson's lower end, one-sided
    assert least_of_guesses(1000, 100, 80, 0.0) == pytest.approx(math.log(p / (1 - p)), abs=2e-3)
    assert least_of_guesses(1000, 100, 50, 0.0) == 0.0
    assert least_of_guesses(1000, 0, 0, 0.0) == 0.0


def test_delta_weakens_the_proof_as_the_theorem_says() -> None:
    epsilon, coins, guesses, right, delta = 0.7, 300, 100, 80, 1e-3
    found = least_of_guesses(coins, guesses, right, delta)
    assert found < least_of_guesses(coins, guesses, right, 0.0)
    # the probability bound at the found epsilon is 5 %, by the sums of theorem 5.2 written out
    q = 1 / (1 + math.exp(-found))
    chance = [sum(binom.pmf(k, guesses, q) for k in range(right - i, right)) / i for i in range(1, right + 1)]
    assert binom.sf(right - 1, guesses, q) + 2 * coins * delta * max(chance) == pytest.approx(0.05, abs=2e-3)
    assert 0 < found != epsilon


@pytest.mark.parametrize("epsilon", [0.0, 1.0])
def test_what_is_proved_is_below_the_truth_for_randomised_response(epsilon: float) -> None:
    source, proved = np.random.default_rng(7), []
    for _ in range(60):
        members = source.random((4, 400)) < 0.5
        honest = source.random((4, 400)) < math.exp(epsilon) / (1 + math.exp(epsilon))
        scores = np.where(honest, members, ~members) + 1e-3 * source.random((4, 400))
        proved.append(least_epsilon(scores, members, 0.0))
    assert sum(value > epsilon for value in proved) <= 6  # of 60, of which 3 are expected at 95 %
    assert np.median(proved) > (0.5 if epsilon else -1)
