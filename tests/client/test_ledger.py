"""What is booked, what it adds up to, and what is refused: by both ledgers alike."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from opacus.accountants import RDPAccountant
from scipy.special import logsumexp

from client.config import ClientConfig
from client.ledger import DiskLedger, Entry, Ledger, MemoryLedger, composed, open_ledger, spent
from client.logbook import Logbook
from shared_models.errors import PrivacyError
from shared_models.privacy import Spend, bound, epsilon

ROOT = Path(__file__).resolve().parents[2]
DELTA = 1e-5
STEP = Spend(noise=1.1, rate=0.02, steps=50)
ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))  # those of Opacus

Make = Callable[..., Ledger]


@pytest.fixture(params=["memory", "disk"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """A ledger with a cap; that on the disk is opened anew each time, as after a restart."""
    memory: list[MemoryLedger] = []

    def ledger(cap: float = math.inf, delta: float = DELTA) -> Ledger:
        if request.param == "disk":
            return DiskLedger(tmp_path / "ledger", cap, delta)
        memory.append(memory[0] if memory else MemoryLedger())
        memory[0].cap_epsilon, memory[0].delta = cap, delta
        return memory[0]

    return ledger


def book(ledger: Ledger, round: int, spend: Spend = STEP, **changed: Any) -> None:
    given = {"dataset": "d", "run": "r", "task": 0, "delta": DELTA, "unit": "sample", "digest": f"x{round}", **changed}
    ledger.reserve(round=round, spend=spend, **given)


def entry(spend: Spend, unit: str = "sample", dataset: str = "d") -> Entry:
    return Entry(dataset, "r", 0, 0, spend, DELTA, unit, "x")


def refusal(attempt: Callable[[], None], message: str) -> str:
    with pytest.raises(PrivacyError, match=message) as caught:
        attempt()
    return caught.value.code


# ---- composition -----------------------------------------------------------------------------------------------------
def test_gaussian_steps_equal_a_sum_by_hand(make: Make) -> None:
    """Without sampling RDP is alpha n / (2 sigma^2); epsilon by Balle et al. 2020, Theorem 21."""
    book(make(), 0, Spend(noise=2.0, rate=1.0, steps=3), run="a")
    book(make(), 0, Spend(noise=4.0, rate=1.0, steps=5), run="b", delta=1e-7)
    book(make(), 0, Spend(noise=0.1, rate=1.0, steps=9), run="c", dataset="another")
    mine = [e for e in make().entries() if e.dataset == "d"]
    slope = 3 / (2 * 2.0**2) + 5 / (2 * 4.0**2)
    assert slope == 0.53125
    by_hand = min(a * slope - (math.log(DELTA) + math.log(a)) / (a - 1) + math.log((a - 1) / a) for a in ORDERS)
    assert spent(mine, DELTA) == pytest.approx(by_hand, rel=1e-12)


def test_sampled_steps_equal_a_sum_by_hand() -> None:
    """Mironov et al. 2019, eq. 3 at integer orders: A = sum_k C(a,k) (1-q)^(a-k) q^k exp((k^2-k) / (2 sigma^2))."""
    parts = [Spend(noise=1.5, rate=0.01, steps=10), Spend(noise=3.0, rate=0.05, steps=20)]

    def rdp(s: Spend, a: int) -> float:
        terms = [
            math.log(math.comb(a, k))
            + (a - k) * math.log1p(-s.rate)
            + k * math.log(s.rate)
            + (k * k - k) / (2 * s.noise**2)
            for k in range(a + 1)
        ]
        return s.steps * float(logsumexp(terms)) / (a - 1)

    curve = {
        a: sum(rdp(s, a) for s in parts) - (math.log(DELTA) + math.log(a)) / (a - 1) + math.log((a - 1) / a)
        for a in range(12, 64)
    }
    best = min(curve, key=lambda a: curve[a])
    assert 12 < best < 63  # a true minimum, at an integer order
    assert spent([entry(s) for s in parts], DELTA) == pytest.approx(curve[best], rel=1e-9)


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_epsilon_is_opacuss_own(accountant: Any) -> None:
    from opacus.accountants import create_accountant

    own = create_accountant(accountant)
    for noise, rate, steps in ((1.1, 0.02, 30), (0.9, 0.01, 20)):
        for _ in range(steps):
            own.step(noise_multiplier=noise, sample_rate=rate)
    spends = [Spend(1.1, 0.02, 30), Spend(0.9, 0.01, 20)]
    assert epsilon(spends, DELTA, accountant) == pytest.approx(own.get_epsilon(delta=DELTA), rel=1e-12)
    assert epsilon([], DELTA, accountant) == 0.0


def test_jobs_restarts_and_the_order_of_entries_make_one_sum(make: Make) -> None:
    whole = RDPAccountant()
    for round in range(3):
        for run, noise in (("first", 1.0), ("second", 1.3)):
            book(make(), round, Spend(noise, 0.05, 7), run=run)
            for _ in range(7):
                whole.step(noise_multiplier=noise, sample_rate=0.05)
    assert len(make().entries()) == 6
    assert spent(make().entries(), DELTA) == pytest.approx(whole.get_epsilon(delta=DELTA), rel=1e-9)
    assert composed(make().entries())[1] == [Spend(1.0, 0.05, 21), Spend(1.3, 0.05, 21)]


def test_no_noise_spends_everything() -> None:
    assert spent([entry(Spend(0.0, 0.5, 1))], DELTA) == math.inf
    assert refusal(lambda: book(MemoryLedger(1e9), 0, Spend(0.0, 0.5, 1)), "to epsilon infinite") == "privacy-cap"


def test_units() -> None:
    """Client rounds alone keep their own unit; beside sample rounds they count at half the noise; both unsampled."""
    clients = [entry(Spend(4.0, 0.1, 2), "client")]
    assert composed(clients) == ("client", [Spend(4.0, 1.0, 2)])
    assert composed([*clients, entry(STEP)]) == ("sample", [STEP, Spend(2.0, 1.0, 2)])
    assert composed([]) == ("sample", [])


def test_half_the_noise_is_what_two_clipped_contributions_need() -> None:
    """Two vectors of norm C at most lie 2 C apart: Renyi divergence a (2C)^2 / (2 (sigma C)^2), that of sigma / 2."""
    sigma, order = 3.0, 7.0
    apart = order * 2.0**2 / (2 * sigma**2)
    assert order / (2 * (sigma / 2) ** 2) == pytest.approx(apart, rel=1e-15)


# ---- the cap ---------------------------------------------------------------------------------------------------------
def test_the_cap_refuses_exactly_at_the_boundary(make: Make) -> None:
    three = spent([entry(replace(STEP, steps=150))], DELTA)
    for round in range(2):
        book(make(three), round)
    under = math.nextafter(three, 0)
    assert refusal(lambda: book(make(under), 2), rf"above this site's cap of {under:g}") == "privacy-cap"
    assert len(make().entries()) == 2
    book(make(three), 2)
    assert spent(make().entries(), DELTA) == three
    assert refusal(lambda: book(make(three), 3), "privacy|cap") == "privacy-cap"
    assert len(make().entries()) == 3
    book(make(three), 2)  # what is booked already costs nothing
    book(make(three), 0, dataset="another", run="s")  # each data set has its own


def test_the_message_says_all_that_belongs_to_an_epsilon() -> None:
    with pytest.raises(PrivacyError) as caught:
        book(MemoryLedger(0.1), 4, job="demo")
    assert str(caught.value) == (
        "round 4 of run 'r' of job 'demo' would bring data set 'd' to epsilon "
        f"{bound(spent([entry(STEP)], DELTA))} at delta 1e-05 (unit: sample; neighbours: one training example added or "
        "removed), above this site's cap of 0.1. Nothing was trained. `fedzoo client ledger show` lists what was "
        "spent; the cap is cap_epsilon in [privacy] of client.toml"
    )


def test_the_sites_own_delta_counts_not_the_jobs(make: Make) -> None:
    book(make(), 0, delta=0.5)
    at = {delta: spent([entry(STEP)], delta) for delta in (1e-3, 1e-9)}
    assert at[1e-3] < at[1e-9]
    book(make(at[1e-3], 1e-3), 0, delta=0.5, dataset="e", run="s")
    assert refusal(lambda: book(make(at[1e-3], 1e-9), 0, delta=0.5, dataset="f", run="t"), "cap") == "privacy-cap"


def test_a_cap_holds_when_many_book_at_once(tmp_path: Path) -> None:
    cap = spent([entry(replace(STEP, steps=5 * STEP.steps))], DELTA)
    refused: list[str] = []

    def site(name: str) -> None:
        try:
            book(DiskLedger(tmp_path, cap, DELTA), 0, run=name)
        except PrivacyError as error:
            refused.append(error.code)

    threads = [threading.Thread(target=site, args=(f"run-{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused == ["privacy-cap"] * 3
    assert spent(DiskLedger(tmp_path, cap, DELTA).entries(), DELTA) == cap


# ---- the same round again --------------------------------------------------------------------------------------------
def test_the_same_round_again_is_the_same_entry(make: Make) -> None:
    book(make(), 0)
    book(make(), 0)
    assert [e.round for e in make().entries()] == [0]
    assert not make().entries()[0].answered


def test_an_entry_of_a_killed_process_is_made_durable_by_the_next(tmp_path: Path) -> None:
    """Killed between the line and its head; the same round again returns only when the head counts it."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    ledger = DiskLedger(tmp_path / "ledger", math.inf, DELTA, mark=tmp_path / "mark")
    book(ledger, 0)
    before = ledger.path.read_bytes()
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(Logbook, "write_heads", killed)
        with pytest.raises(KeyboardInterrupt):
            book(ledger, 1)
    assert len(ledger.entries()) == 2
    book(ledger, 1)
    assert len(ledger.entries()) == 2
    for head in ("ledger/head.json", "mark"):
        assert json.loads((tmp_path / head).read_text())["count"] == 3
    ledger.path.write_bytes(before)
    assert refusal(ledger.entries, "does not hold the 3 lines") == "ledger"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changed",
    [
        {"digest": "another model"},
        {"spend": replace(STEP, noise=1.2)},
        {"spend": replace(STEP, steps=51)},
        {"delta": 1e-6},
        {"unit": "client"},
        {"dataset": "another"},
        {"job": "another"},
    ],
    ids=str,
)
def test_an_altered_round_is_refused(make: Make, changed: dict[str, Any]) -> None:
    book(make(), 0)
    before = make().entries()
    attempt = {"spend": STEP, "digest": "x0", **changed}
    assert refusal(lambda: book(make(), 0, **attempt), "booked for another instruction") == "privacy-altered"
    assert make().entries() == before


