"""The resident worker against a real SuperNode and SuperLink, and what it relies on inside flwr."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import inspect
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock
from zipfile import BadZipFile

import httpx
import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.cli.install import install_from_fab
from flwr.common.config import get_fused_config_from_fab
from flwr.common.constant import ErrorCode
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.supercore.run import RunNotRunningException
from flwr.supernode import start_client_internal
from flwr.supernode.runtime import run_clientapp

from client import flower_app, supernode, worker
from server.flower_control import build_fab
from shared_models.errors import ConfigError
from shared_models.process import Child, flower_environment, free_port
from shared_models.weights import find_weights

ROOT = Path(worker.__file__).parents[1]


def test_flower_is_the_version_whose_inside_is_used():
    assert importlib.metadata.version("flwr") == "1.39.0"


def test_worker_follows_flowers_own_order_of_calls():
    """What `pull_task_input` of this version calls is what the worker calls, the FAB left aside."""
    source = inspect.getsource(run_clientapp.pull_task_input)
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = {f.attr if isinstance(f, ast.Attribute) else f.id for f in calls}
    ours = inspect.getsource(worker._pull)
    assert names - {"run_from_proto", "fab_from_proto", "RuntimeError", "PullAppMessagesRequest"} == {
        name for name in names if f"{name}(" in ours and name != "PullAppMessagesRequest"
    }
    assert "fab" not in ours.replace("(the FAB)", "")


def test_flowers_main_loop_uses_its_clock_only_to_sleep():
    tree = ast.parse(inspect.getsource(start_client_internal))
    used = [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "time"]
    assert used == ["sleep"] * len(used)
    assert len(used) == 3
    assert "time.sleep(3)" in inspect.getsource(start_client_internal)


def test_pauses_of_the_main_loop_follow_the_traffic(monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(supernode, "time", SimpleNamespace(sleep=slept.append))
    monkeypatch.setattr(start_client_internal, "time", time)
    monkeypatch.setattr(pull_objects, "__kwdefaults__", dict(pull_objects.__kwdefaults__))
    assert pull_objects.__kwdefaults__["initial_backoff"] == 1
    supernode.shorten_pauses()
    for seconds in (3, 3, 0.5, 3):
        start_client_internal.time.sleep(seconds)
    assert slept == pytest.approx([0.2, 0.204, 0.1, 0.2])
    for _ in range(200):
        start_client_internal.time.sleep(3)
    assert slept[-1] == 3.0
    assert pull_objects.__kwdefaults__["initial_backoff"] == 0.05


@pytest.mark.parametrize(("named", "folder"), [(None, "weights"), ("", "weights"), ("theirs", "theirs")])
def test_a_node_looks_for_weights_in_its_own_folder_and_not_where_it_was_started(tmp_path, monkeypatch, named, folder):
    """Also by the file's own name: what lies where the worker was started is no job's business."""
    monkeypatch.setenv("FEDZOO_WEIGHTS", "")  # is put back afterwards, as it was before
    monkeypatch.delenv("FEDZOO_WEIGHTS") if named is None else monkeypatch.setenv(
        "FEDZOO_WEIGHTS", named and str(tmp_path / named)
    )
    for name in ("weights", "theirs", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "here" / "private.pt").touch()
    (tmp_path / folder / "shared.pt").touch()
    monkeypatch.chdir(tmp_path / "here")
    found = []

    def app(*_, **__):
        found.extend(find_weights(name) for name in ("private.pt", "shared.pt"))
        raise ConfigError("no node")

    monkeypatch.setattr(flower_app, "client_app", app)
    with pytest.raises(SystemExit):
        worker.main(["--node", "..", "--supernode", "127.0.0.1:1"])
    assert found == [None, (tmp_path / folder / "shared.pt")]


@pytest.mark.parametrize("where", ["pull_object", "confirm_message_received"])
def test_the_task_of_a_run_that_stops_meanwhile_is_ended(monkeypatch, where):
    """Flower alone leaves it open, and the worker that takes it waits for objects that never come."""

    def receive() -> MagicMock:
        state, store = MagicMock(), MagicMock()
        state.create_task.return_value = 7
        store.preregister.return_value = ["object"]
        message, tree = MagicMock(), MagicMock()
        calls = {"pull_object": lambda run, name: b"", "confirm_message_received": lambda run, message: None}

        def stopped(*_):
            raise RunNotRunningException

        calls[where] = stopped
        found = start_client_internal._pull_and_store_message(
            state=state, object_store=store, node_config={}, receive=lambda: (message, tree), get_run=None,
            get_fab=None, trusted_entities=None, **calls,
        )  # fmt: skip
        assert found is None
        return state

    original = start_client_internal._pull_and_store_message
    assert not receive().finish_task.called, "mended in Flower: the mend here can go"
    monkeypatch.setattr(start_client_internal, "_pull_and_store_message", original)
    supernode.drop_tasks_of_stopped_runs()
    state = receive()
    assert state.finish_task.call_args.args == (7,)
    assert state.delete_messages.called


def test_the_supernode_does_not_open_the_app_that_a_server_sends(monkeypatch):
    """Flower alone unzips it to read its configuration, before anybody was asked."""

    def receive() -> MagicMock:
        state, store = MagicMock(), MagicMock()
        state.get_run.return_value = None
        store.preregister.return_value = []
        found = start_client_internal._pull_and_store_message(
            state=state, object_store=store, node_config={}, receive=lambda: (MagicMock(), MagicMock()),
            get_run=lambda run: MagicMock(), get_fab=lambda name, run: SimpleNamespace(content=b"no zip"),
            pull_object=lambda run, name: b"", confirm_message_received=lambda run, message: None,
            trusted_entities=None,
        )  # fmt: skip
        assert found is not None
        return state

    monkeypatch.setattr(start_client_internal, "get_fused_config_from_fab", get_fused_config_from_fab)
    with pytest.raises(BadZipFile):
        receive()
    supernode.leave_apps_closed()
    state = receive()
    assert state.set_run_series_context.call_args.args[1].run_config == {}
    assert state.store_fab.called


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        (True, False),
        (False, True),
        (httpx.HTTPStatusError("", request=None, response=httpx.Response(401)), True),
        (httpx.HTTPStatusError("", request=None, response=httpx.Response(503)), False),
        (httpx.ConnectError(""), False),
    ],
)
def test_heartbeat_gives_up_a_task_only_when_it_is_refused(monkeypatch, answer, refused):
    beats = []

    def beat(_request):
        beats.append(1)
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(success=answer)

    monkeypatch.setattr(worker, "HEARTBEAT_SECONDS", 0.01)
    with worker._Heartbeat(SimpleNamespace(SendTaskHeartbeat=beat)) as heartbeat:
        time.sleep(0.2)
    assert heartbeat.refused.is_set() == refused
    assert len(beats) == 1 if refused else len(beats) > 1


def test_the_reply_of_a_task_that_was_given_up_is_dropped(monkeypatch):
    events: list[str] = []

    class Given_up(worker._Heartbeat):  # noqa: N801
        def _beat(self) -> None:
            self.refused.set()

    monkeypatch.setattr(worker, "_Heartbeat", Given_up)
    monkeypatch.setattr(worker, "_pull", lambda task: (None, None))
    monkeypatch.setattr(worker, "_answer", lambda *_: time.sleep(0.1) or (None, "completed", ""))
    monkeypatch.setattr(worker, "push_message", lambda *_: pytest.fail("a reply was sent"))
    worker._perform(None, None, events.append)
    assert events == ["the SuperNode has given this task up; its reply is dropped"]


def echo(message: Message, _: Context) -> Message:
    word = message.content["in"]["word"]
    if word == "fail":
        raise RuntimeError("CANARY in the text", Path("/data/CANARY.png"))
    if word == "none":
        return None
    if word.startswith("sleep"):
        time.sleep(float(word.split()[1]))
    content = RecordDict({"out": ConfigRecord({"word": word, "pid": os.getpid()})})
    if word == "large":
        content["tensors"] = ArrayRecord([np.arange(1_000_000, dtype=np.float32)])
    return Message(content, reply_to=message)


class Site:
    """A SuperNode of one registered key, and the worker in a thread of the test."""

    def __init__(self, server, folder: Path) -> None:
        self.node_id = server.register(server.new_key(folder / "key"))
        self.address = f"127.0.0.1:{free_port()}"
        self.home = folder / "flower"
        self.log = folder / "supernode.log"
        (folder / "secret").write_bytes(b"s" * 32)
        host, port = self.address.split(":")
        self._command = [
            *(sys.executable, "-P", "-m", "client.supernode", "--superlink", f"127.0.0.1:{server.fleet}"),
            *("--root-certificates", str(server.authority.ca), "--auth-supernode-private-key", str(folder / "key")),
            *("--isolation", "process", "--host", host, "--port", port),
            *("--superexec-auth-secret-file", str(folder / "secret")),
        ]
        self._stop = threading.Event()
        self.events: list[str] = []
        self._thread = threading.Thread(
            target=worker.serve,
            args=(self.address, echo, self._stop, self.events.append),
            kwargs={"secret": b"s" * 32},
        )
        self._thread.start()
        self.start()

    def start(self) -> None:
        environment = {**flower_environment(self.home), "PYTHONPATH": str(ROOT)}
        self.child = Child("supernode", self._command, self.log, environment)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(10)
        self.child.stop()
        assert not self._thread.is_alive()


@pytest.fixture
def site(flower_server, tmp_path: Path, wait_for) -> Iterator[Site]:
    site = Site(flower_server, tmp_path / "site")
    wait_for(lambda: flower_server.online(site.node_id), 30, "the SuperNode is online")
    yield site
    site.stop()


@pytest.fixture
def run(flower_server, site):
    with contextlib.closing(flower_server.start_run()) as run:
        yield run


@pytest.mark.deploy
def test_messages_are_answered_and_nothing_leaks(flower_server, site, run, caplog, tmp_path, monkeypatch):
    """Answers in about half a second; an exception's text is nowhere outside the node; the FAB is never unpacked."""
    home = tmp_path / "home of the test process"
    monkeypatch.setenv("FLWR_HOME", str(home))
    seconds = []
    for number in range(6):
        reply, took = run.ask(site.node_id, f"word {number}")
        assert reply.content["out"]["word"] == f"word {number}"
        assert reply.content["out"]["pid"] == os.getpid()
        seconds.append(took)
    print(f"seconds per message: {sorted(round(s, 2) for s in seconds)}")
    assert sorted(seconds)[3] < 3  # Flower alone: 3 s of sleep and more

    reply, _ = run.ask(site.node_id, "large")
    np.testing.assert_array_equal(reply.content["tensors"].to_numpy_ndarrays()[0], np.arange(1_000_000))

    with caplog.at_level(logging.ERROR, "fedzoo.client.worker"):
        reply, _ = run.ask(site.node_id, "fail")
    assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert reply.error.reason == worker.FAILURE
    assert "CANARY in the text" in caplog.text  # the node's own log has it
    reply, _ = run.ask(site.node_id, "none")
    assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    reply, _ = run.ask(site.node_id, "after")
    assert reply.content["out"]["word"] == "after"
    seen_by_the_server = [path for path in flower_server.folder.rglob("*") if path.is_file()]
    assert any(path.name == "state.db" for path in seen_by_the_server)
    for path in (*seen_by_the_server, site.log):
        assert b"CANARY" not in path.read_bytes(), path
    assert not [*site.home.rglob("apps"), *home.rglob("apps")]
    install_from_fab(build_fab(), skip_prompt=True)
    assert [*home.rglob("apps")]  # where Flower's own client process would have unpacked it

    with contextlib.closing(worker._acquirer(site.address, None)) as stranger, pytest.raises(httpx.HTTPStatusError):
        stranger.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))


