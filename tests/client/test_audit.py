"""The site's record of what was asked and answered: whole lines, of which the oldest alone are lost."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

import client.audit
from client.audit import Audit
from shared_models.errors import PolicyError


@pytest.fixture
def audit(tmp_path: Path) -> Audit:
    return Audit(tmp_path / "logs" / "audit.jsonl")


def test_a_line_is_plain_json_for_this_user_alone(audit: Audit) -> None:
    audit.write("approve", job="a" * 64)
    audit.write("instruction", code="ok", measured=["validation/0"], seconds=1.5)
    first, second = map(json.loads, audit.path.read_text().splitlines())
    assert first == {"time": first["time"], "event": "approve", "job": "a" * 64}
    assert second["measured"] == ["validation/0"]
    assert first["time"] <= second["time"]
    assert first["time"].endswith("+00:00")
    assert audit.path.stat().st_mode & 0o777 == 0o600
    assert audit.path.parent.stat().st_mode & 0o777 == 0o700
    assert audit.last(1) == [second]
    assert audit.last(5) == [first, second]


def test_nothing_was_ever_asked(audit: Audit) -> None:
    assert audit.last(5) == []
    assert not audit.path.parent.exists()


def test_it_is_bounded_and_loses_the_oldest_only(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.audit, "MAX_BYTES", 500)
    monkeypatch.setattr(client.audit, "OLDER", 3)
    for number in range(100):
        audit.write("instruction", number=number)
    files = sorted(p.name for p in audit.path.parent.glob("*.jsonl"))
    assert files == ["audit.1.jsonl", "audit.2.jsonl", "audit.3.jsonl", "audit.jsonl"]
    assert all(p.stat().st_size <= 500 and p.stat().st_mode & 0o777 == 0o600 for p in audit.path.parent.glob("*.jsonl"))
    kept = [line["number"] for line in audit.last(100)]
    assert kept == list(range(kept[0], 100))
    assert len(kept) > 3 * 4
    assert [line["number"] for line in audit.last(10)] == list(range(90, 100))


def test_a_line_that_was_cut_off_costs_no_other(audit: Audit) -> None:
    audit.write("instruction", number=0)
    with audit.path.open("a") as sink:
        sink.write('{"time": "2026')
    audit.write("instruction", number=1)
    assert [line["number"] for line in audit.last(5)] == [0, 1]


def test_writers_at_once_lose_no_line(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node, and a person who approves at the same time; files are changed meanwhile."""
    monkeypatch.setattr(client.audit, "MAX_BYTES", 2000)
    monkeypatch.setattr(client.audit, "OLDER", 50)
    ready = threading.Barrier(4)

    def write(writer: int) -> None:
        ready.wait()
        for number in range(50):
            Audit(audit.path).write("instruction", writer=writer, number=number)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [(line["writer"], line["number"]) for line in audit.last(1000)]
    assert len(found) == 200
    assert set(found) == {(i, n) for i in range(4) for n in range(50)}


def test_what_cannot_be_written_is_said(audit: Audit) -> None:
    audit.path.mkdir(parents=True)
    with pytest.raises(PolicyError, match=r"audit\.jsonl cannot be written: .*nothing leaves without a line") as caught:
        audit.write("approve", job="a" * 64)
    assert caught.value.code == "audit"