def test_answered(make: Make) -> None:
    book(make(), 0)
    make().answered("r", 0, 0)
    make().answered("r", 0, 0)
    make().answered("never booked", 0, 0)
    assert [e.answered for e in make().entries()] == [True]


def test_what_a_node_answered_is_not_computed_again(tmp_path: Path) -> None:
    ledger = DiskLedger(tmp_path, math.inf, DELTA)
    book(ledger, 0)
    ledger.answered("r", 0, 0)
    assert refusal(lambda: book(ledger, 0), "round 0 of run 'r' was answered") == "privacy-repeated"


def test_a_simulation_may_repeat_itself_and_pays_once() -> None:
    ledger = MemoryLedger()
    for _ in range(2):
        for round in range(2):
            book(ledger, round)
            ledger.answered("r", 0, round)
    assert len(ledger.entries()) == 2


def test_a_round_before_the_last_is_not_computed_again(tmp_path: Path) -> None:
    ledger = DiskLedger(tmp_path, math.inf, DELTA)
    book(ledger, 0)
    book(ledger, 1)
    book(ledger, 0, run="other")
    assert refusal(lambda: book(ledger, 0), "was followed by others") == "privacy-repeated"
    book(ledger, 1)
    assert len(ledger.entries()) == 3


def test_rounds_missed_before_may_be_booked_later(make: Make) -> None:
    book(make(), 3)
    book(make(), 1)
    assert [e.round for e in make().entries()] == [3, 1]


