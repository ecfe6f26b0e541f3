"""Child processes that never outlive their parent: how both the server and the node run Flower's programs."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from shared_models.errors import DeploymentError

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before any fork
_MAX_LOG_BYTES = 10_000_000
_TAIL_BYTES = 10_000


def _die_with_parent() -> None:
    """Ask the kernel to stop this process when its parent is gone, even by kill -9 (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def flower_environment(home: Path) -> dict[str, str]:
    """The environment of every Flower program: a private home, no telemetry, no update check."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    }


def program(name: str) -> str:
    """The path of a console script installed beside this interpreter.

    Raises:
        DeploymentError: it is not there.
    """
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise DeploymentError(f"the program '{name}' is not installed beside {sys.executable}", hint="Install fedzoo")
    return str(path)


def require_free_port(host: str, port: int, purpose: str) -> None:
    """Raise a DeploymentError that names the port where something already listens on it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise DeploymentError(
                f"port {port} on {host}, meant for {purpose}, cannot be used: {error.strerror}",
                hint="Stop what uses it or choose another port",
            ) from None


def free_port(host: str = "127.0.0.1") -> int:
    """A port that was free a moment ago."""
    return free_ports(1, host)[0]


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """So many different ports that were free a moment ago."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((host, 0))
        return [probe.getsockname()[1] for probe in probes]


class Child:
    """One supervised process in a session of its own, its output in a log file (one older one is kept, as `.1`).

    Call `new_lines` from time to time, else the log grows without bound.

    Start it from the main thread: the kernel ties its life to the thread that started it.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists() and log.stat().st_size > _MAX_LOG_BYTES:
            log.replace(log.with_name(f"{log.name}.1"))
        self._offset = self._read = log.stat().st_size if log.exists() else 0
        self._begun = self._before = b""  # a line that is not whole yet; the end of what has gone to `.1`
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=dict(env) if env is not None else None,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    @property
    def pid(self) -> int:
        """Process id, which is also the id of its group."""
        return self.process.pid

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self.process.poll()

    def tail(self, lines: int = 12) -> str:
        """The last lines this child (not an earlier one) wrote to its log."""
        written = self._before + self._written(self._offset)
        return "\n".join(written.decode(errors="replace").splitlines()[-lines:])

    def new_lines(self) -> list[str]:
        """The whole lines it wrote since the last call. A log that has grown too large begins anew."""
        found = self._written(self._read)
        self._read += len(found)
        if self._read > _MAX_LOG_BYTES:
            found += self._begin_anew()
        whole, _, self._begun = (self._begun + found).rpartition(b"\n")
        return whole.decode(errors="replace").splitlines()

    def _written(self, offset: int) -> bytes:
        """What is in the log from there on; nothing where somebody has removed it."""
        try:
            with self.log.open("rb") as source:
                source.seek(offset)
                return source.read()
        except FileNotFoundError:
            return b""

    def _begin_anew(self) -> bytes:
        """Copy the log to `.1` and empty it: the child, which appends, goes on at its start. What was not read yet.

        What it writes between the two, within microseconds, is lost. Where the disk is full there is no copy.
        """
        older = self.log.with_name(f"{self.log.name}.1")
        with self.log.open("r+b") as log:
            try:
                with older.open("wb") as sink:
                    shutil.copyfileobj(log, sink)
            except OSError:
                older.unlink(missing_ok=True)
            log.seek(self._read)
            unread = log.read()
            log.seek(max(self._offset, log.tell() - _TAIL_BYTES))
            self._before = log.read()
            log.truncate(0)
        self._offset = self._read = 0
        return unread

    def stop(self, grace: float = 8.0) -> None:
        """SIGTERM to the whole group, SIGKILL to what is left after `grace` seconds."""
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + grace
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return
