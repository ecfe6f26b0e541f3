"""How a site joins a federation with nothing but an invite, and how it asks the server who it is."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from client.config import ClientConfig, NodeFolder, load, save
from client.status import only_process
from client.tls import fetch_ca, site_credentials, verify_server
from shared_models import enrollment_pb2 as pb
from shared_models import enrollment_pb2_grpc as rpc
from shared_models.errors import ConfigError, DataError, DeploymentError, EnrollmentError
from shared_models.files import private_folder, sync_folder, write_whole
from shared_models.invite import REFUSALS, Invite, decode, refusal
from shared_models.validation import validate

CALL_SECONDS = 60.0
CARRY_OVER = (
    "for the same data, carry over the old folder's ledger/, state/ledger.json, secret, and [privacy] and [policy] of "
    "its client.toml, else what was spent and agreed to is forgotten"
)
_DIRECT = [("grpc.enable_http_proxy", 0)]  # as the TLS check before it, which knows no proxy


@dataclass(frozen=True)
class Membership:
    """What the server says about this node.

    Attributes:
        site: the name the server knows it by.
        status: whether it may take part.
        expires: of the node's certificate, Unix seconds.
        server_time: the server's clock, Unix seconds.
    """

    site: str
    status: Literal["active", "revoked"]
    expires: float
    server_time: float


def enroll(invite: str, node_dir: Path, data_folder: Path, data_format: str) -> ClientConfig:
    """Join the federation that issued the invite and make this node's folder, whole or not at all.

    The private key is made here and never leaves the folder.

    Args:
        invite: the string from `fedzoo server invite`.
        node_dir: must not exist; afterwards it holds the node (see `NodeFolder`).
        data_folder: the site's private data; nothing in it is read now.
        data_format: name of the reader for it.

    Returns:
        What stands in the new `client.toml`.

    Raises:
        ConfigError: the node's folder exists already.
        DataError: the data folder is missing.
        UnknownNameError: no reader has that name.
        DeploymentError: the server cannot be reached.
        EnrollmentError: the invite is damaged, expired, used, unknown or foreign, or the server's certificate does
            not fit its address; `code` says which.
    """
    ticket = decode(invite)
    ticket.require_fresh()
    if node_dir.exists() or node_dir.is_symlink():
        raise ConfigError(f"{node_dir} exists already", hint=_instead(node_dir))
    if not data_folder.is_dir():
        raise DataError(f"there is no data folder {data_folder}", hint="Name the site's data with --data")
    from client.readers.base import readers  # imports torch, so late

    readers[data_format]  # an unknown name must not cost the invite
    ca = fetch_ca(ticket.address, ticket.fingerprint)
    verify_server(ticket.address, ca)
    with _appearing(node_dir) as scratch:
        folder = NodeFolder(scratch)
        for path in folder.folders:
            private_folder(path)
        key = ec.generate_private_key(ec.SECP384R1())
        write_whole(folder.key, _openssh(key))
        write_whole(folder.ca, ca, mode=0o644)
        reply = _ask(ticket, ca, _request(key, ticket.site))
        write_whole(folder.certificate, _checked(reply, key, ca), mode=0o644)
        config = _config(reply, ticket, data_folder, data_format)
        save(scratch, config)
    return config


def renew(invite: str, node_dir: Path) -> ClientConfig:
    """Give an enrolled node a new key and certificate of the same federation, in its folder.

    Only `pki/site.key`, `pki/site.crt` and `[server]` of `client.toml` change, and they change when the new ones are
    all on the disk: what the site spent, keeps and agreed to stays. A process that is killed between the last renames
    leaves a node that the server refuses; it is renewed again, with another invite.

    Args:
        invite: the string from `fedzoo server invite` for this very site.
        node_dir: an enrolled node's folder; the node must not run.

    Returns:
        What stands in `client.toml` now.

    Raises:
        ConfigError: the folder is not an enrolled node's, or the invite is for another site or federation.
        DeploymentError: the node runs, or the server cannot be reached.
        EnrollmentError: as for `enroll`.
    """
    ticket = decode(invite)
    ticket.require_fresh()
    config, folder = load(node_dir), NodeFolder(node_dir)
    if ticket.site != config.site:
        raise ConfigError(
            f"the invite is for '{ticket.site}', and this node is '{config.site}'",
            hint="Ask the server's operator for an invite for this site",
        )
    if not _is_of(folder, ticket):
        raise ConfigError(
            f"the invite is of another federation than {node_dir}, which has another certificate authority",
            hint=f"Enroll into a new folder; {CARRY_OVER}",
        )
    ca = fetch_ca(ticket.address, ticket.fingerprint)
    verify_server(ticket.address, ca)
    new_key, new_certificate = (p.with_name(f".{p.name}.new") for p in (folder.key, folder.certificate))
    try:
        with only_process(node_dir):
            key = ec.generate_private_key(ec.SECP384R1())
            write_whole(new_key, _openssh(key))
            reply = _ask(ticket, ca, _request(key, ticket.site))
            write_whole(new_certificate, _checked(reply, key, ca), mode=0o644)
            server = _config(reply, ticket, config.data.folder, config.data.format).server
            renewed = config.model_copy(update={"server": server})
            if renewed != config:
                save(node_dir, renewed)
            new_key.replace(folder.key)
            new_certificate.replace(folder.certificate)
            sync_folder(folder.key.parent)
    except OSError as error:
        raise ConfigError(f"cannot renew the node in {node_dir}: {error.strerror or error}") from None
    finally:
        for path in (new_key, new_certificate):
            with suppress(OSError):
                path.unlink(missing_ok=True)
    return renewed


def whoami(node_dir: Path) -> Membership:
    """Ask the server, over mutual TLS, who this node is.

    Raises:
        ConfigError: the folder is not an enrolled node's.
        DeploymentError: the server cannot be reached, or refuses the node's certificate.
        EnrollmentError: the server does not know the node, or its own certificate does not fit.
    """
    address = load(node_dir).server.membership
    ca, key, certificate = site_credentials(NodeFolder(node_dir))
    credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    try:
        with _calling(), grpc.secure_channel(address, credentials, _DIRECT) as channel:
            reply = rpc.MembershipStub(channel).WhoAmI(pb.WhoAmIRequest(), timeout=CALL_SECONDS)
    except DeploymentError as error:
        if error.code != "unavailable":
            raise
        verify_server(address, ca)  # says what is wrong with the server, if it is the server
        raise DeploymentError(
            f"the server at {address} refuses this node's certificate {NodeFolder(node_dir).certificate}: "
            "it has expired or is of another federation",
            hint="Ask the server's operator to revoke and invite this site, then: fedzoo client renew INVITE",
            code="certificate-refused",
        ) from None
    return Membership(
        site=reply.site,
        status="active" if reply.status == pb.ACTIVE else "revoked",
        expires=float(reply.expires),
        server_time=reply.now,
    )


def _ask(ticket: Invite, ca: bytes, request: bytes) -> pb.EnrollReply:
    credentials = grpc.ssl_channel_credentials(ca)
    with _calling(), grpc.secure_channel(ticket.address, credentials, _DIRECT) as channel:
        message = pb.EnrollRequest(token=ticket.token, request=request)
        return rpc.EnrollmentStub(channel).Enroll(message, timeout=CALL_SECONDS)


def _instead(node_dir: Path) -> str:
    """What to do where a node's folder exists."""
    if not NodeFolder(node_dir).config.exists():
        return "A node's folder is made once; name a new one with --dir"
    return (
        f"To renew its certificate: fedzoo client renew INVITE --dir {node_dir}. "
        f"To begin a new one, name it with --dir; {CARRY_OVER}"
    )


