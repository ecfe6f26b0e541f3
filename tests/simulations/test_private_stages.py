"""Privacy over the stages of a job: what all of them spend is one sum, at the server, at the sites and beforehand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from client.readers.base import Splits
from client.workbench import Benches
from server.chain import run_stages, stage_folder
from server.coordinator import Coordinator
from server.events import Events, read_events
from server.outcome import Outcome
from server.privacy import make_privacy
from shared_models.errors import CompatibilityError
from shared_models.job import Job
from shared_models.messages import Contribution, Instruction
from shared_models.noise import normal
from shared_models.privacy import Spend, client_spend, epsilon
from shared_models.schedule import stage_run
from shared_models.spec import build_model
from simulations.engines.inprocess import InProcess
from simulations.privacy_cost import cost

DELTA = 1e-3
STAGES = [
    {"name": "pretext", "task": {"name": "rotation"}, "federation": {"rounds": 3}},
    {"name": "probe", "train": {"batch_size": 10}},
]
SAMPLE = {"mode": "sample", "noise": 1.5, "delta": DELTA}
CLIENT = {"mode": "client", "noise": 3.0, "clip": 0.01, "delta": DELTA}


@pytest.fixture
def staged(make_job: Any) -> Any:
    def make(privacy: dict[str, Any], **parts: Any) -> Job:
        uniform = {"name": "fedavg", "weighting": "uniform"}
        job: Job = make_job(model={"name": "cnn"}, privacy=privacy, method=uniform, stages=STAGES, **parts)
        return job

    return make


class Watched(InProcess):
    """Ends the process, so to speak, before an answer of a chosen stage and round."""

    def __init__(self, sites: dict[str, Splits], at: tuple[int, int] = (-1, -1)) -> None:
        super().__init__(list(sites), sites.__getitem__, Benches(torch.device("cpu")))
        self.at = at

    def run(self, instructions: Iterable[Instruction]) -> Iterator[Contribution]:
        for asked in instructions:
            if asked.kind == "train" and (asked.job.stage, asked.round) == self.at:
                raise KeyboardInterrupt
            yield self.handler(asked.site).handle(asked)


def carry_out(job: Job, engine: Watched, folder: Path | None = None, secret: bytes = b"q" * 32) -> Outcome:
    events = Events(folder / "events.jsonl" if folder else None)

    def make(step: Job, start: Mapping[str, torch.Tensor]) -> Coordinator:
        run, path = stage_run("run", step), stage_folder(folder, step)
        return Coordinator(step, engine, run, folder=path, events=events, start=start, secret=secret)

    return run_stages(job, make)


@pytest.fixture
def sites(make_splits: Any) -> dict[str, Splits]:
    return {name: make_splits(i, count=20 + 10 * i) for i, name in enumerate("ab")}


def by_hand(examples: int) -> list[Spend]:
    """Three rounds of an epoch in batches of 8, then two of batches of 10."""
    first, second = math.ceil(examples / 8), math.ceil(examples / 10)
    return [Spend(1.5, 1 / first, 3 * first), Spend(1.5, 1 / second, 2 * second)]


def test_examples_pay_for_every_stage(staged: Any, sites: dict[str, Splits]) -> None:
    job, engine = staged(SAMPLE), Watched(sites)
    outcome = carry_out(job, engine)
    expected = {name: epsilon(by_hand(len(splits.train)), DELTA) for name, splits in sites.items()}
    assert outcome.privacy["epsilon"] == pytest.approx(expected, rel=1e-12)
    for name in sites:
        entries = engine.handler(name).protection.ledger.entries()
        assert [(e.run, e.round) for e in entries] == [("run.0", r) for r in range(3)] + [
            ("run.1", r) for r in range(2)
        ]
        assert epsilon([e.spend for e in entries], DELTA) == pytest.approx(expected[name], rel=1e-12)
    found = cost(job, 20)
    assert len(found.epsilon) == 5
    assert found.epsilon[-1] == pytest.approx(expected["a"], rel=1e-12)
    assert [line for line in found.lines() if "noise multiplier" in line] == [
        "stage pretext: noise multiplier 1.5, sampling rate 0.3333, 3 steps a round, 3 rounds",
        "stage probe: noise multiplier 1.5, sampling rate 0.5, 2 steps a round, 2 rounds",
    ]


def test_a_site_pays_for_every_stage(staged: Any, sites: dict[str, Splits], tmp_path: Path) -> None:
    job = staged(CLIENT)
    outcome = carry_out(job, Watched(sites), tmp_path)
    so_far = [epsilon([Spend(3.0, 1.0, n)], DELTA) for n in range(1, 6)]
    assert outcome.privacy["epsilon"] == {"every site": so_far[-1]}
    rounds = [e for e, _ in read_events(tmp_path / "events.jsonl") if e["event"] == "round"]
    assert [e["privacy"]["epsilon"] for e in rounds] == so_far
    assert cost(job, None).epsilon == so_far
    tree = staged({**CLIENT, "mechanism": "ftrl"}, federation={"fraction": 0.5})
    spends = [client_spend(step, step.federation.rounds) for step in tree.steps]
    assert [s.steps for s in spends] == [2, 1], "trees of two rounds"
    assert cost(tree, None).epsilon[-1] == epsilon(spends, DELTA)


@pytest.mark.parametrize("privacy", [SAMPLE, CLIENT], ids=["sample", "client"])
@pytest.mark.parametrize("at", [(0, 2), (1, 1)])
def test_a_run_that_was_stopped_has_spent_what_an_undisturbed_one_has(
    staged: Any, sites: dict[str, Splits], tmp_path: Path, privacy: dict[str, Any], at: tuple[int, int]
) -> None:
    job = staged(privacy)
    whole = carry_out(job, Watched(sites))
    with pytest.raises(KeyboardInterrupt):
        carry_out(job, Watched(sites, at), tmp_path)
    again = carry_out(job, Watched(sites), tmp_path)
    assert again.privacy == whole.privacy
    assert all(torch.equal(again.model[n], t) for n, t in whole.model.items())


def test_no_two_stages_share_their_noise(staged: Any) -> None:
    """Their rounds begin at 0 each, and the run has one secret: the sites' and the server's draws differ by stage."""
    drawn = []
    for step in staged(CLIENT, federation={"fraction": 0.5}).steps:
        privacy: Any = make_privacy(step, build_model(step)[1], b"q" * 32)
        drawn.append(privacy.drawn({"w": torch.zeros(50)}, 0)["w"])
        assert not torch.equal(drawn[-1], normal(b"q" * 32, 50))
        cohorts = [privacy.cohort([str(i) for i in range(40)], 0)]
        drawn.append(torch.tensor([float(name) for name in cohorts[0]]))
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[1].tolist() != drawn[3].tolist()


def test_a_target_over_stages_is_refused_with_its_reason(staged: Any) -> None:
    with pytest.raises(
        CompatibilityError, match=r"privacy\.epsilon is the target of one training, .* give privacy\.noise"
    ):
        staged({"mode": "sample", "epsilon": 3.0})


def test_a_cost_travels_as_json(staged: Any) -> None:
    told = json.loads(json.dumps(cost(staged(SAMPLE), 20).document()))
    assert [stage["rounds"] for stage in told["stages"]] == [3, 2]
