"""A Flower message in, a Flower message out, without a network: the records pass through Flower's own serialisation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.supercore.task_identity import TaskIdentity
from PIL import Image

import client.flower_app
import shared_models.tokens
from client.audit import Audit
from client.config import ClientConfig, DataPart, NodeFolder, PolicyPart, PrivacyPart, ServerPart, save
from client.flower_app import NodeData, client_app
from client.handler import Handler
from client.ledger import open_ledger
from client.policy import Policy
from client.state import MemoryState
from client.workbench import Benches
from shared_models.errors import ConfigError, DataError
from shared_models.flower import from_record, to_record
from shared_models.job import Job
from shared_models.messages import Budget, Contribution, Instruction
from shared_models.privacy import Spend
from shared_models.spec import build_model
from shared_models.wire import VERSION, decode_contribution, encode_contribution, encode_instruction

NODE_ID, RUN_ID = 1234567890123456789, 9876543210987654321
App = Callable[[Message, Context], Message]


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """An enrolled node's folder whose data are thirty images of ten classes."""
    data = tmp_path / "data"
    for part in ("train", "validation", "test"):
        for label in range(10):
            folder = data / part / str(label)
            folder.mkdir(parents=True)
            Image.new("L", (8, 8), 25 * label).save(folder / "1.png")
    server = ServerPart(fleet="h:1", enrollment="h:2", membership="h:3")
    root = tmp_path / "node"
    root.mkdir()
    save(root, ClientConfig(site="hospital-a", server=server, data=DataPart(folder=data, format="imagefolder")))
    return root


@pytest.fixture
def instruction(make_job: Callable[..., Job]) -> Instruction:
    job = make_job()
    model, spec = build_model(job)
    groups = {"model": {k: v for k, v in model.state_dict().items() if k in spec.sent}}
    return Instruction(
        "train", "run-7", "hospital-a", job, spec.fingerprint, rounds=2, evaluate=(("validation", 0),), groups=groups
    )


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """What flwr asks of a process that makes a message."""
    for name, value in (("task_id", 1), ("run_id", RUN_ID), ("node_id", NODE_ID)):
        monkeypatch.setattr(TaskIdentity, f"_{name}", value)


def ask(app: App, content: RecordDict) -> Contribution:
    """As the resident worker does; what comes back is decoded as on the server."""
    arrived = recorddict_from_proto(recorddict_to_proto(content))
    message = Message(arrived, NODE_ID, "train")
    message.metadata.__dict__["_message_id"] = "message-1"
    context = Context(RUN_ID, NODE_ID, {}, RecordDict(), {})
    reply = app(message, context)
    assert reply.metadata.reply_to_message_id == "message-1"
    return decode_contribution(*from_record(recorddict_from_proto(recorddict_to_proto(reply.content))))


def test_a_round_over_flower_is_the_round_in_process(node: Path, instruction: Instruction) -> None:
    reply = ask(client_app(node, approve=[instruction.job.hash]), to_record(*encode_instruction(instruction)))
    assert (reply.code, reply.site, reply.run, reply.examples) == ("ok", "hospital-a", "run-7", 10)
    data = NodeData(client.flower_app.load(node))
    here = Handler("hospital-a", data, MemoryState(), Policy(approve_all=True), Benches(torch.device("cpu")))
    assert encode_contribution(here.handle(instruction)) == encode_contribution(reply)


def test_nothing_is_named_by_an_id_of_flowers(node: Path, instruction: Instruction) -> None:
    """After a crash the run comes under another Flower run; it finds its state and is answered from it."""
    first = ask(client_app(node, approve_all=True), to_record(*encode_instruction(instruction)))
    names = [str(p.relative_to(node)) for p in node.rglob("*")]
    assert f"state/hospital-a/{instruction.run}/current" in names
    assert not any(str(i) in name for name in names for i in (NODE_ID, RUN_ID))
    again = ask(client_app(node, approve_all=True), to_record(*encode_instruction(instruction)))
    assert encode_contribution(again) == encode_contribution(first)


def test_without_approval_a_request_is_left(node: Path, instruction: Instruction) -> None:
    reply = ask(client_app(node), to_record(*encode_instruction(instruction)))
    assert (reply.code, reply.site, reply.groups) == ("not-approved", "hospital-a", {})
    assert (NodeFolder(node).requests / f"{instruction.job.hash}.toml").exists()
    assert list(NodeFolder(node).state.iterdir()) == [NodeFolder(node).mark]


