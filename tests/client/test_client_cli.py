"""`fedzoo client`: what a person types and reads. The server behind `check` is played by the test."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import client.enroll
import client.readers
import client.tls
from client import status
from client.cli import app
from client.config import ClientConfig, NodeFolder, PolicyPart, load, save
from client.enroll import Membership
from client.status import Status
from shared_models.errors import ConfigError, DataError, PolicyError, UnknownNameError

ROOT = Path(client.__file__).parents[1]


@pytest.fixture
def node(tmp_path: Path, monkeypatch) -> Path:
    addresses = dict.fromkeys(("fleet", "enrollment", "membership"), "localhost:1")
    data = {"folder": str(tmp_path / "data"), "format": "imagefolder"}
    save(tmp_path, ClientConfig.model_validate({"site": "a", "server": addresses, "data": data}))
    monkeypatch.setattr(client.tls, "verify_server", lambda address, ca: None)
    monkeypatch.setattr(client.tls, "site_credentials", lambda folder: (b"", b"", b""))
    monkeypatch.setattr(client.readers, "check", lambda folder, format: {"images": 3, "unreadable": []})
    member(monkeypatch)
    return tmp_path


def member(monkeypatch, state: str = "active", clock: float = 0.0, until: float = 2e9) -> None:
    """The membership service says so; `clock` is how far the server's clock is ahead."""
    monkeypatch.setattr(client.enroll, "whoami", lambda _: Membership("a", state, until, time.time() + clock))


def check(node: Path) -> tuple[int, dict]:
    result = CliRunner().invoke(app, ["check", "--dir", str(node), "--json"])
    return result.exit_code, json.loads(result.output)


def test_check_of_a_sound_node(node):
    code, report = check(node)
    assert code == 0
    assert report["data"] == {"images": 3, "unreadable": []}
    assert report["server"] == {"fleet": "localhost:1"}
    assert report["identity"] == {
        "site": "a",
        "status": "active",
        "certificate_until": "2033-05-18T03:33:20Z",
        "clock_ahead_seconds": pytest.approx(0, abs=0.2),
    }
    assert report["ledger"] == {"rounds_booked": 0, "file": str(node / "ledger" / "entries.log")}
    assert "data      ok" in CliRunner().invoke(app, ["check", "--dir", str(node)]).output


@pytest.mark.parametrize(
    ("state", "clock", "problem"),
    [
        ("revoked", 0, "this node is revoked"),
        ("active", -6, "clock is 6 s ahead of the server's"),
        ("active", 300, "clock is 300 s behind the server's"),
        ("active", 200, None),
    ],
)
def test_check_of_who_this_node_is(node, monkeypatch, state, clock, problem):
    member(monkeypatch, state, clock)
    code, report = check(node)
    assert code == (1 if problem else 0)
    assert (problem in report["identity"]["problem"]) if problem else "problem" not in report["identity"]


def test_check_warns_before_the_certificate_ends(node, monkeypatch):
    member(monkeypatch, until=time.time() + 12.5 * 86400)
    code, report = check(node)
    assert code == 0  # it works today
    assert ", in 12 days; " in report["identity"]["warning"]
    assert "operator to revoke and invite it, then: fedzoo client renew INVITE" in report["identity"]["warning"]
    assert (
        "  warning: this node's certificate ends on 20" in CliRunner().invoke(app, ["check", "--dir", str(node)]).output
    )
    member(monkeypatch, until=time.time() + 61 * 86400)
    assert "warning" not in check(node)[1]["identity"]


def test_check_goes_on_after_a_problem_and_ends_with_1(node, monkeypatch):
    def unreadable(folder, format):
        raise DataError(f"the data folder {folder} does not exist", hint="Give a folder")

    monkeypatch.setattr(client.readers, "check", unreadable)
    code, report = check(node)
    assert code == 1
    assert "does not exist. Give a folder" in report["data"]["problem"]
    assert report["identity"]["site"] == "a"
    monkeypatch.setattr(client.readers, "check", lambda *_: {"images": 3, "unreadable": ["x.png"]})
    assert check(node)[1]["data"]["problem"] == "1 files cannot be read"
    NodeFolder(node).mark.parent.mkdir()
    NodeFolder(node).mark.touch()
    assert "is gone" in check(node)[1]["ledger"]["problem"]


def test_status_shows_what_waits_for_approval(node):
    (node / "requests").mkdir()
    (node / "requests" / f"{'a' * 64}.toml").write_text("")
    status.write(node, Status(7, "refused", "why", 0.0, 2))
    with status.only_process(node):
        result = CliRunner().invoke(app, ["status", "--dir", str(node), "--json"])
        text = CliRunner().invoke(app, ["status", "--dir", str(node)]).output
    assert json.loads(result.output) == {
        "pid": 7,
        "state": "refused",
        "reason": "why",
        "since": 0.0,
        "restarts": 2,
        "requests": ["a" * 64],
    }
    assert text.startswith("refused: why\nprocess 7, 2 restarts, since 1970-01-01T00:00:00Z\n")
    assert f"fedzoo client approve {'a' * 64}" in text


