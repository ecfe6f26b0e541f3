"""A child's log: no line is lost to its reader, and the disk it takes has a bound also while the child runs."""

from __future__ import annotations

import errno
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shared_models import process
from shared_models.process import Child

LIMIT = 2000
WRITER = """
import sys
for number in range(200):
    print(f"line {number:03d} " + "." * 40, flush=True)
    sys.stdout.write(f"half {number:03d} ")
    sys.stdout.flush()
    input_file = sys.argv[1]
    import pathlib, time
    while not pathlib.Path(f"{input_file}-{number}").exists():
        time.sleep(0.001)
    print("done", flush=True)
print("the end", flush=True)
"""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_MAX_LOG_BYTES", LIMIT)


def wait(truth: Callable[[], object]) -> None:
    until = time.monotonic() + 30
    while not truth():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_a_log_has_a_bound_while_its_process_runs_and_its_reader_misses_nothing(tmp_path: Path) -> None:
    """The child pauses in the middle of every line, and is read then: also a line that a cut goes through is whole."""
    log, older = tmp_path / "logs" / "child.log", tmp_path / "logs" / "child.log.1"
    child = Child("child", [sys.executable, "-c", WRITER, str(tmp_path / "go")], log)
    seen: list[str] = []
    largest = 0
    try:
        for number in range(200):
            wait(lambda number=number: f"half {number:03d}" in child.tail(1))
            seen += child.new_lines()
            largest = max(largest, log.stat().st_size, older.stat().st_size if older.exists() else 0)
            (tmp_path / f"go-{number}").touch()
        wait(lambda: child.exit_code() is not None)
        seen += child.new_lines()
    finally:
        child.stop()
    expected = [line for n in range(200) for line in (f"line {n:03d} " + "." * 40, f"half {n:03d} done")]
    assert seen == [*expected, "the end"]
    assert largest < LIMIT + 200
    assert child.tail(30) == "\n".join([*expected, "the end"][-30:])  # over the cut as well
    assert sorted(path.name for path in log.parent.iterdir()) == ["child.log", "child.log.1"]
    kept = older.read_text() + log.read_text()
    assert "\n".join([*expected, "the end"]).endswith(kept.rstrip("\n"))


def test_where_the_disk_is_full_the_log_is_cut_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    log = tmp_path / "child.log"
    monkeypatch.setattr(shutil, "copyfileobj", full)
    child = Child("child", [sys.executable, "-c", f"print('x' * {2 * LIMIT})"], log)
    wait(lambda: child.exit_code() is not None)
    try:
        assert child.new_lines() == ["x" * 2 * LIMIT]
        assert [path.name for path in tmp_path.iterdir()] == ["child.log"]
        assert log.stat().st_size == 0
        assert child.new_lines() == []
        assert child.tail() == "x" * 2 * LIMIT
    finally:
        child.stop()


def test_a_log_that_somebody_removes_stops_nobody(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    child = Child("child", [sys.executable, "-c", "print('x')"], log)
    wait(lambda: child.exit_code() is not None)
    log.unlink()
    try:
        assert (child.new_lines(), child.tail()) == ([], "")
    finally:
        child.stop()
