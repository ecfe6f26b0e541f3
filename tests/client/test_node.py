"""The node process with a real SuperLink, SuperNode and worker: it comes back from whatever is killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import client
from client import status
from client.config import ClientConfig, NodeFolder, save
from client.node import _Node
from client.node import run as run_node
from client.status import Status
from server.authority import Authority
from shared_models.errors import ConfigError, DeploymentError
from shared_models.process import free_port

ROOT = Path(client.__file__).parents[1]


def make_node(server, folder: Path, ca: Path | None = None) -> int:
    """An enrolled node's folder without the enrollment; returns Flower's node id."""
    node = NodeFolder(folder)
    for path in node.folders:
        path.mkdir(parents=True, exist_ok=True)
    node_id = server.register(server.new_key(node.key))
    node.ca.write_bytes((ca or server.authority.ca).read_bytes())
    nowhere = f"127.0.0.1:{free_port()}"
    addresses = {"fleet": f"127.0.0.1:{server.fleet}", "enrollment": nowhere, "membership": nowhere}
    data = {"folder": str(folder / "data"), "format": "imagefolder"}
    save(folder, ClientConfig.model_validate({"site": "a", "server": addresses, "data": data}))
    return node_id


def pid_of(folder: Path, part: str) -> int | None:
    """The process of this node that runs `client.<part>`; None when there is none."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().decode().split("\0")
            if f"client.{part}" in words and any(word.startswith(str(folder)) for word in words):
                return int(process.name)
    return None


class NodeProcess:
    """`fedzoo client start` as a process."""

    def __init__(self, folder: Path, node_id: int) -> None:
        self.folder, self.node_id = folder, node_id
        self.output = folder / "events.txt"
        code = "from client.cli import app; app()"
        command = [sys.executable, "-c", code, "start", "--dir", str(folder), "--approve-all"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        with self.output.open("w") as sink:
            self.process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)

    @property
    def events(self) -> str:
        return self.output.read_text()

    def state(self) -> str:
        return status.read(self.folder).state

    def children(self) -> list[int]:
        return [pid for part in ("supernode", "worker") if (pid := pid_of(self.folder, part))]

    def kill(self, part: str) -> None:
        os.kill(pid_of(self.folder, part), signal.SIGKILL)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()


@pytest.fixture
def node(flower_server, tmp_path: Path, wait_for) -> Iterator[NodeProcess]:
    folder = tmp_path / "node"
    node = NodeProcess(folder, make_node(flower_server, folder))
    try:
        wait_for(lambda: node.state() == "online", 60, "the node is online")
        yield node
    finally:
        node.stop()


@pytest.fixture
def run(flower_server, node):
    with contextlib.closing(flower_server.start_run()) as run:
        yield run


@pytest.mark.deploy
def test_a_node_answers_survives_its_workers_death_and_leaves_nothing_behind(node, run, wait_for):
    assert run.ask(node.node_id, "hello")[0].has_content()
    first = pid_of(node.folder, "worker")
    node.kill("worker")
    wait_for(lambda: pid_of(node.folder, "worker") not in (None, first), 20, "another worker")
    assert run.ask(node.node_id, "again")[0].has_content()
    wait_for(
        lambda: node.state() == "online", 20, "the node says so"
    )  # a worker may answer before its node has read it
    now = json.loads((node.folder / "node.json").read_text())
    assert (now["pid"], now["restarts"]) == (node.process.pid, 1)
    assert "waiting: the worker has ended (exit code -9)" in node.events
    assert re.fullmatch(r"\d\d:\d\d:\d\d online: site 'a' answers 127.0.0.1:\d+", node.events.splitlines()[-1])

    children = node.children()
    assert len(children) == 2
    node.process.kill()
    node.process.wait()
    wait_for(lambda: not node.children(), 15, "the kernel has told the children")
    assert status.read(node.folder) == Status(
        pid=node.process.pid,
        state="stopped",
        reason="its process is gone without having been stopped",
        since=now["since"],
        restarts=1,
    )


@pytest.mark.deploy
def test_a_wrong_certificate_authority_is_refused_with_its_reason(flower_server, tmp_path, wait_for):
    folder = tmp_path / "node"
    other = Authority.create(tmp_path / "other", ["localhost"])
    node = NodeProcess(folder, make_node(flower_server, folder, other.ca))
    try:
        wait_for(lambda: "refused: the server's certificate is not trusted" in node.events, 30, "the refusal")
        assert node.state() == "refused"
        assert node.process.poll() is None
    finally:
        node.stop()
    assert node.process.returncode == 0
    assert status.read(folder).state == "stopped"
    assert not node.children()


@pytest.mark.deploy
@pytest.mark.slow
def test_a_supernode_that_was_killed_comes_back_when_the_server_has_noticed(flower_server, node, run, wait_for):
    node.kill("supernode")
    wait_for(lambda: "the server still counts this node as online; trying again" in node.events, 20, "it says why")
    took = wait_for(lambda: node.state() == "online", 90, "the node is back")
    print(f"back after {took:.0f} s")
    assert run.ask(node.node_id, "again")[0].has_content()
    node.stop()
    assert not flower_server.online(node.node_id)  # a node that is stopped says goodbye


