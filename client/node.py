"""The node process: keeps Flower's SuperNode and the resident worker alive, and says in one line what goes on.

Both are children of this process and die with it. Whatever happens to them, to the server or to the network, the node
goes on trying; where a person must act (a revoked key, a wrong certificate) it says so and tries slowly.
"""

from __future__ import annotations

import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from client import status
from client.config import NodeFolder, load
from client.pace import Pace
from client.status import State, Status
from client.verdict import REVOKED, UNREACHABLE, WORKER_READY, WORKER_SENDING, Verdict, of_exit, of_line
from shared_models.errors import ConfigError, DeploymentError, FedzooError
from shared_models.files import private_folder, write_whole
from shared_models.process import Child, flower_environment, free_port, require_free_port

LOOPBACK = "127.0.0.1"
TICK_SECONDS = 0.2
STABLE_SECONDS = 30.0
ASK_SECONDS = 5.0
_RANK: dict[State, int] = {"refused": 0, "waiting": 1, "starting": 2, "online": 3, "stopped": 4}


def run(
    node_dir: Path,
    approve: Sequence[str],
    approve_all: bool,
    stop: threading.Event,
    on_event: Callable[[str], None],
) -> None:
    """Keep the node running until `stop` is set. Call it from the main thread, which the children's lives hang on.

    Args:
        node_dir: an enrolled node's folder; gets `node.json` and `logs/`.
        approve: job hashes this site agrees to, besides those in `client.toml`.
        approve_all: agree to every job.
        stop: ends it within seconds.
        on_event: called with one line for each change of state.

    Raises:
        ConfigError: the folder is not an enrolled node's.
        DeploymentError: the node runs already.
    """
    node_dir = node_dir.resolve()
    folder = NodeFolder(node_dir)
    load(node_dir)
    for path in (folder.ca, folder.key):
        if not path.is_file():
            raise ConfigError(f"there is no {path}", hint="Enroll this node again")
    with status.only_process(node_dir):
        node = _Node(folder, approve, approve_all, on_event)
        try:
            while not stop.is_set():
                node.tick()
                stop.wait(TICK_SECONDS)
        finally:
            node.stop()


class _Part:
    """One child process that is started, watched and started again.

    Args:
        name: `supernode` or `worker`; also the log's name.
        command: what to run, made anew for each start.
        folder: the node's folder.
    """

    def __init__(self, name: str, command: Callable[[], list[str]], folder: NodeFolder) -> None:
        self.name = name
        self.command = command
        self.log = folder.logs / f"{name}.log"
        self.environment = _environment(folder)
        self.child: Child | None = None
        self.verdict = Verdict("starting", f"the {name} is starting")
        self.restarts = -1
        self._pace = Pace(1.0, 15.0)
        self._due = 0.0
        self._started = 0.0

    def tick(self) -> list[str]:
        """Start it when it is due; the lines it has written since the last tick."""
        if self.child is None:
            if time.monotonic() < self._due:
                return []
            self.child = Child(self.name, self.command(), self.log, self.environment)
            self._started = time.monotonic()
            self.restarts += 1
        return self.child.new_lines()

    def ended(self) -> tuple[int, str] | None:
        """Exit code and last lines where it has ended by itself, once."""
        if self.child is None or (code := self.child.exit_code()) is None:
            return None
        tail = self.child.tail(40)
        self.stop()
        if time.monotonic() - self._started > STABLE_SECONDS:
            self._pace.reset()
        return code, tail

    def later(self, verdict: Verdict) -> None:
        """Start it again after the verdict's pause."""
        self.verdict = verdict
        self._due = time.monotonic() + (self._pace.next() if verdict.pause is None else verdict.pause)

    def stop(self) -> None:
        """Stop the child, if there is one."""
        if self.child is not None:
            self.child.stop()
            self.child = None


