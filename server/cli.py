"""`fedzoo server`: make a server, run it, invite and revoke sites."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from server.flower_control import FlowerNode

DEFAULT_DIR = Path("fedzoo-server")

app = typer.Typer(name="server", help="Run a federation's server, invite and revoke sites.", no_args_is_help=True)
Dir = Annotated[Path, typer.Option("--dir", help="The server's folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program.")]


@app.command()
def init(
    dir: Dir = DEFAULT_DIR,
    host: Annotated[
        list[str] | None,
        typer.Option(help="A name or IP address under which nodes reach this server; the first stands in invites."),
    ] = None,
    fleet_port: Annotated[int, typer.Option(help="For SuperNodes.")] = 9092,
    control_port: Annotated[int, typer.Option(help="For Flower's Control API, on loopback only.")] = 9093,
    enroll_port: Annotated[int, typer.Option(help="For sites that enroll.")] = 9094,
    member_port: Annotated[int, typer.Option(help="For enrolled sites.")] = 9095,
) -> None:
    """Make a server's folder: settings, certificate authority, certificate, empty roster.

    Without --host the server listens on loopback alone.
    """
    from server.authority import Authority
    from server.config import ServerConfig, ServerFolder, save
    from server.nodes import Roster
    from shared_models.errors import ConfigError
    from shared_models.files import private_folder
    from shared_models.validation import validate

    folder = ServerFolder(dir)
    if folder.root.exists() and (not folder.root.is_dir() or any(folder.root.iterdir())):
        raise ConfigError(f"{dir} exists and is not empty", hint="Name a new folder with --dir")
    ports = {"fleet": fleet_port, "control": control_port, "enrollment": enroll_port, "membership": member_port}
    config = validate(ServerConfig, {"ports": ports, **({"hosts": host} if host else {})}, "server init")
    for path in folder.folders:
        private_folder(path)
    Authority.create(folder.pki, config.hosts)
    Roster(folder.nodes)
    save(dir, config)
    typer.echo(f"made a server in {dir} for {', '.join(config.hosts)}. Start it: fedzoo server start --dir {dir}")


@app.command()
def renew(dir: Dir = DEFAULT_DIR) -> None:
    """Give the server a new key and certificate, for the hosts in server.toml. Enrolled sites need not do anything."""
    from server.authority import Authority
    from server.config import ServerFolder, load

    config = load(dir)
    authority = Authority.load(ServerFolder(dir).pki)
    authority.issue_server(config.hosts)
    end = f"{authority.ends(authority.server):%Y-%m-%d}"
    typer.echo(
        f"the server's certificate is valid until {end} for {', '.join(config.hosts)}; "
        "a server that runs must be restarted to show it"
    )


@app.command()
def start(dir: Dir = DEFAULT_DIR) -> None:
    """Run the server in the foreground until Ctrl-C."""
    import logging
    import os
    from logging.handlers import RotatingFileHandler

    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else every failed handshake of a stranger is printed

    from server.config import ServerFolder, load
    from server.process import serve

    config = load(dir)
    logs = ServerFolder(dir).logs
    logs.mkdir(exist_ok=True, mode=0o700)
    handler = RotatingFileHandler(logs / "server.log", maxBytes=10_000_000, backupCount=1)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("fedzoo")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)

    def ready() -> None:
        fleet, enrollment = config.public(config.ports.fleet), config.public(config.ports.enrollment)
        typer.echo(f"ready: nodes connect to {fleet}, sites enroll at {enrollment}. Logs in {logs}. Ctrl-C stops.")

    typer.echo(f"starting the server in {dir} ...")
    serve(dir, ready)
    typer.echo("stopped")


@app.command()
def invite(
    site: Annotated[str, typer.Argument(help="The name the site gets: a-z, 0-9 and '-'.")],
    dir: Dir = DEFAULT_DIR,
    hours: Annotated[float, typer.Option(max=8760, help="How long the invite is good for.")] = 24.0,
) -> None:
    """Print an invite: one string that lets one site enroll once."""
    typer.echo(make_invite(dir, site, hours))


def make_invite(server_dir: Path, site: str, hours: float) -> str:
    """A new invite; raises ConfigError or EnrollmentError as `Roster.invite`."""
    from server.authority import Authority
    from server.config import ServerFolder, load
    from server.nodes import Roster
    from shared_models.invite import Invite, encode

    folder = ServerFolder(server_dir)
    config = load(server_dir)
    fingerprint = Authority.load(folder.pki).fingerprint
    token, expires = Roster(folder.nodes).invite(site, hours * 3600)
    return encode(Invite(config.public(config.ports.enrollment), fingerprint, token, expires, site))


@app.command()
def nodes(dir: Dir = DEFAULT_DIR, json_output: Json = False) -> None:
    """List the enrolled sites and whether they are online."""
    from server.config import ServerFolder, load
    from server.expiry import may_connect
    from server.nodes import Roster

    load(dir)
    known = _flower_nodes(dir)
    rows = []
    for node in Roster(ServerFolder(dir).nodes).nodes():
        flower = (known or {}).get(node.public_key)
        allowed = may_connect(node)
        barred = "revoked" if node.revoked else "expired"
        online = "unknown" if known is None else "online" if flower and flower.online else "offline"
        rows.append(
            {
                "site": node.site,
                "state": online if allowed else barred,
                "enrolled": _iso(node.enrolled),
                "last_seen": _iso(flower.last_seen) if flower else None,
                "revoked": _iso(node.revoked),
            }
        )
    if json_output:
        typer.echo(json.dumps(rows, indent=2))
    elif not rows:
        typer.echo("no site has enrolled yet. Invite one: fedzoo server invite SITE")
    else:
        _table(rows)


@app.command()
def revoke(site: Annotated[str, typer.Argument(help="The site's name.")], dir: Dir = DEFAULT_DIR) -> None:
    """Shut a site out: its node is refused at once, its open invites are withdrawn."""
    from server.authority import Authority
    from server.config import ServerFolder, load
    from server.flower_control import FlowerControl
    from server.nodes import Roster
    from shared_models.errors import DeploymentError

    folder = ServerFolder(dir)
    config = load(dir)
    node = Roster(folder.nodes).revoke(site)
    try:
        with FlowerControl(config.control, Authority.load(folder.pki).ca) as control:
            for known in control.nodes():
                if known.public_key == node.public_key:
                    control.unregister(known.node_id)
    except DeploymentError as error:
        if error.code != "not-running":
            raise
        typer.echo(f"revoked {site}; the server is not running and will refuse the node from its next start")
        return
    typer.echo(f"revoked {site}")


@app.command()
def status(dir: Dir = DEFAULT_DIR, json_output: Json = False) -> None:
    """Say whether the server runs, where it listens, how many sites it has and which certificates end soon."""
    from server.authority import Authority
    from server.config import ServerFolder, load
    from server.expiry import warnings
    from server.nodes import Roster

    config = load(dir)
    known = _flower_nodes(dir)
    roster = Roster(ServerFolder(dir).nodes).nodes()
    active = [node.public_key for node in roster if node.revoked is None]
    state = {
        "running": known is not None,
        "hosts": list(config.hosts),
        "ports": config.ports.model_dump(),
        "enrolled": len(active),
        "online": sum(key in known and known[key].online for key in active) if known is not None else None,
        "revoked": len(roster) - len(active),
        "warnings": (warned := warnings(Authority.load(ServerFolder(dir).pki), roster)),
    }
    if json_output:
        typer.echo(json.dumps(state, indent=2))
        return
    typer.echo(f"{'running' if known is not None else 'not running'}; hosts {', '.join(config.hosts)}")
    typer.echo("ports " + ", ".join(f"{name} {port}" for name, port in config.ports.model_dump().items()))
    online = f", {state['online']} online" if known is not None else ""
    typer.echo(f"sites {state['enrolled']} enrolled{online}, {state['revoked']} revoked")
    for line in warned:
        typer.echo(f"warning: {line}")


def _flower_nodes(server_dir: Path) -> dict[bytes, FlowerNode] | None:
    """Public key -> node as the running server knows it; None where the server does not run."""
    from server.authority import Authority
    from server.config import ServerFolder, load
    from server.flower_control import FlowerControl
    from shared_models.errors import DeploymentError

    try:
        with FlowerControl(load(server_dir).control, Authority.load(ServerFolder(server_dir).pki).ca) as control:
            return {node.public_key: node for node in control.nodes()}
    except DeploymentError as error:
        if error.code != "not-running":
            raise
        return None


def _iso(moment: float | None) -> str | None:
    return None if moment is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def _table(rows: list[dict[str, str | None]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in rows[0]:
        table.add_column(name.replace("_", " "))
    for row in rows:
        table.add_row(*(value or "-" for value in row.values()))
    Console().print(table)
