"""The site's ledger: what every round of every job may have told about its data, booked before it happens.

An entry is booked durably before the first noise of its round is drawn, and `answered` once the reply is kept and about
to leave. So an entry that is not answered never left the site, and its round may be done again with the same noise; one
that is answered is never computed a second time. What is booked and never sent counts: the ledger may say too much,
never too little.

The entries of one data set are composed, over jobs, runs and restarts, at the site's own delta. Clocks play no part.
This module imports neither torch nor Opacus until an epsilon is wanted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from client.config import ClientConfig, NodeFolder
from client.logbook import Logbook, Record
from shared_models.errors import PrivacyError
from shared_models.privacy import RELATIONS, Spend, bound, epsilon, merged

Key = tuple[str, str, int, int]


@dataclass(frozen=True)
class Entry:
    """One booked round.

    Attributes:
        dataset: which of the site's data sets is read.
        run, task, round: of the instruction.
        spend: noise, sampling rate and steps of this round.
        delta: the job's own; the site composes at its own.
        unit: `sample` or `client`: whose presence is hidden.
        digest: of the instruction, so that another one is not taken for its repetition.
        job: the job's name, where it is known.
        site: the name of the node that booked it, for nodes of one institution may share a ledger.
        booked: Unix seconds, for people alone.
        answered: whether its reply was kept and may have left.
    """

    dataset: str
    run: str
    task: int
    round: int
    spend: Spend
    delta: float
    unit: str
    digest: str
    job: str = ""
    site: str = ""
    booked: float = field(default=0.0, compare=False)
    answered: bool = field(default=False, compare=False)

    @property
    def key(self) -> Key:
        """What names it."""
        return self.site, self.run, self.task, self.round


class Ledger(Protocol):
    """Where a site books what its rounds spend.

    Attributes:
        cap_epsilon: the most that one data set may spend; infinite for no cap.
        delta: at which the entries of a data set are composed.
        site: the name under which rounds are booked.
    """

    cap_epsilon: float
    delta: float
    site: str

    def reserve(
        self,
        dataset: str,
        run: str,
        task: int,
        round: int,
        spend: Spend,
        delta: float,
        unit: str,
        *,
        digest: str,
        job: str = "",
    ) -> None:
        """Book a round; durable when this returns. The same round with the same digest again is the same entry.

        Raises:
            PrivacyError: beyond the site's cap (code `privacy-cap`); the round was booked for another instruction
                (`privacy-altered`); its reply has left, or later rounds were booked (`privacy-repeated`); values that
                no mechanism has (`privacy`); the ledger is damaged, gone or cannot be written (`ledger`).
        """

    def answered(self, run: str, task: int, round: int) -> None:
        """Say, before the reply leaves, that it is kept; nothing where the round was not booked.

        Raises:
            PrivacyError: as `reserve` (`ledger`).
        """

    def entries(self) -> list[Entry]:
        """All entries in their order. Raises PrivacyError (`ledger`)."""


class MemoryLedger:
    """For simulated sites and tests: lives as long as the process.

    Args:
        cap_epsilon: per data set; infinite for no cap.
        delta: at which the entries of a data set are composed.
    """

    def __init__(self, cap_epsilon: float = math.inf, delta: float = 1e-5) -> None:
        self.cap_epsilon = cap_epsilon
        self.delta = delta
        self.site = ""
        self._entries: dict[Key, Entry] = {}

    def reserve(
        self,
        dataset: str,
        run: str,
        task: int,
        round: int,
        spend: Spend,
        delta: float,
        unit: str,
        *,
        digest: str,
        job: str = "",
    ) -> None:
        """Book it in memory."""
        entry = Entry(dataset, run, task, round, spend, delta, unit, digest, job, booked=time.time())
        if _is_new(entry, self._entries, self.cap_epsilon, self.delta):
            self._entries[entry.key] = entry

    def answered(self, run: str, task: int, round: int) -> None:
        """Note it. The same round may be simulated again: what is drawn for it is the same, and nothing leaves."""
        key = (self.site, run, task, round)
        if key in self._entries:
            self._entries[key] = replace(self._entries[key], answered=True)

    def entries(self) -> list[Entry]:
        """All of them."""
        return list(self._entries.values())


class DiskLedger:
    """For nodes: a `Logbook`, read anew for each entry, so several processes and nodes may share one.

    Args:
        path: the ledger's folder.
        cap_epsilon: per data set; infinite for no cap.
        delta: at which the entries of a data set are composed.
        mark: file in another folder that notices a ledger that was deleted or put back from an older copy.
        witnesses: files that exist only where a ledger was begun.
        site: this node's name.
    """

    def __init__(
        self,
        path: Path,
        cap_epsilon: float,
        delta: float,
        mark: Path | None = None,
        witnesses: Sequence[Path] = (),
        site: str = "",
    ) -> None:
        self.cap_epsilon = cap_epsilon
        self.delta = delta
        self.site = site
        self._book = Logbook(path, mark, witnesses)

    @property
    def path(self) -> Path:
        """The file of entries."""
        return self._book.file

    def begin(self) -> None:
        """Make it where there is none, before anything that witnesses it. Raises PrivacyError (`ledger`)."""
        with self._book.held():
            pass

    def reserve(
        self,
        dataset: str,
        run: str,
        task: int,
        round: int,
        spend: Spend,
        delta: float,
        unit: str,
        *,
        digest: str,
        job: str = "",
    ) -> None:
        """Book it on the disk."""
        entry = Entry(dataset, run, task, round, spend, delta, unit, digest, job, self.site, time.time())
        with self._book.held() as book:
            known = _entries(book.records)
            if _is_new(entry, known, self.cap_epsilon, self.delta):
                book.append({"booked": {k: v for k, v in asdict(entry).items() if k != "answered"}})
            else:
                _require_unanswered(entry.key, known)
                book.settle()

    def answered(self, run: str, task: int, round: int) -> None:
        """Note it on the disk."""
        with self._book.held() as book:
            known = _entries(book.records).get((self.site, run, task, round))
            if known is not None and not known.answered:
                book.append({"answered": known.key})

    def entries(self) -> list[Entry]:
        """All of them, of every process and node that shares it."""
        return list(_entries(self._book.read()).values())


def composed(entries: Iterable[Entry]) -> tuple[str, list[Spend]]:
    """(unit, spends) of a data set's entries together.

    The unit is `client` where all entries have it, else `sample`.

    A round that hides the whole site counts with a sampling rate of 1. Its amplification belongs to all rounds of a
    run, and the ledger has only those that the site took part in.

    It hides one example too: two data sets that differ by it give two contributions of the site, each within the clip,
    which lie twice the clip apart at most. So beside rounds with unit `sample` it counts at half its noise.
    """
    entries = list(entries)
    unit = "client" if entries and all(e.unit == "client" for e in entries) else "sample"
    spends = []
    for e in entries:
        share = 1.0 if e.unit == unit else 0.5
        spends.append(e.spend if e.unit == "sample" else replace(e.spend, noise=e.spend.noise * share, rate=1.0))
    return unit, sorted(merged(spends), key=lambda s: (s.noise, s.rate))


def spent(entries: Iterable[Entry], delta: float) -> float:
    """Epsilon at `delta` of a data set's entries together, in the unit that `composed` says."""
    return epsilon(composed(entries)[1], delta)