def test_what_was_not_approved_is_read_and_nothing_of_it_is_built(
    node: Path, instruction: Instruction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer's file goes to a library of native code: only once the site has agreed to it."""
    manifest, blob = encode_instruction(instruction)
    head = json.loads(manifest)
    head["job"]["data"] |= {"shape": [16], "tokenizer": '{"version": "no tokenizer"}'}
    asked = to_record(json.dumps(head).encode(), blob)
    built: list[str] = []

    def build(content: str) -> None:
        built.append(content)
        raise ConfigError("data.tokenizer is no tokenizer's JSON")

    monkeypatch.setattr(shared_models.tokens, "make_tokenizer", build)
    reply = ask(client_app(node), asked)
    assert (reply.code, reply.kind, reply.run, reply.site) == ("not-approved", "train", "run-7", "hospital-a")
    assert not built
    (request,) = NodeFolder(node).requests.iterdir()
    assert "no tokenizer" in request.read_text()
    assert ask(client_app(node, approve=[request.stem]), asked).code == "config"
    assert built


def test_approval_in_client_toml(node: Path, instruction: Instruction) -> None:
    config = client.flower_app.load(node)
    for policy, code in (
        (PolicyPart(approve=(instruction.job.hash,)), "ok"),
        (PolicyPart(approve_all=True), "ok"),
        (PolicyPart(approve=("0" * 64,)), "not-approved"),
    ):
        save(node, config.model_copy(update={"policy": policy}))
        assert ask(client_app(node), to_record(*encode_instruction(instruction))).code == code


def test_consent_is_withdrawn_while_the_node_runs(node: Path, instruction: Instruction) -> None:
    """Whatever client.toml said when it started; only what the command line said stays."""
    config, job = client.flower_app.load(node), instruction.job.hash
    asked = to_record(*encode_instruction(instruction))
    for given in (PolicyPart(approve=(job,)), PolicyPart(approve_all=True)):
        save(node, config.model_copy(update={"policy": given}))
        app, told, told_all = client_app(node), client_app(node, approve=[job]), client_app(node, approve_all=True)
        assert [ask(a, asked).code for a in (app, told, told_all)] == ["ok"] * 3
        save(node, config)
        assert [ask(a, asked).code for a in (app, told, told_all)] == ["not-approved", "ok", "ok"]
        save(node, config.model_copy(update={"policy": given}))
        assert ask(app, asked).code == "ok"


def test_what_a_site_gives_and_takes_is_read_anew(node: Path, make_job: Callable[..., Job]) -> None:
    summing = make_job(model={"name": "kmeans"}, task={"name": "clustering"}, method={"name": "lloyd"})
    config, app = client.flower_app.load(node), client_app(node, approve_all=True)

    probe = Instruction("probe", "run-7", "hospital-a", summing, "", rounds=2)

    def code() -> str:
        return ask(app, to_record(*encode_instruction(probe))).code

    before = code()
    for part, word in (
        ({"policy": PolicyPart(statistics=False)}, "no-statistics"),
        ({"privacy": PrivacyPart(require="any")}, "privacy-required"),
        ({}, before),
    ):
        save(node, config.model_copy(update=part))
        assert code() == word
    assert before == "fingerprint"  # it passed the policy


@pytest.mark.parametrize("broken", ["[policy]\napprove = 3\n", "site = ", None])
def test_nothing_runs_while_client_toml_cannot_be_read(
    node: Path, instruction: Instruction, caplog: pytest.LogCaptureFixture, broken: str | None
) -> None:
    """It may be there that consent was withdrawn; so not even what the command line said."""
    path = NodeFolder(node).config
    config, asked = path.read_bytes(), to_record(*encode_instruction(instruction))
    app = client_app(node, approve=[instruction.job.hash], approve_all=True)
    path.unlink() if broken is None else path.write_text(broken)
    reply = ask(app, asked)
    assert (reply.code, reply.groups, reply.metrics) == ("policy-unreadable", {}, {})
    assert "what this site permits cannot be read" in caplog.text
    assert str(path) in caplog.text
    assert not list(NodeFolder(node).requests.glob("*"))
    path.write_bytes(config)
    assert ask(app, asked).code == "ok"


def test_a_site_that_takes_only_jobs_with_privacy(node: Path, instruction: Instruction) -> None:
    config = client.flower_app.load(node)
    save(node, config.model_copy(update={"privacy": PrivacyPart(require="any")}))
    app = client_app(node, approve=[instruction.job.hash])
    assert ask(app, to_record(*encode_instruction(instruction))).code == "privacy-required"
    probe = replace(instruction, kind="probe", groups={})
    assert ask(app, to_record(*encode_instruction(probe))).code == "privacy-required"


def test_a_round_with_privacy_is_booked_on_the_node(
    node: Path, instruction: Instruction, make_job: Callable[..., Job]
) -> None:
    job = make_job(privacy={"mode": "sample", "noise": 1.0, "delta": 1e-3})
    asked = to_record(*encode_instruction(replace(instruction, job=job)))
    reply = ask(client_app(node, approve=[job.hash]), asked)
    assert (reply.code, reply.noise) == ("ok", 1.0)
    (entry,) = open_ledger(node, client.flower_app.load(node)).entries()
    data = str(client.flower_app.load(node).data.folder)
    assert (entry.dataset, entry.site, entry.run, entry.round) == (data, "hospital-a", "run-7", 0)
    assert (entry.spend, entry.unit, entry.answered) == (Spend(1.0, 0.5, 2), "sample", True)  # ten examples, by eight
    assert NodeFolder(node).secret.stat().st_mode & 0o777 == 0o600
    again = ask(client_app(node, approve=[job.hash]), asked)
    assert encode_contribution(again) == encode_contribution(reply)
    config = client.flower_app.load(node)
    save(node, config.model_copy(update={"privacy": PrivacyPart(cap_epsilon=0.5)}))
    later = to_record(*encode_instruction(replace(instruction, job=job, round=1)))
    assert ask(client_app(node, approve=[job.hash]), later).code == "privacy-cap"
    assert len(open_ledger(node, config).entries()) == 1


def test_the_ledger_is_begun_with_the_node_and_missed_when_it_is_gone(
    node: Path, instruction: Instruction, caplog: pytest.LogCaptureFixture
) -> None:
    client_app(node)
    ledger = open_ledger(node, client.flower_app.load(node))
    assert ledger.path.is_file()
    client_app(node)
    assert not caplog.records
    ledger.path.unlink()
    app = client_app(node, approve_all=True)
    assert "is gone" in caplog.text
    assert ask(app, to_record(*encode_instruction(instruction))).code == "ok"  # it books nothing
    assert not ledger.path.exists()


def test_an_approved_job_does_not_approve_more_work(node: Path, instruction: Instruction) -> None:
    app = client_app(node, approve=[instruction.job.hash])
    greedy = replace(instruction, budget=Budget(epochs=100.0))
    reply = ask(app, to_record(*encode_instruction(greedy)))
    assert (reply.code, reply.groups, reply.metrics) == ("beyond-job", {}, {})
    assert ask(app, to_record(*encode_instruction(instruction))).code == "ok"


def test_each_instruction_is_a_line_of_the_sites_record(
    node: Path, instruction: Instruction, make_job: Callable[..., Job]
) -> None:
    """Answered, answered once more, refused, not understood."""
    app, other = client_app(node, approve=[instruction.job.hash]), make_job(name="other")
    asked = to_record(*encode_instruction(instruction))
    replies = [ask(app, asked), ask(app, asked)]
    replies.append(ask(app, to_record(*encode_instruction(replace(instruction, job=other, groups={})))))
    replies.append(ask(app, RecordDict()))
    begun, *lines = NodeFolder(node).audit.read_text().splitlines()
    start = json.loads(begun)
    assert (start["event"], start["approve"], start["approve_all"]) == ("start", [instruction.job.hash], False)
    found = [json.loads(line) for line in lines]
    assert [line["code"] for line in found] == [r.code for r in replies] == ["ok", "ok", "not-approved", "malformed"]
    for line, reply in zip(found, replies, strict=True):
        assert line["event"] == "instruction"
        assert line["bytes"] == sum(map(len, encode_contribution(reply)))
        assert line["examples"] == reply.examples
        assert 0 <= line["seconds"] < 60
    first, again, refused, garbage = found
    told = {"run": "run-7", "kind": "train", "stage": 0, "task": 0, "round": 0}
    assert told.items() <= first.items()
    assert (first["job"], first["name"]) == (instruction.job.hash, "test")
    assert (refused["job"], refused["name"]) == (other.hash, "other")
    assert (first["measured"], refused["measured"]) == (["validation/0"], [])
    assert first["model"] == again["model"] != refused["model"] == ""
    assert not {"job", "run", "kind", "model"} & garbage.keys()
    changed = {k: v + 1 if v.is_floating_point() else v for k, v in instruction.groups["model"].items()}
    turned = dict(reversed(instruction.groups["model"].items()))
    for groups, same in ((changed, False), (turned, True)):
        ask(app, to_record(*encode_instruction(replace(instruction, groups={"model": groups}))))
        assert (Audit(NodeFolder(node).audit).last(1)[0]["model"] == first["model"]) == same


def test_nothing_leaves_without_a_line(node: Path, instruction: Instruction, caplog: pytest.LogCaptureFixture) -> None:
    app, asked = client_app(node, approve_all=True), to_record(*encode_instruction(instruction))
    path = NodeFolder(node).audit
    path.unlink()
    path.mkdir()
    reply = ask(app, asked)
    assert (reply.code, reply.run, reply.groups, reply.metrics, reply.examples) == ("audit", "run-7", {}, {}, 0)
    assert "nothing leaves without a line" in caplog.text
    path.rmdir()
    assert ask(app, asked).code == "ok"


def test_a_wrong_hash_ends_the_start(node: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a job hash"):
        client_app(node, approve=["yes"])
    with pytest.raises(ConfigError, match="Enroll first"):
        client_app(tmp_path / "nowhere")


def _swapped(instruction: Instruction) -> RecordDict:
    manifest, blob = encode_instruction(instruction)
    return to_record(blob, manifest)


def _flipped(instruction: Instruction) -> RecordDict:
    manifest, blob = encode_instruction(instruction)
    return to_record(manifest, bytes([blob[0] ^ 1]) + blob[1:])


def _other_job(instruction: Instruction) -> RecordDict:
    manifest, blob = encode_instruction(instruction)
    return to_record(manifest.replace(b'"name":"mlp"', b'"name":"mlq"'), blob)


def _path_as_run(instruction: Instruction) -> RecordDict:
    manifest, blob = encode_instruction(instruction)
    assert b'"run":"run-7"' in manifest
    return to_record(manifest.replace(b'"run":"run-7"', b'"run":"../up"'), blob)


def _other_version(instruction: Instruction) -> RecordDict:
    manifest, blob = encode_instruction(instruction)
    return to_record(manifest.replace(f'"version":{VERSION},'.encode(), b'"version":99,'), blob)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda i: RecordDict(), "malformed"),
        (lambda i: RecordDict({"manifest": ConfigRecord({"manifest": "text"})}), "malformed"),
        (lambda i: RecordDict({"manifest": ArrayRecord({}), "blob": ConfigRecord({})}), "malformed"),
        (lambda i: to_record(b"", b""), "malformed"),
        (lambda i: to_record(b"\xff\xfe{", b"x"), "malformed"),
        (lambda i: to_record(b'{"kind": "train"}', b""), "malformed"),
        (lambda i: to_record(b"[" * 100_000, b""), "malformed"),
        (_swapped, "malformed"),
        (_flipped, "malformed"),
        (_path_as_run, "malformed"),
        (_other_version, "wire-version"),
        (_other_job, "unknown-name"),
    ],
)
def test_garbage_gets_a_code_and_runs_nothing(
    node: Path,
    instruction: Instruction,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Instruction], RecordDict],
    code: str,
) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Handler, "handle", never)
    app = client_app(node, approve_all=True)
    logs = NodeFolder(node).logs  # that it came is written there
    before = {p: p.stat().st_mtime_ns for p in node.rglob("*") if logs not in p.parents}
    reply = ask(app, make(instruction))
    assert (reply.code, reply.site, reply.run, reply.groups) == (code, "hospital-a", "unknown", {})
    assert {p: p.stat().st_mtime_ns for p in node.rglob("*") if logs not in p.parents} == before


def test_data_are_read_once_per_preprocessing(node: Path, make_job: Callable[..., Job], monkeypatch) -> None:
    data = NodeData(client.flower_app.load(node))
    first = data(make_job())
    assert data(make_job(train={"lr": 0.9})) is first
    other = data(make_job(data={"shape": [1, 4, 4]}))
    assert other.train.store.x.shape == (30, 1, 4, 4)
    relabelled = data(make_job(task={"labels": [str(9 - c) for c in range(10)]}))
    assert relabelled.train.y.tolist() == list(range(10))
    assert relabelled.train.store.x[0].unique().tolist() == [225]  # label "9" comes first
    with pytest.raises(DataError, match="'0', which is not a label"):
        data(make_job(task={"labels": [str(c) for c in range(1, 11)]}))
    assert data(make_job()).train.store.x.shape == (30, 1, 8, 8)
