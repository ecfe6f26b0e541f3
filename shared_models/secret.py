"""A secret: 32 bytes from which everything is drawn that privacy rests on.

A node has one for its noise and its sampling, a run of a server one for the noise that hides a site. None of them
ever leaves its machine.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from shared_models.errors import PrivacyError
from shared_models.files import locked, write_whole

LENGTH = 32
LOCK_SECONDS = 30.0


def load_secret(path: Path, what: str = "the node's secret") -> bytes:
    """The secret that lies at `path`; the first call makes it.

    It is written beside and renamed, so a crash leaves none or a whole one, and two processes that ask at once get the
    same. One that was lost is replaced by a new one: what was spent stays true, for it does not depend on it.

    Args:
        path: of its file.
        what: how an error calls it.

    Raises:
        PrivacyError: others than this user may read or write it, it has another length, or it cannot be read or made.
    """
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.with_name(f"{path.name}.lock"), LOCK_SECONDS):
                if not path.exists():
                    write_whole(path, secrets.token_bytes(LENGTH))
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            found = file.read(LENGTH + 1)
    except OSError as error:
        raise PrivacyError(
            f"{what} {path} cannot be read or made: {error.strerror or error}",
            hint="Mend the folder; no round with noise runs without it",
            code="secret",
        ) from None
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise PrivacyError(
            f"others may read {what} {path} (mode {stat.S_IMODE(status.st_mode):04o})",
            hint=f"If nobody has, chmod 600 {path}; else delete it and a new one is made",
            code="secret",
        )
    if len(found) != LENGTH:
        raise PrivacyError(
            f"{what} {path} has {status.st_size} bytes instead of {LENGTH}",
            hint="Restore it, or delete it and a new one is made",
            code="secret",
        )
    return found
