"""The Flower executor against a grid in memory that loses, delays, garbles and misattributes what real nodes send.

Real processes are in `tests/test_federation.py`; here every fault comes on demand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.proto.message_pb2 import Metadata, ObjectTree, PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import InflatableObject, get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from client.readers.base import Splits
from client.workbench import Benches
from server import flower_executor
from server.coordinator import Coordinator
from server.events import Events
from server.flower_executor import FlowerExecutor
from server.nodes import Node
from shared_models.errors import DeploymentError
from shared_models.flower import from_record, to_record
from shared_models.job import Job
from shared_models.messages import Contribution, Instruction, refusal
from shared_models.wire import decode_instruction, encode_contribution
from simulations.engines.inprocess import InProcess

Answer = Callable[[Instruction], Contribution | RecordDict | Error | None]


@dataclass
class Roster:
    """Sites by Flower node id; revoked ones as the server's database would say."""

    ids: dict[str, int]
    revoked: set[str] = field(default_factory=set)

    def nodes(self) -> list[Node]:
        return [Node(s, b"", i, s, 0.0, 1.0 if s in self.revoked else None) for s, i in self.ids.items()]


class Grid:
    """Hands each message to a function and keeps the reply until it is pulled."""

    def __init__(self, roster: Roster, answer: Answer, newest_first: bool = False) -> None:
        self.roster = roster
        self.answer = answer
        self.newest_first = newest_first
        self.offline: set[str] = set()
        self.asked: list[tuple[str, str]] = []
        self._replies: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return [i for s, i in self.roster.ids.items() if s not in self.offline]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{len(self.asked)}"
            instruction = decode_instruction(*from_record(message.content))
            self.asked.append((instruction.kind, instruction.site))
            made = self.answer(instruction)
            if isinstance(made, Contribution):
                made = to_record(*encode_contribution(made))
            if made is not None:
                self._replies[message.metadata.message_id] = Message(made, reply_to=message)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        order = list(ids)[::-1] if self.newest_first else list(ids)
        return [self._replies.pop(i) for i in order if i in self._replies]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    for name in ("POLL", "WAIT_POLL", "REPROBE"):
        monkeypatch.setattr(flower_executor, name, 0.01)
    monkeypatch.setattr(flower_executor, "LOST_AFTER", 0.05)


@pytest.fixture
def engine(make_splits: Callable[..., Splits]) -> InProcess:
    sites = {name: make_splits(i, count=16) for i, name in enumerate("abc")}
    return InProcess(list(sites), sites.__getitem__, Benches())


def federation(job: Job, answer: Answer, timeout: float = 5.0, **options: Any) -> tuple[Coordinator, Grid, list[Any]]:
    roster = Roster({"a": 11, "b": 12, "c": 13})
    grid = Grid(roster, answer, **options)
    heard: list[Any] = []
    events = Events(listener=heard.append)
    executor = FlowerExecutor(grid, roster, timeout, events)  # type: ignore[arg-type]
    return Coordinator(job, executor, "run", events=events), grid, heard


@pytest.mark.parametrize("newest_first", [False, True])
def test_the_network_does_not_change_a_bit(make_job: Callable[..., Job], engine: InProcess, newest_first: bool) -> None:
    import torch

    job = make_job(method={"name": "scaffold"})
    expected = Coordinator(job, engine, "run").run()
    fresh = InProcess(engine.names, engine.splits, Benches())
    coordinator, grid, _ = federation(job, lambda i: fresh.handler(i.site).handle(i), newest_first=newest_first)
    found = coordinator.run()
    assert all(torch.equal(found.model[n], t) for n, t in expected.model.items())
    assert found.all_sites == expected.all_sites
    assert [k for k, _ in grid.asked] == ["probe"] * 3 + ["train"] * 6 + ["evaluate"] * 3


FAULTS: dict[str, tuple[str, Callable[[Contribution], Any]]] = {
    "flower-error-2": ("an exception in the worker", lambda r: Error(2, "RuntimeError: canary")),
    "malformed": ("no message of ours", lambda r: RecordDict()),
    "wrong-site": ("another site's name", lambda r: replace(r, site="a")),
    "timeout": ("silence", lambda r: None),
    "stale-round": ("an answer to another run", lambda r: replace(r, run="other")),
}


