"""Both services on real TLS sockets, Flower replaced by a stand-in: what is let in and what is refused, and how."""

from __future__ import annotations

import dataclasses
import datetime
import os
import socket
import stat
import threading
import time
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from enrolling import Server

from client.config import NodeFolder, load
from client.enroll import enroll, whoami
from client.tls import site_credentials
from server import authority as authority_module
from server.enrollment import start_services
from shared_models import enrollment_pb2 as pb
from shared_models import enrollment_pb2_grpc as rpc
from shared_models.errors import ConfigError, DataError, DeploymentError, EnrollmentError, UnknownNameError
from shared_models.invite import decode, encode


def refused(invite: str, tmp_path: Path, code: str, match: str) -> None:
    """Enrolling fails for that reason and leaves nothing behind."""
    before = sorted(os.listdir(tmp_path))
    with pytest.raises((EnrollmentError, DeploymentError), match=match) as caught:
        enroll(invite, tmp_path / "refused", tmp_path / "data", "imagefolder")
    assert caught.value.code == code
    assert sorted(os.listdir(tmp_path)) == before


def test_enroll_and_who_am_i(server: Server, tmp_path: Path, data: Path) -> None:
    config = enroll(server.invite(), node := tmp_path / "node", data, "imagefolder")
    ports = server.config.ports
    assert config == load(node)
    assert config.site == "hospital-a"
    assert config.server.fleet == f"localhost:{ports.fleet}"
    assert config.server.membership == f"localhost:{ports.membership}"
    assert config.data.folder == data.resolve()

    me = whoami(node)
    assert (me.site, me.status) == ("hospital-a", "active")
    assert me.server_time == pytest.approx(time.time(), abs=5)
    assert me.expires == pytest.approx(time.time() + 365 * 86400, abs=3600)

    folder = NodeFolder(node)
    (entry,) = server.roster.nodes()
    key = serialization.load_ssh_private_key(folder.key.read_bytes(), None)
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert server.flower.keys == {entry.node_id: public}
    assert x509.load_pem_x509_certificate(folder.certificate.read_bytes()).public_key() == key.public_key()

    server.roster.revoke("hospital-a")
    assert whoami(node).status == "revoked"


def test_modes(server: Server, tmp_path: Path, data: Path) -> None:
    enroll(server.invite(), node := tmp_path / "node", data, "imagefolder")
    folder = NodeFolder(node)
    for path in folder.folders:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in (folder.key, folder.config):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_used(server: Server, tmp_path: Path, data: Path) -> None:
    invite = server.invite()
    enroll(invite, tmp_path / "node", data, "imagefolder")
    refused(invite, tmp_path, "invite-used", "used already")


def test_expired_by_the_clock_here_and_by_the_server_s(server: Server, tmp_path: Path, data: Path) -> None:
    token, expires = server.roster.invite("hospital-a", 60, now=time.time() - 120)
    refused(encode(server.ticket(token, expires)), tmp_path, "invite-expired", r"hospital-a' expired at 20")
    postdated = dataclasses.replace(server.ticket(token, expires), expires=expires + 3600)
    refused(encode(postdated), tmp_path, "invite-expired", "has expired")
    assert server.flower.keys == {}


def test_forged(server: Server, tmp_path: Path, data: Path) -> None:
    server.invite()
    refused(encode(server.ticket(bytes(32), int(time.time()) + 60)), tmp_path, "invite-unknown", "never issued")
    assert server.flower.keys == {}


def test_revoked_site(server: Server, tmp_path: Path, data: Path) -> None:
    invite, other = server.invite(), server.invite()
    enroll(invite, tmp_path / "node", data, "imagefolder")
    refused(other, tmp_path, "site-enrolled", "enrolled already")
    server.roster.revoke("hospital-a")
    refused(other, tmp_path, "site-revoked", "was revoked")
    enroll(server.invite(), tmp_path / "again", data, "imagefolder")
    assert whoami(tmp_path / "again").status == "active"
    assert whoami(tmp_path / "node").status == "revoked"


