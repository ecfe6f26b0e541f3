"""The federation's own certificate authority: ECDSA P-384 throughout, kept in the server's `pki/` folder.

The CA signs two kinds of certificate: the server's (serverAuth, every name nodes may use) and one for each site
(clientAuth, the site's name as the server gives it). Neither kind can sign or stand in for the other.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared_models.errors import ConfigError
from shared_models.files import private_folder, write_whole
from shared_models.invite import refusal

YEAR = datetime.timedelta(days=365)
CA_LIFE, SERVER_LIFE, SITE_LIFE = 10 * YEAR, 2 * YEAR, YEAR
CLOCK_SKEW = datetime.timedelta(hours=1)
MAX_REQUEST_BYTES = 8192
ALWAYS = ("localhost", "127.0.0.1")
PEM = serialization.Encoding.PEM


@dataclass(frozen=True)
class SiteCertificate:
    """What signing gives.

    Attributes:
        pem: the certificate.
        public_key: the site's key as Flower wants it: PEM, SubjectPublicKeyInfo.
        serial: of the certificate, hex.
    """

    pem: bytes
    public_key: bytes
    serial: str


@dataclass(frozen=True)
class Authority:
    """The certificates and keys in one `pki/` folder."""

    folder: Path

    @staticmethod
    def create(folder: Path, hosts: Sequence[str]) -> Authority:
        """Make a new CA and the server's certificate in `folder` (0700; keys 0600).

        Args:
            folder: must not hold a CA yet.
            hosts: names and IP addresses beside `localhost` and `127.0.0.1`.

        Raises:
            ConfigError: there is a CA already; a new one would lock out every enrolled node.
        """
        authority = Authority(private_folder(folder))
        if authority.ca_key.exists():
            raise ConfigError(f"there is a certificate authority in {folder} already")
        key = ec.generate_private_key(ec.SECP384R1())
        mark = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        name = _name(f"fedzoo CA {mark.digest.hex()[:12]}")
        certificate = (
            _builder(name, name, key.public_key(), CA_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(sign_certificates=True), critical=True)
            .add_extension(mark, critical=False)
            .sign(key, hashes.SHA384())
        )
        write_whole(authority.ca_key, _private_pem(key))
        write_whole(authority.ca, certificate.public_bytes(PEM), mode=0o644)
        authority.issue_server(hosts)
        return authority

    @staticmethod
    def load(folder: Path) -> Authority:
        """The authority in `folder`.

        Raises:
            ConfigError: one of its four files is missing.
        """
        authority = Authority(folder)
        for path in (authority.ca, authority.ca_key, authority.server, authority.server_key):
            if not path.is_file():
                raise ConfigError(f"there is no {path}", hint="Restore it from a backup; the nodes trust this CA alone")
        return authority

    @property
    def ca(self) -> Path:
        """The CA's certificate, PEM; public."""
        return self.folder / "ca.crt"

    @property
    def ca_key(self) -> Path:
        """The CA's private key; whoever has it can enroll anybody."""
        return self.folder / "ca.key"

    @property
    def server(self) -> Path:
        """The server's certificate, PEM; public."""
        return self.folder / "server.crt"

    @property
    def server_key(self) -> Path:
        """The server's private key."""
        return self.folder / "server.key"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the CA's certificate (DER), 64 hex digits: what an invite carries."""
        return self._ca_certificate().fingerprint(hashes.SHA256()).hex()

    def issue_server(self, hosts: Sequence[str]) -> None:
        """Write a new server key and certificate for `localhost`, `127.0.0.1` and `hosts`; nodes know the CA alone.

        Two files: where the second is missed (a kill in between), call it again.

        Raises:
            ConfigError: the CA itself has ended.
        """
        if (end := self.ends(self.ca)) <= datetime.datetime.now(datetime.UTC):
            raise ConfigError(
                f"the certificate authority in {self.folder} ended on {end:%Y-%m-%d}: nothing it signs is valid",
                hint="Make a new server (fedzoo server init) and let every site enroll there",
            )
        key = ec.generate_private_key(ec.SECP384R1())
        names = [_general_name(host) for host in dict.fromkeys([*ALWAYS, *hosts])]
        certificate = (
            self._leaf(_name(next(iter([*hosts, *ALWAYS]))), key.public_key(), SERVER_LIFE)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .sign(self._ca_private_key(), hashes.SHA384())
        )
        write_whole(self.server_key, _private_pem(key))
        write_whole(self.server, certificate.public_bytes(PEM), mode=0o644)

    def ends(self, path: Path) -> datetime.datetime:
        """Until when one of the certificates here is valid, in UTC."""
        return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc

    def sign(self, site: str, request: bytes) -> SiteCertificate:
        """Sign a site's request. Only its public key is taken from it: the name is `site`, whatever the request says.

        Args:
            site: the name the server gives.
            request: PEM certificate-signing request, signed by the key it asks for (proof of possession).

        Raises:
            EnrollmentError: `bad-request`: not a request, too large, another kind of key, or a wrong signature.
        """
        if len(request) > MAX_REQUEST_BYTES:
            raise refusal("bad-request")
        try:
            csr = x509.load_pem_x509_csr(request)
            key = csr.public_key()
            proven = csr.is_signature_valid
        except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature):
            raise refusal("bad-request") from None
        if not proven or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
            raise refusal("bad-request")
        certificate = (
            self._leaf(_name(site), key, SITE_LIFE)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .sign(self._ca_private_key(), hashes.SHA384())
        )
        public = key.public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        return SiteCertificate(certificate.public_bytes(PEM), public, f"{certificate.serial_number:x}")

    def _leaf(
        self, name: x509.Name, key: ec.EllipticCurvePublicKey, life: datetime.timedelta
    ) -> x509.CertificateBuilder:
        ca = self._ca_certificate()
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._ca_private_key().public_key())
        return (
            _builder(name, ca.subject, key, life)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign_certificates=False), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(issuer, critical=False)
        )

    def _ca_certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.ca.read_bytes())

    def _ca_private_key(self) -> ec.EllipticCurvePrivateKey:
        key = serialization.load_pem_private_key(self.ca_key.read_bytes(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError(f"{self.ca_key} is not an ECDSA key")
        return key


def _builder(
    name: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, life: datetime.timedelta
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + life)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
