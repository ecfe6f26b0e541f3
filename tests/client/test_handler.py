"""The one entry to a site: what each kind of instruction gets, and that a failure gives a code and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import client.handler
from client.config import ClientConfig, DataPart, ServerPart
from client.flower_app import NodeData
from client.handler import Handler
from client.policy import Policy
from client.readers.base import Examples, Splits
from client.state import DiskState, MemoryState, State
from client.trainer import in_order
from client.workbench import Benches, Workbench
from shared_models.errors import DataError
from shared_models.job import Job
from shared_models.messages import Budget, Contribution, Instruction
from shared_models.spec import build_model
from shared_models.sums import Groups
from shared_models.tasks.classification import Classification
from shared_models.wire import encode_contribution

CPU = torch.device("cpu")
CANARY = "Doe-Jane-1971-03-02"
VALIDATION = (("validation", 0),)
MakeJob = Callable[..., Job]
MakeSplits = Callable[..., Splits]


def ask(job: Job, kind: str = "train", **fields: object) -> Instruction:
    """An instruction as an honest server would send it."""
    model, spec = build_model(job)
    entries = model.state_dict()
    down: Groups = {"model": {name: entries[name].clone() for name in spec.sent}}
    if job.method.name == "scaffold":
        down = {**down, "control": {n: torch.full_like(down["model"][n], 0.01) for n in spec.trained if n in spec.sent}}
    groups = {} if kind == "probe" else down
    document = spec.document if kind == "probe" else {}
    common = {"rounds": job.federation.rounds, "groups": groups, "document": document, **fields}
    return Instruction(kind, "run", "a", job, spec.fingerprint, **common)  # type: ignore[arg-type]


def at(
    site: str, splits: Splits, state: State | None = None, benches: Callable[[Job], Workbench] | None = None
) -> Handler:
    policy = Policy(approve_all=True)
    return Handler(site, lambda job: splits, state or MemoryState(), policy, benches or Benches(CPU))


def copied(reply: Contribution) -> Contribution:
    """With tensors of its own, for comparison after the next call."""
    groups = {g: {n: t.clone() for n, t in ts.items()} for g, ts in reply.groups.items()}
    return replace(reply, groups=groups)


def encoded(reply: Contribution) -> bytes:
    manifest, blob = encode_contribution(reply)
    return manifest + blob


# ---- kinds -----------------------------------------------------------------------------------------------------------
def test_probe(make_job: MakeJob, make_splits: MakeSplits) -> None:
    job = make_job()
    reply = at("a", make_splits(1, count=30)).handle(ask(job, "probe"))
    assert (reply.kind, reply.site, reply.code, reply.examples) == ("probe", "a", "ok", 30)
    assert reply.document == build_model(job)[1].document
    assert reply.groups == {}


def test_probe_by_a_server_that_would_train_another_model(
    make_job: MakeJob, make_splits: MakeSplits, caplog: pytest.LogCaptureFixture
) -> None:
    job, touched = make_job(), []
    other = build_model(make_job(data={"shape": [1, 8, 8], "mean": [0.4]}))[1].document
    handler = Handler("a", touched.append, MemoryState(), Policy(approve_all=True), Benches(CPU))  # type: ignore[arg-type]
    reply = handler.handle(ask(job, "probe", document=other))
    assert reply.code == "fingerprint"
    assert reply.document == build_model(job)[1].document
    assert "preprocessing.mean" in caplog.text
    assert not touched


def test_probe_of_a_site_whose_data_cannot_be_read(make_job: MakeJob) -> None:
    def unreadable(job: Job) -> Splits:
        raise DataError(CANARY)

    reply = Handler("a", unreadable, MemoryState(), Policy(approve_all=True), Benches(CPU)).handle(
        ask(make_job(), "probe")
    )
    assert (reply.code, reply.document) == ("data", {})


def test_train(make_job: MakeJob, make_splits: MakeSplits) -> None:
    job, splits = make_job(), make_splits(1, count=30)
    asked = ask(job, budget=Budget(epochs=1.5), evaluate=VALIDATION, round=1)
    reply = at("a", splits).handle(asked)
    assert (reply.kind, reply.run, reply.site, reply.task, reply.round) == ("train", "run", "a", 0, 1)
    assert (reply.code, reply.examples, reply.samples, reply.steps) == ("ok", 30, 45, 6)  # 8+8+8+6, 8+7
    assert reply.metrics["validation/0/confusion"].sum() == len(splits.validation)
    assert reply.groups.keys() == {"model"}
    assert reply.groups["model"].keys() == asked.groups["model"].keys()
    assert all(not torch.equal(t, asked.groups["model"][n]) for n, t in reply.groups["model"].items())


def test_evaluate_measures_and_leaves_no_trace(make_job: MakeJob, make_splits: MakeSplits) -> None:
    splits, state = make_splits(1, count=30), MemoryState()
    job = make_job(time="continual", stream={"tasks": 2})
    parts = tuple((part, task) for part in ("validation", "test") for task in (0, 1))
    reply = at("a", splits, state).handle(ask(job, "evaluate", evaluate=parts))
    counts = {k: v.sum().item() for k, v in reply.metrics.items() if k.endswith("confusion")}
    expected = {f"{part}/{task}/confusion": len(getattr(splits, part).of_tasks(job, (task,))) for part, task in parts}
    assert counts == expected
    assert sum(counts.values()) == len(splits.validation) + len(splits.test)
    assert (reply.code, reply.groups, reply.steps) == ("ok", {}, 0)
    assert state.load("run") == {}


def test_the_received_model_is_measured_not_the_trained_one(make_job: MakeJob, make_splits: MakeSplits) -> None:
    job, splits = make_job(), make_splits(1)
    trained = at("a", splits).handle(ask(job, evaluate=VALIDATION))
    measured = at("a", splits).handle(ask(job, "evaluate", evaluate=VALIDATION))
    assert torch.equal(trained.metrics["validation/0/loss"], measured.metrics["validation/0/loss"])


def test_a_site_without_data_of_the_task_still_measures(make_job: MakeJob, make_splits: MakeSplits) -> None:
    splits = make_splits(1, count=30, classes=5)  # the second task's classes 5..9 do not occur
    job = make_job(time="continual", stream={"tasks": 2})
    for kind in ("train", "end_task"):
        state = MemoryState()
        reply = at("a", splits, state).handle(ask(job, kind, task=1, evaluate=(("validation", 0), ("validation", 1))))
        assert (reply.code, reply.examples, reply.groups) == ("no-data", 0, {})
        assert reply.metrics["validation/0/confusion"].sum() == len(splits.validation)
        assert not any(name.startswith("validation/1") for name in reply.metrics)
        assert state.load("run") == {}


# ---- refusals and failures -------------------------------------------------------------------------------------------
def test_wrong_site(make_job: MakeJob, make_splits: MakeSplits) -> None:
    reply = at("b", make_splits(1)).handle(ask(make_job()))
    assert (reply.code, reply.groups) == ("wrong-site", {})


@pytest.mark.parametrize("kind", ["train", "evaluate", "end_task"])
def test_wrong_fingerprint(make_job: MakeJob, kind: str) -> None:
    touched: list[Job] = []
    handler = Handler("a", touched.append, MemoryState(), Policy(approve_all=True), Benches(CPU))  # type: ignore[arg-type]
    reply = handler.handle(replace(ask(make_job(), kind), fingerprint="0" * 64))
    assert (reply.code, reply.groups) == ("fingerprint", {})
    assert not touched


def test_a_model_that_is_not_this_nodes(make_job: MakeJob, make_splits: MakeSplits) -> None:
    asked = ask(make_job())
    part = {"head.bias": asked.groups["model"]["head.bias"]}
    assert at("a", make_splits(1)).handle(replace(asked, groups={"model": part})).code == "fingerprint"


def test_an_update_that_is_not_finite_does_not_leave(make_job: MakeJob, make_splits: MakeSplits) -> None:
    state = MemoryState()
    job = make_job(train={"lr": 1e30}, share={"personal": ["head.*"]})
    reply = at("a", make_splits(1), state).handle(ask(job, budget=Budget(epochs=3)))
    assert (reply.code, reply.groups) == ("not-finite", {})
    assert state.load("run") == {}  # nor does it spoil what is kept


def test_an_update_above_the_limit_does_not_leave(make_job: MakeJob, make_splits: MakeSplits) -> None:
    assert at("a", make_splits(1)).handle(ask(make_job(federation={"max_update_norm": 1e-9}))).code == "norm"


def raising(error: Exception) -> Callable[..., object]:
    def fail(*_: object, **__: object) -> object:
        raise error

    return fail


@pytest.mark.parametrize("error", [RuntimeError(f"at {CANARY}.png"), DataError(f"{CANARY}.png cannot be read")])
@pytest.mark.parametrize("place", ["reader", "model", "loss", "load", "replay", "save", "optimizer", "policy", "bench"])
def test_a_failure_gives_a_code_and_nothing_else(
    make_job: MakeJob, make_splits: MakeSplits, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    place: str, error: Exception,
) -> None:  # fmt: skip
    job, state, benches, data = make_job(), MemoryState(), Benches(CPU), make_splits(1)
    policy, bench = Policy(approve_all=True), benches(job)
    broken = raising(error)
    if place == "loss":
        monkeypatch.setattr(Classification, "loss", broken)
    elif place in ("load", "replay", "save"):
        monkeypatch.setattr(state, place, broken)
    elif place == "model":
        monkeypatch.setattr(bench.model, "forward", broken)
    elif place == "optimizer":
        monkeypatch.setattr(bench.optimizer, "step", broken)
    elif place == "policy":
        monkeypatch.setattr(policy, "require", broken)
    handler = Handler(
        "a", broken if place == "reader" else lambda job: data, state, policy, broken if place == "bench" else benches
    )  # type: ignore[arg-type]
    reply = handler.handle(ask(job, evaluate=VALIDATION))
    code = "data" if isinstance(error, DataError) else "exception"
    assert reply == Contribution("train", "run", "a", code=code)
    assert CANARY.encode() not in encoded(reply)
    assert CANARY in caplog.text
    healthy = Handler("a", lambda job: data, MemoryState(), Policy(approve_all=True), Benches(CPU))
    monkeypatch.undo()
    assert healthy.handle(ask(job)).code == "ok"


def test_the_name_of_an_unreadable_file_stays_here(
    make_job: MakeJob, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A real folder, a real reader, a real broken file."""
    for part in ("train", "validation", "test"):
        folder = tmp_path / CANARY / part / "3"
        folder.mkdir(parents=True)
        Image.new("L", (8, 8)).save(folder / "1.png")
    (folder / f"scan-of-{CANARY}.png").write_bytes(b"\x89PNG")
    server = ServerPart(fleet="h:1", enrollment="h:2", membership="h:3")
    config = ClientConfig(site="a", server=server, data=DataPart(folder=tmp_path / CANARY, format="imagefolder"))
    handler = Handler("a", NodeData(config), MemoryState(), Policy(approve_all=True), Benches(CPU))
    for kind in ("probe", "train", "evaluate"):
        reply = handler.handle(ask(make_job(), kind))
        assert reply == Contribution(kind, "run", "a", code="data")  # type: ignore[arg-type]
    assert f"scan-of-{CANARY}.png cannot be read" in caplog.text