def test_a_foreign_server(server: Server, tmp_path: Path, data: Path) -> None:
    other = Server(tmp_path / "other")
    try:
        ticket = decode(server.invite())
        misled = dataclasses.replace(ticket, address=f"localhost:{other.config.ports.enrollment}")
        refused(encode(misled), tmp_path, "foreign-server", "someone is in between")
    finally:
        other.stop()


def test_an_imposter_that_shows_the_true_ca(server: Server, tmp_path: Path, data: Path) -> None:
    """A CA certificate is public: whoever shows it without a certificate from it is still refused."""
    other = Server(tmp_path / "other")
    other.stop()
    other.authority.ca.write_bytes(other.authority.ca.read_bytes() + server.authority.ca.read_bytes())
    services = start_services(other.authority, other.roster, other.flower, other.config)
    try:
        ticket = decode(server.invite())
        misled = dataclasses.replace(ticket, address=f"localhost:{other.config.ports.enrollment}")
        refused(encode(misled), tmp_path, "server-certificate", "not of this federation")
    finally:
        for service in services:
            service.stop(0).wait()


def test_a_wrong_host_name(tmp_path: Path, data: Path) -> None:
    server = Server(tmp_path / "server", hosts=("fed.example.org",))
    try:
        refused(server.invite(host="127.0.0.2"), tmp_path, "server-certificate", "not for the host '127.0.0.2'")
    finally:
        server.stop()


def test_an_unreachable_server(server: Server, tmp_path: Path, data: Path) -> None:
    invite = server.invite()
    server.stop()
    refused(invite, tmp_path, "unreachable", r"cannot reach the server at localhost:\d+: Connection refused\. Check")


def test_something_that_is_no_tls(server: Server, tmp_path: Path, data: Path) -> None:
    with socket.create_server(("localhost", 0)) as plain:

        def greet() -> None:
            peer, _ = plain.accept()
            peer.sendall(b"220 mail.example.org ESMTP\r\n" * 10)
            peer.close()

        thread = threading.Thread(target=greet)
        thread.start()
        misled = dataclasses.replace(decode(server.invite()), address=f"localhost:{plain.getsockname()[1]}")
        with pytest.raises(DeploymentError, match="does not speak TLS"):
            enroll(encode(misled), tmp_path / "node", data, "imagefolder")
        thread.join(10)


def test_an_expired_server_certificate(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authority_module, "SERVER_LIFE", datetime.timedelta(seconds=-60))
    server = Server(tmp_path / "server")
    try:
        refused(server.invite(), tmp_path, "server-certificate", "out of date.*clock")
    finally:
        server.stop()


def test_a_token_is_not_spent_when_flower_fails(server: Server, tmp_path: Path, data: Path) -> None:
    invite = server.invite()
    server.flower.broken = True
    refused(invite, tmp_path, "busy", "stays valid")
    server.flower.broken = False
    enroll(invite, tmp_path / "node", data, "imagefolder")
    assert whoami(tmp_path / "node").status == "active"


def test_a_node_that_cannot_be_entered_is_unregistered(
    server: Server,
    tmp_path: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: object) -> None:
        raise OSError("disk full: CANARY")

    with monkeypatch.context() as patch:
        patch.setattr("server.nodes.Redemption.enroll", full)
        refused(invite := server.invite(), tmp_path, "internal", "invite stays valid")
    assert server.flower.keys == {}
    assert "enrollment failed: OSError" in caplog.text
    assert "CANARY" not in caplog.text
    enroll(invite, tmp_path / "node", data, "imagefolder")


