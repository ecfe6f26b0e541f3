"""The roster: a token works once, whoever races for it, and only as long as it is meant to."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import server
from server.nodes import Roster
from shared_models.errors import ConfigError, EnrollmentError


@pytest.fixture
def roster(tmp_path: Path) -> Roster:
    return Roster(tmp_path / "nodes.db")


def enroll(roster: Roster, token: bytes, serial: str = "1", now: float | None = None) -> str:
    with roster.redeem(token, now) as redemption:
        redemption.enroll(f"key {serial}".encode(), 2**64 - 1, serial)
        return redemption.site


def code(error: pytest.ExceptionInfo[EnrollmentError]) -> str:
    return error.value.code


def test_a_token_works_once(roster: Roster) -> None:
    token, expires = roster.invite("a", 3600, now=1000)
    assert (len(token), expires) == (32, 4600)
    assert enroll(roster, token, now=2000) == "a"
    (node,) = roster.nodes()
    assert (node.site, node.node_id, node.serial, node.enrolled, node.revoked) == ("a", 2**64 - 1, "1", 2000, None)
    with pytest.raises(EnrollmentError) as error:
        enroll(roster, token, "2", now=2001)
    assert code(error) == "invite-used"


def test_the_token_itself_is_stored_nowhere(roster: Roster) -> None:
    token, _ = roster.invite("a", 60)
    stored = b"".join(path.read_bytes() for path in roster.path.parent.iterdir())
    assert token not in stored
    assert token.hex().encode() not in stored


def test_expiry_is_exact(roster: Roster) -> None:
    token, expires = roster.invite("a", 60, now=1000)
    with pytest.raises(EnrollmentError) as error:
        enroll(roster, token, now=expires)
    assert code(error) == "invite-expired"
    assert enroll(roster, token, now=expires - 0.001) == "a"


def test_forged(roster: Roster) -> None:
    roster.invite("a", 60)
    for token in (bytes(32), b"", b"x" * 5000):
        with pytest.raises(EnrollmentError) as error:
            enroll(roster, token)
        assert code(error) == "invite-unknown"


def test_a_failure_in_between_leaves_the_token_usable(roster: Roster) -> None:
    token, _ = roster.invite("a", 60)

    def fail() -> None:
        with roster.redeem(token) as redemption:
            redemption.enroll(b"key", 1, "1")
            raise RuntimeError("the registration went wrong")

    with pytest.raises(RuntimeError, match="went wrong"):
        fail()
    assert roster.nodes() == []
    assert enroll(roster, token) == "a"


def test_revocation(roster: Roster) -> None:
    first, _ = roster.invite("a", 60)
    open_invite, _ = roster.invite("a", 60)
    enroll(roster, first)
    with pytest.raises(EnrollmentError) as error:
        enroll(roster, open_invite, "2")
    assert code(error) == "site-enrolled"
    with pytest.raises(EnrollmentError, match="revoke it first"):
        roster.invite("a", 60)
    assert roster.revoke("a", now=77).serial == "1"
    revoked = roster.by_serial("1")
    assert revoked is not None
    assert revoked.revoked == 77
    with pytest.raises(EnrollmentError) as error:
        enroll(roster, open_invite, "2")
    assert code(error) == "site-revoked"
    again, _ = roster.invite("a", 60)
    assert enroll(roster, again, "3") == "a"
    with pytest.raises(EnrollmentError, match="no enrolled site is called 'b'"):
        roster.revoke("b")


def test_a_key_enrolls_once(roster: Roster) -> None:
    token, _ = roster.invite("a", 60)
    enroll(roster, token, "1")
    other, _ = roster.invite("b", 60)

    def reuse() -> None:
        with roster.redeem(other) as redemption:
            redemption.require_new(b"key 2")
            redemption.require_new(b"key 1")

    with pytest.raises(EnrollmentError) as error:
        reuse()
    assert code(error) == "key-used"


def race(roster: Roster, token: bytes, serial: str, start: threading.Barrier, outcomes: list[str]) -> None:
    start.wait()
    try:
        enroll(roster, token, serial)
        outcomes.append(serial)
    except EnrollmentError as error:
        outcomes.append(error.code)


def test_of_many_threads_one_wins(tmp_path: Path) -> None:
    for attempt in range(5):
        roster = Roster(tmp_path / f"{attempt}.db")
        token, _ = roster.invite("a", 60)
        start, outcomes = threading.Barrier(8), list[str]()
        racers = [
            threading.Thread(target=race, args=(Roster(roster.path), token, str(n), start, outcomes)) for n in range(8)
        ]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join(30)
        (winner,) = roster.nodes()
        assert sorted(outcomes) == [winner.serial, *["invite-used"] * 7]


RACER = """
import sys
from pathlib import Path
from server.nodes import Roster
from shared_models.errors import EnrollmentError
path, token, serial = Path(sys.argv[1]), bytes.fromhex(sys.argv[2]), sys.argv[3]
roster = Roster(path)
print("ready", flush=True)
sys.stdin.readline()
try:
    with roster.redeem(token) as redemption:
        redemption.enroll(serial.encode(), 1, serial)
    print("won")
except EnrollmentError as error:
    print(error.code)
"""


def test_of_two_processes_one_wins(roster: Roster) -> None:
    token, _ = roster.invite("a", 60)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(roster.path), token.hex(), serial],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(server.__file__).parents[1])},
        )
        for serial in ("1", "2")
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    results = [racer.communicate("go\n", timeout=30)[0].strip() for racer in racers]
    assert sorted(results) == ["invite-used", "won"]


@pytest.mark.parametrize("name", ["", "A", "-a", "a_b", "a" * 64, "a/b", "ä", "a\n"])
def test_names_that_cannot_be(roster: Roster, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a site's name"):
        roster.invite(name, 60)


def test_longest_name_and_lifetime(roster: Roster) -> None:
    roster.invite("a" * 63, 60)
    with pytest.raises(ConfigError, match="longer than 0"):
        roster.invite("a", 0)


def test_file_mode(roster: Roster) -> None:
    assert roster.path.stat().st_mode & 0o777 == 0o600
