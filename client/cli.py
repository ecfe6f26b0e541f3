"""`fedzoo client`: join a federation as a site, run its node, look at it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from client import ledger_cli
from client.ledger_cli import DEFAULT_DIR, Dir, Json

AHEAD_SECONDS, BEHIND_SECONDS = 4.0, 240.0  # Flower refuses a signature 5 s from the future or 305 s old

app = typer.Typer(name="client", help="Join a federation as a site and run its node.", no_args_is_help=True)
app.add_typer(ledger_cli.app)


@app.command()
def enroll(
    invite: Annotated[str, typer.Argument(help="The string from the server's operator.")],
    data: Annotated[Path, typer.Option(help="The site's private data; it stays where it is.")],
    dir: Dir = DEFAULT_DIR,
    format: Annotated[str, typer.Option(help="How to read the data.")] = "imagefolder",
) -> None:
    """Join the federation that issued the invite. The node makes its own key; it never leaves the folder."""
    from client.enroll import enroll as join
    from client.readers.base import readers

    readers[format]  # an unknown name must not cost the invite
    config = join(invite, dir, data, format)
    typer.echo(f"enrolled as '{config.site}' in {dir}. Next: fedzoo client check --dir {dir}")


@app.command()
def renew(
    invite: Annotated[str, typer.Argument(help="A new string for this site from the server's operator.")],
    dir: Dir = DEFAULT_DIR,
) -> None:
    """Give this node a new key and certificate; its ledger, its state and what it agreed to stay. Stop it first."""
    from client.enroll import renew as join_again

    config = join_again(invite, dir)
    typer.echo(f"'{config.site}' in {dir} has a new certificate. Next: fedzoo client check --dir {dir}")


@app.command()
def check(dir: Dir = DEFAULT_DIR, json_output: Json = False) -> None:
    """Look whether data and ledger can be read, the server reached, and who this node is. Ends with 1 on a problem."""
    from client.config import NodeFolder, load
    from client.enroll import whoami
    from client.ledger import open_ledger
    from client.readers import check as look
    from client.tls import site_credentials, verify_server
    from shared_models.errors import FedzooError
    from shared_models.expiry import ending

    config = load(dir)

    def server() -> dict[str, Any]:
        verify_server(config.server.fleet, site_credentials(NodeFolder(dir))[0])
        return {"fleet": config.server.fleet}

    def identity() -> dict[str, Any]:
        asked = time.time()
        member = whoami(dir)
        clock = (asked + time.time()) / 2 - member.server_time
        problem = ""
        if member.status == "revoked":
            problem = "this node is revoked; ask the server's operator for a new invite"
        elif not -BEHIND_SECONDS < clock < AHEAD_SECONDS:
            problem = f"this machine's clock is {abs(clock):.0f} s {'ahead of' if clock > 0 else 'behind'} the server's"
        found = {"site": member.site, "status": member.status, "certificate_until": _iso(member.expires)}
        if said := ending(member.expires):
            advice = "ask the server's operator to revoke and invite it, then: fedzoo client renew INVITE"
            found["warning"] = f"this node's certificate {said}; {advice}"
        return {**found, "clock_ahead_seconds": round(clock, 1), **({"problem": problem} if problem else {})}

    def private_data() -> dict[str, Any]:
        summary = look(config.data.folder, config.data.format)
        bad = len(summary.get("unreadable", ()))
        return {**summary, **({"problem": f"{bad} files cannot be read"} if bad else {})}

    def booked() -> dict[str, Any]:
        ledger = open_ledger(dir, config)
        return {"rounds_booked": len(ledger.entries()), "file": str(ledger.path)}

    def attempt(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return part()
        except FedzooError as error:
            return {"problem": str(error)}

    parts = {"data": private_data, "ledger": booked, "server": server, "identity": identity}
    report = {name: attempt(part) for name, part in parts.items()}
    if json_output:
        typer.echo(json.dumps(report, indent=2))
    else:
        for part, found in report.items():
            typer.echo(f"{part:9} {'PROBLEM' if 'problem' in found else 'ok'}")
            for name, value in found.items():
                typer.echo(f"  {name}: {value}")
    if any("problem" in found for found in report.values()):
        raise typer.Exit(1)


@app.command()
def start(
    dir: Dir = DEFAULT_DIR,
    approve: Annotated[
        list[str] | None, typer.Option(metavar="HASH", help="A job this site agrees to; may be repeated.")
    ] = None,
    approve_all: Annotated[bool, typer.Option("--approve-all", help="Agree to every job of this server.")] = False,
    skip_bad: Annotated[
        int | None,
        typer.Option("--skip-bad", min=0, help="Pass over up to N unusable files and list them in the worker's log."),
    ] = None,
) -> None:
    """Run the node in the foreground until Ctrl-C. Without approval nothing runs on the data."""
    import signal
    import threading

    from client.config import PolicyPart, load, save
    from client.node import run
    from shared_models.validation import validate

    config = load(dir)
    validate(PolicyPart, {"approve": approve or []}, "--approve")
    if skip_bad is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"skip_bad": skip_bad})})
        save(dir, config)  # the worker reads it there, as at every later start
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    if not (approve or approve_all or config.policy.approve or config.policy.approve_all):
        _say("no job is approved: what the server asks for is refused and kept in requests/ for you to read")
    run(dir, approve or (), approve_all, stop, _say)


@app.command()
def approve(
    job: Annotated[str, typer.Argument(metavar="HASH", help="The job's hash, 64 hex digits; it may be run again.")],
    dir: Dir = DEFAULT_DIR,
) -> None:
    """Agree to a job, also while the node runs. It is written into client.toml; `client withdraw` takes it back."""
    from client.config import NodeFolder, load
    from client.consent import agree, guards_examples

    known = agree(dir, job)
    typer.echo(f"site '{load(dir).site}' agrees to job {job}")
    if (kept := NodeFolder(dir).approved / f"{job}.toml").exists():
        typer.echo(f"what it agreed to is kept in {kept}")
        if not guards_examples(kept):
            typer.echo(
                "it adds no noise for each example ([privacy] mode = 'sample'): a server that makes up the weights "
                "could read examples out of the answers, so this trusts the server's operator with the data"
            )
    if not known:
        typer.echo("the server has not asked for it yet; compare the hash with the one that was submitted")


@app.command()
def withdraw(
    job: Annotated[str, typer.Argument(metavar="HASH", help="The hash of a job that this site has agreed to.")],
    dir: Dir = DEFAULT_DIR,
) -> None:
    """Take the consent to a job back, also while the node runs; a round that runs already ends first."""
    from client.config import load
    from client.consent import withdraw as take_back

    every = take_back(dir, job)
    typer.echo(f"site '{load(dir).site}' no longer agrees to job {job}: its next instruction is refused")
    typer.echo("a round that runs already ends first, and its answer leaves")
    typer.echo("what `client start` was given (--approve, --approve-all) lasts until the node is stopped")
    if every:
        typer.echo("approve_all = true stands in client.toml, so the job still runs: set it to false")


@app.command()
def audit(
    dir: Dir = DEFAULT_DIR,
    last: Annotated[int, typer.Option(min=1, metavar="N", help="How many lines.")] = 20,
    json_output: Json = False,
) -> None:
    """Show the last lines of the site's own record: what it was asked, what it answered, what it agreed to."""
    from client.audit import Audit
    from client.config import NodeFolder, load

    load(dir)
    found = Audit(NodeFolder(dir).audit).last(last)
    if json_output:
        typer.echo(json.dumps(found, indent=2))
        return
    for line in found:
        facts = (f"{name}={value}" for name, value in line.items() if name not in ("time", "event"))
        typer.echo(" ".join((line["time"], line["event"], *facts)))


