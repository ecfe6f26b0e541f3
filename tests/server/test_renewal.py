"""A node that enrolls again: it gets a new key and certificate in its folder, and what it spent and agreed to stays."""

from __future__ import annotations

import dataclasses
import stat
import time
from pathlib import Path

import pytest
from enrolling import Server

from client.config import NodeFolder, PolicyPart, load, save
from client.enroll import enroll, renew, whoami
from client.ledger import open_ledger
from client.status import only_process
from shared_models.errors import ConfigError, DeploymentError, EnrollmentError
from shared_models.invite import decode, encode
from shared_models.privacy import Spend


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a node but the lock of its process."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"
    }


@pytest.fixture
def node(server: Server, tmp_path: Path, data: Path) -> Path:
    """A node with a past: what it spent, what it agreed to, what it keeps. It was revoked meanwhile."""
    config = enroll(server.invite(), node := tmp_path / "node", data, "imagefolder")
    save(node, config.model_copy(update={"policy": PolicyPart(approve=("a" * 64,), statistics=False)}))
    ledger = open_ledger(node, load(node))
    ledger.reserve("chest", "run-1", 0, 0, Spend(1.2, 0.1, 10), 1e-5, "sample", digest="d", job="j")
    NodeFolder(node).secret.write_bytes(bytes(32))
    (NodeFolder(node).logs / "audit.jsonl").write_text("{}\n")
    server.roster.revoke("hospital-a")
    return node


def test_a_node_is_renewed_in_its_folder(server: Server, node: Path) -> None:
    before, config = contents(node), load(node)
    assert whoami(node).status == "revoked"
    renew(server.invite(), node)
    assert whoami(node).status == "active"
    after = contents(node)
    assert {name for name in before if after.get(name) != before[name]} == {"pki/site.key", "pki/site.crt"}
    assert after.keys() == before.keys()
    assert stat.S_IMODE(NodeFolder(node).key.stat().st_mode) == 0o600
    assert load(node) == config
    assert len(open_ledger(node, load(node)).entries()) == 1


def test_a_server_that_has_moved_is_found_again(server: Server, node: Path) -> None:
    config = load(node)
    old = {"fleet": "old:1", "enrollment": "old:2", "membership": "old:3"}
    save(node, config.model_copy(update={"server": config.server.model_copy(update=old)}))
    assert renew(server.invite(), node) == load(node) == config


def unchanged(node: Path, invite: str, error: type[BaseException], match: str | None) -> None:
    before = contents(node)
    with pytest.raises(error, match=match):
        renew(invite, node)
    assert contents(node) == before


def test_a_renewal_that_is_refused_changes_nothing(
    server: Server, node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unchanged(node, server.invite("hospital-b"), ConfigError, "is for 'hospital-b', and this node is 'hospital-a'")
    unknown = server.ticket(bytes(32), int(time.time()) + 60)
    unchanged(node, encode(unknown), EnrollmentError, "never issued")
    foreign = dataclasses.replace(decode(invite := server.invite()), fingerprint="ab" * 32)
    unchanged(node, encode(foreign), ConfigError, "another federation.*ledger/")
    with monkeypatch.context() as patch:
        patch.setattr("client.enroll._checked", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        unchanged(node, invite, KeyboardInterrupt, None)
    with only_process(node), pytest.raises(DeploymentError, match="runs already"):
        renew(invite, node)
    with pytest.raises(ConfigError, match="Enroll first"):
        renew(invite, tmp_path / "nowhere")


def test_who_would_begin_anew_is_told_what_to_carry_over(server: Server, node: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match="exists already") as caught:
        enroll(server.invite(), node, data, "imagefolder")
    for word in (
        f"fedzoo client renew INVITE --dir {node}",
        "ledger/",
        "state/ledger.json",
        "secret",
        "[privacy]",
        "[policy]",
    ):
        assert word in str(caught.value)
