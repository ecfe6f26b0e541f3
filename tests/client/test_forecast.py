"""Whether a whole job fits under a site's cap is known at the probe, before anything is trained."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from client.forecast import _expected, require_room
from client.handler import Handler
from client.ledger import DiskLedger, Entry
from client.policy import Policy
from client.protection import Protection
from client.readers.base import Splits
from client.spending import planned
from client.state import MemoryState
from client.workbench import Benches
from shared_models.job import Job
from shared_models.messages import Instruction
from shared_models.privacy import Spend, epsilon
from shared_models.spec import build_model

DELTA = 1e-5
MakeJob = Callable[..., Job]
EACH = Spend(2.0, 0.25, 4)  # of 30 examples by 8


class Site:
    """Its ledger lies on the disk; cap and node are made anew for each question."""

    def __init__(self, folder: Path, splits: Splits) -> None:
        self.folder, self.splits = folder, splits

    def ledger(self, cap: float = math.inf) -> DiskLedger:
        return DiskLedger(self.folder / "ledger", cap, DELTA, site="a")

    def ask(self, job: Job, cap: float, kind: str = "probe", round: int = 0, run: str = "r") -> str:
        protection = Protection("a", self.ledger(cap), "chest", lambda _: b"s" * 32)
        handler = Handler(
            "a", lambda _: self.splits, MemoryState(), Policy(approve_all=True), Benches(torch.device("cpu")),
            protection=protection,
        )  # fmt: skip
        model, spec = build_model(job)
        parts: dict[str, Any] = {"groups": {"model": {name: model.state_dict()[name] for name in spec.sent}}}
        if kind == "probe":
            parts = {"document": spec.document}
        asked = Instruction(kind, run, "a", job, spec.fingerprint, round=round, rounds=4, **parts)  # type: ignore[arg-type]
        return handler.handle(asked).code


@pytest.fixture
def site(tmp_path: Path, make_splits: Callable[..., Splits]) -> Site:
    return Site(tmp_path, make_splits(1))


@pytest.fixture
def job(make_job: MakeJob) -> Job:
    return make_job(privacy={"mode": "sample", "noise": 2.0, "delta": 1e-3}, federation={"rounds": 4})


def cost(steps: int) -> float:
    return epsilon([Spend(EACH.noise, EACH.rate, steps)], DELTA)


def test_all_rounds_count_and_the_boundary_is_exact(
    site: Site, job: Job, make_job: MakeJob, caplog: pytest.LogCaptureFixture
) -> None:
    assert planned(job, [30]) == dict.fromkeys(range(4), EACH)
    assert site.ask(job, cost(16)) == "ok"
    with caplog.at_level(logging.ERROR):
        assert site.ask(job, math.nextafter(cost(16), 0)) == "privacy-cap"
    assert (
        "job 'test' cannot end under this site's cap of epsilon 2.81035: with the 4 rounds to come of it, data set "
        "'chest' would be at 2.82, now at 0, at delta 1e-05 (unit: sample; neighbours: one training example added or "
        "removed). Nothing was trained. Ask for fewer rounds or more noise"
    ) in caplog.text
    assert site.ask(make_job(), 1e-9) == "ok", "a job without privacy books nothing"
    assert site.ledger().entries() == [], "a probe books nothing"


def test_what_was_spent_before_counts_and_other_data_sets_do_not(site: Site, job: Job) -> None:
    for dataset, run in (("chest", "old"), ("skin", "other")):
        site.ledger().reserve(dataset, run, 0, 0, EACH, DELTA, "sample", digest="x")
    assert site.ask(job, cost(20)) == "ok"
    assert site.ask(job, math.nextafter(cost(20), 0)) == "privacy-cap"


def test_booked_rounds_of_a_run_that_goes_on_count_once(site: Site, job: Job) -> None:
    for round in range(3):
        assert site.ask(job, cost(16), "train", round) == "ok"
    assert site.ask(job, cost(16), round=3) == "ok"
    assert site.ask(job, cost(16), round=2) == "ok", "a round that is repeated is booked already"
    assert site.ask(job, cost(16), round=4) == "ok"
    assert site.ask(job, cost(16), run="anew") == "privacy-cap"


def test_rounds_that_a_site_missed_do_not_count(site: Site, job: Job) -> None:
    assert site.ask(job, cost(8), round=2) == "ok"
    assert site.ask(job, cost(8), round=1) == "privacy-cap"


def test_beside_rounds_of_another_unit(site: Site, job: Job) -> None:
    site.ledger().reserve("chest", "old", 0, 0, Spend(4.0, 1.0, 1), DELTA, "client", digest="x")
    both = epsilon([Spend(2.0, 1.0, 1), Spend(EACH.noise, EACH.rate, 16)], DELTA)
    assert site.ask(job, both) == "ok"
    assert site.ask(job, math.nextafter(both, 0)) == "privacy-cap"


def test_of_a_part_of_the_sites_the_part_of_the_rounds_is_expected(site: Site, job: Job) -> None:
    half = job.replace(federation={"fraction": 0.5})
    assert site.ask(half, cost(8)) == "ok"
    assert site.ask(half, math.nextafter(cost(8), 0)) == "privacy-cap"
    rounds = [Entry("d", "r", 0, r, EACH, DELTA, "sample", "") for r in range(6)]
    for fraction, expected in ((1.0, range(6)), (0.5, [0, 2, 4]), (0.34, [0, 3]), (0.01, [0])):
        assert [e.round for e in _expected(rounds, fraction)] == list(expected)
    assert _expected([], 0.5) == []


def test_a_target_that_the_sites_delta_does_not_meet_is_refused_before_the_first_round(site: Site, job: Job) -> None:
    aimed = job.replace(privacy={"noise": None, "epsilon": 2.0})
    assert site.ask(aimed, 2.0) == "privacy-cap", "two at the job's delta of 1e-3 are more at 1e-5"
    assert site.ask(aimed, 4.0) == "ok"


def test_all_stages_count_and_those_that_are_booked_count_once(site: Site, job: Job) -> None:
    staged = job.replace(stages=[{"name": "one", "federation": {"rounds": 1}}, {"name": "two"}])
    one, two = staged.steps
    assert site.ask(one, cost(20), run="r.0") == "ok", "a round and four of four steps each"
    assert site.ask(one, math.nextafter(cost(20), 0), run="r.0") == "privacy-cap"
    assert site.ask(one, cost(20), "train", run="r.0") == "ok"
    for round in range(2):
        assert site.ask(two, cost(20), "train", round, run="r.1") == "ok"
    assert site.ask(one, cost(20), round=1, run="r.0") == "ok", "resumed, the server asks from the first stage on"
    assert site.ask(two, cost(20), round=2, run="r.1") == "ok"
    assert site.ask(two, cost(20), round=2, run="s.1") == "ok", "two rounds more"
    assert site.ask(two, cost(20), round=1, run="s.1") == "privacy-cap"


def test_delta_is_looked_at_before_the_first_round(site: Site, job: Job) -> None:
    assert site.ask(job.replace(privacy={"delta": 0.05}), 8.0) == "delta"


def test_a_site_whose_own_delta_says_nothing_is_told(site: Site, job: Job, caplog: pytest.LogCaptureFixture) -> None:
    for delta, told in ((0.03, False), (0.04, True)):
        caplog.clear()
        ledger = DiskLedger(site.folder / "ledger", 8.0, delta, site="a")
        require_room(ledger, "chest", Instruction("probe", "r", "a", job, ""), lambda _: [30])
        assert ("delta = 0.04 in [privacy] of client.toml is not below 1/30" in caplog.text) == told


def test_without_a_cap_the_ledger_is_not_read(site: Site, job: Job) -> None:
    site.ledger().begin()
    site.ledger().path.write_bytes(b"broken")
    assert site.ask(job, math.inf) == "ok"
    assert site.ask(job, 8.0) == "ledger"
