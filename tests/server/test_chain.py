"""Stages: what is carried from one to the next, what it costs, and that a crash changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from client.handler import Handler
from client.policy import Policy
from client.readers.base import Examples, Splits, Store
from client.state import DiskState, MemoryState
from client.workbench import Benches, Workbench
from server.chain import run_stages, stage_folder
from server.coordinator import Coordinator
from server.outcome import Outcome
from shared_models.errors import ConfigError
from shared_models.job import Job
from shared_models.job_parts import DataPart
from shared_models.messages import Instruction
from shared_models.schedule import stage_run
from shared_models.spec import build_model, carried
from shared_models.wire import decode_instruction, encode_instruction
from simulations.engines.inprocess import InProcess

LABELS = ["a", "b", "c"]
PROBE = {
    "name": "probe", "share": {"base": ["!@head"]}, "federation": {"rounds": 1}, "train": {"lr": 0.5},
}  # fmt: skip


def a_job(*stages: dict[str, Any], **parts: Any) -> Job:
    base: dict[str, Any] = {
        "name": "chain",
        "model": {"name": "cnn"},
        "task": {"labels": LABELS},
        "data": {"shape": [1, 8, 8]},
        "train": {"lr": 0.1, "batch_size": 8},
        "federation": {"rounds": 2, "min_sites": 2},
        "stages": list(stages),
    }
    return Job.resolve({**base, **parts})


def a_site(name: str) -> Splits:
    source = torch.Generator().manual_seed(ord(name))
    x = torch.randint(0, 256, (24, 1, 8, 8), dtype=torch.uint8, generator=source)
    store = Store(x, torch.arange(24) % 3, [str(i) for i in range(24)], DataPart(shape=(1, 8, 8)))
    return Splits(*(Examples(store, torch.arange(24)) for _ in range(3)))


def carry_out(job: Job, folder: Path | None = None, fail_after: int = 99) -> tuple[Outcome, list[Coordinator]]:
    """Over two sites; with a folder their state and the checkpoints are on disk."""
    made: list[Coordinator] = []
    states = (lambda name: DiskState(folder / "sites", name)) if folder else None

    def make(step: Job, start: Mapping[str, Tensor]) -> Coordinator:
        if len(made) >= fail_after:
            raise KeyboardInterrupt
        engine = InProcess(["a", "b"], a_site, Benches(torch.device("cpu")), states)
        path = stage_folder(folder / "run", step) if folder else None
        made.append(Coordinator(step, engine, stage_run("run", step), folder=path, start=start))
        return made[-1]

    return run_stages(job, make), made


def test_a_probe_trains_the_head_on_what_the_stage_before_learned() -> None:
    outcome, (first, second) = carry_out(a_job({"name": "pretext"}, PROBE))
    learned, _ = carry_out(a_job())
    body = [name for name in learned.model if not name.startswith("head.")]
    assert body
    for name in body:  # as the first stage left it, bit for bit, and it was not sent again
        assert torch.equal(outcome.model[name], learned.model[name])
    assert set(second.spec.sent) == {"head.weight", "head.bias"}
    assert not torch.equal(outcome.model["head.weight"], learned.model["head.weight"])
    assert outcome.stages == {"pretext": learned.all_sites}
    totals = [c.progress.totals for c in (first, second)]
    assert outcome.totals.samples == sum(t.samples for t in totals) == 2 * 48 + 48
    assert outcome.totals.bytes_up == sum(t.bytes_up for t in totals)


@pytest.mark.parametrize("labels", [LABELS, ["x", "y", "z"]])
def test_a_head_is_carried_where_the_task_is_the_same(labels: list[str]) -> None:
    one, two = a_job({"name": "one"}, {"name": "two", "task": {"labels": labels}}).steps
    model = {name: torch.full_like(value, 7.0) for name, value in build_model(one)[0].state_dict().items()}
    left = carried(one, two, model)
    body = {name for name in model if not name.startswith("head.")}
    assert left.keys() == (set(model) if labels == LABELS else body)
    second = Coordinator(two, InProcess(["a", "b"], a_site), "run", start=left)
    fresh = build_model(two)[0].state_dict()["head.weight"]
    assert torch.equal(second.state["model"]["conv1.weight"], model["conv1.weight"])
    assert torch.equal(second.state["model"]["head.weight"], model["head.weight"] if labels == LABELS else fresh)


def test_entries_of_another_shape_are_not_carried() -> None:
    one, two = a_job({"name": "one"}, {"name": "two", "model": {"name": "cnn", "hidden": [5]}}).steps
    left = carried(one, two, build_model(one)[0].state_dict())
    assert "conv1.weight" in left
    assert "hidden1.weight" not in left


@pytest.mark.parametrize(("first", "second"), [("b", "both"), ("both", "b")])
def test_adapters_are_carried_to_a_stage_that_trains_other_factors_of_them(first: str, second: str) -> None:
    stages = ({"name": name, "lora": {"rank": 2, "train": train}} for name, train in (("one", first), ("two", second)))
    one, two = a_job(*stages, model={"name": "vit", "layers": 1}).steps
    adapter = {f"blocks.0.hidden.lora_{factor}.weight" for factor in "ab"}
    model = {name: torch.full_like(value, 7.0) for name, value in build_model(one)[0].state_dict().items()}
    left = carried(one, two, model)
    assert adapter <= left.keys()
    entries = build_model(two, start=left)[0].state_dict()
    assert all(torch.equal(entries[name], model[name]) for name in adapter)


@pytest.mark.parametrize(("positions", "found"), [({}, False), ({"positions": 16}, True)])
def test_gpt_keeps_its_positions_from_next_tokens_to_classes_where_their_number_is_told(
    positions: dict[str, int], found: bool
) -> None:
    """Next tokens are said from one token less than a text has."""
    parts = {"name": "j", "model": {"name": "gpt", **positions}, "data": {"tokenizer": "bytes", "shape": [16]}}
    one = Job.resolve({**parts, "task": {"name": "language-modelling"}})
    two = Job.resolve({**parts, "task": {"name": "classification", "labels": ["a", "b"]}})
    left = carried(one, two, build_model(one)[0].state_dict())
    assert ("positions.table.weight" in left) == found
    assert "tokens.weight" in left


def test_gpt_refuses_texts_beyond_its_positions() -> None:
    job = Job.resolve({
        "name": "j", "model": {"name": "gpt", "positions": 14}, "task": {"name": "language-modelling"},
        "data": {"tokenizer": "bytes", "shape": [16]},
    })  # fmt: skip
    with pytest.raises(ConfigError, match="model 'gpt' has 14 positions, too few for texts of 15 tokens"):
        build_model(job)


def test_the_same_bits_on_disk_and_after_a_crash_between_stages(tmp_path: Path) -> None:
    job = a_job({"name": "pretext"}, PROBE)
    expected, _ = carry_out(job)
    with pytest.raises(KeyboardInterrupt):
        carry_out(job, tmp_path, fail_after=1)
    resumed, (first, _) = carry_out(job, tmp_path)
    assert first.progress.round == 2
    assert resumed.model.keys() == expected.model.keys()
    assert all(torch.equal(resumed.model[n], t) for n, t in expected.model.items())
    assert resumed.totals.samples == expected.totals.samples
    assert (tmp_path / "run" / "stages" / "pretext" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_what_a_site_approves_is_the_whole_job() -> None:
    job = a_job({"name": "pretext"}, PROBE)
    other = a_job({"name": "pretext"}, {**PROBE, "train": {"lr": 0.4}})
    assert len({job.hash, other.hash, a_job().hash, job.steps[1].hash}) == 4
    assert job.steps[0].hash == a_job().hash  # a first stage without changes is the plain job
    assert [step.whole.hash for step in job.steps] == [job.hash] * 2
    assert Job.resolve(job.model_dump(mode="json")).hash == job.hash
    _, made = carry_out(job)
    instruction = made[1]._probe("a")
    back = decode_instruction(*encode_instruction(instruction))
    assert (back.job.whole.hash, back.job.hash, back.job.stage) == (job.hash, job.steps[1].hash, 1)
    assert back.groups["start"].keys() == set(made[1].spec.kept)


@pytest.mark.parametrize("kind", ["probe", "train"])
def test_a_server_cannot_put_start_values_into_a_first_stage(kind: Literal["probe", "train"]) -> None:
    """The base of a job without a stage before is what the job says, and a round brings none at all."""
    job = a_job(share={"base": ["!@head"]})
    bench = Workbench(job, torch.device("cpu"))
    state = MemoryState()
    site = Handler("a", lambda job: a_site("a"), state, Policy(approve_all=True), Benches(torch.device("cpu")))
    groups = {"model": bench.sent(), "start": {n: torch.zeros_like(bench.entries[n]) for n in bench.spec.kept}}
    asked = Instruction(kind, "run", "a", job, bench.spec.fingerprint, groups=groups, document=bench.spec.document)
    assert (site.handle(asked).code == "ok") == (kind == "probe")
    assert state.start("run", 0) == {}


def test_start_values_of_a_later_stage_do_not_reach_the_first() -> None:
    """The run's id is the server's to choose: what one stage was given is no other stage's, nor is what it trains."""
    one, two = a_job({"name": "one", "share": {"base": ["!@head"]}}, PROBE).steps
    state = MemoryState()
    site = Handler("a", lambda job: a_site("a"), state, Policy(approve_all=True), Benches(torch.device("cpu")))
    model, spec = build_model(two)
    zeros = {name: torch.zeros_like(model.state_dict()[name]) for name in spec.kept}
    _, with_zeros = build_model(two, start=zeros)
    asked = Instruction("probe", "run", "a", two, "", groups={"start": zeros}, document=with_zeros.document)
    assert site.handle(asked).code == "ok"
    assert state.start("run", 1).keys() == zeros.keys()
    bench = Workbench(one, torch.device("cpu"))
    trained = Instruction("train", "run", "a", one, bench.spec.fingerprint, groups={"model": bench.sent()})
    assert site.handle(trained).code == "ok"
    head = {name: model.state_dict()[name] for name in spec.sent}
    _, with_head = build_model(two, start={**zeros, **head})
    again = replace(asked, groups={"start": {**zeros, **head}}, document=with_head.document)
    assert site.handle(again).code == "fingerprint"


