"""Certificates that end: who is told when, what renewing changes, and what an ended one still opens."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from commands import port_options, run_here
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from client.config import NodeFolder
from client.enroll import enroll, whoami
from client.node import _is_revoked
from client.tls import verify_server
from server import authority as authority_module
from server.authority import SITE_LIFE, Authority
from server.cli import app, make_invite
from server.config import ServerFolder, load
from server.enrollment import start_services
from server.flower_control import FlowerNode
from server.nodes import Roster
from server.process import reconcile, shut_out
from shared_models.errors import ConfigError, DeploymentError, EnrollmentError
from shared_models.expiry import ending

DAY = 86400.0


fedzoo = partial(run_here, app)


@pytest.fixture
def folder(tmp_path: Path) -> ServerFolder:
    fedzoo("init", "--dir", str(tmp_path / "server"), "--host", "localhost", *port_options())
    return ServerFolder(tmp_path / "server")


def end(authority: Authority, path: Path, days: float) -> None:
    """Sign a certificate anew with everything as it was but its end, so many days from now."""
    old = x509.load_pem_x509_certificate(path.read_bytes())
    key = serialization.load_pem_private_key(authority.ca_key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    builder = x509.CertificateBuilder(old.issuer, old.subject, old.public_key(), old.serial_number)
    builder = builder.not_valid_before(moment - datetime.timedelta(days=400)).not_valid_after(moment)
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    path.write_bytes(builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM))


class Flower:
    """Flower's side of the roster, in memory."""

    def __init__(self, *keys: bytes) -> None:
        self.keys = dict(enumerate(keys))

    def nodes(self) -> list[FlowerNode]:
        return [FlowerNode(node_id, key, False, None) for node_id, key in self.keys.items()]

    def register(self, public_key: bytes) -> int:
        self.keys[node_id := len(self.keys)] = public_key
        return node_id

    def unregister(self, node_id: int) -> None:
        del self.keys[node_id]


def enter(roster: Roster, site: str, days_ago: float) -> bytes:
    """A site that enrolled so long ago; its key."""
    then = time.time() - days_ago * DAY
    token, _ = roster.invite(site, 60, now=then)
    with roster.redeem(token, now=then) as redemption:
        redemption.enroll(site.encode(), 0, site)
    return site.encode()


@pytest.mark.parametrize(
    ("days", "said"),
    [(61, ""), (59.5, "ends on 1970-03-01, in 59 days"), (0.5, "ends on 1970-01-01, in 0 days"), (0, "ended on 1970")],
)
def test_sixty_days_before_it_is_said(days: float, said: str) -> None:
    assert ending(days * DAY, now=0.0).startswith(said)
    assert bool(ending(days * DAY, now=0.0)) == bool(said)


# ---- the server's own ------------------------------------------------------------------------------------------------
@pytest.fixture
def serving(folder: ServerFolder) -> Iterator[object]:
    """Both services of the server in `folder`; called again, they start anew, as after a restart."""
    running: list[object] = []

    def start() -> None:
        stop()
        authority, roster = Authority.load(folder.pki), Roster(folder.nodes)
        running.extend(start_services(authority, roster, Flower(), load(folder.root)))

    def stop() -> None:
        while running:
            running.pop().stop(0).wait()  # type: ignore[attr-defined]

    yield start
    stop()


def test_a_node_verifies_the_server_after_a_renewal(folder: ServerFolder, serving, tmp_path: Path) -> None:
    """Over real TLS: enrolled before, refused once the certificate has ended, and again at home when it is renewed."""
    (tmp_path / "data").mkdir()
    authority = Authority.load(folder.pki)
    serving()
    config = enroll(make_invite(folder.root, "a", 1), node := tmp_path / "node", tmp_path / "data", "imagefolder")
    ca, address = NodeFolder(node).ca.read_bytes(), config.server.enrollment
    end(authority, authority.server, -1)
    serving()
    with pytest.raises(EnrollmentError, match="out of date: certificate has expired"):
        verify_server(address, ca)
    fedzoo("renew", "--dir", str(folder.root))
    serving()
    verify_server(address, ca)
    assert whoami(node).status == "active"
    assert authority.ca.read_bytes() == ca


