"""`node.json`: what the node process says about itself, and the lock that makes it the only one in its folder."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from shared_models.errors import ConfigError, DeploymentError
from shared_models.files import write_whole

State = Literal["starting", "online", "waiting", "refused", "stopped"]
FILE, LOCK = "node.json", "node.lock"


@dataclass(frozen=True)
class Status:
    """The state of a node process.

    Attributes:
        pid: of the node process; 0 when it never ran.
        state: `starting`; `online`: messages are answered; `waiting`: it tries again by itself; `refused`: somebody
            must act, though it still tries; `stopped`.
        reason: one line for a person, empty when online.
        since: Unix seconds of the last change of state or reason.
        restarts: how often the SuperNode or the worker had to be started again.
    """

    pid: int
    state: State
    reason: str
    since: float
    restarts: int


def write(node_dir: Path, status: Status) -> None:
    """Replace `node.json` at once."""
    write_whole(node_dir / FILE, json.dumps(asdict(status), indent=1) + "\n")


def read(node_dir: Path) -> Status:
    """The last status; where the process is gone without a word, `stopped` with that as the reason.

    Raises:
        ConfigError: the folder is missing or `node.json` is broken.
    """
    if not node_dir.is_dir():
        raise ConfigError(
            f"there is no node in {node_dir}", hint="Enroll first: fedzoo client enroll INVITE --dir NODE"
        )
    try:
        status = Status(**json.loads((node_dir / FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Status(0, "stopped", "it was never started", 0.0, 0)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"cannot read {node_dir / FILE}: {error}", hint="Delete it and start the node") from None
    if status.state != "stopped" and not _locked(node_dir):
        return replace(status, state="stopped", reason="its process is gone without having been stopped")
    return status


@contextmanager
def only_process(node_dir: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel frees it however this process ends.

    Raises:
        DeploymentError: another node process has it.
    """
    with (node_dir / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise DeploymentError(
                f"this node runs already, as process {file.read().strip() or 'unknown'} on {node_dir}",
                hint="Stop that one first",
                code="already-running",
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _locked(node_dir: Path) -> bool:
    with (node_dir / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
