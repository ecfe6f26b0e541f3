"""What the server knows about itself: `server.toml`, and where everything lies in its folder."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from shared_models.files import read_toml, write_whole
from shared_models.validation import validate

Port = Annotated[int, Field(ge=1, le=65535)]
LOOPBACK = "127.0.0.1"


class Ports(BaseModel):
    """`[ports]`: where the server listens.

    Attributes:
        fleet: SuperNodes, TLS with node authentication.
        control: Flower's Control and Runtime APIs; on loopback only, because whoever reaches it can start runs.
        enrollment: sites with an invite, TLS.
        membership: enrolled sites, mutual TLS.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fleet: Port = 9092
    control: Port = 9093
    enrollment: Port = 9094
    membership: Port = 9095

    @model_validator(mode="after")
    def _distinct(self) -> Ports:
        if len({self.fleet, self.control, self.enrollment, self.membership}) < 4:
            raise ValueError("the four ports must differ")
        return self


class ServerConfig(BaseModel):
    """The whole `server.toml`.

    Attributes:
        hosts: names and IP addresses under which nodes reach this server; the first one stands in invites. With
            loopback names alone the server listens on loopback alone.
        ports: where it listens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    hosts: Annotated[tuple[str, ...], Field(min_length=1)] = ("localhost",)
    ports: Ports = Ports()

    @field_validator("hosts")
    @classmethod
    def _are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not _is_ip(host) and not re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,63}(\.(?!-)[A-Za-z0-9-]{1,63})*", host):
                raise ValueError(f"'{host}' is neither a host name nor an IP address (no port, no https://)")
        return hosts

    @property
    def bind(self) -> str:
        """The address the public services listen on."""
        local = all(
            host == "localhost" or (_is_ip(host) and ipaddress.ip_address(host).is_loopback) for host in self.hosts
        )
        if local:
            return LOOPBACK
        return "[::]" if any(":" in host for host in self.hosts) else "0.0.0.0"

    def public(self, port: int) -> str:
        """`host:port` as nodes are told it."""
        host = self.hosts[0]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def control(self) -> str:
        """`host:port` of Flower's Control API on this machine."""
        return f"{LOOPBACK}:{self.ports.control}"


def no_proxy(environment: Mapping[str, str]) -> str:
    """The value of `no_proxy` that keeps a proxy in the environment away from this machine's own Control API."""
    known = environment.get("no_proxy") or environment.get("NO_PROXY")
    if known and LOOPBACK in known.split(","):
        return known
    return f"{known},{LOOPBACK}" if known else LOOPBACK


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class ServerFolder:
    """Where everything of one server lies; folders are 0700 and private files 0600."""

    root: Path

    @property
    def config(self) -> Path:
        """`server.toml`, the one file meant to be edited."""
        return self.root / "server.toml"

    @property
    def pki(self) -> Path:
        """Certificates and keys: ca.crt, ca.key, server.crt, server.key."""
        return self.root / "pki"

    @property
    def nodes(self) -> Path:
        """The roster, SQLite."""
        return self.root / "nodes.db"

    @property
    def lock(self) -> Path:
        """Held by the running server."""
        return self.root / "server.lock"

    @property
    def flower(self) -> Path:
        """SuperLink's private home and database."""
        return self.root / "flower"

    @property
    def runs(self) -> Path:
        """One folder for each run."""
        return self.root / "runs"

    @property
    def logs(self) -> Path:
        """Logs of the server's processes."""
        return self.root / "logs"

    @property
    def folders(self) -> tuple[Path, ...]:
        """Every folder of a server."""
        return (self.root, self.pki, self.flower, self.runs, self.logs)


def load(server_dir: Path) -> ServerConfig:
    """Read and check `server.toml`.

    Raises:
        ConfigError: it is missing, broken (with the line) or has a key or value that cannot be (with the nearest key).
    """
    path = ServerFolder(server_dir).config
    hint = f"Make a server first: fedzoo server init --dir {server_dir}"
    return validate(ServerConfig, read_toml(path, hint), str(path))


def save(server_dir: Path, config: ServerConfig) -> None:
    """Write `server.toml` whole, readable by this user alone."""
    import tomli_w

    write_whole(ServerFolder(server_dir).config, tomli_w.dumps(config.model_dump(mode="json")))
