"""Membership inference finds what a model has seen, finds nothing where it has not, and runs the job's own path."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest
import torch

from client.readers.base import Examples
from client.workbench import Benches
from shared_models.job import Job
from simulations.attacks.audit import auc, least_epsilon
from simulations.attacks.levels import Level, levels
from simulations.attacks.lira import log_ratio
from simulations.attacks.membership import Chosen, attack, coins, confidences, halves, judge, question
from simulations.attacks.report import says
from simulations.attacks.results import Guessed, Membership
from simulations.compare import load_sites
from simulations.paradigms import Setting, paradigms
from simulations.partition import SitePopulation
from simulations.statistics import summarize

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "digits-attack.toml"
SHORT = ("federation.rounds=5", "data.train_share=0.2")


def prepared(*overrides: str) -> tuple[Job, SitePopulation]:
    job = Job.load(EXAMPLE, [*SHORT, *overrides])
    return job, load_sites(job, EXAMPLE.parent)


def without_privacy(job: Job) -> Level:
    return levels(job, "none")[0]


def test_an_overfitted_model_gives_its_members_away() -> None:
    job, sites = prepared()
    found = attack(job, levels(job, "none"), sites, shadows=8, targets=4)
    (level,) = found.levels
    assert level.low > 0.6
    assert level.low <= fmean(level.auc) <= level.high
    assert level.least_epsilon > 0.2
    assert level.epsilon is None
    assert level.most_auc is None
    assert level.tpr["0.001"] is None, "non-members are too few for 0.1 %"
    assert found.candidates == len(sites.pooled().train)


@pytest.mark.parametrize(
    ("low", "proved", "claims"),
    [
        (0.51, 0.0, "the attack tells members from others (AUC 0.520, 95 % interval 0.510 to 0.530, 4 target models)."),
        (0.51, 0.3, "the attack tells members from others (AUC 0.520, 95 % interval 0.510 to 0.530, 4 target models); "
                    "it proves an epsilon of at least 0.30 at delta 1e-05."),
        (0.49, 0.0, "it cannot be claimed that the attack does better than guessing (AUC 0.520, 95 % interval 0.490 to "
                    "0.530, 4 target models)."),
        (0.49, 0.3, "it cannot be claimed that the attack does better than guessing (AUC 0.520, 95 % interval 0.490 to "
                    "0.530, 4 target models), but at those of which it is surest it does; it proves an epsilon of at "
                    "least 0.30 at delta 1e-05."),
    ],
)  # fmt: skip
def test_a_sentence_says_no_more_than_the_interval_and_the_proof(low: float, proved: float, claims: str) -> None:
    level = Guessed.model_construct(
        level="epsilon 3", epsilon=None, statement="", auc=[0.52] * 4, low=low, high=0.53, least_epsilon=proved
    )
    found = Membership.model_construct(targets=4, delta=1e-5, levels=[level])
    assert says(found) == [f"epsilon 3: {claims}"]


def test_what_is_proved_holds_at_one_delta_for_all_levels() -> None:
    """Else the row without privacy could not be held against the others."""
    job, sites = prepared("federation.rounds=3")
    level, drawn = without_privacy(job), torch.cat([halves(sites, 4, 0), coins(sites, 4, 0)])
    candidates = sites.pooled().train
    asked, seen = question(level, sites, drawn, candidates), drawn[:, candidates.rows]
    scores, members = log_ratio(asked.phi[4:], asked.phi[:4], seen[:4]).numpy(), seen[4:].numpy()
    proved = [judge(level, asked, scores, members, 4, delta).least_epsilon for delta in (0.0, 1e-4)]
    assert proved == [least_epsilon(scores, members, delta) for delta in (0.0, 1e-4)]
    assert proved[0] > proved[1] > 0


def test_models_that_never_saw_the_candidates_tell_nothing_of_them() -> None:
    """Who is a member is drawn, and the models know nothing of it: the AUC is 0.5 within its interval."""
    job, sites = prepared()
    pooled = sites.pooled()
    strangers = Examples(sites.store, torch.cat([pooled.validation.rows, pooled.test.rows]))
    drawn = torch.cat([halves(sites, 8, 0), coins(sites, 4, 0)])
    asked = question(without_privacy(job), sites, drawn, strangers)
    source = torch.Generator().manual_seed(1)
    seen = torch.stack([torch.randperm(8, generator=source) < 4 for _ in range(len(strangers))], dim=1)
    members = torch.rand(4, len(strangers), generator=source) < 0.5
    scores = log_ratio(asked.phi[8:], asked.phi[:8], seen).numpy()
    found = summarize([auc(s, m) for s, m in zip(scores, members.numpy(), strict=True)])
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.5 < found.high
    assert found.high - found.low < 0.2


def test_every_candidate_is_in_half_of_the_shadows_and_in_targets_by_a_coin() -> None:
    _, sites = prepared()
    rows = sites.pooled().train.rows
    shadows, targets = halves(sites, 6, 0), coins(sites, 40, 0)
    assert (shadows[:, rows].sum(dim=0) == 3).all()
    for name in sites.names:
        own = sites.splits(name).train.rows
        assert {abs(2 * n - len(own)) for n in shadows[:, own].sum(dim=1).tolist()} <= {0, 1}
    others = torch.ones(len(sites.store.names), dtype=torch.bool)
    others[rows] = False
    assert not shadows[:, others].any()
    assert not targets[:, others].any()
    assert 0.45 < targets[:, rows].float().mean() < 0.55
    assert not torch.equal(targets[0], targets[1])


@pytest.mark.parametrize("place", ["federated", "centralized"])
def test_only_the_chosen_examples_are_trained_on(place: str) -> None:
    _, sites = prepared()
    chosen = halves(sites, 2, 0)[0]
    some = Chosen(sites, chosen)
    splits = some.pooled() if place == "centralized" else some.splits(sites.names[0])
    whole = sites.pooled() if place == "centralized" else sites.splits(sites.names[0])
    assert splits.train.rows.tolist() == [r for r in whole.train.rows.tolist() if chosen[r]]
    assert torch.equal(splits.validation.rows, whole.validation.rows)
    assert torch.equal(splits.test.rows, whole.test.rows)


@pytest.mark.parametrize("place", ["federated", "centralized"])
def test_a_target_is_the_model_that_the_job_itself_trains(place: str) -> None:
    job, sites = prepared(f"place={place}", "federation.min_sites=1")
    level, candidates = without_privacy(job), sites.pooled().train
    everyone = torch.ones(1, len(sites.store.names), dtype=torch.bool)
    asked = question(level, sites, everyone, candidates)
    result = paradigms[place](Setting(level.job, sites, Benches()))
    assert torch.equal(asked.phi[0], confidences(level.job, result, candidates))
    assert asked.accuracy == [result.all_sites]


@pytest.mark.parametrize("mode", ["sample", "client", "shares"])
def test_each_model_has_the_same_start_and_noise_of_its_own(mode: str) -> None:
    unit = {"sample": (), "client": ("privacy.mode=client", "method.weighting=uniform")}
    unit["shares"] = (*unit["client"], "privacy.noise_by=clients")
    job, sites = prepared("federation.rounds=1", *unit[mode])
    drawn = torch.ones(2, len(sites.store.names), dtype=torch.bool)
    plain, private = (question(level, sites, drawn, sites.pooled().train) for level in levels(job, "none,8"))
    assert torch.equal(plain.phi[0], plain.phi[1])
    assert (private.phi[0] - private.phi[1]).abs().max() > 0.01
    assert plain.epsilon is None
    assert 7.9 < (private.epsilon or 0) <= 8


def test_the_same_attack_gives_the_same_figures() -> None:
    job, sites = prepared("federation.rounds=1")
    first, second = (attack(job, levels(job, "none,8"), sites, shadows=4, targets=2).levels for _ in range(2))
    assert first == second
    assert [level.level for level in first] == ["no privacy", "epsilon 8"]


@pytest.mark.slow
def test_the_attack_fades_with_epsilon() -> None:
    job = Job.load(EXAMPLE)
    found = attack(job, levels(job, None), load_sites(job, EXAMPLE.parent), shadows=16, targets=8)
    none, eight, three, one = (fmean(level.auc) for level in found.levels)
    assert none > 0.65
    assert none > eight + 0.08
    assert eight > 0.5
    assert abs(three - 0.5) < 0.03
    assert abs(one - 0.5) < 0.03
    for level in found.levels[1:]:
        assert level.epsilon is not None
        assert level.least_epsilon <= level.epsilon
        assert fmean(level.auc) <= (level.most_auc or 0)
