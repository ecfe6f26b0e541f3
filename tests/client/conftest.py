"""A real SuperLink for the node's tests. The test itself plays Flower's ServerApp: it takes the run's task."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import run_from_proto
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from server.authority import Authority
from server.flower_control import FlowerControl
from shared_models.errors import DeploymentError
from shared_models.process import Child, flower_environment, free_ports, program


def _wait_for(condition, seconds: float, what: str) -> float:
    """Poll until `condition()` is true; returns the seconds it took, fails the test when it never was."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if condition():
            return time.monotonic() - began
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s: {what}")


class Run:
    """One Flower run, its ServerApp being the test. Heartbeats keep it alive."""

    def __init__(self, server: FlowerServer) -> None:
        with server.control() as control:
            self.run_id = control.start_run({})
        with contextlib.closing(server.runtime()) as acquirer:
            request = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP.value])
            token = acquirer.AcquireTask(request).token
        self._client = server.runtime(token)
        pulled = self._client.PullTaskInput(PullTaskInputRequest())
        self.grid = HttpGrid(server.control_address, False, server.authority.ca.read_bytes(), token=token)
        self.grid.set_run(run_from_proto(pulled.run))
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = pulled.task_id, self.run_id, SUPERLINK_NODE_ID
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._over.wait(10):
            with contextlib.suppress(Exception):  # while the server is down
                self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())

    def send(self, node_id: int, word: str) -> str:
        """Push one message for a node; returns its id."""
        content = RecordDict({"in": ConfigRecord({"word": word})})
        (sent,) = self.grid.push_messages([Message(content, node_id, "train")])
        return sent

    def reply(self, message_id: str, seconds: float) -> tuple[Message, float]:
        """The reply to a message and the seconds it took to come."""
        replies: list[Message] = []
        took = _wait_for(
            lambda: replies.extend(self.grid.pull_messages([message_id])) or replies, seconds, "a reply came"
        )
        return replies[0], took

    def ask(self, node_id: int, word: str, seconds: float = 40) -> tuple[Message, float]:
        """Send, and wait for the reply."""
        return self.reply(self.send(node_id, word), seconds)

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._client.close()


@dataclass
class FlowerServer:
    """SuperLink as `fedzoo server start` runs it, except that it starts no ServerApp."""

    folder: Path
    authority: Authority
    ports: list[int] = field(default_factory=lambda: free_ports(2))
    child: Child | None = None

    @property
    def fleet(self) -> int:
        return self.ports[0]

    @property
    def port(self) -> int:
        return self.ports[1]

    @property
    def control_address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "superlink.log").read_text()

    def control(self) -> FlowerControl:
        return FlowerControl(self.control_address, self.authority.ca)

    def runtime(self, token: str = "") -> RuntimeHttpClient:
        interceptors = [RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")]
        if token:
            interceptors.append(RuntimeTokenHttpInterceptor(token=token))
        ca = self.authority.ca.read_bytes()
        return RuntimeHttpClient.from_server_address(self.control_address, False, ca, interceptors)

    def start(self) -> None:
        command = [
            program("flower-superlink"),
            *("--host", "127.0.0.1", "--port", str(self.port), "--fleet-api-address", f"127.0.0.1:{self.fleet}"),
            *("--ssl-ca-certfile", str(self.authority.ca), "--ssl-certfile", str(self.authority.server)),
            *("--ssl-keyfile", str(self.authority.server_key), "--database", str(self.folder / "state.db")),
            *("--enable-supernode-auth", "--disable-runtime-dependency-installation", "--isolation", "process"),
        ]
        environment = flower_environment(self.folder / "flower")
        self.child = Child("superlink", command, self.folder / "superlink.log", environment)
        _wait_for(self.answers, 60, "SuperLink answers")

    def answers(self) -> bool:
        try:
            with self.control() as control:
                control.nodes()
        except DeploymentError:
            return False
        return True

    def kill(self) -> None:
        assert self.child is not None
        self.child.stop(grace=0)

    def online(self, node_id: int) -> bool:
        with self.control() as control:
            return any(node.node_id == node_id and node.online for node in control.nodes())

    def start_run(self) -> Run:
        return Run(self)

    def new_key(self, path: Path) -> bytes:
        """Make a site's key file; returns its public half as Flower registers it."""
        key = ec.generate_private_key(ec.SECP384R1())
        path.parent.mkdir(parents=True, exist_ok=True)
        encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH
        path.write_bytes(key.private_bytes(encoding, form, serialization.NoEncryption()))
        path.chmod(0o600)
        return key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)

    def register(self, public_key: bytes) -> int:
        with self.control() as control:
            return control.register(public_key)


@pytest.fixture
def wait_for():
    """`wait_for(condition, seconds, what)`: poll; returns the seconds it took."""
    return _wait_for


@pytest.fixture
def flower_server(tmp_path: Path) -> Iterator[FlowerServer]:
    """A running SuperLink on free loopback ports, with a certificate authority of its own."""
    folder = tmp_path / "server"
    folder.mkdir()
    server = FlowerServer(folder, Authority.create(folder / "pki", ["localhost"]))
    server.start()
    yield server
    server.kill()
