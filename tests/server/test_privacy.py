"""The server's half of privacy by hand, its noise against its stated deviation, turns, resumption, and the accounts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats

from client.readers.base import Splits
from client.spending import round_spend
from server.privacy import ClientPrivacy, TreePrivacy, make_privacy, nodes, split_noise
from shared_models.checks import check_contribution
from shared_models.errors import CompatibilityError, Rejected, RunError
from shared_models.job import Job
from shared_models.messages import Budget, Contribution, Instruction
from shared_models.noise import derive, normal, normal_like
from shared_models.privacy import levels
from shared_models.spec import build_model

ERROR = 1e-6
MakeJob = Callable[..., Job]
MakeSplits = Callable[..., Splits]
START = {"model": {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.5])}}


def made(job: Job, secret: bytes = b"s" * 32) -> Any:
    return make_privacy(job, build_model(job)[1], secret)


def moved(*change: float) -> dict[str, dict[str, torch.Tensor]]:
    w, b = START["model"].values()
    return {"model": {"w": w + torch.tensor(change[:2]), "b": b + torch.tensor(change[2:])}}


# ---- clip, mean, noise -----------------------------------------------------------------------------------------------
def test_an_update_is_clipped_over_all_entries_and_a_short_one_is_not_touched(client_job: MakeJob) -> None:
    privacy = made(client_job({"clip": 1.0}))
    long = privacy.bounded(moved(2.0, 1.0, 2.0), START)["model"]  # norm 3
    change = torch.cat([long[n] - START["model"][n] for n in ("w", "b")])
    torch.testing.assert_close(change, torch.tensor([2.0, 1.0, 2.0]) / 3, rtol=2e-5, atol=1e-6)
    short = moved(0.1, 0.0, 0.2)
    assert privacy.bounded(short, START) is short
    wild = privacy.bounded(moved(3e38, 3e38, 0.0), START)["model"]
    assert all(torch.equal(wild[n], t) for n, t in START["model"].items()), "a norm beyond float32 counts as nothing"


def test_the_sum_is_divided_by_the_sites_expected_not_by_those_that_came(client_job: MakeJob) -> None:
    privacy = made(client_job({"noise": 0}, federation={"fraction": 0.5}))
    mean = moved(0.4, 0.0, 0.8)  # of 3 sites that came; 4 were expected of 8
    found = privacy.released(mean, START, 3, 8, 0)["model"]
    torch.testing.assert_close(found["w"], torch.tensor([1.0 + 0.4 * 3 / 4, 2.0]))
    torch.testing.assert_close(found["b"], torch.tensor([0.5 + 0.8 * 3 / 4]))
    assert privacy.released(mean, START, 4, 8, 0)["model"]["w"] is mean["model"]["w"], "no rounding where all came"


def test_noise_has_the_deviation_sigma_clip_by_expected_sites(client_job: MakeJob) -> None:
    privacy = made(client_job({"noise": 2.0, "clip": 0.3}, federation={"fraction": 0.5}))
    start = {"model": {"w": torch.zeros(20_000)}}
    rounds = [privacy.released(start, start, 4, 8, r)["model"]["w"] for r in range(2)]
    alone = privacy.released(None, start, 0, 8, 0)["model"]["w"]
    assert torch.equal(alone, rounds[0]), "where nobody came, noise alone"
    for noise in rounds:
        unit = noise.double() / (2.0 * 0.3 / 4)
        low, high = stats.chi2.ppf([ERROR / 2, 1 - ERROR / 2], len(unit))
        assert low < float(unit.square().sum()) < high
        assert stats.kstest(unit.numpy(), "norm").pvalue > ERROR
    assert stats.pearsonr(rounds[0].numpy(), rounds[1].numpy()).pvalue > ERROR


def test_one_site_more_moves_the_sum_by_at_most_the_clip(client_job: MakeJob) -> None:
    privacy, source = made(client_job({"noise": 0, "clip": 0.7})), torch.Generator().manual_seed(2)
    for _ in range(30):
        sums = torch.zeros(3)
        before = torch.zeros(3)
        for _ in range(int(torch.randint(1, 6, (), generator=source))):
            before = sums.clone()
            update = moved(*(torch.randn(3, generator=source) * 5).tolist())
            found = privacy.bounded(update, START)["model"]
            sums += torch.cat([found[n] - START["model"][n] for n in ("w", "b")])
        assert float((sums - before).norm()) <= 0.7 * (1 + 1e-6)


def test_too_few_shares_of_noise_end_the_run(client_job: MakeJob) -> None:
    privacy = made(client_job({"noise_by": "clients"}, federation={"min_sites": 3}))
    assert privacy.released(START, START, 3, 4, 0) is not None
    with pytest.raises(RunError, match="2 sites added their share of the noise, 3 make the whole of it"):
        privacy.released(START, START, 2, 4, 0)


def test_running_statistics_are_refused(client_job: MakeJob) -> None:
    parts = {"model": {"name": "resnet18", "norm": "batch"}, "data": {"shape": [1, 32, 32]}}
    job = client_job(**parts, share={"base": ["conv1.weight"]})
    with pytest.raises(CompatibilityError, match="is a running statistic of batch normalisation"):
        made(job)
    made(client_job(**parts, share={"base": ["!@head"]}))


# ---- sampling of sites -----------------------------------------------------------------------------------------------
def test_sites_are_sampled_each_on_its_own_by_the_secret(client_job: MakeJob) -> None:
    names = [f"s{i}" for i in range(10)]
    privacy = made(client_job(federation={"fraction": 0.3}))
    cohorts = [privacy.cohort(names, r) for r in range(1000)]
    count = Counter(site for cohort in cohorts for site in cohort)
    assert stats.binomtest(sum(count.values()), 10_000, 0.3).pvalue > ERROR
    assert stats.chi2.sf(sum((count[n] - 300) ** 2 / (1000 * 0.3 * 0.7) for n in names), 10) > ERROR
    assert [] in cohorts, "a round without a site happens"
    assert cohorts[:50] == [privacy.cohort(names, r) for r in range(50)]
    other = made(client_job(federation={"fraction": 0.3}), b"t" * 32)
    assert cohorts[:50] != [other.cohort(names, r) for r in range(50)], "the job's seed does not tell who takes part"
    assert made(client_job()).cohort(names, 0) == names


# ---- adaptive clipping -----------------------------------------------------------------------------------------------
def test_adaptive_clipping_by_hand(client_job: MakeJob) -> None:
    job = client_job({"noise": 0, "clip": 1.0, "quantile": 0.5, "clip_rate": 0.2})
    privacy = made(job)
    assert isinstance(privacy, ClientPrivacy)
    privacy.cohort(["a", "b", "c", "d"], 0)
    for change in (0.5, 0.9, 1.5, 0.2):
        privacy.bounded(moved(change, 0.0, 0.0), START)
    privacy.noise = 1e-9  # the count's is then a twentieth of the cohort
    privacy.released(START, START, 4, 4, 0)
    drawn = 4 / 20 * float(normal(derive(privacy.secret, "count", 0), 1)[0])
    assert privacy.state["clip"] == pytest.approx(math.exp(-0.2 * ((3 + drawn) / 4 - 0.5)), rel=1e-6)


def test_one_site_more_moves_the_count_by_one_half(client_job: MakeJob) -> None:
    """In units of its own noise: the logarithm of the clip says what was added up, the noise being the same."""

    def counted(*norms: float) -> float:
        privacy = made(client_job({"noise": 1.0, "clip": 1.0, "quantile": 0.5, "clip_rate": 1.0}))
        privacy.cohort(["a", "b"], 0)
        for norm in norms:
            privacy.bounded(moved(norm, 0.0, 0.0), START)
        privacy.released(START, START, len(norms), 2, 0)
        return -2 * math.log(privacy.state["clip"])  # of two sites that were expected

    alone = counted(0.5)
    assert counted(0.5, 0.5) - alone == pytest.approx(0.5)
    assert counted(0.5, 3.0) - alone == pytest.approx(-0.5)
    assert split_noise(1.0, 0.5, 2)[1] == 2.0


def test_noise_is_split_between_updates_and_count_at_the_stated_cost() -> None:
    """Andrew et al. 2021: two Gaussian mechanisms of sensitivities 1 and 1/2 cost together what one costs."""
    for noise, count in ((1.0, 10), (0.7, 1000), (5.0, 3)):
        updates, deviation = split_noise(noise, 0.5, count)
        assert 1 / updates**2 + 1 / (2 * deviation) ** 2 == pytest.approx(1 / noise**2)
        assert deviation >= count / 20
    assert split_noise(1.3, 0.0, 10) == (1.3, 0.0)


def test_the_clip_settles_at_its_quantile(client_job: MakeJob) -> None:
    privacy = made(client_job({"noise": 0.1, "clip": 10.0, "quantile": 0.6, "clip_rate": 0.3}))
    for round in range(60):
        privacy.cohort([str(i) for i in range(20)], round)
        for i in range(20):
            privacy.bounded(moved(0.1 * (i + 1), 0.0, 0.0), START)
        privacy.released(START, START, 20, 20, round)
    assert 0.9 < privacy.state["clip"] < 1.5, "the norms are 0.1 to 2.0"


# ---- DP-FTRL ---------------------------------------------------------------------------------------------------------
def test_the_nodes_of_a_prefix_are_its_binary_digits() -> None:
    assert nodes(0) == []
    assert nodes(1) == [(0, 0)]
    assert nodes(6) == [(2, 0), (1, 2)]
    assert nodes(7) == [(2, 0), (1, 2), (0, 6)]
    for prefix in range(1, 33):
        leaves = [leaf for level, i in nodes(prefix) for leaf in range(i << level, (i + 1) << level)]
        assert leaves == list(range(prefix))


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.34, 0.2, 0.125])
def test_no_leaf_is_part_of_more_nodes_than_are_accounted_for(client_job: MakeJob, fraction: float) -> None:
    job = client_job({"mechanism": "ftrl"}, federation={"fraction": fraction})
    used = {node for prefix in range(math.ceil(1 / fraction) + 1) for node in nodes(prefix)}
    part_of = Counter(leaf for level, i in used for leaf in range(i << level, (i + 1) << level))
    assert max(part_of.values()) <= levels(job)


def test_increments_add_up_to_the_noise_of_the_prefix(client_job: MakeJob) -> None:
    privacy = made(client_job({"mechanism": "ftrl"}, federation={"fraction": 0.125}))
    assert isinstance(privacy, TreePrivacy)
    model, total = {"w": torch.zeros(5000)}, torch.zeros(5000)
    for round in range(8):
        total += privacy.drawn(model, round)["w"]
        ones = [normal_like(derive(privacy.secret, "tree", 0, *node), model)["w"] for node in nodes(round + 1)]
        torch.testing.assert_close(total, sum(ones), atol=1e-5, rtol=1e-5)
        square = float(total.double().square().sum()) / len(ones)
        low, high = stats.chi2.ppf([ERROR / 2, 1 - ERROR / 2], 5000)
        assert low < square < high, "as many independent parts as the round's number has binary ones"
    fresh = privacy.drawn(model, 8)["w"]
    assert torch.equal(fresh, normal_like(derive(privacy.secret, "tree", 1, 0, 0), model)["w"]), "a new tree"


def test_every_site_has_its_turn_once_in_a_tree(client_job: MakeJob) -> None:
    privacy = made(client_job({"mechanism": "ftrl"}, federation={"fraction": 0.3}))
    names, trees = [f"s{i}" for i in range(10)], []
    for tree in range(3):
        taken: list[str] = []
        for leaf in range(4):
            cohort = privacy.cohort(names, 4 * tree + leaf)
            assert cohort == privacy.cohort(names, 4 * tree + leaf), "a round that is repeated asks the same sites"
            assert len(cohort) == (3 if leaf < 3 else 1)
            taken += cohort
            privacy.settle(4 * tree + leaf)
        assert sorted(taken) == sorted(names)
        trees.append(taken)
    assert trees[0] != trees[1], "in another order"


# ---- accounts --------------------------------------------------------------------------------------------------------
def test_an_answer_counts_also_where_it_is_rejected_and_once_where_it_is_repeated(make_job: MakeJob) -> None:
    """Its tensors have arrived; of a site that could not answer none have."""
    job = make_job(privacy={"mode": "sample", "noise": 1.0}, train={"batch_size": 5})
    privacy, asked = made(job), Instruction("train", "r", "a", job, "f")
    answer = Contribution("train", "r", "a", examples=10, samples=10, steps=2, noise=1.0)
    with pytest.raises(Rejected, match="group"):
        check_contribution(answer, asked, {"model": {"w": torch.zeros(1)}}, 1.0)
    for reply in (answer, answer, replace(answer, site="b", code="exception")):
        privacy.note(reply, asked)
    privacy.settle(0)
    assert privacy.state["spends"] == {"a": [[1.0, 0.5, 2]]}
    privacy.note(answer, asked)
    privacy.settle(1)
    assert privacy.state["spends"] == {"a": [[1.0, 0.5, 4]]}


def test_what_the_accountant_cannot_add_up_is_rejected_and_leaves_no_trace(make_job: MakeJob) -> None:
    job = make_job(privacy={"mode": "sample", "epsilon": 2.0, "delta": 1e-4}, train={"batch_size": 5})
    privacy, asked = made(job), Instruction("train", "r", "a", job, "f")
    with pytest.raises(Rejected, match="the accountant cannot add up") as error:
        privacy.note(Contribution("train", "r", "a", examples=10, samples=10, steps=2, noise=1e-200), asked)
    assert error.value.code == "privacy"
    privacy.settle(0)
    assert privacy.state["spends"] == {}


def test_a_site_with_other_noise_than_the_job_says_is_rejected(make_job: MakeJob) -> None:
    job = make_job(privacy={"mode": "sample", "noise": 1.0})
    asked = Instruction("train", "r", "a", job, "f")
    answer = Contribution("train", "r", "a", examples=10, samples=10, steps=2, noise=0.5)
    with pytest.raises(Rejected, match=r"noise multiplier 0\.5, the job says 1") as error:
        check_contribution(answer, asked, {}, 1.0)
    assert error.value.code == "privacy"


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_what_the_planner_finds_is_accepted_and_half_of_its_noise_is_not(make_job: MakeJob, accountant: str) -> None:
    """One round alone spends no more than the target, in a run of one round just that."""
    examples, part = 60, {"mode": "sample", "epsilon": 2.0, "delta": 1e-4, "accountant": accountant}
    for rounds in (1, 20):
        job = make_job(privacy=part, federation={"rounds": rounds})
        spend = round_spend(job, 0, Budget(epochs=1), [examples])
        asked = Instruction("train", "r", "a", job, "f")
        fields = {"examples": examples, "samples": examples, "steps": spend.steps}
        answer = Contribution("train", "r", "a", noise=spend.noise, **fields)
        assert check_contribution(answer, asked, {}, 1.0) == 0.0
        with pytest.raises(Rejected, match="one round with the noise multiplier") as error:
            check_contribution(replace(answer, noise=spend.noise / (2 if rounds == 1 else 5)), asked, {}, 1.0)
        assert error.value.code == "privacy"
