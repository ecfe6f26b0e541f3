"""The file of records: whatever it is stopped by or whatever is done to it, nothing is lost unnoticed."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from client.logbook import Logbook
from shared_models.errors import PrivacyError

ROOT = Path(__file__).resolve().parents[2]
CHANGES = ("open", "pwrite", "ftruncate", "fsync", "fchmod", "replace", "mkdir")


def book_in(folder: Path, **named: object) -> Logbook:
    return Logbook(folder / "ledger", folder / "state" / "mark.json", **named)  # type: ignore[arg-type]


def append(book: Logbook, *numbers: int) -> None:
    for number in numbers:
        with book.held() as writer:
            writer.append({"n": number})


def numbers(book: Logbook) -> list[int]:
    return [record["n"] for record in book.read()]


@pytest.fixture
def book(tmp_path: Path) -> Logbook:
    found = book_in(tmp_path)
    append(found, 1, 2, 3)
    return found


def play(mode: str, folder: Path, *words: object) -> dict[str, int]:
    """What `ledger_kills.py` finds."""
    command = [sys.executable, str(Path(__file__).with_name("ledger_kills.py")), mode, str(folder), *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


# ---- processes that die ----------------------------------------------------------------------------------------------
def test_two_hundred_kills_never_leave_the_ledger_below_the_truth(tmp_path: Path) -> None:
    found = play("moments", tmp_path, 200, 20240601)
    assert (found["kills"], found["below"], found["far_above"]) == (200, 0, 0)
    assert min(found["above"], found["progress"], found["spent"]) > 20  # the kills fell on both sides of the booking


def test_killed_before_every_change_of_a_file_and_within_each_write(tmp_path: Path) -> None:
    found = play("points", tmp_path)
    assert (found["below"], found["far_above"]) == (0, 0)
    assert found["kills"] > 60
    assert min(found["above"], found["progress"]) > 10


def test_four_processes_at_once(tmp_path: Path) -> None:
    assert play("together", tmp_path) == {"entries": 100, "answered": 100}


# ---- a machine that loses power --------------------------------------------------------------------------------------
class PowerCut(BaseException):
    """Nothing but what was synced is left."""


class Disk:
    """Keeps what a power cut would leave at worst: contents and names as of their last sync."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cut_at: int) -> None:
        self.contents: dict[int, bytes] = {}
        self.names: dict[int, dict[str, tuple[int, bool]]] = {}
        self.left = cut_at
        for name in CHANGES:
            monkeypatch.setattr(os, name, self.counted(getattr(os, name), name))

    def counted(self, change: Callable[..., object], name: str) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            if self.left <= 0:
                raise PowerCut
            self.left -= 1
            done = change(*arguments, **named)
            if name == "fsync":
                self.sync(arguments[0])  # type: ignore[arg-type]
            return done

        return call

    def sync(self, descriptor: int) -> None:
        path, inode = Path(f"/proc/self/fd/{descriptor}").resolve(), os.fstat(descriptor).st_ino
        if path.is_dir():
            self.names[inode] = {p.name: (p.stat().st_ino, p.is_dir()) for p in path.iterdir()}
        else:
            self.contents[inode] = path.read_bytes()

    def after(self, inode: int, target: Path) -> None:
        """Lay out what is left of the folder with that inode."""
        target.mkdir()
        for name, (inner, folder) in self.names.get(inode, {}).items():
            if folder:
                self.after(inner, target / name)
            else:
                (target / name).write_bytes(self.contents.get(inner, b""))


def cut(here: Path, left: Path, point: int, wanted: tuple[int, ...]) -> list[int]:
    """Append until the power is cut at that change; `left` becomes what is left. The numbers that were returned for."""
    returned: list[int] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        disk = Disk(monkeypatch, 10**6)
        for path in (here, *here.rglob("*")):  # what is there is on the disk
            descriptor = os.open(path, os.O_RDONLY)
            disk.sync(descriptor)
            os.close(descriptor)
        disk.left = point
        with suppress(PowerCut):
            for number in wanted:
                append(book_in(here), number)
                returned.append(number)
    disk.after(here.stat().st_ino, left)
    return returned


