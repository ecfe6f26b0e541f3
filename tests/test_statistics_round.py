"""Normalisation measured at the sites: sums go up, mean and deviation come down, and equal those of the pooled data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from client.handler import Handler
from client.policy import Policy
from client.readers.base import Examples, Splits, Store
from client.state import MemoryState
from client.workbench import Benches
from server.coordinator import Coordinator
from shared_models.checks import check_contribution
from shared_models.errors import Rejected, RunError
from shared_models.job import Job
from shared_models.job_parts import DataPart
from shared_models.messages import Contribution, Instruction
from shared_models.normalisation import FEWEST, channel_sums, merge
from shared_models.spec import build_model
from shared_models.wire import decode_instruction, encode_instruction
from simulations.engines.inprocess import InProcess

SITES = ("a", "b", "c")
Maker = Callable[..., Job]


def table(rows: int, seed: int) -> Splits:
    """Three features of very different scales, one of them missing now and then; two thirds train."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, generator=source) * torch.tensor([100.0, 1.0, 0.01]) + torch.tensor([500.0, seed, 0.0])
    x[::5, 1] = float("nan")
    data = DataPart(shape=(3,), features=("u", "v", "w"), normalise_by="sites", missing="mean")
    store = Store(x, (x[:, 0] > 500).long(), [f"{i:03d}" for i in range(rows)], data)
    cut = 2 * rows // 3
    parts = (torch.arange(cut), torch.arange(cut, rows), torch.arange(cut, rows))
    return Splits(*(Examples(store, part) for part in parts))


@pytest.fixture
def sites() -> dict[str, Splits]:
    return {name: table(30 + 12 * i, i) for i, name in enumerate(SITES)}


@pytest.fixture
def job(make_job: Maker) -> Job:
    features = {"shape": [3], "features": ["u", "v", "w"], "normalise_by": "sites", "missing": "mean"}
    return make_job(model={"name": "logistic"}, task={"labels": ["no", "yes"]}, data=features)


def coordinator(job: Job, sites: dict[str, Splits], folder: Path | None = None) -> Coordinator:
    return Coordinator(job, InProcess(list(sites), sites.__getitem__, Benches()), "run", folder=folder)


def test_they_equal_those_of_the_pooled_training_examples(job: Job, sites: dict[str, Splits]) -> None:
    found = coordinator(job, sites)
    found.measure_statistics()
    pooled = torch.cat([s.train.store.x[s.train.rows] for s in sites.values()]).double()
    for c in range(3):
        known = pooled[:, c][~pooled[:, c].isnan()]
        assert found.statistics["mean"][c].item() == pytest.approx(known.mean().item(), rel=1e-6)
        assert found.statistics["std"][c].item() == pytest.approx(known.std(unbiased=False).item(), rel=1e-5)


def test_the_model_sees_normalised_features_and_a_missing_one_is_the_mean(job: Job, sites: dict[str, Splits]) -> None:
    found = coordinator(job, sites)
    outcome = found.run()
    splits = sites["b"].normalised_by(found.statistics["mean"], found.statistics["std"])
    x = splits.train.batch(torch.arange(len(splits.train))).x
    raw = splits.train.store.x[splits.train.rows]
    assert not x.isnan().any()
    assert (x[raw.isnan()] == 0).all()
    expected = (raw - found.statistics["mean"]) / found.statistics["std"]
    torch.testing.assert_close(x[~raw.isnan()], expected[~raw.isnan()])
    assert outcome.statistics["mean"] == pytest.approx(found.statistics["mean"].tolist(), rel=1e-6)
    assert outcome.all_sites["accuracy"] > 0.5


def test_images_are_measured_in_units_of_255() -> None:
    x = torch.tensor([[[[0, 255]]], [[[255, 255]]]], dtype=torch.uint8)
    found = merge([channel_sums(x[:1], 255.0), channel_sums(x[1:], 255.0)])
    assert found["mean"].tolist() == [0.75]
    assert found["std"].item() == pytest.approx((0.75 * 0.25) ** 0.5)


def test_a_channel_that_is_constant_at_the_sites_is_0_everywhere() -> None:
    found = merge([channel_sums(torch.full((4, 1), 7.0), 1.0)])
    data = DataPart(shape=(1,), features=("u",), normalise_by="sites")
    store = Store(torch.tensor([[7.0], [300.0]]), torch.tensor([0, 1]), ["a", "b"], data)
    assert store.normalised_by(found["mean"], found["std"]).inputs.flatten().tolist() == pytest.approx([0, 0])