def test_consent_is_given_and_withdrawn(node):
    one, other = "a" * 64, "b" * 64

    def say(*words: str) -> str:
        result = CliRunner().invoke(app, [*words, "--dir", str(node)])
        assert result.exit_code == 0, result.exception
        return result.output

    for job in (one, other, one):
        say("approve", job)
    assert load(node).policy.approve == (one, other)
    said = say("withdraw", one)
    assert load(node).policy.approve == (other,)
    assert said.startswith(f"site 'a' no longer agrees to job {one}")
    assert "a round that runs already ends first" in said
    assert "until the node is stopped" in said
    assert "approve_all" not in said
    save(node, load(node).model_copy(update={"policy": PolicyPart(approve=(other,), approve_all=True)}))
    assert "approve_all = true" in say("withdraw", other)
    assert load(node).policy == PolicyPart(approve_all=True)


def test_an_approved_request_waits_no_longer(node):
    """Its text is kept, so that the site can read what it has agreed to."""
    job, requests = "a" * 64, NodeFolder(node).requests
    requests.mkdir()
    (requests / f"{job}.toml").write_text("what was asked")
    said = CliRunner().invoke(app, ["approve", job, "--dir", str(node)]).output
    assert "has not asked for it yet" not in said
    assert list(requests.glob("*.toml")) == []
    assert (requests / "approved" / f"{job}.toml").read_text() == "what was asked"
    assert str(requests / "approved" / f"{job}.toml") in said
    CliRunner().invoke(app, ["withdraw", job, "--dir", str(node)])
    now = CliRunner().invoke(app, ["status", "--dir", str(node), "--json"]).output
    assert json.loads(now)["requests"] == []
    (requests / f"{job}.toml").write_text("asked again")
    assert json.loads(CliRunner().invoke(app, ["status", "--dir", str(node), "--json"]).output)["requests"] == [job]


@pytest.mark.parametrize(
    ("privacy", "told"),
    [
        ("", True),
        ("[privacy]\nmode = 'none'", True),
        ("[privacy]\nmode = 'client'\nnoise = 1.0", True),
        ("[privacy]\nmode = 'sample'\nnoise = 0.0", True),
        ("[privacy]\nmode = 'sample'\nnoise = 1.0", False),
        ("[privacy]\nmode = 'sample'\nepsilon = 3.0", False),
    ],
)
def test_who_approves_is_told_whom_the_job_trusts_with_the_data(node, privacy, told):
    job, requests = "a" * 64, NodeFolder(node).requests
    requests.mkdir()
    (requests / f"{job}.toml").write_text(f"name = 'x'\n{privacy}\n")
    said = CliRunner().invoke(app, ["approve", job, "--dir", str(node)]).output
    assert ("trusts the server's operator with the data" in said) == told


def test_consent_stands_in_the_record(node):
    job = "a" * 64
    for word in ("approve", "withdraw"):
        assert CliRunner().invoke(app, [word, job, "--dir", str(node)]).exit_code == 0
    found = json.loads(CliRunner().invoke(app, ["audit", "--dir", str(node), "--json"]).output)
    assert [(line["event"], line["job"]) for line in found] == [("approve", job), ("withdraw", job)]
    (line,) = CliRunner().invoke(app, ["audit", "--last", "1", "--dir", str(node)]).output.splitlines()
    assert line == f"{found[1]['time']} withdraw job={job}"


def test_no_consent_without_a_line_but_a_withdrawal(node):
    job = "a" * 64
    save(node, load(node).model_copy(update={"policy": PolicyPart(approve=("b" * 64,))}))
    NodeFolder(node).audit.mkdir(parents=True)
    for word, given in (("approve", job), ("withdraw", "b" * 64)):
        result = CliRunner().invoke(app, [word, given, "--dir", str(node)])
        assert isinstance(result.exception, PolicyError)
    assert load(node).policy.approve == ()


def test_a_mistyped_approval_ends_before_anything_starts(node):
    result = CliRunner().invoke(app, ["start", "--dir", str(node), "--approve", "abc"])
    assert isinstance(result.exception, ConfigError)
    assert "approve" in str(result.exception)
    assert not (node / "node.json").exists()


def test_an_unknown_format_costs_no_invite(node, monkeypatch):
    monkeypatch.setattr(client.enroll, "enroll", lambda *_: pytest.fail("the invite was used"))
    arguments = ["enroll", "INVITE", "--dir", str(node / "n"), "--data", str(node), "--format", "imagefoldr"]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UnknownNameError)
    assert "imagefolder" in str(result.exception)


def test_the_commands_load_nothing_heavy_before_they_run():
    code = "import sys, client.cli, client.node; print(sorted({'torch', 'flwr', 'grpc', 'sklearn'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