def test_power_cut_at_every_change_of_a_file(tmp_path: Path) -> None:
    """What `append` returned for is on the disk, with nothing but what was synced, and the rest can be gone on with.

    Also where the power is cut again while an interrupted beginning is gone on with.
    """
    kept, again = set(), 0
    for point in itertools.count():
        (here := tmp_path / f"{point}").mkdir()
        (here / "state").mkdir()
        returned = cut(here, left := tmp_path / f"{point}-left", point, (1, 2))
        found = numbers(book_in(left))
        assert found[: len(returned)] == returned
        assert len(found) <= len(returned) + 1
        kept.add((len(returned), len(found)))
        if not found and (left / "ledger" / "entries.log").exists():
            again += 1
            for second in itertools.count():
                shutil.copytree(left, once := tmp_path / f"{point}-{second}")
                returned_then = cut(once, twice := tmp_path / f"{point}-{second}-left", second, (1,))
                then = numbers(book_in(twice))
                assert then in ([], [1])
                assert then == [1] or not returned_then
                if returned_then:
                    break
        append(book_in(left), 9)
        assert numbers(book_in(left)) == [*found, 9]
        if len(returned) == 2:
            break
    assert kept == {(0, 0), (0, 1), (1, 1), (1, 2), (2, 2)}
    assert again >= 3


# ---- a disk that is full ---------------------------------------------------------------------------------------------
def test_no_space_at_any_point_is_a_refusal_and_mends(tmp_path: Path) -> None:
    point, refusals, done = 0, [], False
    while not done:
        book = book_in(tmp_path / f"{point}")
        left = [point]

        def full(change: Callable[..., object], left: list[int] = left) -> Callable[..., object]:
            def call(*arguments: object, **named: object) -> object:
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return change(*arguments, **named)

            return call

        with pytest.MonkeyPatch.context() as monkeypatch:
            for name in ("pwrite", "fsync", "replace", "mkdir"):
                monkeypatch.setattr(os, name, full(getattr(os, name)))
            try:
                append(book, 1)
                done = True
            except PrivacyError as error:
                refusals.append((error.code, "cannot be written: No space left on device" in str(error)))
        before = numbers(book)
        assert before in ([], [1])
        assert before == [1] or not done
        append(book, 2)
        assert numbers(book) == [*before, 2]
        point += 1
    assert len(refusals) >= 8
    assert set(refusals) == {("ledger", True)}


def test_a_file_that_may_not_grow_takes_half_a_line_back(book: Logbook) -> None:
    """The kernel's own refusal after a short write (EFBIG), in a process of its own."""
    before = book.file.read_bytes()
    child = os.fork()
    if not child:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, len(before) + 10))
            append(book, 4)
        except PrivacyError:
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert book.file.read_bytes() == before
    append(book, 4)
    assert numbers(book) == [1, 2, 3, 4]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "ledger").write_text("a file where the folder should be")
    with pytest.raises(PrivacyError, match=r"the ledger .*entries\.log cannot be written") as caught:
        append(book_in(tmp_path), 1)
    assert caught.value.code == "ledger"


# ---- a file that was changed -----------------------------------------------------------------------------------------
def flips(data: bytes) -> Iterator[bytes]:
    for i in range(len(data)):
        yield data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]


def test_every_flipped_bit_is_noticed(book: Logbook) -> None:
    sound = book.file.read_bytes()
    for broken in flips(sound):
        book.file.write_bytes(broken)
        with pytest.raises(PrivacyError, match="is damaged: it does not hold the 4 lines"):
            book.read()
        with pytest.raises(PrivacyError, match="is damaged"), book.held():
            pytest.fail("it was opened")
    book.file.write_bytes(sound)
    assert numbers(book) == [1, 2, 3]


def test_every_truncation_is_noticed(book: Logbook) -> None:
    """Down to nothing: an empty file is not an empty ledger."""
    sound = book.file.read_bytes()
    for size in range(len(sound)):
        book.file.write_bytes(sound[:size])
        with pytest.raises(PrivacyError, match="is damaged") as caught:
            book.read()
        assert caught.value.code == "ledger"


def test_an_empty_file_alone_is_not_an_empty_ledger(tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "entries.log").touch()
    with pytest.raises(PrivacyError, match="is damaged: it has no first line"):
        book_in(tmp_path).read()


