"""An enrollment server on real TLS sockets, Flower replaced by a stand-in that can fail."""

from __future__ import annotations

import secrets
from pathlib import Path

import grpc

from server.authority import Authority
from server.config import Ports, ServerConfig
from server.enrollment import start_services
from server.nodes import Roster
from shared_models import enrollment_pb2 as pb
from shared_models import enrollment_pb2_grpc as rpc
from shared_models.errors import DeploymentError
from shared_models.invite import Invite, encode
from shared_models.process import free_ports


class Flower:
    """A stand-in for SuperLink that can fail."""

    def __init__(self) -> None:
        self.keys: dict[int, bytes] = {}
        self.broken = False

    def register(self, public_key: bytes) -> int:
        if self.broken:
            raise DeploymentError("SuperLink is not there")
        self.keys[node_id := secrets.randbits(64)] = public_key
        return node_id

    def unregister(self, node_id: int) -> None:
        del self.keys[node_id]


class Server:
    """A whole enrollment server on free loopback ports."""

    def __init__(self, folder: Path, hosts: tuple[str, ...] = ("localhost",)) -> None:
        names = ("fleet", "control", "enrollment", "membership")
        self.config = ServerConfig(hosts=hosts, ports=Ports(**dict(zip(names, free_ports(4), strict=True))))
        self.authority = Authority.create(folder / "pki", hosts)
        self.roster = Roster(folder / "nodes.db")
        self.flower = Flower()
        self.services = start_services(self.authority, self.roster, self.flower, self.config)

    def invite(self, site: str = "hospital-a", lifetime: float = 60.0, host: str = "localhost") -> str:
        token, expires = self.roster.invite(site, lifetime)
        return encode(self.ticket(token, expires, site, host))

    def ticket(self, token: bytes, expires: int, site: str = "hospital-a", host: str = "localhost") -> Invite:
        return Invite(f"{host}:{self.config.ports.enrollment}", self.authority.fingerprint, token, expires, site)

    def call(self, token: bytes, request: bytes) -> pb.EnrollReply:
        credentials = grpc.ssl_channel_credentials(self.authority.ca.read_bytes())
        with grpc.secure_channel(f"localhost:{self.config.ports.enrollment}", credentials) as channel:
            return rpc.EnrollmentStub(channel).Enroll(pb.EnrollRequest(token=token, request=request), timeout=20)

    def stop(self) -> None:
        for service in self.services:
            service.stop(0).wait()