def request_on(curve: ec.EllipticCurve) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(ec.generate_private_key(curve), hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def test_another_curve_does_not_spend_the_token(server: Server) -> None:
    token, _ = server.roster.invite("hospital-a", 60)
    with pytest.raises(grpc.RpcError) as caught:
        server.call(token, request_on(ec.SECP256R1()))
    assert caught.value.details() == "bad-request"
    assert server.call(token, request_on(ec.SECP384R1())).site == "hospital-a"


def test_nothing_sent_is_logged_or_crashes(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    token, _ = server.roster.invite("hospital-a", 60)
    for bad_token, request in ((b"CANARY", b"CANARY"), (token, b"CANARY\x00\xff"), (b"", b"")):
        with pytest.raises(grpc.RpcError) as caught:
            server.call(bad_token, request)
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    with pytest.raises(grpc.RpcError) as caught:
        server.call(token, b"x" * 1_000_000)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "invite-unknown" in caplog.text
    assert "CANARY" not in caplog.text
    assert server.call(token, request_on(ec.SECP384R1())).site == "hospital-a"


def test_bad_local_input(server: Server, tmp_path: Path, data: Path) -> None:
    invite = server.invite()
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        enroll(invite, tmp_path / "there", data, "imagefolder")
    with pytest.raises(DataError, match="there is no data folder"):
        enroll(invite, tmp_path / "node", tmp_path / "nowhere", "imagefolder")
    with pytest.raises(UnknownNameError, match="did you mean 'imagefolder'"):
        enroll(invite, tmp_path / "node", data, "imagefoldr")
    with pytest.raises(ConfigError, match="cannot make the node's folder"):
        enroll(invite, Path("/proc/node"), data, "imagefolder")
    assert not (tmp_path / "node").exists()
    enroll(invite, tmp_path / "node", data, "imagefolder")


def test_an_interrupted_enrollment_leaves_nothing(
    server: Server, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    invite, before = server.invite(), sorted(os.listdir(tmp_path))
    monkeypatch.setattr("client.enroll.save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        enroll(invite, tmp_path / "node", data, "imagefolder")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_foreign_certificate_is_refused(server: Server, tmp_path: Path, data: Path) -> None:
    """A node of another federation, given our CA and addresses, still holds a certificate of its own CA."""
    other = Server(tmp_path / "other")
    try:
        enroll(other.invite(), node := tmp_path / "node", data, "imagefolder")
    finally:
        other.stop()
    folder = NodeFolder(node)
    text = folder.config.read_text()
    folder.config.write_text(text.replace(str(other.config.ports.membership), str(server.config.ports.membership)))
    with pytest.raises(EnrollmentError, match="not of this federation"):
        whoami(node)
    folder.ca.write_bytes(server.authority.ca.read_bytes())
    with pytest.raises(DeploymentError, match="refuses this node's certificate") as caught:
        whoami(node)
    assert caught.value.code == "certificate-refused"


def test_no_certificate_is_refused(server: Server) -> None:
    credentials = grpc.ssl_channel_credentials(server.authority.ca.read_bytes())
    address = f"localhost:{server.config.ports.membership}"
    with grpc.secure_channel(address, credentials) as channel, pytest.raises(grpc.RpcError) as caught:
        rpc.MembershipStub(channel).WhoAmI(pb.WhoAmIRequest(), timeout=20)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_the_server_s_own_certificate_is_no_node_s(server: Server) -> None:
    authority = server.authority
    credentials = grpc.ssl_channel_credentials(
        authority.ca.read_bytes(), authority.server_key.read_bytes(), authority.server.read_bytes()
    )
    address = f"localhost:{server.config.ports.membership}"
    with grpc.secure_channel(address, credentials) as channel, pytest.raises(grpc.RpcError) as caught:
        rpc.MembershipStub(channel).WhoAmI(pb.WhoAmIRequest(), timeout=20)
    assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.PERMISSION_DENIED)


def test_a_certificate_the_roster_does_not_know(server: Server, tmp_path: Path, data: Path) -> None:
    enroll(server.invite(), node := tmp_path / "node", data, "imagefolder")
    folder = NodeFolder(node)
    _, key, _ = site_credentials(folder)
    private = serialization.load_pem_private_key(key, None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    request = builder.sign(private, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)
    folder.certificate.write_bytes(server.authority.sign("hospital-a", request).pem)
    with pytest.raises(EnrollmentError, match="does not know this node's certificate"):
        whoami(node)


def test_who_am_i_without_a_server_or_a_key(server: Server, tmp_path: Path, data: Path) -> None:
    enroll(server.invite(), node := tmp_path / "node", data, "imagefolder")
    server.stop()
    with pytest.raises(DeploymentError, match="cannot reach the server"):
        whoami(node)
    NodeFolder(node).key.write_text("no key")
    with pytest.raises(ConfigError, match="is not a private key"):
        whoami(node)
    NodeFolder(node).key.unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*site\.key"):
        whoami(node)
