"""`fedzoo server` without a running server."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from commands import port_options, run_here
from cryptography import x509

import server
from server.authority import Authority
from server.cli import app
from server.config import ServerFolder, load
from server.flower_control import FlowerNode
from server.nodes import Roster
from server.process import reconcile
from server.superlink import SuperLink, is_healthy
from shared_models.errors import ConfigError, DeploymentError, EnrollmentError
from shared_models.invite import decode

fedzoo = partial(run_here, app)


@pytest.fixture
def folder(tmp_path: Path) -> ServerFolder:
    """A server on ports that nothing listens on."""
    fedzoo(
        "init", "--dir", str(tmp_path / "server"), "--host", "fed.example.org", "--host", "10.0.0.5", *port_options()
    )
    return ServerFolder(tmp_path / "server")


def test_init_makes_a_private_folder_once(folder: ServerFolder) -> None:
    assert load(folder.root).hosts == ("fed.example.org", "10.0.0.5")
    for path in folder.root.rglob("*"):
        public = path.suffix == ".crt"
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o644 if public else 0o600), path
    certificate = x509.load_pem_x509_certificate((folder.pki / "server.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == ["localhost", "127.0.0.1", "fed.example.org", "10.0.0.5"]
    before = (folder.pki / "ca.key").read_bytes()
    with pytest.raises(ConfigError, match="exists and is not empty"):
        fedzoo("init", "--dir", str(folder.root))
    assert (folder.pki / "ca.key").read_bytes() == before


def test_init_refuses_a_bad_host_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a host name nor an IP"):
        fedzoo("init", "--dir", str(tmp_path / "server"), "--host", "https://fed.example.org")
    assert not (tmp_path / "server").exists()


def test_invite_prints_only_the_invite(folder: ServerFolder) -> None:
    printed = fedzoo("invite", "hospital-a", "--dir", str(folder.root), "--hours", "2")
    invite = decode(printed)
    assert printed.count("\n") == 1
    assert invite.address == f"fed.example.org:{load(folder.root).ports.enrollment}"
    assert invite.fingerprint == Authority.load(folder.pki).fingerprint
    assert invite.expires == pytest.approx(time.time() + 7200, abs=30)
    with pytest.raises(ConfigError, match="cannot be a site's name"):
        fedzoo("invite", "Hospital A", "--dir", str(folder.root))


def test_nodes_and_status_of_a_server_that_does_not_run(folder: ServerFolder) -> None:
    where = ("--dir", str(folder.root))
    assert "no site has enrolled yet" in fedzoo("nodes", *where)
    roster = Roster(folder.nodes)
    token, _ = roster.invite("a", 60)
    with roster.redeem(token, now=time.time()) as redemption:
        redemption.enroll(b"key", 7, "1")
    (row,) = json.loads(fedzoo("nodes", *where, "--json"))
    assert (row["site"], row["state"], row["last_seen"], row["revoked"]) == ("a", "unknown", None, None)
    assert "unknown" in fedzoo("nodes", *where)
    state = json.loads(fedzoo("status", *where, "--json"))
    assert (state["running"], state["enrolled"], state["online"], state["revoked"]) == (False, 1, None, 0)
    assert "not running" in fedzoo("status", *where)
    assert "will refuse the node from its next start" in fedzoo("revoke", "a", *where)
    assert json.loads(fedzoo("nodes", *where, "--json"))[0]["state"] == "revoked"
    with pytest.raises(EnrollmentError, match="no enrolled site is called 'a'"):
        fedzoo("revoke", "a", *where)


@pytest.mark.parametrize("command", [["start"], ["renew"], ["nodes"], ["status"], ["invite", "a"], ["revoke", "a"]])
def test_a_folder_that_is_no_server(tmp_path: Path, command: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"there is no .*server\.toml\. Make a server first"):
        fedzoo(*command, "--dir", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_proxy_in_the_environment_is_ignored(folder: ServerFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "example.org")
    environment = SuperLink(folder, load(folder.root), Authority.load(folder.pki))._environment()
    assert environment["no_proxy"] == "example.org,127.0.0.1"


def test_superlink_that_dies_is_reported_with_its_log(folder: ServerFolder) -> None:
    (folder.pki / "server.key").write_text("no key")
    superlink = SuperLink(folder, config := load(folder.root), authority := Authority.load(folder.pki))
    with pytest.raises(DeploymentError, match=r"SuperLink ended with code \d+\. The end of .*superlink\.log"):
        superlink.start()
    assert not is_healthy(config, authority)


class Control:
    """Flower's side of the roster, in memory."""

    def __init__(self, **known: int) -> None:
        self.known = {key.encode(): node_id for key, node_id in known.items()}

    def nodes(self) -> list[FlowerNode]:
        return [FlowerNode(node_id, key, False, None) for key, node_id in self.known.items()]

    def register(self, key: bytes) -> int:
        if key == b"lost":
            raise DeploymentError("key in use")
        self.known[key] = 1000
        return 1000

    def unregister(self, node_id: int) -> None:
        self.known = {key: known for key, known in self.known.items() if known != node_id}


def test_reconcile_makes_flower_know_the_active_nodes_alone(folder: ServerFolder) -> None:
    roster = Roster(folder.nodes)
    for number, site in enumerate(["kept", "new", "gone", "lost"]):
        token, _ = roster.invite(site, 60)
        with roster.redeem(token) as redemption:
            redemption.enroll(site.encode(), number, str(number))
    roster.revoke("gone")
    control = Control(kept=0, gone=2, stranger=3)
    reconcile(roster, control)  # type: ignore[arg-type]
    assert control.known == {b"kept": 0, b"new": 1000}
    assert {node.site: node.node_id for node in roster.nodes()} == {"kept": 0, "new": 1000, "gone": 2, "lost": 3}


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, server.cli; print([m for m in ('torch', 'flwr', 'grpc', 'sklearn') if m in sys.modules])"
    environment = {"PYTHONPATH": str(Path(server.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