@pytest.mark.parametrize("code", FAULTS)
def test_faults_of_a_node_become_codes(make_job: Callable[..., Job], engine: InProcess, code: str) -> None:
    fault = FAULTS[code][1]

    def answer(instruction: Instruction) -> Any:
        reply = engine.handler(instruction.site).handle(instruction)
        return fault(reply) if (instruction.site, instruction.kind) == ("b", "train") else reply

    coordinator, _, heard = federation(make_job(federation={"rounds": 1}), answer, timeout=0.3)
    coordinator.run()
    assert [(e["site"], e["code"]) for e in heard if e["event"] == "rejected"] == [("b", code)]
    assert next(e["sites"] for e in heard if e["event"] == "round") == ["a", "c"]
    assert "canary" not in str(heard)


class Link:
    """SuperLink as its grid asks it: hands out each object as the node uploaded it, whatever is in it."""

    def __init__(self, grid: Grid, wrap: Callable[[Message], Message | InflatableObject | bytes]) -> None:
        self.grid = grid
        self.wrap = wrap
        self.objects: dict[str, bytes] = {}

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:
        found = PullAppMessagesResponse()
        for message in self.grid.pull_messages(request.message_ids):
            asked, given = message.metadata.reply_to_message_id, self.wrap(message)
            if isinstance(given, bytes):
                tree = ObjectTree(object_id=hashlib.sha256(given).hexdigest())
                self.objects[tree.object_id] = given
            else:
                tree = get_object_tree(given)
                self.objects |= {name: part.deflate() for name, part in get_all_nested_objects(given).items()}
            found.messages_list.add().metadata.CopyFrom(
                Metadata(message_id=tree.object_id, reply_to_message_id=asked, run_id=1)
            )
            found.message_object_trees.append(tree)
        return found

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:
        content = self.objects[request.object_id]
        validate_object_content(content)  # all that SuperLink checks
        return PullObjectResponse(object_found=True, object_available=True, object_content=content)

    def ConfirmMessageReceived(self, request: object) -> None:
        pass


def _elsewhere(message: Message) -> Message:
    message.metadata.__dict__["_reply_to_message_id"] = "0" * 64
    return message


OBJECTS: dict[str, tuple[list[str], Callable[[Message], Any]]] = {
    "as it should be": ([], lambda message: message),
    "names another message than the one it answers": ([], _elsewhere),
    "no protobuf": (["malformed"], lambda message: b"Message  20\0" + b"\xff" * 20),
    "no message": (["malformed"], lambda message: ConfigRecord({"a": 1})),
}


@pytest.mark.parametrize("what", OBJECTS)
def test_an_object_that_flower_cannot_read_is_its_site_s_fault_alone(
    make_job: Callable[..., Job], engine: InProcess, what: str
) -> None:
    codes, wrap = OBJECTS[what]
    training: list[int] = []

    def answer(instruction: Instruction) -> Contribution:
        training.append(instruction.kind == "train")
        return engine.handler(instruction.site).handle(instruction)

    coordinator, grid, heard = federation(make_job(federation={"rounds": 1}), answer)

    def bad(message: Message) -> Any:
        return wrap(message) if training[-1] and message.metadata.src_node_id == 12 else message

    real = HttpGrid(token="t")
    real._run, real._client = SimpleNamespace(run_id=1), Link(grid, bad)  # type: ignore[assignment]
    pull, grid.pull_messages = grid.pull_messages, real.pull_messages  # type: ignore[method-assign]
    real._client.grid = SimpleNamespace(pull_messages=pull)  # type: ignore[union-attr]
    coordinator.run()
    assert [(e["site"], e["code"]) for e in heard if e["event"] == "rejected"] == [("b", code) for code in codes]
    assert next(e["sites"] for e in heard if e["event"] == "round") == (["a", "c"] if codes else ["a", "b", "c"])


def test_a_superlink_that_is_away_ends_the_lease(make_job: Callable[..., Job], engine: InProcess) -> None:
    """It is no fault of a site's: the run goes on from its checkpoint under another Flower run."""
    coordinator, grid, _ = federation(make_job(), lambda i: engine.handler(i.site).handle(i))

    def away(ids: Iterable[str]) -> list[Message]:
        raise httpx.ConnectError("nobody there")

    grid.pull_messages = away  # type: ignore[method-assign]
    with pytest.raises(httpx.ConnectError):
        coordinator.run()


class Clock:
    """Time that goes on when something is said to take it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_looking_in_vain_takes_half_the_time_at_most(
    make_job: Callable[..., Job], engine: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three looks of 0.2 s that find nothing are followed by 0.6 s of rest."""
    clock, looks = Clock(), 0
    monkeypatch.setattr(flower_executor, "time", clock)
    coordinator, grid, _ = federation(make_job(federation={"rounds": 1}), lambda i: engine.handler(i.site).handle(i))
    pull = grid.pull_messages

    def slow(ids: Iterable[str]) -> list[Message]:
        nonlocal looks
        looks += 1
        if looks > 3:
            return pull(ids)
        clock.now += 0.2
        return []

    grid.pull_messages = slow  # type: ignore[method-assign]
    coordinator.run()
    assert max(clock.slept) == pytest.approx(0.6)


