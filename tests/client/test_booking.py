"""A round that spends: booked, drawn, its answer kept, noted, sent; and what is left where it stops in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import client.handler
from client.handler import Handler
from client.ledger import DiskLedger
from client.policy import Policy
from client.protection import Protection
from client.readers.base import Splits
from client.state import DiskState
from client.workbench import Benches
from shared_models.job import Job
from shared_models.messages import Contribution, Instruction
from shared_models.privacy import Spend
from shared_models.secret import load_secret
from shared_models.spec import build_model
from shared_models.wire import digest, encode_contribution

CPU = torch.device("cpu")
PRIVACY = {"mode": "sample", "noise": 1.0, "clip": 0.5, "delta": 1e-3}


class Stopped(BaseException):
    """The process ends here."""


class Site:
    """A node's handler, made anew after each stop, over the same folder."""

    def __init__(self, folder: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.splits, self.drawn = folder, splits, 0
        self.benches = Benches(CPU)
        self.ledger = DiskLedger(folder / "ledger", float("inf"), 1e-5)
        self.restart()
        train = client.handler.train

        def counted(*arguments: Any) -> Any:
            self.drawn += 1
            return train(*arguments)

        monkeypatch.setattr(client.handler, "train", counted)

    def restart(self, cap: float = float("inf")) -> None:
        self.ledger = DiskLedger(self.folder / "ledger", cap, 1e-5)
        protection = Protection("a", self.ledger, "chest", lambda _: load_secret(self.folder / "secret"))
        state, policy = DiskState(self.folder / "state", "a"), Policy(approve_all=True)
        self.handler = Handler("a", lambda _: self.splits, state, policy, self.benches, protection=protection)

    def ask(self, instruction: Instruction) -> bytes:
        """The answer as it would cross the network, or its code."""
        reply: Contribution = self.handler.handle(instruction)
        return b"".join(encode_contribution(reply)) if reply.code == "ok" else reply.code.encode()

    @property
    def booked(self) -> list[tuple[int, bool]]:
        return [(e.round, e.answered) for e in self.ledger.entries()]


@pytest.fixture
def site(tmp_path: Path, make_splits: Callable[..., Splits], monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, make_splits(1), monkeypatch)


@pytest.fixture
def job(make_job: Callable[..., Job]) -> Job:
    return make_job(privacy=PRIVACY, federation={"rounds": 3})


def ask(job: Job, round: int = 0, kind: str = "train", shift: float = 0.0) -> Instruction:
    model, spec = build_model(job)
    down = {"model": {name: model.state_dict()[name] + shift for name in spec.sent}}
    return Instruction(kind, "run", "a", job, spec.fingerprint, round=round, rounds=3, groups=down)  # type: ignore[arg-type]


def test_what_is_booked(site: Site, job: Job) -> None:
    site.ask(ask(job, 2))
    (entry,) = site.ledger.entries()
    assert (entry.dataset, entry.run, entry.task, entry.round, entry.job) == ("chest", "run", 0, 2, "test")
    assert (entry.spend, entry.delta, entry.unit) == (Spend(1.0, 0.25, 4), 1e-3, "sample")  # 30 examples, by 8
    assert entry.digest == digest(ask(job, 2))
    assert entry.answered


def test_booked_before_anything_is_drawn_and_refused_without(site: Site, job: Job) -> None:
    site.restart(cap=1e-3)
    assert site.ask(ask(job)) == b"privacy-cap"
    assert (site.drawn, site.booked) == (0, [])
    site.restart()
    site.ask(ask(job))
    whole = site.ledger.path.read_bytes()
    site.ledger.path.write_bytes(b"")
    assert site.ask(ask(job, 1)) == b"ledger"
    site.ledger.path.write_bytes(whole)
    (site.folder / "secret").chmod(0o644)
    assert site.ask(ask(job, 1)) == b"secret"
    assert site.drawn == 1


@pytest.mark.parametrize("where", ["check_contribution", "save", "answered"])
def test_stopped_anywhere_the_repeated_round_gives_the_same_bytes_and_is_paid_once(
    site: Site, job: Job, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Site(tmp_path / "other", site.splits, monkeypatch)
    (tmp_path / "other" / "secret").parent.mkdir(exist_ok=True)
    (tmp_path / "other" / "secret").write_bytes(load_secret(tmp_path / "secret"))
    (tmp_path / "other" / "secret").chmod(0o600)
    undisturbed = other.ask(ask(job))
    site.drawn = 0

    def stop(*_: object) -> None:
        raise Stopped

    with pytest.MonkeyPatch.context() as broken:
        holder = {"check_contribution": client.handler, "save": site.handler.state, "answered": site.ledger}
        broken.setattr(holder[where], where, stop)
        with pytest.raises(Stopped):
            site.ask(ask(job))
    assert site.booked == [(0, False)]
    site.restart()
    assert site.ask(ask(job)) == undisturbed
    assert site.drawn == (1 if where == "answered" else 2)
    assert len(site.booked) == 1
    site.restart()
    assert site.ask(ask(job)) == undisturbed  # and once more, from what was kept


def test_a_kept_answer_that_was_not_noted_is_noted_when_it_is_sent_again(site: Site, job: Job) -> None:
    def stop(*_: object) -> None:
        raise Stopped

    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(site.ledger, "answered", stop)
        with pytest.raises(Stopped):
            site.ask(ask(job))
    site.restart()
    site.ask(ask(job))
    assert (site.booked, site.drawn) == ([(0, True)], 1)


def test_another_model_for_a_booked_round_is_refused(site: Site, job: Job) -> None:
    def stop(*_: object) -> None:
        raise Stopped

    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(site.handler.state, "save", stop)
        with pytest.raises(Stopped):
            site.ask(ask(job))
    site.restart()
    assert site.ask(ask(job, shift=0.5)) == b"privacy-altered"
    assert (site.drawn, len(site.booked)) == (1, 1)


def test_without_its_state_a_site_does_not_answer_a_round_twice(site: Site, job: Job) -> None:
    """The stored answer is gone, so the same round would be computed a second time, perhaps of other data."""
    site.ask(ask(job))
    (site.folder / "state").rename(site.folder / "lost")
    site.restart()
    assert site.ask(ask(job)) == b"privacy-repeated"
    assert site.drawn == 1


def test_old_rounds_are_not_computed_again(site: Site, job: Job) -> None:
    for round in range(3):
        site.ask(ask(job, round))
    assert site.ask(ask(job, 0)) == b"privacy-repeated"
    assert site.drawn == 3
    assert site.booked == [(0, True), (1, True), (2, True)]


def test_a_job_that_books_nothing_needs_no_ledger(site: Site, make_job: Callable[..., Job]) -> None:
    site.ledger.begin()
    site.ledger.path.write_bytes(b"broken")
    first = site.ask(ask(make_job()))
    assert first.startswith(b"{")
    assert site.ask(ask(make_job())) == first


def test_the_digest_covers_all_that_is_asked(job: Job, make_job: Callable[..., Job]) -> None:
    one = ask(job)
    assert digest(one) == digest(ask(job))
    others = [
        ask(job, shift=1e-6),
        ask(job, 1),
        replace(one, run="s"),
        replace(one, site="b"),
        replace(one, task=1),
        replace(one, rounds=4),
        replace(one, fingerprint="0"),
        replace(one, evaluate=(("validation", 0),)),
        ask(make_job(train={"lr": 0.2})),
    ]
    assert len({digest(one), *map(digest, others)}) == len(others) + 1
