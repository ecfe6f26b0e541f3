"""Kills processes that spend, and compares the ledger with what was really spent. Not a test by itself.

`python ledger_kills.py moments FOLDER KILLS SEED`: at seeded moments. `points FOLDER`: before each system call that
changes a file, and in the middle of each write. `together FOLDER`: nobody is killed, four processes book at once.
Each prints one JSON object. Nothing heavy is imported, so a killed process is a fork that costs milliseconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from client.ledger import DiskLedger
from shared_models.privacy import Spend

SPEND = Spend(noise=1.0, rate=0.5, steps=3)
CHANGES = ("open", "pwrite", "ftruncate", "fsync", "fchmod", "replace", "mkdir")


def ledger_in(folder: Path) -> DiskLedger:
    return DiskLedger(folder / "ledger", float("inf"), 1e-5, mark=folder / "state" / "ledger.json")


def book(ledger: DiskLedger, round: int, run: str = "run") -> None:
    ledger.reserve("d", run, 0, round, SPEND, 1e-5, "sample", digest=f"digest {round}")


def spend(folder: Path, rounds: int) -> None:
    """A site: books a round, and only then spends, which is a line of `truth`."""
    ledger = ledger_in(folder)
    truth = os.open(folder / "truth", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    round = len(spent(folder))
    for _ in range(rounds):
        book(ledger, round)
        os.write(truth, f"{round:08d}\n".encode())
        ledger.answered("run", 0, round)
        round += 1


def spent(folder: Path) -> set[int]:
    return {int(line) for line in (folder / "truth").read_bytes().splitlines()}


def killed(child: int) -> bool:
    """Wait for a fork; whether it was killed, which is the only other end than 0."""
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
        return False
    assert os.WIFSIGNALED(status), status
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    return True


def fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


class Tally:
    """How ledger and truth compare after each kill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found = {"kills": 0, "below": 0, "above": 0, "far_above": 0, "progress": 0}
        (folder / "truth").touch()

    def after_kill(self, before: int) -> None:
        truth = spent(self.folder)
        booked = [entry.round for entry in ledger_in(self.folder).entries()]
        over = len(booked) - len(truth)
        self.found["kills"] += 1
        self.found["below"] += bool(truth - set(booked))
        self.found["above"] += over == 1
        self.found["far_above"] += over > 1
        self.found["progress"] += len(truth) > before


def moments(folder: Path, kills: int, seed: int) -> dict[str, int]:
    source, tally = random.Random(seed), Tally(folder)
    for _ in range(kills):
        before = len(spent(folder))
        child = fork(lambda: spend(folder, 10**6))
        time.sleep(source.uniform(0.0, 0.08))
        os.kill(child, signal.SIGKILL)
        assert killed(child)
        tally.after_kill(before)
    return tally.found | {"spent": len(spent(folder))}


def points(folder: Path) -> dict[str, int]:
    """From nothing, two rounds: killed at the n-th change of a file, for every n."""
    total = {"kills": 0, "below": 0, "above": 0, "far_above": 0, "progress": 0}
    for halves in (False, True):
        point, again = 0, True
        while again:
            here = folder / f"{halves}-{point}"
            here.mkdir()
            tally = Tally(here)
            again = killed(fork(lambda n=point, h=halves, f=here: (die_at(n, h), spend(f, 2))[0]))  # type: ignore[misc]
            if again:
                tally.after_kill(0)
            assert not killed(fork(lambda f=here: spend(f, 1)))  # type: ignore[misc]
            assert {e.round for e in ledger_in(here).entries()} == spent(here)
            total = {name: total[name] + tally.found[name] for name in total}
            point += 1
    return total


def die_at(point: int, halves: bool) -> None:
    """This process is killed before the change number `point`, or after half of the write number `point`."""
    left = [point]

    def mortal(change: Callable[..., object], name: str) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            if left[0] == 0:
                if halves:
                    descriptor, data, offset = arguments
                    change(descriptor, data[: len(data) // 2], offset)  # type: ignore[index,arg-type]
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return change(*arguments, **named)

        return call

    for name in ("pwrite",) if halves else CHANGES:
        setattr(os, name, mortal(getattr(os, name), name))


def together(folder: Path) -> dict[str, int]:
    def site(number: int) -> None:
        ledger = ledger_in(folder)
        for round in range(25):
            book(ledger, round, f"run-{number}")
            ledger.answered(f"run-{number}", 0, round)

    for child in [fork(lambda n=n: site(n)) for n in range(4)]:  # type: ignore[misc]
        assert not killed(child)
    entries = ledger_in(folder).entries()
    return {"entries": len({e.key for e in entries}), "answered": sum(e.answered for e in entries)}


if __name__ == "__main__":
    mode, where, *numbers = sys.argv[1:]
    print(json.dumps(globals()[mode](Path(where), *map(int, numbers))))