def test_an_interrupt_is_not_swallowed(make_job: MakeJob) -> None:
    handler = Handler("a", raising(KeyboardInterrupt()), MemoryState(), Policy(approve_all=True), Benches(CPU))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        handler.handle(ask(make_job()))


# ---- a repeated instruction ------------------------------------------------------------------------------------------
def test_a_repeated_round_is_sent_again_not_trained_again(
    make_job: MakeJob, make_splits: MakeSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a new process, and with SCAFFOLD, whose second training would move the site's control twice."""
    calls: list[int] = []
    real = client.handler.train
    monkeypatch.setattr(client.handler, "train", lambda *a: calls.append(1) or real(*a))
    job, splits = make_job(method={"name": "scaffold"}), make_splits(1)
    asked = ask(job, evaluate=VALIDATION)
    first = encode_contribution(at("a", splits, DiskState(tmp_path, "a")).handle(asked))
    kept = DiskState(tmp_path, "a").load("run")
    again = encode_contribution(at("a", splits, DiskState(tmp_path, "a")).handle(asked))
    assert again == first
    assert len(calls) == 1
    after = DiskState(tmp_path, "a").load("run")
    assert all(torch.equal(t, after["scaffold"]["control"][n]) for n, t in kept["scaffold"]["control"].items())
    at("a", splits, DiskState(tmp_path, "a")).handle(replace(asked, round=1))
    at("a", splits, DiskState(tmp_path, "a")).handle(replace(asked, run="another"))
    assert len(calls) == 3


def test_disk_and_memory_give_the_same_bits(make_job: MakeJob, make_splits: MakeSplits, tmp_path: Path) -> None:
    job, splits = make_job(method={"name": "scaffold"}, share={"personal": ["head.*"]}), make_splits(1)
    replies = []
    for state in (MemoryState(), DiskState(tmp_path, "a")):
        handler = at("a", splits, state)
        replies.append([encoded(handler.handle(ask(job, round=r, evaluate=VALIDATION))) for r in range(2)])
    assert replies[0] == replies[1]


# ---- shares ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("durable", [False, True])
def test_personal_entries_stay_and_are_restored(
    make_job: MakeJob, make_splits: MakeSplits, tmp_path: Path, durable: bool
) -> None:
    """Base entries are neither sent nor moved."""
    job = make_job(model={"name": "mlp", "hidden": [6, 5]}, share={"personal": ["head.*"], "base": ["hidden1.*"]})
    state: State = DiskState(tmp_path, "a") if durable else MemoryState()
    benches, splits = Benches(CPU), make_splits(1)
    handler, bench = at("a", splits, state, benches), benches(job)
    base = bench.entries["hidden1.weight"].clone()
    initial = bench.entries["head.weight"].clone()
    reply = handler.handle(ask(job))
    assert reply.groups["model"].keys() == {"hidden2.weight", "hidden2.bias"}
    assert b"head" not in encode_contribution(reply)[0]
    own = bench.entries["head.weight"].clone()
    assert not torch.equal(own, initial)
    at("b", make_splits(2), None, benches).handle(replace(ask(job), site="b"))  # another site uses the bench
    assert not torch.equal(bench.entries["head.weight"], own)
    handler.handle(ask(job, "evaluate", evaluate=VALIDATION, round=1))
    assert torch.equal(bench.entries["head.weight"], own)
    handler.handle(ask(job, round=1))
    assert not torch.equal(bench.entries["head.weight"], own)
    assert torch.equal(bench.entries["hidden1.weight"], base)


# ---- sites that share one workbench ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("model", "train"),
    [
        ({"name": "mlp"}, {"optimizer": "adamw", "lr": 0.01}),
        ({"name": "mlp"}, {"momentum": 0.9}),
        ({"name": "resnet18", "norm": "batch"}, {"momentum": 0.9, "steps": 1}),
        ({"name": "vit", "dropout": 0.2}, {"steps": 2}),
    ],
    ids=["adamw", "momentum", "batch-norm", "dropout"],
)
def test_the_order_of_sites_changes_no_bit(
    make_job: MakeJob, make_splits: MakeSplits, model: dict[str, object], train: dict[str, object]
) -> None:
    job = make_job(model=model, train=train, share={"personal": ["fc.*" if model["name"] == "resnet18" else "head.*"]})
    data = {"a": make_splits(1, count=16), "b": make_splits(2, count=20)}
    seen = []
    for order in ("ab", "ba", "aab"):
        benches, replies = Benches(CPU), {}
        states = {site: MemoryState() for site in order}
        for round in range(2):
            for site in order:
                asked = replace(ask(job, round=round, evaluate=VALIDATION, budget=Budget(steps=2)), site=site)
                if order == "aab" and (site, round) in replies:  # a measurement in between
                    asked = replace(asked, kind="evaluate", evaluate=(("test", 0),))
                    at(site, data[site], states[site], benches).handle(asked)
                else:
                    replies[site, round] = encoded(at(site, data[site], states[site], benches).handle(asked))
        seen.append(replies)
    assert seen[0] == seen[1] == seen[2]
    assert seen[0]["a", 0] != seen[0]["b", 0]


