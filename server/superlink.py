"""Flower's SuperLink as a supervised child process.

Control and Runtime listen on loopback only, because whoever reaches them can start runs; Fleet is public, over TLS,
and takes registered node keys only.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import signal
import site
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path

import server
from server.authority import Authority
from server.config import LOOPBACK, ServerConfig, ServerFolder, no_proxy
from shared_models.errors import DeploymentError
from shared_models.files import private_folder
from shared_models.process import Child, flower_environment, program, require_free_port

START_SECONDS = 90.0
FIRST_WAIT, LONGEST_WAIT, STABLE_SECONDS = 1.0, 30.0, 60.0
log = logging.getLogger("fedzoo.server.superlink")


class SuperLink:
    """Start it and call `supervise` again and again from the main thread: the kernel ties the child to that thread."""

    def __init__(self, folder: ServerFolder, config: ServerConfig, authority: Authority) -> None:
        self.folder = folder
        self.config = config
        self.authority = authority
        self.home = folder.flower.resolve()
        self._child: Child | None = None
        self._started = 0.0
        self._wait = FIRST_WAIT
        self._retry_at: float | None = None

    def start(self, give_up: Callable[[], bool] = lambda: False) -> None:
        """Start SuperLink and return when it answers, or when `give_up` says so.

        Raises:
            DeploymentError: a port is taken, or it ended or stayed silent for 90 s; with the end of its log.
        """
        self.stop()
        host = self.config.bind.strip("[]")
        require_free_port(host, self.config.ports.fleet, "SuperNodes ([ports] fleet)")
        require_free_port(LOOPBACK, self.config.ports.control, "Flower's Control API ([ports] control)")
        child = self._spawn()
        deadline = time.monotonic() + START_SECONDS
        while not self.healthy():
            if give_up():
                return
            ended = child.exit_code()
            if ended is not None or time.monotonic() > deadline:
                state = f"ended with code {ended}" if ended is not None else f"is silent after {START_SECONDS:.0f} s"
                tail = child.tail()
                self.stop()
                raise DeploymentError(f"SuperLink {state}. The end of {child.log}:\n{tail}")
            time.sleep(0.1)

    def supervise(self) -> bool:
        """Start SuperLink again, with growing pauses, where it has ended; True when it was started just now."""
        now = time.monotonic()
        if self._child is not None:
            self._child.new_lines()  # nobody reads them here, but so its log stays within bounds
        if self._child is not None and (code := self._child.exit_code()) is not None:
            self._wait = FIRST_WAIT if now - self._started > STABLE_SECONDS else min(2 * self._wait, LONGEST_WAIT)
            log.error(
                "SuperLink ended with code %s; it starts again in %.0f s. Its log: %s",
                code,
                self._wait,
                self._child.log,
            )
            self.stop()
            self._retry_at = now + self._wait
        if self._retry_at is None or now < self._retry_at:
            return False
        self._spawn()
        return True

    def healthy(self) -> bool:
        """Whether it answers its health check."""
        return is_healthy(self.config, self.authority)

    def stop(self) -> None:
        """Stop it and all it started, also what an earlier one has left behind."""
        self._retry_at = None
        end_processes(self.home)
        if self._child is not None:
            self._child.stop()
            self._child = None

    def _spawn(self) -> Child:
        command = [
            program("flower-superlink"),
            *("--host", LOOPBACK, "--port", str(self.config.ports.control)),
            *("--fleet-api-address", f"{self.config.bind}:{self.config.ports.fleet}"),
            *("--ssl-ca-certfile", str(self.authority.ca.resolve())),
            *("--ssl-certfile", str(self.authority.server.resolve())),
            *("--ssl-keyfile", str(self.authority.server_key.resolve())),
            *("--database", str(self.home / "state.db")),
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
        ]
        private_folder(self.home)
        self._child = Child("superlink", command, self.folder.logs / "superlink.log", self._environment())
        self._started = time.monotonic()
        self._retry_at = None
        return self._child

    def _environment(self) -> dict[str, str]:
        """SuperLink starts `flower-superexec` and the ServerApp by name: they and our packages must be found."""
        environment = flower_environment(self.home)
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
        environment["no_proxy"] = no_proxy(environment)
        packages = Path(server.__file__).resolve().parents[1]
        if packages not in [Path(folder).resolve() for folder in site.getsitepackages()]:
            known = environment.get("PYTHONPATH")
            environment["PYTHONPATH"] = os.pathsep.join([str(packages), known] if known else [str(packages)])
        return environment


def end_processes(home: Path, grace: float = 5.0) -> None:
    """End every process that has `home` as its Flower home: SIGTERM, and SIGKILL after `grace` seconds.

    SuperLink's `flower-superexec` and `flwr-serverapp` live in sessions of their own and outlive a killed SuperLink; an
    old ServerApp must not go on writing beside a new one. Their environment tells whose they are.
    """
    for pid in _processes(home):
        _signal(pid, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while (left := _processes(home)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        _signal(pid, signal.SIGKILL)


def _processes(home: Path) -> list[int]:
    wanted = f"FLWR_HOME={home}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # it has just ended, or belongs to another user
            continue
    return found


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def is_healthy(config: ServerConfig, authority: Authority) -> bool:
    """Whether this server's SuperLink answers on its Control port."""
    context = ssl.create_default_context(cafile=str(authority.ca))
    connection = http.client.HTTPSConnection(LOOPBACK, config.ports.control, timeout=2.0, context=context)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
