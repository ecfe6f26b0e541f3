"""How a node comes to trust its server, and proves to it who it is.

A newcomer knows the CA only by the fingerprint in its invite. It takes the certificates the server shows without
believing them, keeps the one whose fingerprint fits, and from then on believes that CA alone.
"""

from __future__ import annotations

import hashlib
import socket
import ssl
from typing import Any

from cryptography.hazmat.primitives import serialization

from client.config import NodeFolder
from shared_models.errors import ConfigError, DeploymentError, EnrollmentError

CONNECT_SECONDS = 10.0
_HOSTNAME_MISMATCH, _IP_MISMATCH, _NOT_YET_VALID, _EXPIRED = 62, 64, 9, 10  # X509_V_ERR_* of OpenSSL


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[IPv6]:port` as (host, port)."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def fetch_ca(address: str, fingerprint: str) -> bytes:
    """The PEM of the CA whose SHA-256 is `fingerprint`, as the server at `address` shows it.

    Raises:
        DeploymentError: nothing answers there, or not in TLS.
        EnrollmentError: the server has another CA: the invite is foreign, or someone is in between.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with _handshake(address, context) as connection:
        chain = _unverified_chain(connection)
    for certificate in chain:
        if hashlib.sha256(certificate).hexdigest() == fingerprint:
            return ssl.DER_cert_to_PEM_cert(certificate).encode()
    raise EnrollmentError(
        f"the server at {address} is not the one that issued this invite: its certificate authority is another, "
        "or someone is in between",
        hint="Do not go on; ask the server's operator",
        code="foreign-server",
    )


def verify_server(address: str, ca: bytes) -> None:
    """Check with a TLS handshake that the server at `address` has a valid certificate of that CA for that very host.

    Raises:
        DeploymentError: nothing answers there, or not in TLS.
        EnrollmentError: the certificate is for other hosts, expired, not valid yet, or of another CA.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=ca.decode("ascii"))
    try:
        _handshake(address, context).close()
    except ssl.SSLCertVerificationError as error:
        host, _ = split_address(address)
        if error.verify_code in (_HOSTNAME_MISMATCH, _IP_MISMATCH):
            reason = f"the server's certificate is not for the host '{host}'"
            hint = f"The operator adds '{host}' to hosts in server.toml, then: fedzoo server renew, and a restart"
        elif error.verify_code in (_NOT_YET_VALID, _EXPIRED):
            reason = f"the server's certificate is out of date: {error.verify_message}"
            hint = "Check this machine's clock; if it is right, the server's operator renews it: fedzoo server renew"
        else:
            reason = f"the server at {address} is not of this federation: {error.verify_message}"
            hint = "Do not go on; ask the server's operator"
        raise EnrollmentError(reason, hint=hint, code="server-certificate") from None


def site_credentials(folder: NodeFolder) -> tuple[bytes, bytes, bytes]:
    """(CA, private key, certificate) of an enrolled node in PEM, as mutual TLS wants them.

    The key lies on disk once, in the OpenSSH format the SuperNode asks for, and is turned into PEM in memory.

    Raises:
        ConfigError: a file is missing or broken.
    """
    try:
        key = serialization.load_ssh_private_key(folder.key.read_bytes(), password=None)
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return folder.ca.read_bytes(), pem, folder.certificate.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}", hint="Enroll this node again") from None
    except ValueError:
        raise ConfigError(f"{folder.key} is not a private key", hint="Enroll this node again") from None


def _handshake(address: str, context: ssl.SSLContext) -> ssl.SSLSocket:
    host, port = split_address(address)
    context.set_alpn_protocols(["h2"])
    try:
        plain = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
    except OSError as error:
        raise DeploymentError(
            f"cannot reach the server at {address}: {error.strerror or error}",
            hint="Check that the server runs and that this machine may connect to it",
            code="unreachable",
        ) from None
    try:
        return context.wrap_socket(plain, server_hostname=host)
    except ssl.SSLCertVerificationError:
        plain.close()
        raise
    except OSError:
        plain.close()
        raise DeploymentError(f"what answers at {address} does not speak TLS as a fedzoo server does") from None


def _unverified_chain(connection: ssl.SSLSocket) -> list[bytes]:
    """The certificates the peer sent, DER, leaf first. Public from Python 3.13 on; before, the private twin has it."""
    public: Any = getattr(connection, "get_unverified_chain", None)
    if public is not None:
        return list(public())
    private: Any = connection
    return [
        ssl.PEM_cert_to_DER_cert(certificate.public_bytes()) for certificate in private._sslobj.get_unverified_chain()
    ]