def test_the_written_job_keeps_its_stages(tmp_path: Path) -> None:
    job = a_job({"name": "pretext"}, PROBE)
    (tmp_path / "job.toml").write_text(job.to_toml(), encoding="utf-8")
    assert Job.load(tmp_path / "job.toml").hash == job.hash
    changed = Job.load(tmp_path / "job.toml", ["stages.probe.train.lr=0.25"])
    assert [step.train.lr for step in changed.steps] == [0.1, 0.25]
    with pytest.raises(ConfigError, match="no stage is called 'prob', there is pretext, probe"):
        Job.load(tmp_path / "job.toml", ["stages.prob.train.lr=0.25"])


@pytest.mark.parametrize(
    ("stages", "parts", "message"),
    [
        ([PROBE, PROBE], {}, "two stages are called 'probe'"),
        ([{"name": "a", "seed": {}}], {}, "a stage cannot change 'seed'"),
        ([{"name": "a", "train": {"lrr": 1}}], {}, "stage 'a': .*lrr"),
        ([{"name": "a", "share": {"personal": ["@head"]}}], {}, "stage 'a' has personal entries"),
        ([{"name": "a"}], {"data": {"shape": [1, 8, 8], "normalise_by": "sites"}}, "measures mean and deviation anew"),
        ([{"name": "a", "lora": {"rank": 2}}, {"name": "b"}], {}, "'b' has not the adapters of stage 'a'"),
        (
            [{"name": "a", "task": {"name": "rotation"}}],
            {"model": {"name": "cnn"}, "time": "continual", "stream": {"tasks": 2}},
            "stage 'a': .*'rotation' has none; list them in task.labels",
        ),
    ],
)
def test_stages_that_cannot_be(stages: list[dict[str, Any]], parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        a_job(*stages, **parts)