class _Node:
    """Both parts together and what is said about them."""

    def __init__(
        self, folder: NodeFolder, approve: Sequence[str], approve_all: bool, on_event: Callable[[str], None]
    ) -> None:
        self.folder = folder
        self.config = load(folder.root)
        self.on_event = on_event
        self.port = free_port(LOOPBACK)
        self.secret = private_folder(folder.flower) / "worker.secret"
        write_whole(self.secret, secrets.token_bytes(32))
        self.approval = [word for job in approve for word in ("--approve", job)] + ["--approve-all"] * approve_all
        self.supernode = _Part("supernode", self._supernode_command, folder)
        self.worker = _Part("worker", self._worker_command, folder)
        self._refused_since: float | None = None
        self._requests = set(folder.requests.glob("*.toml"))
        self._told = Status(0, "stopped", "", 0.0, 0)
        self._tell()

    def tick(self) -> None:
        """Look at both parts once."""
        self._tick_supernode()
        self._tick_worker()
        self._tell_requests()
        self._tell()

    def stop(self) -> None:
        """Stop both parts: the SuperNode first, so that the server is told."""
        self.supernode.stop()
        self.worker.stop()
        self._tell(Verdict("stopped", "it was told to stop"))

    def _tick_supernode(self) -> None:
        part = self.supernode
        for line in part.tick():
            if verdict := of_line(line):
                part.verdict = verdict
        if part.verdict.state == "online" or part.verdict == UNREACHABLE:
            self._refused_since = None
        if ended := part.ended():
            now = time.monotonic()
            lasting = now - self._refused_since if self._refused_since is not None else 0.0
            verdict = of_exit(*ended, log_name=str(part.log), refused_for=lasting)
            if verdict.ask:
                self._refused_since = self._refused_since if self._refused_since is not None else now
                verdict = REVOKED if _is_revoked(self.folder.root) else verdict
            part.later(verdict)

    def _tick_worker(self) -> None:
        part = self.worker
        if any(WORKER_READY in line for line in part.tick()):
            part.verdict = Verdict("online")
        if ended := part.ended():
            code, tail = ended
            lines = tail.splitlines() or [""]
            why = lines[-1] if "error:" in lines[-1] else f"(exit code {code}); see {part.log}"
            part.later(Verdict("waiting", f"the worker has ended {why}; starting it again"))
            if WORKER_SENDING in lines[-1]:  # the SuperNode would wait for the rest of that reply for ever
                self.supernode.stop()
                self.supernode.later(Verdict("waiting", "a reply was cut off; starting the SuperNode anew", pause=0.0))

    def _tell(self, verdict: Verdict | None = None) -> None:
        """Write `node.json` and report one line where something has changed."""
        worst = verdict or min((self.supernode.verdict, self.worker.verdict), key=lambda v: _RANK[v.state])
        restarts = max(0, self.supernode.restarts) + max(0, self.worker.restarts)
        changed = (worst.state, worst.reason) != (self._told.state, self._told.reason)
        if not changed and restarts == self._told.restarts:
            return
        since = time.time() if changed else self._told.since
        self._told = Status(os.getpid(), worst.state, worst.reason, since, restarts)
        status.write(self.folder.root, self._told)
        if changed:
            online = f"site '{self.config.site}' answers {self.config.server.fleet}"
            self.on_event(f"{worst.state}: {worst.reason or online}")

    def _tell_requests(self) -> None:
        """Report each job that asks for approval, once as long as its request lies there."""
        known, self._requests = self._requests, set(self.folder.requests.glob("*.toml"))
        for path in sorted(self._requests - known):
            self.on_event(f"a job asks to run; read {path}, then: fedzoo client approve {path.stem}")

    def _supernode_command(self) -> list[str]:
        try:
            require_free_port(LOOPBACK, self.port, "the SuperNode's local API")
        except DeploymentError:
            self.port = free_port(LOOPBACK)
            self.worker.stop()  # its next start finds the new port
        return [
            *(sys.executable, "-P", "-m", "client.supernode"),
            *("--superlink", self.config.server.fleet, "--root-certificates", str(self.folder.ca)),
            *("--auth-supernode-private-key", str(self.folder.key), "--isolation", "process"),
            *("--host", LOOPBACK, "--port", str(self.port), "--superexec-auth-secret-file", str(self.secret)),
        ]

    def _worker_command(self) -> list[str]:
        return [
            *(sys.executable, "-P", "-m", "client.worker", "--node", str(self.folder.root)),
            *("--supernode", f"{LOOPBACK}:{self.port}", "--secret", str(self.secret), *self.approval),
        ]


def _environment(folder: NodeFolder) -> dict[str, str]:
    """Flower's, and ours to be found wherever the node was started."""
    environment = flower_environment(folder.flower)
    packages, known = str(Path(__file__).resolve().parents[1]), environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([packages, known] if known else [packages])
    return environment


def _is_revoked(node_dir: Path) -> bool:
    """Whether the membership service says, within some seconds, that this node is revoked, unknown or expired."""
    answers: list[bool] = []

    def ask() -> None:
        from client.enroll import whoami

        try:
            answers.append(whoami(node_dir).status == "revoked")
        except FedzooError as error:
            answers.append(error.code in ("unknown-node", "certificate-refused"))

    thread = threading.Thread(target=ask, name="whoami", daemon=True)
    thread.start()
    thread.join(ASK_SECONDS)
    return answers == [True]
