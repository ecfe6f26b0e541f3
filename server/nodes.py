"""The roster: who was invited, who enrolled, who was revoked. SQLite, safe for many threads and processes at once.

A token is kept only as its SHA-256. Redeeming one happens inside a single write transaction that holds SQLite's write
lock from the check to the entry of the node, so of two that race for one token exactly one wins, and whatever goes
wrong in between (an exception, a kill -9) leaves the token as it was.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shared_models.errors import ConfigError, EnrollmentError
from shared_models.files import PRIVATE_FILE
from shared_models.invite import SITE_NAME, TOKEN_BYTES, refusal

WAIT_SECONDS = 45.0  # longer than one registration at Flower may take

_SCHEMA = """
CREATE TABLE IF NOT EXISTS invites (
    token_hash BLOB PRIMARY KEY, site TEXT NOT NULL, expires REAL NOT NULL, used REAL, withdrawn REAL
) STRICT;
CREATE TABLE IF NOT EXISTS nodes (
    serial TEXT PRIMARY KEY, site TEXT NOT NULL, public_key BLOB NOT NULL UNIQUE, node_id TEXT NOT NULL,
    enrolled REAL NOT NULL, revoked REAL
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS one_active_node_a_site ON nodes (site) WHERE revoked IS NULL;
"""
_NODE = "SELECT site, public_key, node_id, serial, enrolled, revoked FROM nodes"


@dataclass(frozen=True)
class Node:
    """One enrolled site.

    Attributes:
        site: its name.
        public_key: PEM, SubjectPublicKeyInfo; Flower knows the node by it.
        node_id: Flower's id, which may change; nothing is named by it.
        serial: of its certificate, hex.
        enrolled: Unix seconds.
        revoked: Unix seconds, or None while it is active.
    """

    site: str
    public_key: bytes
    node_id: int
    serial: str
    enrolled: float
    revoked: float | None


class Roster:
    """The invites and nodes in one database file (0600)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch(mode=PRIVATE_FILE)
        with self._connect() as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.executescript(_SCHEMA)

    def invite(self, site: str, lifetime: float, now: float | None = None) -> tuple[bytes, int]:
        """Issue a one-time token for a site.

        Args:
            site: 1 to 63 of `a-z`, `0-9` and `-`, not starting with `-`.
            lifetime: seconds until it expires.
            now: Unix seconds, by default the clock's.

        Returns:
            The token (32 random bytes, kept nowhere) and its expiry (Unix seconds).

        Raises:
            ConfigError: the name or the lifetime cannot be.
            EnrollmentError: the site is enrolled and not revoked.
        """
        if not re.fullmatch(SITE_NAME, site):
            raise ConfigError(f"'{site}' cannot be a site's name", hint="Use a-z, 0-9 and '-', at most 63 characters")
        if not lifetime > 0:
            raise ConfigError("an invite must live longer than 0 hours")
        token = secrets.token_bytes(TOKEN_BYTES)
        expires = int((time.time() if now is None else now) + lifetime)
        with self._write() as db:
            if _active(db, site):
                raise EnrollmentError(
                    f"site '{site}' is enrolled already",
                    hint=f"To enroll it anew, revoke it first: fedzoo server revoke {site}",
                    code="site-enrolled",
                )
            db.execute("INSERT INTO invites VALUES (?, ?, ?, NULL, NULL)", (_hash(token), site, expires))
        return token, expires

    @contextmanager
    def redeem(self, token: bytes, now: float | None = None) -> Iterator[Redemption]:
        """Check a token and hold it; it is spent when the block ends well and `enroll` was called, else untouched.

        Raises:
            EnrollmentError: `invite-unknown`, `invite-used`, `invite-expired`, `site-revoked` or `site-enrolled`.
        """
        moment = time.time() if now is None else now
        with self._connect() as db:
            db.execute("BEGIN")
            _valid_site(db, token, moment)  # a forged or stale token never waits for the write lock
        with self._write() as db:
            yield Redemption(db, _valid_site(db, token, moment), _hash(token), moment)

    def revoke(self, site: str, now: float | None = None) -> Node:
        """Revoke a site's node and withdraw its open invites; returns the node.

        Raises:
            EnrollmentError: no active node has that name.
        """
        moment = time.time() if now is None else now
        with self._write() as db:
            node = _active(db, site)
            if node is None:
                raise EnrollmentError(
                    f"no enrolled site is called '{site}'", hint="See: fedzoo server nodes", code="site-unknown"
                )
            db.execute("UPDATE nodes SET revoked = ? WHERE serial = ?", (moment, node.serial))
            db.execute("UPDATE invites SET withdrawn = ? WHERE site = ? AND used IS NULL", (moment, site))
        return node

    def nodes(self) -> list[Node]:
        """Every node that ever enrolled, the oldest first."""
        with self._connect() as db:
            return [_node(row) for row in db.execute(f"{_NODE} ORDER BY enrolled, serial")]

    def by_serial(self, serial: str) -> Node | None:
        """The node whose certificate has that serial number (hex)."""
        with self._connect() as db:
            row = db.execute(f"{_NODE} WHERE serial = ?", (serial,)).fetchone()
        return _node(row) if row else None

    def set_node_id(self, serial: str, node_id: int) -> None:
        """Note the id under which Flower knows a node from now on."""
        with self._write() as db:
            db.execute("UPDATE nodes SET node_id = ? WHERE serial = ?", (str(node_id), serial))

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None)
        try:
            yield db
        finally:
            db.close()

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._connect() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")


@dataclass(frozen=True)
class Redemption:
    """A valid token, held by its open transaction."""

    db: sqlite3.Connection
    site: str
    token_hash: bytes
    now: float

    def require_new(self, public_key: bytes) -> None:
        """Raise an EnrollmentError (`key-used`) where that key has been enrolled before, by whatever site."""
        if self.db.execute("SELECT 1 FROM nodes WHERE public_key = ?", (public_key,)).fetchone():
            raise refusal("key-used")

    def enroll(self, public_key: bytes, node_id: int, serial: str) -> None:
        """Enter the node and spend the token, both or neither."""
        values = (serial, self.site, public_key, str(node_id), self.now)
        self.db.execute("INSERT INTO nodes VALUES (?, ?, ?, ?, ?, NULL)", values)
        self.db.execute("UPDATE invites SET used = ? WHERE token_hash = ?", (self.now, self.token_hash))


def _valid_site(db: sqlite3.Connection, token: bytes, now: float) -> str:
    """The site a token stands for; raises as `Roster.redeem`."""
    query = "SELECT site, expires, used, withdrawn FROM invites WHERE token_hash = ?"
    row = db.execute(query, (_hash(token),)).fetchone()
    if row is None:
        raise refusal("invite-unknown")
    site, expires, used, withdrawn = row
    if used is not None:
        raise refusal("invite-used")
    if withdrawn is not None:
        raise refusal("site-revoked")
    if now >= expires:
        raise refusal("invite-expired")
    if _active(db, site):
        raise refusal("site-enrolled")
    return str(site)


def _active(db: sqlite3.Connection, site: str) -> Node | None:
    row = db.execute(f"{_NODE} WHERE site = ? AND revoked IS NULL", (site,)).fetchone()
    return _node(row) if row else None


def _node(row: tuple[str, bytes, str, str, float, float | None]) -> Node:
    site, public_key, node_id, serial, enrolled, revoked = row
    return Node(site, public_key, int(node_id), serial, enrolled, revoked)


def _hash(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