@pytest.mark.deploy
@pytest.mark.slow
def test_a_server_that_was_killed_finds_its_node_again(flower_server, node, run, wait_for):
    assert run.ask(node.node_id, "hello")[0].has_content()
    flower_server.kill()
    wait_for(lambda: "the server does not answer; trying again" in node.events, 30, "the node says so")
    assert node.state() == "waiting"
    time.sleep(5)
    flower_server.start()
    took = wait_for(lambda: node.state() == "online", 60, "the node is back")
    print(f"back after {took:.0f} s")
    with contextlib.closing(flower_server.start_run()) as another:
        assert another.ask(node.node_id, "again")[0].has_content()
    assert json.loads((node.folder / "node.json").read_text())["restarts"] == 0


@pytest.mark.deploy
@pytest.mark.slow
def test_a_revoked_node_says_so_and_stays(flower_server, node, wait_for):
    with flower_server.control() as control:
        control.unregister(node.node_id)
    wait_for(lambda: "the server ended the session" in node.events, 20, "the session's end")
    wait_for(lambda: node.state() == "refused", 120, "the refusal")
    assert "refused: the server does not accept this node's key" in node.events
    assert node.process.poll() is None


def test_a_worker_that_dies_while_it_sends_takes_the_supernode_with_it(tmp_path, monkeypatch, wait_for):
    """Half a reply would block a SuperNode for ever. Stand-ins for both programs: no Flower here."""
    node = NodeFolder(tmp_path)
    addresses = dict.fromkeys(("fleet", "enrollment", "membership"), "localhost:1")
    data = {"folder": str(tmp_path), "format": "imagefolder"}
    save(tmp_path, ClientConfig.model_validate({"site": "a", "server": addresses, "data": data}))
    supernode = "import time; print('SuperNode ID: 5', flush=True); time.sleep(60)"
    last = ["error: bad settings", "sending a reply"]

    def worker(_self) -> list[str]:
        end = f"time.sleep(0.5); print({last.pop()!r}, flush=True); os._exit(1)" if last else "time.sleep(60)"
        return [sys.executable, "-c", f"import os, time; print('worker ready', flush=True); {end}"]

    monkeypatch.setattr(_Node, "_supernode_command", lambda _: [sys.executable, "-c", supernode])
    monkeypatch.setattr(_Node, "_worker_command", worker)
    events: list[str] = []
    running = _Node(node, (), False, events.append)
    pids: list[int] = []

    def settled() -> bool:
        running.tick()
        child = running.supernode.child
        if child is not None and child.pid not in pids:
            pids.append(child.pid)
        return running.worker.restarts == 2 and status.read(tmp_path).restarts == 3 and "online" in events[-1]

    try:
        with status.only_process(tmp_path):
            wait_for(settled, 20, "the third worker is at rest")
    finally:
        running.stop()
    assert len(pids) == 2  # it was started anew once: for the reply, not for the error
    assert "waiting: the worker has ended error: bad settings; starting it again" in events
    assert events[-1] == "stopped: it was told to stop"


def test_a_taken_port_is_left_to_its_owner(tmp_path):
    addresses = dict.fromkeys(("fleet", "enrollment", "membership"), "localhost:1")
    data = {"folder": str(tmp_path), "format": "imagefolder"}
    save(tmp_path, ClientConfig.model_validate({"site": "a", "server": addresses, "data": data}))
    node = _Node(NodeFolder(tmp_path), (), False, lambda _: None)
    first = node.port
    assert str(first) in node._supernode_command()
    with socket.socket() as other:
        other.bind(("127.0.0.1", first))
        other.listen()
        assert str(first) not in node._supernode_command()
    assert f"127.0.0.1:{node.port}" in node._worker_command()
    assert node.port != first


def test_the_folder_must_be_an_enrolled_nodes(tmp_path):
    with pytest.raises(ConfigError, match=r"client\.toml"):
        run_node(tmp_path, (), False, threading.Event(), print)
    addresses = dict.fromkeys(("fleet", "enrollment", "membership"), "localhost:1")
    data = {"folder": str(tmp_path), "format": "imagefolder"}
    save(tmp_path, ClientConfig.model_validate({"site": "a", "server": addresses, "data": data}))
    with pytest.raises(ConfigError, match=r"ca\.crt"):
        run_node(tmp_path, (), False, threading.Event(), print)


def test_one_process_a_folder(tmp_path):
    refused = pytest.raises(DeploymentError, match=f"process {os.getpid()} ")
    with status.only_process(tmp_path), refused, status.only_process(tmp_path):
        pytest.fail("two processes in one folder")
    with status.only_process(tmp_path):
        assert (tmp_path / "node.lock").read_text() == f"{os.getpid()}\n"


def test_status_of_a_node_that_never_ran_and_of_a_broken_file(tmp_path):
    assert status.read(tmp_path).reason == "it was never started"
    now = Status(1, "online", "", 5.0, 2)
    status.write(tmp_path, now)
    with status.only_process(tmp_path):
        assert status.read(tmp_path) == now
    (tmp_path / "node.json").write_text("{")
    with pytest.raises(ConfigError, match=r"node\.json"):
        status.read(tmp_path)
    with pytest.raises(ConfigError, match="no node in"):
        status.read(tmp_path / "absent")


def test_a_job_that_asks_is_reported_once_each_time(tmp_path):
    said: list[str] = []
    node = object.__new__(_Node)
    node.folder, node.on_event, node._requests = NodeFolder(tmp_path), said.append, set()
    node.folder.requests.mkdir()
    request = node.folder.requests / f"{'a' * 64}.toml"
    request.touch()
    node._tell_requests()
    node._tell_requests()
    assert said == [f"a job asks to run; read {request}, then: fedzoo client approve {'a' * 64}"]
    request.unlink()  # approved, withdrawn, and asked for again
    node._tell_requests()
    request.touch()
    node._tell_requests()
    assert said == said[:1] * 2