@pytest.mark.deploy
@pytest.mark.slow
@pytest.mark.parametrize("beating", [True, False])
def test_a_task_longer_than_a_minute_lives_by_its_heartbeats(site, run, monkeypatch, beating):
    if not beating:
        monkeypatch.setattr(worker, "HEARTBEAT_SECONDS", 1000)
    reply, took = run.ask(site.node_id, "sleep 75", 120)
    if beating:
        assert took > 75
        assert reply.content["out"]["word"] == "sleep 75"
    else:
        assert reply.error.code == ErrorCode.CLIENT_APP_CRASHED
        time.sleep(20)  # the app ends; its late reply is refused, and the worker goes on
    reply, _ = run.ask(site.node_id, "after")
    assert reply.content["out"]["word"] == "after"


@pytest.mark.deploy
@pytest.mark.slow
def test_the_worker_survives_a_restart_of_the_supernode(flower_server, site, run, wait_for):
    site.child.stop()
    wait_for(lambda: any("does not answer" in event for event in site.events), 10, "the worker says so")
    site.start()
    wait_for(lambda: any("answers again" in event for event in site.events), 30, "the worker is back")
    wait_for(lambda: flower_server.online(site.node_id), 30, "the SuperNode is online")
    reply, _ = run.ask(site.node_id, "again")
    assert reply.content["out"]["word"] == "again"


def test_an_idle_worker_polls_slowly(monkeypatch):
    """With a SuperNode that has nothing: about 10 polls in the first second, 2 a second at most after a minute."""
    clock, polls = [0.0], []
    stop = SimpleNamespace(is_set=lambda: clock[0] > 120, wait=lambda s: clock.__setitem__(0, clock[0] + s))

    def acquire(_request):
        polls.append(clock[0])
        return SimpleNamespace(token="")

    monkeypatch.setattr(worker, "_acquirer", lambda *_: SimpleNamespace(AcquireTask=acquire, close=lambda: None))
    worker.serve("nowhere:1", echo, stop, lambda _: None)
    assert 9 <= sum(p < 1 for p in polls) <= 11
    assert sum(60 < p <= 120 for p in polls) in (119, 120, 121)