def test_a_node_that_goes_offline_is_given_up(make_job: Callable[..., Job], engine: InProcess) -> None:
    def answer(instruction: Instruction) -> Any:
        if (instruction.site, instruction.kind) == ("b", "train"):
            grid.offline.add("b")
            return None
        return engine.handler(instruction.site).handle(instruction)

    coordinator, grid, heard = federation(make_job(federation={"rounds": 2}), answer, timeout=60.0)
    coordinator.run()
    assert [(e["site"], e["code"]) for e in heard if e["event"] == "rejected"] == [("b", "lost")]
    assert [e["sites"] for e in heard if e["event"] == "round"] == [["a", "c"]] * 2


def test_a_revoked_site_is_not_believed(make_job: Callable[..., Job], engine: InProcess) -> None:
    """Its answer of the very round in which it is revoked does not count, and it is asked no more."""

    def answer(instruction: Instruction) -> Any:
        if instruction.kind == "train":
            grid.roster.revoked.add("b")
        return engine.handler(instruction.site).handle(instruction)

    coordinator, grid, heard = federation(make_job(), answer)
    coordinator.run()
    assert [(e["site"], e["code"]) for e in heard if e["event"] == "rejected"] == [("b", "revoked")]
    assert ("evaluate", "b") not in grid.asked


def test_waiting_is_bounded_and_says_who_is_missing(make_job: Callable[..., Job], engine: InProcess) -> None:
    job = make_job(federation={"min_sites": 3, "wait": 0.1})
    coordinator, grid, heard = federation(
        job,
        lambda i: refusal(i, "not-approved") if i.site == "c" else engine.handler(i.site).handle(i),
    )
    grid.offline.add("a")
    with pytest.raises(DeploymentError, match=r"1 of 3 needed sites.*\(a: offline, c: not-approved\)"):
        coordinator.run()
    assert [e["missing"] for e in heard if e["event"] == "waiting"] == [{"a": "offline", "c": "not-approved"}]
    assert [(e["site"], e["code"]) for e in heard if e["event"] == "refused"] == [("c", "not-approved")]


def test_a_site_that_approves_later_joins(make_job: Callable[..., Job], engine: InProcess) -> None:
    probes = []

    def answer(instruction: Instruction) -> Any:
        if instruction.site == "c" and instruction.kind == "probe":
            probes.append(1)
            if len(probes) < 3:
                return refusal(instruction, "not-approved")
        return engine.handler(instruction.site).handle(instruction)

    coordinator, _, heard = federation(make_job(federation={"min_sites": 3, "wait": 5}), answer)
    coordinator.run()
    assert next(e["sites"] for e in heard if e["event"] == "round") == ["a", "b", "c"]


def test_another_model_is_refused_before_training_and_the_difference_named(
    make_job: Callable[..., Job], engine: InProcess
) -> None:
    other = Benches()

    def answer(instruction: Instruction) -> Any:
        reply = engine.handler(instruction.site).handle(instruction)
        if instruction.kind == "probe" and instruction.site == "b":
            narrow = instruction.job.replace(model={"hidden": [7]})
            return replace(reply, code="fingerprint", document=other(narrow).spec.document)
        return reply

    coordinator, grid, heard = federation(make_job(), answer)
    coordinator.run()
    (refused,) = [e for e in heard if e["event"] == "refused"]
    assert refused["site"] == "b"
    assert refused["detail"].startswith("'model.hidden")
    assert ("train", "b") not in grid.asked


def test_a_silent_node_holds_nobody_up(
    make_job: Callable[..., Job], engine: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that hangs in its probe costs one bounded wait, not the round timeout of every round."""
    import time

    monkeypatch.setattr(flower_executor, "PROBE_SECONDS", 0.2)
    answered = lambda i: None if i.site == "c" else engine.handler(i.site).handle(i)  # noqa: E731
    coordinator, grid, heard = federation(make_job(federation={"rounds": 4}), answered, timeout=600.0)
    began = time.monotonic()
    coordinator.run()
    assert time.monotonic() - began < 60
    assert [k for k, site in grid.asked if site == "c"].count("probe") <= 2
    assert [e["sites"] for e in heard if e["event"] == "round"] == [["a", "b"]] * 4