# ---- whatever else happens -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changed",
    [
        {"spend": Spend(math.nan, 0.1, 1)},
        {"spend": Spend(math.inf, 0.1, 1)},
        {"spend": Spend(-1.0, 0.1, 1)},
        {"spend": Spend(1.0, 0.0, 1)},
        {"spend": Spend(1.0, 1.1, 1)},
        {"spend": Spend(1.0, math.nan, 1)},
        {"spend": Spend(1.0, 0.1, 0)},
        {"spend": Spend(1.0, 0.1, -5)},
        {"delta": 0.0},
        {"delta": 1.0},
        {"unit": "batch"},
        {"digest": ""},
    ],
    ids=str,
)
def test_what_no_mechanism_has_is_not_booked(make: Make, changed: dict[str, Any]) -> None:
    given = {"spend": STEP, **changed}
    assert refusal(lambda: book(make(), 0, **given), "no mechanism has") == "privacy"
    assert make().entries() == []


def test_clocks_play_no_part(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cap = spent([entry(replace(STEP, steps=4 * STEP.steps))], DELTA)
    for round, now in enumerate((2e9, 0.0, -5.0, 1e12)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        book(make(cap), round)
        book(make(cap), round)
    assert [e.round for e in make().entries()] == [0, 1, 2, 3]
    assert spent(make().entries(), DELTA) == cap
    assert refusal(lambda: book(make(cap), 4), "cap") == "privacy-cap"


def test_a_ledger_that_cannot_be_read_books_nothing(tmp_path: Path) -> None:
    ledger = DiskLedger(tmp_path, math.inf, DELTA)
    book(ledger, 0)
    ledger.path.write_bytes(b"")
    for attempt in (lambda: book(ledger, 1), lambda: ledger.answered("r", 0, 0), ledger.entries, ledger.begin):
        assert refusal(attempt, "is damaged") == "ledger"  # type: ignore[arg-type]
    assert ledger.path.read_bytes() == b""


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    odd = Entry("ä\n\udcff /data", "r", 2, 7, Spend(1 / 3, 0.1 + 0.2, 10**12), 1e-300, "client", "d" * 64, "job")
    DiskLedger(tmp_path, math.inf, DELTA).reserve(
        odd.dataset, odd.run, odd.task, odd.round, odd.spend, odd.delta, odd.unit, digest=odd.digest, job=odd.job
    )
    assert DiskLedger(tmp_path, math.inf, DELTA).entries() == [odd]


def config_of(folder: Path, site: str = "a", **privacy: Any) -> ClientConfig:
    addresses = dict.fromkeys(("fleet", "enrollment", "membership"), "localhost:1")
    data = {"folder": str(folder), "format": "imagefolder"}
    return ClientConfig.model_validate({"site": site, "server": addresses, "data": data, "privacy": privacy})


def test_a_node_that_lost_its_ledger_notices(tmp_path: Path) -> None:
    node, data = tmp_path / "node", tmp_path / "data"
    (node / "state").mkdir(parents=True)
    ledger = open_ledger(node, config_of(data))
    assert (ledger.cap_epsilon, ledger.delta, ledger.path) == (8.0, 1e-5, node / "ledger" / "entries.log")
    ledger.begin()
    for path in (node / "ledger").iterdir():
        path.unlink()
    assert refusal(lambda: book(ledger, 0), r"is gone, and .*state/ledger\.json shows") == "ledger"
    (node / "state" / "ledger.json").unlink()
    (node / "secret").write_bytes(b"s" * 32)
    assert refusal(ledger.begin, r"is gone, and .*secret shows") == "ledger"  # type: ignore[arg-type]


def test_two_nodes_of_a_site_share_a_ledger_and_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    one = config_of(tmp_path / "data", ledger=str(tmp_path / "shared"))
    two = config_of(tmp_path / "link", "b", ledger=str(tmp_path / "shared"))
    assert one.dataset == two.dataset == str((tmp_path / "data").resolve())
    assert config_of(tmp_path / "link", dataset="chest").dataset == "chest"
    first, second = open_ledger(tmp_path / "one", one), open_ledger(tmp_path / "two", two)
    book(first, 0, dataset=one.dataset)
    book(second, 0, dataset=two.dataset, digest="its own")  # sites of one run: each round is booked for each
    second.answered("r", 0, 0)
    book(first, 0, dataset=one.dataset)
    assert [(e.site, e.answered) for e in first.entries()] == [("a", False), ("b", True)]
    once, twice = (spent([entry(replace(STEP, steps=n * STEP.steps))], DELTA) for n in (1, 2))
    assert spent([e for e in first.entries() if e.dataset == one.dataset], DELTA) == twice > once


def test_booking_without_a_cap_loads_neither_torch_nor_opacus(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from client.ledger import DiskLedger, Spend\n"
        f"book = DiskLedger(Path({str(tmp_path)!r}), float('inf'), 1e-5)\n"
        "book.reserve('d', 'r', 0, 0, Spend(1.0, 0.1, 1), 1e-5, 'sample', digest='x')\n"
        "heavy = {'torch', 'opacus', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