@app.command()
def forget(run: Annotated[str, typer.Argument(help="The run's id.")], dir: Dir = DEFAULT_DIR) -> None:
    """Remove what this node keeps of a run that is over: also what never left it, as a personal head. Not the ledger.

    A run that goes on after that begins anew here, and rounds that were paid for are not repeated.
    """
    from client.config import NodeFolder, load
    from client.state import DiskState

    site = load(dir).site
    folder, files, size = DiskState(NodeFolder(dir).state, site).forget(run)
    kept = f"{files} files, {size / 1e6:.2f} MB in {folder}"
    typer.echo(f"removed what site '{site}' kept of run {run}: {kept}; what was spent of the data stays in the ledger")


@app.command()
def status(dir: Dir = DEFAULT_DIR, json_output: Json = False) -> None:
    """Show what the node does now, and the jobs that wait for approval."""
    from dataclasses import asdict

    from client.config import NodeFolder, load
    from client.status import read

    now = read(dir)
    approved = load(dir).policy.approve
    pending = sorted(p.stem for p in NodeFolder(dir).requests.glob("*.toml") if p.stem not in approved)
    if json_output:
        typer.echo(json.dumps({**asdict(now), "requests": pending}, indent=2))
        return
    typer.echo(f"{now.state}{': ' if now.reason else ''}{now.reason}")
    if now.pid:
        typer.echo(f"process {now.pid}, {now.restarts} restarts, since {_iso(now.since)}")
    for job in pending:
        typer.echo(f"asked for: {job}  (read {NodeFolder(dir).requests / job}.toml)")
        typer.echo(f"  to agree: fedzoo client approve {job} --dir {dir}")


def _say(line: str) -> None:
    typer.echo(f"{time.strftime('%H:%M:%S')} {line}")


def _iso(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))
