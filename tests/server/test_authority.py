"""The certificate authority against cryptography's own path validation, and requests that must not be signed."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from server.authority import Authority
from shared_models.errors import ConfigError, EnrollmentError


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("ca") / "pki", ["fed.example.org", "10.1.2.3"])


def request_for(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, name: str = "mallory") -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA384())
    return csr.public_bytes(serialization.Encoding.PEM)


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "fed.example.org", "10.1.2.3"])
def test_the_server_certificate_is_valid_for_every_host(authority: Authority, host: str) -> None:
    import ipaddress

    subject = x509.IPAddress(ipaddress.ip_address(host)) if host[0].isdigit() else x509.DNSName(host)
    verifier = PolicyBuilder().store(Store([certificate(authority.ca)])).build_server_verifier(subject)
    chain = verifier.verify(certificate(authority.server), [])
    assert [c.subject for c in chain][-1] == certificate(authority.ca).subject


def test_the_server_certificate_is_not_valid_for_others(authority: Authority) -> None:
    verifier = PolicyBuilder().store(Store([certificate(authority.ca)])).build_server_verifier(x509.DNSName("evil.org"))
    with pytest.raises(VerificationError):
        verifier.verify(certificate(authority.server), [])


def test_a_site_gets_the_name_the_server_says(authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    signed = authority.sign("hospital-a", request_for(key, name="hospital-b"))
    leaf = x509.load_pem_x509_certificate(signed.pem)
    assert [a.value for a in leaf.subject] == ["hospital-a"]
    assert leaf.public_key() == key.public_key()
    assert f"{leaf.serial_number:x}" == signed.serial
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    leaf.verify_directly_issued_by(certificate(authority.ca))


def test_a_site_cannot_stand_in_for_the_server(authority: Authority) -> None:
    signed = authority.sign("localhost", request_for(ec.generate_private_key(ec.SECP384R1())))
    verifier = (
        PolicyBuilder().store(Store([certificate(authority.ca)])).build_server_verifier(x509.DNSName("localhost"))
    )
    with pytest.raises(VerificationError):
        verifier.verify(x509.load_pem_x509_certificate(signed.pem), [])


def test_lifetimes(authority: Authority) -> None:
    signed = authority.sign("a", request_for(ec.generate_private_key(ec.SECP384R1())))
    now = datetime.datetime.now(datetime.UTC)
    for cert, years in (
        (certificate(authority.ca), 10),
        (certificate(authority.server), 2),
        (x509.load_pem_x509_certificate(signed.pem), 1),
    ):
        assert abs((cert.not_valid_after_utc - now).days - 365 * years) <= 1
        assert cert.not_valid_before_utc < now


def tampered() -> bytes:
    """A request for one key with another key in it: the signature does not fit."""
    mine, other = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    der = x509.load_pem_x509_csr(request_for(mine)).public_bytes(serialization.Encoding.DER)

    def point(key: ec.EllipticCurvePrivateKey) -> bytes:
        return key.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)

    swapped = der.replace(point(mine), point(other))
    assert swapped != der
    return x509.load_der_x509_csr(swapped).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    "request_bytes",
    [
        request_for(ec.generate_private_key(ec.SECP256R1())),
        request_for(ec.generate_private_key(ec.SECP521R1())),
        request_for(rsa.generate_private_key(65537, 2048)),
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(ed25519.Ed25519PrivateKey.generate(), None)
        .public_bytes(serialization.Encoding.PEM),
        tampered(),
        b"",
        b"\x00\xff" * 50,
        b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
        request_for(ec.generate_private_key(ec.SECP384R1())) + b" " * 8192,
    ],
    ids=["p256", "p521", "rsa", "ed25519", "no-possession", "empty", "binary", "broken", "large"],
)
def test_requests_that_are_not_signed(authority: Authority, request_bytes: bytes) -> None:
    with pytest.raises(EnrollmentError) as caught:
        authority.sign("a", request_bytes)
    assert caught.value.code == "bad-request"


def test_private_files_are_private(authority: Authority) -> None:
    assert authority.folder.stat().st_mode & 0o777 == 0o700
    for path in (authority.ca_key, authority.server_key):
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_ca_is_never_replaced(authority: Authority) -> None:
    before = authority.ca_key.read_bytes()
    with pytest.raises(ConfigError, match="already"):
        Authority.create(authority.folder, [])
    assert authority.ca_key.read_bytes() == before


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    Authority.create(tmp_path / "pki", []).server_key.unlink()
    with pytest.raises(ConfigError, match=r"there is no .*server\.key"):
        Authority.load(tmp_path / "pki")


def test_fingerprint_is_the_digest_of_the_ca(authority: Authority) -> None:
    import hashlib
    import ssl

    der = ssl.PEM_cert_to_DER_cert(authority.ca.read_text())
    assert authority.fingerprint == hashlib.sha256(der).hexdigest()