def _is_of(folder: NodeFolder, ticket: Invite) -> bool:
    """Whether the node trusts the very authority that issued the invite."""
    try:
        known = x509.load_pem_x509_certificate(folder.ca.read_bytes())
    except (OSError, ValueError):
        raise ConfigError(
            f"{folder.ca} is missing or no certificate", hint=f"Enroll into a new folder; {CARRY_OVER}"
        ) from None
    return known.fingerprint(hashes.SHA256()).hex() == ticket.fingerprint


@contextmanager
def _calling() -> Iterator[None]:
    """Turn the outcome of a gRPC call into our errors; a refusal's fixed word becomes its sentence."""
    try:
        yield
    except grpc.RpcError as error:
        failed: Any = error
        if failed.details() in REFUSALS:
            raise refusal(failed.details()) from None
        raise DeploymentError(
            f"the server did not answer ({failed.code().name})",
            hint="Try again in a minute",
            code="unavailable" if failed.code() == grpc.StatusCode.UNAVAILABLE else "no-answer",
        ) from None


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A scratch folder that becomes `target` when the block ends well, and vanishes when it does not."""
    scratch: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield scratch
        os.rename(scratch, target)
    except OSError as error:
        raise ConfigError(f"cannot make the node's folder {target}: {error.strerror}") from None
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _config(reply: pb.EnrollReply, ticket: Invite, data_folder: Path, data_format: str) -> ClientConfig:
    server = {"fleet": reply.fleet, "enrollment": ticket.address, "membership": reply.membership}
    data = {"folder": data_folder.resolve(), "format": data_format}
    return validate(ClientConfig, {"site": reply.site, "server": server, "data": data}, "the server's answer")


def _openssh(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )


def _request(key: ec.EllipticCurvePrivateKey, site: str) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA384())
    return request.public_bytes(serialization.Encoding.PEM)


def _checked(reply: pb.EnrollReply, key: ec.EllipticCurvePrivateKey, ca: bytes) -> bytes:
    """The certificate, once it is known to be for our key and of the CA we trust."""
    try:
        certificate = x509.load_pem_x509_certificate(reply.certificate)
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca))
        fits = certificate.public_key() == key.public_key()
    except Exception:
        fits = False
    if not fits:
        raise EnrollmentError("the server answered with a certificate that is not for this node", code="bad-reply")
    return reply.certificate
