"""The two gRPC services of the server: `Enrollment` (TLS, for who holds an invite) and `Membership` (mutual TLS).

Both listen with small message limits and few threads. A refusal is answered by a fixed word (`REFUSALS`), an
unexpected failure by `internal`; nothing a client sends reaches the log.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import grpc
from cryptography import x509

from server.authority import Authority
from server.config import ServerConfig
from server.nodes import Roster
from shared_models import enrollment_pb2 as pb
from shared_models import enrollment_pb2_grpc as rpc
from shared_models.errors import DeploymentError, EnrollmentError
from shared_models.invite import refusal

THREADS = 4
MAX_WAITING = 64
MAX_MESSAGE_BYTES = 16 * 1024
log = logging.getLogger("fedzoo.server.enrollment")


class Registry(Protocol):
    """Where a new node's key is made known: Flower's SuperLink, or a stand-in."""

    def register(self, public_key: bytes) -> int:
        """Make a PEM public key known and return the node's id; a DeploymentError where that fails."""
        ...

    def unregister(self, node_id: int) -> None:
        """Forget a node."""
        ...


class EnrollmentService(rpc.EnrollmentServicer):
    """Exchanges an invite and a certificate request for a certificate and a place in the roster."""

    def __init__(self, authority: Authority, roster: Roster, registry: Registry, config: ServerConfig) -> None:
        self.authority = authority
        self.roster = roster
        self.registry = registry
        self.config = config

    def Enroll(self, request: pb.EnrollRequest, context: Any) -> pb.EnrollReply:  # noqa: N802 - gRPC's name
        """The token is spent only when the node is registered and in the roster; else it stays as it was."""
        with _answering(context, "enrollment"), self.roster.redeem(request.token) as redemption:
            certificate = self.authority.sign(redemption.site, request.request)
            redemption.require_new(certificate.public_key)
            try:
                node_id = self.registry.register(certificate.public_key)
            except DeploymentError as error:
                log.error("the node of site '%s' could not be registered: %s", redemption.site, error)
                raise refusal("busy") from None
            try:
                redemption.enroll(certificate.public_key, node_id, certificate.serial)
            except BaseException:
                self.registry.unregister(node_id)
                raise
            site = redemption.site
        log.info("site '%s' enrolled", site)
        return pb.EnrollReply(
            ca=self.authority.ca.read_bytes(),
            certificate=certificate.pem,
            site=site,
            fleet=self.config.public(self.config.ports.fleet),
            membership=self.config.public(self.config.ports.membership),
        )


class MembershipService(rpc.MembershipServicer):
    """Tells an enrolled node who it is; TLS has checked the certificate against our CA before this is asked."""

    def __init__(self, roster: Roster) -> None:
        self.roster = roster

    def WhoAmI(self, request: pb.WhoAmIRequest, context: Any) -> pb.WhoAmIReply:  # noqa: N802 - gRPC's name
        """The node of the certificate shown; a revoked one is told so."""
        with _answering(context, "membership"):
            certificate = x509.load_pem_x509_certificate(context.auth_context()["x509_pem_cert"][0])
            node = self.roster.by_serial(f"{certificate.serial_number:x}")
            if node is None:
                raise refusal("unknown-node")
        return pb.WhoAmIReply(
            site=node.site,
            status=pb.ACTIVE if node.revoked is None else pb.REVOKED,
            expires=int(certificate.not_valid_after_utc.timestamp()),
            now=time.time(),
        )


def start_services(authority: Authority, roster: Roster, registry: Registry, config: ServerConfig) -> list[grpc.Server]:
    """Start both services on their ports; stop each with `.stop(grace)`.

    Raises:
        DeploymentError: a port cannot be used.
    """
    enrollment = EnrollmentService(authority, roster, registry, config)
    membership = MembershipService(roster)
    ports = config.ports
    return [
        _serve(
            lambda server: rpc.add_EnrollmentServicer_to_server(enrollment, server),
            f"{config.bind}:{ports.enrollment}",
            _credentials(authority, mutual=False),
        ),
        _serve(
            lambda server: rpc.add_MembershipServicer_to_server(membership, server),
            f"{config.bind}:{ports.membership}",
            _credentials(authority, mutual=True),
        ),
    ]


def _credentials(authority: Authority, mutual: bool) -> grpc.ServerCredentials:
    """TLS with the leaf and the CA in the chain, so that a newcomer can compare the CA with its invite."""
    ca = authority.ca.read_bytes()
    pair = (authority.server_key.read_bytes(), authority.server.read_bytes() + ca)
    return grpc.ssl_server_credentials([pair], root_certificates=ca if mutual else None, require_client_auth=mutual)


def _serve(add: Callable[[grpc.Server], None], address: str, credentials: grpc.ServerCredentials) -> grpc.Server:
    server = grpc.server(
        ThreadPoolExecutor(THREADS),
        maximum_concurrent_rpcs=MAX_WAITING,
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_metadata_size", MAX_MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),
        ],
    )
    add(server)
    try:
        server.add_secure_port(address, credentials)
    except RuntimeError:
        raise DeploymentError(f"cannot listen on {address}", hint="Stop what uses the port or choose another") from None
    server.start()
    return server


@contextmanager
def _answering(context: Any, purpose: str) -> Iterator[None]:
    """Turn a refusal into its fixed word, and anything unexpected into `internal`."""
    try:
        yield
    except EnrollmentError as error:
        code, status = error.code, grpc.StatusCode.PERMISSION_DENIED
    except Exception as error:
        log.error("%s failed: %s", purpose, type(error).__name__)
        code, status = "internal", grpc.StatusCode.INTERNAL
    else:
        return
    log.warning("%s refused: %s", purpose, code)
    context.abort(status, code)