def ask(job: Job, site: str, **fields: Any) -> Instruction:
    return Instruction("statistics", "run", site, job, build_model(job)[1].fingerprint, **fields)


def handler(sites: dict[str, Splits], policy: Policy) -> Handler:
    return Handler("a", lambda job: sites["a"], MemoryState(), policy, Benches())


def test_a_site_may_refuse_and_a_small_one_does(job: Job, sites: dict[str, Splits]) -> None:
    assert handler(sites, Policy(approve_all=True)).handle(ask(job, "a")).code == "ok"
    refusing = handler(sites, Policy(approve_all=True, statistics=False))
    assert refusing.handle(ask(job, "a")).code == "no-statistics"
    small = Examples(sites["a"].train.store, torch.arange(FEWEST - 1))
    answer = handler({"a": replace(sites["a"], train=small)}, Policy(approve_all=True)).handle(ask(job, "a"))
    assert answer.code == "too-few-examples"
    assert not answer.groups


def test_a_job_that_does_not_say_so_gets_none(make_job: Maker, sites: dict[str, Splits]) -> None:
    plain = make_job()
    answer = handler(sites, Policy([plain.hash], as_written=True)).handle(ask(plain, "a"))
    assert answer.code == "beyond-job"


def test_a_node_without_statistics_does_not_train(job: Job, sites: dict[str, Splits]) -> None:
    model = build_model(job)[0].state_dict()
    asked = replace(ask(job, "a"), kind="evaluate", groups={"model": model}, evaluate=(("test", 0),))
    assert handler(sites, Policy(approve_all=True)).handle(asked).code == "fingerprint"


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [("count", -1.0, "statistics"), ("squares", -1.0, "statistics"), ("sum", float("nan"), "not-finite")],
)
def test_bad_sums_are_rejected(job: Job, sites: dict[str, Splits], name: str, value: float, code: str) -> None:
    good = handler(sites, Policy(approve_all=True)).handle(ask(job, "a"))
    assert check_contribution(good, ask(job, "a"), {}, 1.0) >= 0
    sums = {**good.groups["statistics"], name: torch.full((3,), value, dtype=torch.float64)}
    with pytest.raises(Rejected) as error:
        check_contribution(replace(good, groups={"statistics": sums}), ask(job, "a"), {}, 1.0)
    assert error.value.code == code


def test_too_few_sums_end_the_run_in_one_sentence(job: Job, sites: dict[str, Splits]) -> None:
    class Refusing(InProcess):
        def run(self, instructions: Any) -> Any:
            for instruction in instructions:
                yield Contribution(instruction.kind, "run", instruction.site, code="no-statistics")

    engine = Refusing(list(sites), sites.__getitem__, Benches())
    with pytest.raises(RunError, match="0 of 3 sites gave statistics"):
        Coordinator(job, engine, "run").run()


def test_they_survive_a_crash_before_the_first_round(job: Job, sites: dict[str, Splits], tmp_path: Path) -> None:
    first = coordinator(job, sites, tmp_path)
    first.measure_statistics()
    changed = {**sites, "a": table(90, 7)}  # another site would now give other sums: the run keeps the old ones
    again = coordinator(job, changed, tmp_path)
    again.run()
    assert all(torch.equal(again.statistics[n], t) for n, t in first.statistics.items())


def test_they_travel_with_the_instruction(job: Job) -> None:
    sent = ask(job, "a", statistics={"mean": torch.ones(3), "std": torch.full((3,), 2.0)})
    received = decode_instruction(*encode_instruction(sent))
    assert received.groups == {}
    assert all(torch.equal(received.statistics[n], t) for n, t in sent.statistics.items())


def test_the_sums_count_among_the_bytes_that_went_up(job: Job, sites: dict[str, Splits]) -> None:
    loop = coordinator(job, sites)
    totals = loop.run().totals
    weights = sum(t.numel() * 4 for t in loop.state["model"].values())
    sums = 3 * 3 * 3 * 8  # sites, sums, features, bytes
    assert totals.bytes_up - totals.bytes_metrics == job.federation.rounds * 3 * weights + sums