def test_what_a_stopped_append_left_is_written_over(book: Logbook) -> None:
    whole = book.file.read_bytes()
    for tail in (b"0", b"\0" * 40, b"\n", b"0123 {}\n", whole[-20:]):
        book.file.write_bytes(whole + tail)
        assert numbers(book) == [1, 2, 3]
    book.file.write_bytes(whole + b"0" * 1000)
    append(book, 4)
    assert numbers(book) == [1, 2, 3, 4]
    assert book.file.read_bytes().startswith(whole)
    assert book.file.stat().st_size < len(whole) + 100


def test_lines_exchanged_or_taken_from_another_ledger(book: Logbook, tmp_path: Path) -> None:
    first, a, b, c = book.file.read_bytes().splitlines(keepends=True)
    other = book_in(tmp_path / "other")
    append(other, 1, 2, 3)
    for broken in (first + b + a + c, first + a + c, first + a + b + b, other.file.read_bytes()):
        book.file.write_bytes(broken)
        with pytest.raises(PrivacyError, match="is damaged"):
            book.read()


@pytest.mark.parametrize("content", ["", "{}", "null", '{"count": "x", "hash": ""}', '{"count": 99, "hash": "0"}'])
def test_a_broken_head(book: Logbook, content: str) -> None:
    (book.file.parent / "head.json").write_text(content)
    with pytest.raises(PrivacyError, match="is damaged"):
        book.read()


def test_a_head_that_is_gone(book: Logbook) -> None:
    (book.file.parent / "head.json").unlink()
    with pytest.raises(PrivacyError, match=r"is damaged: its head .*head\.json is gone"):
        book.read()


def test_a_later_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.logbook.VERSION", 2)
    append(book_in(tmp_path), 1)
    monkeypatch.undo()
    with pytest.raises(PrivacyError, match="it is of version 2, this one reads 1"):
        book_in(tmp_path).read()


# ---- a ledger that was deleted or put back ---------------------------------------------------------------------------
def copy(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def delete(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_a_deleted_ledger_is_noticed_by_what_it_left(book: Logbook, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.touch()
    delete(tmp_path / "ledger")
    watched = book_in(tmp_path, witnesses=(secret,))
    for left in (tmp_path / "state" / "mark.json", secret):
        for attempt in (watched.read, lambda: append(watched, 1)):
            with pytest.raises(PrivacyError, match=rf"is gone, and {left} shows that there was one") as caught:
                attempt()
            assert caught.value.code == "ledger"
        assert not (tmp_path / "ledger").exists()
        left.unlink()
    assert watched.read() == []  # all traces deleted: begun anew, knowingly
    append(watched, 1)
    assert numbers(watched) == [1]


def test_the_file_alone_deleted(book: Logbook) -> None:
    book.file.unlink()
    with pytest.raises(PrivacyError, match=r"is gone, and .*head\.json"):
        book.read()
    with pytest.raises(PrivacyError, match="is gone"):
        append(book, 1)


def test_an_older_copy_put_back_is_noticed_by_the_mark(book: Logbook, tmp_path: Path) -> None:
    copy(tmp_path / "ledger", tmp_path / "old")
    append(book, 4)
    copy(tmp_path / "ledger", tmp_path / "new")
    delete(tmp_path / "ledger")
    copy(tmp_path / "old", tmp_path / "ledger")
    with pytest.raises(PrivacyError, match=r"does not hold the 5 lines that .*mark\.json counts"):
        book.read()
    delete(tmp_path / "ledger")
    copy(tmp_path / "new", tmp_path / "ledger")
    assert numbers(book) == [1, 2, 3, 4]


def test_two_nodes_share_one_and_each_has_its_own_mark(tmp_path: Path) -> None:
    one, two = (Logbook(tmp_path / "ledger", tmp_path / name) for name in ("one", "two"))
    append(one, 1)
    append(two, 2)
    append(one, 3)
    assert numbers(one) == numbers(two) == [1, 2, 3]
    assert (tmp_path / "one").read_bytes() != (tmp_path / "two").read_bytes()


def test_one_that_waits_too_long_says_so(book: Logbook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.logbook.LOCK_SECONDS", 0.05)
    with book.held(), pytest.raises(PrivacyError, match="another process has held"):
        book.read()


def test_only_this_user_may_read_it(book: Logbook) -> None:
    assert book.file.parent.stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o777 for p in book.file.parent.iterdir()} == {0o600}