@pytest.mark.gpu
def test_a_gpu_node_answers_like_a_cpu_node(make_job: MakeJob, make_splits: MakeSplits, tmp_path: Path) -> None:
    """State from disk and tensors from the network lie in main memory, the model does not."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    job, splits = make_job(method={"name": "scaffold"}, share={"personal": ["head.*"]}), make_splits(1)
    answers = []
    for device in (CPU, torch.device("cuda")):
        handler = at("a", splits, DiskState(tmp_path / device.type, "a"), Benches(device))
        replies = [copied(handler.handle(ask(job, round=r, evaluate=VALIDATION))) for r in range(2)]
        assert [r.code for r in replies] == ["ok", "ok"]
        answers.append(replies[1].groups)
    for group, tensors in answers[0].items():
        for name, value in tensors.items():
            assert answers[1][group][name].device == CPU
            torch.testing.assert_close(answers[1][group][name], value, rtol=1e-4, atol=1e-5)


def test_examples_reach_the_end_of_a_task_in_order_and_in_bounded_batches(
    make_job: Callable[..., Job], make_splits: MakeSplits
) -> None:
    examples: Examples = make_splits(1, count=259).train
    batches = list(in_order(examples, Workbench(make_job(), CPU)))
    assert [len(b) for b in batches] == [256, 3]
    assert torch.equal(torch.cat([b.y for b in batches]), examples.y)


def test_only_the_log_says_why(make_job: MakeJob, make_splits: MakeSplits, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, logger="fedzoo.client"):
        at("b", make_splits(1)).handle(ask(make_job(), round=4))
    (record,) = caplog.records
    assert record.getMessage() == "train, round 4: an instruction for 'a' reached 'b'"
