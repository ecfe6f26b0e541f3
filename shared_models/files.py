"""Files written whole or not at all, and TOML read with errors a person understands."""

from __future__ import annotations

import fcntl
import os
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared_models.errors import ConfigError

PRIVATE_FILE = 0o600
PRIVATE_FOLDER = 0o700
LOCK_PAUSE = 0.005


def write_whole(path: Path, data: bytes | str, mode: int = PRIVATE_FILE) -> None:
    """Write beside `path` and rename, so that no reader ever sees half a file; `mode` holds from the first byte."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    content = data.encode() if isinstance(data, str) else data
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as sink:
            os.fchmod(sink.fileno(), mode)
            sink.write(content)
            sink.flush()
            os.fsync(sink.fileno())
        partial.replace(path)
        sync_folder(path.parent)  # the rename itself must outlast a power cut
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Make the names in a folder outlast a power cut."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """Hold the lock file `path`, which is made where it is missing; the kernel frees it however this process ends.

    Raises:
        TimeoutError: another holder, in this process or another, has kept it for so many seconds.
    """
    until = time.monotonic() + seconds
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, PRIVATE_FILE)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TimeoutError(f"another process has held {path} for {seconds:g} s") from None
                time.sleep(LOCK_PAUSE)
        yield
    finally:
        os.close(descriptor)


def private_folder(path: Path) -> Path:
    """Make `path` and its parents; `path` itself is for this user alone (0700)."""
    path.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
    path.chmod(PRIVATE_FOLDER)
    return path


def read_toml(path: Path, hint: str = "") -> dict[str, Any]:
    """The tables of a TOML file.

    Args:
        path: the file.
        hint: what to do when it is not there.

    Raises:
        ConfigError: it is missing, unreadable or not TOML; the message has the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no {path}", hint=hint) from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
