"""The server in one foreground process: SuperLink, the enrollment service and the membership service."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

import grpc

from server.authority import Authority
from server.config import ServerFolder, load
from server.enrollment import start_services
from server.expiry import may_connect
from server.flower_control import FlowerControl
from server.nodes import Roster
from server.runs import renew_leases
from server.superlink import SuperLink
from shared_models.errors import DeploymentError
from shared_models.process import require_free_port

POLL_SECONDS = 0.2
RENEW_SECONDS = 3.0
LOOK_SECONDS = 3600.0  # how long a site's certificate may have ended before its node is shut out
log = logging.getLogger("fedzoo.server")


def serve(server_dir: Path, on_ready: Callable[[], None] = lambda: None) -> None:
    """Run the server until SIGINT or SIGTERM, then stop everything it started. Call it from the main thread.

    Args:
        server_dir: a folder made by `fedzoo server init`.
        on_ready: called once, when nodes can enroll and connect.

    Raises:
        ConfigError: the folder is not a server's.
        DeploymentError: it runs already, a port is taken, or SuperLink does not start (with the end of its log).
    """
    os.umask(0o077)
    folder = ServerFolder(server_dir)
    config = load(server_dir)
    authority = Authority.load(folder.pki)
    roster = Roster(folder.nodes)
    with _alone(folder), _stop_signals() as stop, ExitStack() as running:
        for port, purpose in ((config.ports.enrollment, "enrollment"), (config.ports.membership, "membership")):
            require_free_port(config.bind.strip("[]"), port, f"the {purpose} service ([ports] {purpose})")
        superlink = SuperLink(folder, config, authority)
        running.callback(superlink.stop)
        superlink.start(give_up=stop.is_set)
        if stop.is_set():
            return
        control = running.enter_context(FlowerControl(config.control, authority.ca))
        reconcile(roster, control)
        for service in start_services(authority, roster, control, config):
            running.callback(_stop_service, service)
        resume(folder, control)
        on_ready()
        lost, due, look = False, 0.0, time.monotonic() + LOOK_SECONDS
        while not stop.wait(POLL_SECONDS):
            lost = superlink.supervise() or lost
            with suppress(DeploymentError):  # SuperLink is not up yet; the next turn tries again
                if lost or time.monotonic() >= look:
                    shut_out(roster, control)
                    look = time.monotonic() + LOOK_SECONDS
                if lost:
                    resume(folder, control)
                    lost = False
                elif time.monotonic() >= due:
                    due = time.monotonic() + RENEW_SECONDS
                    renew(folder, control)


def reconcile(roster: Roster, control: FlowerControl) -> None:
    """Make Flower know exactly the nodes that may connect: register those it lacks, unregister all others."""
    active = {node.public_key: node for node in roster.nodes() if may_connect(node)}
    known = {node.public_key: node for node in control.nodes()}
    for key in known.keys() - active.keys():
        control.unregister(known[key].node_id)
    for key, node in active.items():
        try:
            node_id = known[key].node_id if key in known else control.register(key)
        except DeploymentError as error:
            log.error("site '%s' cannot connect until it is revoked and enrolled anew: %s", node.site, error)
            continue
        if node_id != node.node_id:
            roster.set_node_id(node.serial, node_id)


def shut_out(roster: Roster, control: FlowerControl) -> None:
    """Unregister what was revoked while SuperLink was away, and what has ended meanwhile.

    A key that is being enrolled just now is left alone.
    """
    barred = {node.public_key for node in roster.nodes() if not may_connect(node)}
    for node in control.nodes():
        if node.public_key in barred:
            control.unregister(node.node_id)


def resume(folder: ServerFolder, control: FlowerControl) -> None:
    """After a start of SuperLink: end the Flower runs of the one before, whose processes are gone, and lease anew.

    Left alone, Flower would take minutes to notice.
    """
    for run, state in control.runs().items():
        if not state.startswith("finished"):
            control.stop_run(run)
    renew(folder, control)


def renew(folder: ServerFolder, control: FlowerControl) -> None:
    """Give every run whose process is gone a new lease."""
    for line in renew_leases(folder.runs, control, folder.root):
        log.info(line)


@contextmanager
def _alone(folder: ServerFolder) -> Iterator[None]:
    """Hold the server's folder; the kernel lets go of it when this process ends, however it ends."""
    with folder.lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DeploymentError(
                f"the server in {folder.root} is running already", hint="See: fedzoo server status"
            ) from None
        yield


def _stop_service(service: grpc.Server) -> None:
    service.stop(grace=1.0).wait()


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets; the handlers that were there before come back afterwards."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