def _is_new(entry: Entry, known: Mapping[Key, Entry], cap: float, delta: float) -> bool:
    """Whether the entry must be booked, False where it is booked already; raises as `Ledger.reserve`."""
    _require_mechanism(entry)
    where = f"round {entry.round} of run '{entry.run}'"
    if (before := known.get(entry.key)) is not None:
        if before != entry:
            raise PrivacyError(
                f"{where} was booked for another instruction, or for other data of this site, and its noise must not "
                "cover two different answers",
                hint="If the data are the same, ask the server's operator why the round was changed",
                code="privacy-altered",
            )
        return False
    if cap == math.inf:
        return True
    mine = [e for e in known.values() if e.dataset == entry.dataset]
    unit, spends = composed([*mine, entry])
    after = epsilon(spends, delta)
    if not after <= cap:
        raise PrivacyError(
            f"{where} of job '{entry.job}' would bring data set '{entry.dataset}' to epsilon {bound(after)} at delta "
            f"{delta:g} (unit: {unit}; neighbours: {RELATIONS[unit]}), above this site's cap of {cap:g}",
            hint="Nothing was trained. `fedzoo client ledger show` lists what was spent; the cap is cap_epsilon in "
            "[privacy] of client.toml",
            code="privacy-cap",
        )
    return True


def _require_unanswered(key: Key, known: Mapping[Key, Entry]) -> None:
    """Raise where the round's answer may have left: a second one of other data would have the same noise."""
    before = known[key]
    last = [e for e in known.values() if (e.site, e.run) == (before.site, before.run)][-1]
    if before.answered or last is not before:
        raise PrivacyError(
            f"round {before.round} of run '{before.run}' was "
            f"{'answered' if before.answered else 'followed by others'}, and its answer is not kept any more; it must "
            "not be computed a second time",
            hint="Ask the server's operator why an old round is asked for",
            code="privacy-repeated",
        )


def _require_mechanism(entry: Entry) -> None:
    spend = entry.spend
    sound = (
        math.isfinite(spend.noise)
        and spend.noise >= 0
        and 0 < spend.rate <= 1
        and spend.steps >= 1
        and 0 < entry.delta < 1
        and entry.unit in RELATIONS
        and entry.digest
    )
    if not sound:
        raise PrivacyError(
            f"no mechanism has noise {spend.noise}, sampling rate {spend.rate}, {spend.steps} steps, delta "
            f"{entry.delta} and unit '{entry.unit}' (digest '{entry.digest}')"
        )


def _entries(records: Iterable[Record]) -> dict[Key, Entry]:
    found: dict[Key, Entry] = {}
    for record in records:
        if "booked" in record:
            fields: dict[str, Any] = dict(record["booked"])
            entry = Entry(**{**fields, "spend": Spend(**fields["spend"])})
            found[entry.key] = entry
        else:
            site, run, task, round = record["answered"]
            key = (site, run, task, round)
            found[key] = replace(found[key], answered=True)
    return found


def open_ledger(node_dir: Path, config: ClientConfig) -> DiskLedger:
    """The ledger of a node, as `client.toml` says."""
    folder, privacy = NodeFolder(node_dir.resolve()), config.privacy
    return DiskLedger(
        folder.root / privacy.ledger,
        privacy.cap_epsilon,
        privacy.delta,
        mark=folder.mark,
        witnesses=(folder.secret,),
        site=config.site,
    )
