"""`fedzoo client ledger show`: never an epsilon without delta, unit and neighbours."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fedzoo
from client.cli import app
from client.config import ClientConfig, NodeFolder, load, save
from client.ledger import DiskLedger, open_ledger
from shared_models.errors import ConfigError, PrivacyError
from shared_models.privacy import Spend, bound, epsilon, rest

SAMPLE, CLIENT = Spend(1.0, 0.02, 10), Spend(8.0, 0.5, 1)


@pytest.fixture
def node(tmp_path: Path) -> Path:
    configure(tmp_path)
    return tmp_path


def configure(node: Path, **privacy: Any) -> None:
    addresses = dict.fromkeys(("fleet", "enrollment", "membership"), "localhost:1")
    data = {"folder": "/data/chest", "format": "imagefolder"}
    given = {"site": "a", "server": addresses, "data": data, "privacy": privacy}
    save(node, ClientConfig.model_validate(given))


def ledger_of(node: Path) -> DiskLedger:
    return open_ledger(node, load(node))


def book(node: Path, round: int, run: str = "r1", spend: Spend = SAMPLE, **changed: Any) -> None:
    given = {"dataset": "/data/chest", "task": 0, "delta": 1e-6, "unit": "sample", "digest": "x", "job": "demo"}
    ledger_of(node).reserve(run=run, round=round, spend=spend, **{**given, **changed})


def show(node: Path, *words: str) -> str:
    result = CliRunner().invoke(app, ["ledger", "show", "--dir", str(node), *words])
    assert result.exit_code == 0, result.output
    return result.output


def test_nothing_spent(node: Path) -> None:
    assert show(node) == (
        f"ledger {node}/ledger/entries.log\n"
        "\n"
        "data set /data/chest  (read by this node)\n"
        "  epsilon 0 at delta 1e-05, unit sample (neighbours: one training example added or removed); cap 8, left 8\n"
        "  no round has been booked\n"
    )
    assert not (node / "ledger").exists()


def test_two_jobs_on_one_data_set(node: Path) -> None:
    for round in range(3):
        book(node, round)
        ledger_of(node).answered("r1", 0, round)
    book(node, 0, "r2", job="")
    all_, first, last = (epsilon([Spend(1.0, 0.02, n)], 1e-5) for n in (40, 30, 10))
    unit = "at delta 1e-05, unit sample (neighbours: one training example added or removed)"
    assert show(node) == (
        f"ledger {node}/ledger/entries.log\n"
        "\n"
        "data set /data/chest  (read by this node)\n"
        f"  epsilon {bound(all_)} {unit}; cap 8, left {rest(8 - all_)}\n"
        "  run r1, site a, job demo: 3 rounds (0 to 2)\n"
        f"    alone epsilon {bound(first)} {unit}\n"
        "    noise 1, sampling rate 0.02, 30 steps\n"
        "  run r2, site a, job unknown: 1 round (0)\n"
        f"    alone epsilon {bound(last)} {unit}\n"
        "    noise 1, sampling rate 0.02, 10 steps\n"
        "    1 booked and not answered; counted all the same\n"
    )


def test_units_do_not_mix_in_silence(node: Path) -> None:
    book(node, 0, "c", CLIENT, unit="client")
    assert "unit client (neighbours: one site added or removed with all its data); cap 8" in show(node)
    assert "rounds with unit client count here without sampling; a job's own epsilon may count on it\n" in show(node)
    book(node, 0, "s")
    text = show(node)
    assert "a job's own epsilon may count" not in text
    both = epsilon([SAMPLE, Spend(4.0, 1.0, 1)], 1e-5)
    assert (
        f"  epsilon {bound(both)} at delta 1e-05, unit sample (neighbours: one training example added or removed)"
        in text
    )
    assert "rounds with unit client count here at half their noise and without sampling" in text


def test_every_epsilon_has_its_delta_unit_and_neighbours(node: Path) -> None:
    book(node, 0, "c", CLIENT, unit="client")
    book(node, 0, "s")
    book(node, 0, "o", dataset="old name")
    text = show(node)
    stated = [line for line in text.splitlines() if " epsilon " in line]
    assert len(stated) == 5
    assert all(re.search(r"epsilon \S+ at delta \S+, unit \w+ \(neighbours: [^)]+\)", line) for line in stated)
    assert "private" not in text


def test_json(node: Path) -> None:
    book(node, 0)
    book(node, 4)
    book(node, 0, "o", dataset="old name")
    configure(node, cap_epsilon=0.5, delta=1e-4)
    found = json.loads(show(node, "--json"))
    both = epsilon([Spend(1.0, 0.02, 20)], 1e-4)
    assert (found["file"], found["dataset"]) == (str(node / "ledger" / "entries.log"), "/data/chest")
    mine, other = found["datasets"]
    assert {k: v for k, v in mine.items() if k != "runs"} == {
        "dataset": "/data/chest",
        "epsilon": both,
        "delta": 1e-4,
        "unit": "sample",
        "relation": "one training example added or removed",
        "accountant": "rdp",
        "cap_epsilon": 0.5,
        "left": max(0.0, 0.5 - both),
        "unsampled": False,
        "converted": False,
    }
    assert mine["runs"] == [
        {
            "run": "r1",
            "site": "a",
            "job": "demo",
            "rounds": [0, 4],
            "unanswered": 2,
            "unit": "sample",
            "relation": "one training example added or removed",
            "epsilon": both,
            "delta": 1e-4,
            "mechanisms": [{"noise": 1.0, "rate": 0.02, "steps": 20}],
        }
    ]
    assert other["dataset"] == "old name"


def test_what_is_infinite_is_null_and_said(node: Path) -> None:
    configure(node, cap_epsilon=float("inf"))
    assert load(node).privacy.cap_epsilon == float("inf")
    book(node, 0, spend=Spend(0.0, 1.0, 1))
    (mine,) = json.loads(show(node, "--json"))["datasets"]
    assert (mine["epsilon"], mine["cap_epsilon"], mine["left"]) == (None, None, None)
    assert "  epsilon infinite at delta 1e-05, unit sample" in show(node)
    assert "; no cap" in show(node)
    configure(node)
    (mine,) = json.loads(show(node, "--json"))["datasets"]
    assert (mine["epsilon"], mine["cap_epsilon"], mine["left"]) == (None, 8.0, 0.0)


def test_what_is_shown_is_never_less_than_spent_nor_more_than_left(node: Path) -> None:
    configure(node, cap_epsilon=8.0)
    for round in range(7):
        book(node, round, spend=Spend(1.1 + round, 0.31, 3 + round))
        (mine,) = json.loads(show(node, "--json"))["datasets"]
        told = re.search(r"  epsilon (\S+) at .*, left (\S+)", show(node))
        assert told is not None
        assert mine["epsilon"] <= float(told[1]) <= mine["epsilon"] * 1.01
        assert mine["left"] * 0.99 <= float(told[2]) <= mine["left"]


def test_names_cannot_write_to_the_terminal(node: Path) -> None:
    book(node, 0, dataset="\x1b[2J\udcff\n")
    assert "data set \\x1b[2J\\udcff\\n" in show(node)


def test_errors_end_with_one_line_and_1(node: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book(node, 0)
    (node / "ledger" / "entries.log").write_bytes(b"")
    result = CliRunner().invoke(app, ["ledger", "show", "--dir", str(node)])
    assert isinstance(result.exception, PrivacyError)
    with pytest.raises(SystemExit) as end:
        fedzoo.main(["client", "ledger", "show", "--dir", str(node)])
    assert str(end.value).startswith(f"error: the ledger {node}/ledger/entries.log is damaged")
    assert "\n" not in str(end.value)
    result = CliRunner().invoke(app, ["ledger", "show", "--dir", str(tmp_path / "nowhere")])
    assert isinstance(result.exception, ConfigError)


def test_a_deleted_ledger_is_not_zero(node: Path) -> None:
    book(node, 0)
    for path in (node / "ledger").iterdir():
        path.unlink()
    (node / "ledger").rmdir()
    result = CliRunner().invoke(app, ["ledger", "show", "--dir", str(node)])
    assert "is gone" in str(result.exception)
    assert str(NodeFolder(node).mark) in str(result.exception)