def test_a_node_whose_certificate_has_ended_is_told_so(
    folder: ServerFolder, serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(authority_module, "SITE_LIFE", datetime.timedelta(seconds=-60))
    serving()
    enroll(make_invite(folder.root, "a", 1), node := tmp_path / "node", tmp_path / "data", "imagefolder")
    with pytest.raises(
        DeploymentError, match=r"has expired or .* Ask the server's operator to revoke and invite this site"
    ):
        whoami(node)
    assert _is_revoked(node)


def test_renew_keeps_ca_and_names_and_says_what_to_do(folder: ServerFolder) -> None:
    authority = Authority.load(folder.pki)
    before = {path.name: path.read_bytes() for path in folder.pki.iterdir()}
    said = fedzoo("renew", "--dir", str(folder.root))
    after = {path.name: path.read_bytes() for path in folder.pki.iterdir()}
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {"server.crt", "server.key"}
    assert authority.server_key.stat().st_mode & 0o777 == 0o600
    old, new = (x509.load_pem_x509_certificate(found["server.crt"]) for found in (before, after))
    names = [c.extensions.get_extension_for_class(x509.SubjectAlternativeName).value for c in (old, new)]
    assert names[0] == names[1]
    assert f"valid until {new.not_valid_after_utc:%Y-%m-%d} for localhost" in said
    assert "a server that runs must be restarted" in said


def test_a_renewal_that_was_cut_off_is_made_good_by_the_next(
    folder: ServerFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, write = Authority.load(folder.pki), authority_module.write_whole

    def cut(path: Path, *arguments: object, **more: object) -> None:
        if path.name == "server.crt":
            raise KeyboardInterrupt
        write(path, *arguments, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(authority_module, "write_whole", cut)
        with pytest.raises(KeyboardInterrupt):
            authority.issue_server(["localhost"])
    fedzoo("renew", "--dir", str(folder.root))
    key = serialization.load_pem_private_key(authority.server_key.read_bytes(), None)
    assert x509.load_pem_x509_certificate(authority.server.read_bytes()).public_key() == key.public_key()


def test_an_ended_authority_signs_nothing_more(folder: ServerFolder) -> None:
    authority = Authority.load(folder.pki)
    end(authority, authority.ca, -1)
    before = authority.server.read_bytes(), authority.server_key.read_bytes()
    with pytest.raises(ConfigError) as error:
        fedzoo("renew", "--dir", str(folder.root))
    assert str(error.value).startswith(f"the certificate authority in {folder.pki} ended on 20")
    assert str(error.value).endswith("Make a new server (fedzoo server init) and let every site enroll there")
    assert (authority.server.read_bytes(), authority.server_key.read_bytes()) == before


# ---- who is told -----------------------------------------------------------------------------------------------------
def warned(folder: ServerFolder) -> list[str]:
    found = json.loads(fedzoo("status", "--dir", str(folder.root), "--json"))["warnings"]
    printed = fedzoo("status", "--dir", str(folder.root))
    assert [line.removeprefix("warning: ") for line in printed.splitlines() if line.startswith("warning: ")] == found
    return list(found)


def test_status_warns_of_what_ends_soon(folder: ServerFolder) -> None:
    authority, roster = Authority.load(folder.pki), Roster(folder.nodes)
    assert SITE_LIFE.days == 365
    enter(roster, "new", 300)
    enter(roster, "gone", 360)
    roster.revoke("gone")
    assert warned(folder) == []
    enter(roster, "old", 310)
    enter(roster, "ended", 366)
    end(authority, authority.server, 20.5)
    end(authority, authority.ca, 30.5)
    ca, server, ended, old = warned(folder)
    assert ca.startswith("the certificate authority ends on 20")
    assert "in 30 days; make a new server" in ca
    assert server.startswith("the server's certificate ends on 20")
    assert server.endswith(", in 20 days; renew it: fedzoo server renew")
    assert "site 'ended' ended on 20" in ended
    assert "site 'old' ends on 20" in old
    assert old.endswith("; revoke it and invite it; there: fedzoo client renew INVITE")
    rows = json.loads(fedzoo("nodes", "--dir", str(folder.root), "--json"))
    assert {row["site"]: row["state"] for row in rows} == {
        "new": "unknown", "gone": "revoked", "old": "unknown", "ended": "expired",
    }  # fmt: skip


# ---- what an ended one still opens -----------------------------------------------------------------------------------
def test_a_site_whose_certificate_has_ended_cannot_connect(folder: ServerFolder) -> None:
    roster = Roster(folder.nodes)
    old, new = enter(roster, "old", 366), enter(roster, "new", 364)
    at_start = Flower(old, new)
    reconcile(roster, at_start)  # type: ignore[arg-type]
    assert list(at_start.keys.values()) == [new]
    while_it_runs = Flower(old, new, b"being enrolled")
    shut_out(roster, while_it_runs)  # type: ignore[arg-type]
    assert list(while_it_runs.keys.values()) == [new, b"being enrolled"]
