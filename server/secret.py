"""A run's secret: what the server draws from, noise and cohorts, where a site is the unit of privacy."""

from __future__ import annotations

import secrets
from pathlib import Path

from shared_models.errors import RunError
from shared_models.files import write_whole

LENGTH = 32


def run_secret(folder: Path) -> bytes:
    """32 bytes in the run's folder, for this user alone; made at first use, so that a resumed run draws the same.

    Raises:
        RunError: the file has another length.
    """
    path = folder / "secret"
    if not path.exists():
        write_whole(path, secrets.token_bytes(LENGTH))
    found = path.read_bytes()
    if len(found) != LENGTH:
        raise RunError(f"the run's secret {path} has {len(found)} bytes instead of {LENGTH}", hint="Restore it")
    return found
