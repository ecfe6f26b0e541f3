"""`logs/audit.jsonl`: what this site was asked, what it answered and what it agreed to, a line each, kept at the site.

It is for the site's own eyes: it says more than the server learns, and never an example. It is bounded: a file of 10 MB
becomes `audit.1.jsonl`, that one `audit.2.jsonl`, and so on; the oldest of nine is dropped. A line has about 500 bytes,
so the last 200,000 instructions are kept. Who wants more copies the older files away. A line is written before its
answer leaves; an instruction in whose middle the worker was killed has none, for nothing of it left.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shared_models.errors import PolicyError
from shared_models.files import PRIVATE_FILE, locked, private_folder

MAX_BYTES = 10_000_000
OLDER = 9
LOCK_SECONDS = 30.0


class Audit:
    """Appends lines to a file and begins another when it is full; several processes may write.

    Args:
        path: the newest file; its folder is made at the first line, for this user alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = path.with_name(f"{path.stem}.lock")

    def write(self, event: str, **facts: Any) -> None:
        """Add one line with the time, in UTC.

        Raises:
            PolicyError: it cannot be written (code `audit`).
        """
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": time, "event": event, **facts}).encode() + b"\n"
        try:
            private_folder(self.path.parent)
            with locked(self._lock, LOCK_SECONDS):
                self._append(line)
        except OSError as error:
            raise PolicyError(
                f"the site's record {self.path} cannot be written: {error.strerror or error}",
                hint="Free space or mend the folder; nothing leaves without a line there",
                code="audit",
            ) from None

    def last(self, count: int) -> list[dict[str, Any]]:
        """The newest lines, the oldest of them first; half a line that a crash left is passed over."""
        found: list[dict[str, Any]] = []
        if not self.path.parent.is_dir():
            return found
        with locked(self._lock, LOCK_SECONDS):
            for path in (self.path, *map(self._older, range(1, OLDER + 1))):
                if len(found) >= count or not path.exists():
                    break
                found = [*_lines(path), *found]
        return found[max(0, len(found) - count) :]

    def _append(self, line: bytes) -> None:
        if self.path.exists() and self.path.stat().st_size + len(line) > MAX_BYTES:
            for number in range(OLDER - 1, 0, -1):
                if self._older(number).exists():
                    self._older(number).replace(self._older(number + 1))
            self.path.replace(self._older(1))
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, PRIVATE_FILE)
        with os.fdopen(descriptor, "rb+", buffering=0) as sink:
            size = sink.seek(0, os.SEEK_END)
            cut = size > 0 and os.pread(sink.fileno(), 1, size - 1) != b"\n"
            written = b"\n" * cut + line
            if sink.write(written) != len(written):
                raise OSError("only a part of a line was written")

    def _older(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.stem}.{number}{self.path.suffix}")


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_bytes().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
