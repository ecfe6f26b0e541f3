"""An append-only file of records in which nothing that was once written can be lost unnoticed.

Each line is `<SHA-256> <JSON>`, and each hash covers the one before it, so a changed, missing or exchanged line breaks
the chain. Beside the file lies its *head*, how many lines there are and the hash of the last one; a *mark*, the same in
another folder, notices that file and head were deleted or put back from an older copy.

`append` writes the line, syncs it, and then replaces head and mark by a rename each. It returns after that, so whatever
point a process or a machine stops at, the file is in one of three states:

- the line is not whole: no append returned for it, no head counts it, and the next append writes over it;
- the line is whole and the head does not count it yet: no append returned for it; it is read and counts;
- the head counts it: it is on the disk, and a file that does not hold it is damaged, which is an error.

So what is read is never less than what was appended, and at most one record more.

Why not SQLite: it keeps to its transactions too, but takes an empty file for an empty database, and reads a changed
digit or an older copy of its file without a word. For a record of what was spent those are the faults that matter.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared_models.errors import PrivacyError
from shared_models.files import locked, private_folder, sync_folder, write_whole

VERSION = 1
LOCK_SECONDS = 60.0
Record = Mapping[str, Any]


class Logbook:
    """The file `entries.log` in a folder of its own.

    Args:
        folder: made at the first append, for this user alone.
        mark: a file in another folder that says how far this logbook had come.
        witnesses: files that exist only where a logbook was begun.
    """

    def __init__(self, folder: Path, mark: Path | None = None, witnesses: Sequence[Path] = ()) -> None:
        self.file = folder / "entries.log"
        self._lock = folder / "lock"
        self._head = folder / "head.json"
        self._mark = mark
        self._witnesses = tuple(witnesses)

    def read(self) -> list[Record]:
        """All records in their order; none where no logbook was ever begun.

        Raises:
            PrivacyError: it is damaged, gone, or cannot be read (code `ledger`).
        """
        with self._faults("read"):
            if not self._head.parent.is_dir():
                self._require_none()
                return []
            with locked(self._lock, LOCK_SECONDS):
                return self._chain().records

    @contextmanager
    def held(self) -> Iterator[Writer]:
        """Begin it where there is none, and keep every other writer and reader out; raises as `read`.

        An OSError of the block is taken for a fault of the file.
        """
        with self._faults("written"):
            if not self._head.parent.is_dir():
                self._require_none()
                private_folder(self._head.parent)
                sync_folder(self._head.parent.parent)
            with locked(self._lock, LOCK_SECONDS):
                chain = self._chain()
                if not chain.hashes:
                    chain = self._begin()
                elif not self._head.exists():  # stopped while it was begun
                    self.write_heads(chain)
                yield Writer(self, chain)

    def _begin(self) -> _Chain:
        line, hashed = _line("", {"ledger": secrets.token_hex(16), "version": VERSION})
        write_whole(self.file, line)
        chain = _Chain([], [hashed], len(line))
        self.write_heads(chain)
        return chain

    def _chain(self) -> _Chain:
        """The longest unbroken chain from the first line, where it reaches as far as head and mark say."""
        if not self.file.exists():
            self._require_none()
            return _Chain([], [], 0)
        chain = _read_chain(self.file)
        heads = [path for path in (self._head, self._mark) if path is not None and path.exists()]
        if self._head not in heads and len(chain.hashes) > 1:
            raise _damaged(self.file, f"its head {self._head} is gone")
        for path in heads:
            count, hashed = _read_head(path)
            if not 1 <= count <= len(chain.hashes) or chain.hashes[count - 1] != hashed:
                raise _damaged(self.file, f"it does not hold the {count} lines that {path} counts")
        if not chain.hashes:
            raise _damaged(self.file, "it has no first line")
        return chain

    def _require_none(self) -> None:
        known = (self._head, self._mark, *self._witnesses)
        if left := [str(path) for path in known if path is not None and path.exists()]:
            raise PrivacyError(
                f"the ledger {self.file} is gone, and {left[0]} shows that there was one",
                hint="Restore it from a copy; who means to begin anew, and to forget what was spent, deletes "
                f"{' and '.join(left)} too",
                code="ledger",
            )

    def write_heads(self, chain: _Chain) -> None:
        """Say that the whole chain is on the disk."""
        content = json.dumps({"count": len(chain.hashes), "hash": chain.hashes[-1]}) + "\n"
        write_whole(self._head, content)
        if self._mark is not None:
            self._mark.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._mark, content)

    def heads_count(self, chain: _Chain) -> bool:
        """Whether head and mark count the whole chain."""
        heads = [path for path in (self._head, self._mark) if path is not None]
        return all(path.exists() and _read_head(path)[0] == len(chain.hashes) for path in heads)

    @contextmanager
    def _faults(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PrivacyError(
                f"the ledger {self.file} cannot be {what}: {error.strerror or error}",
                hint="Free space or mend the folder; until then no round that must be paid for runs",
                code="ledger",
            ) from None


class Writer:
    """What may be done while the logbook is held."""

    def __init__(self, book: Logbook, chain: _Chain) -> None:
        self._book = book
        self._chain = chain

    @property
    def records(self) -> list[Record]:
        """All records in their order."""
        return self._chain.records

    def append(self, record: Record) -> None:
        """Add a record; it is on the disk when this returns. After an OSError it may or may not be there."""
        before = self._chain
        line, hashed = _line(before.hashes[-1], record)
        descriptor = os.open(self._book.file, os.O_WRONLY)
        try:
            os.ftruncate(descriptor, before.size)  # a line that was cut off
            try:
                _write(descriptor, line, before.size)
                os.fsync(descriptor)
            except OSError:
                with suppress(OSError):  # a page that could not be synced would be taken for written the next time
                    os.ftruncate(descriptor, before.size)
                raise
        finally:
            os.close(descriptor)
        self._chain = _Chain([*before.records, record], [*before.hashes, hashed], before.size + len(line))
        self._book.write_heads(self._chain)

    def settle(self) -> None:
        """Put on the disk what is only known to be in the file: a writer may have been killed before its sync."""
        if self._book.heads_count(self._chain):
            return
        descriptor = os.open(self._book.file, os.O_WRONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._book.write_heads(self._chain)


@dataclass(frozen=True)
class _Chain:
    """Records, the hash after each line (one more than records: the first line names the logbook), and their bytes."""

    records: list[Record]
    hashes: list[str]
    size: int


def _line(before: str, record: Record) -> tuple[bytes, str]:
    text = json.dumps(record, allow_nan=False, separators=(",", ":"))
    hashed = hashlib.sha256(f"{before} {text}".encode()).hexdigest()
    return f"{hashed} {text}\n".encode(), hashed


def _read_chain(file: Path) -> _Chain:
    """As far as each line ends and its hash is right."""
    records: list[Record] = []
    hashes: list[str] = []
    size = 0
    for line in file.read_bytes().split(b"\n")[:-1]:
        hashed, _, text = line.partition(b" ")
        before = hashes[-1] if hashes else ""
        if hashlib.sha256(before.encode() + b" " + text).hexdigest().encode() != hashed:
            break
        record = json.loads(text)
        if not hashes and record.get("version") != VERSION:
            raise _damaged(file, f"it is of version {record.get('version')}, this one reads {VERSION}")
        if hashes:
            records.append(record)
        hashes.append(hashed.decode())
        size += len(line) + 1
    return _Chain(records, hashes, size)


def _read_head(path: Path) -> tuple[int, str]:
    try:
        found = json.loads(path.read_bytes())
        return int(found["count"]), str(found["hash"])
    except (ValueError, KeyError, TypeError):
        raise _damaged(path, "it does not say how many lines there are") from None


def _write(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _damaged(path: Path, why: str) -> PrivacyError:
    return PrivacyError(
        f"the ledger {path} is damaged: {why}",
        hint="Restore it from a copy: without it nobody knows what was spent, and no round is paid for",
        code="ledger",
    )
