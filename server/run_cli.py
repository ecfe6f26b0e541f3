"""`fedzoo run`: submit a job to the server on this machine and follow it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli import DEFAULT_DIR, Dir, Json

if TYPE_CHECKING:
    from server.flower_control import FlowerControl
    from server.runs import RunFolder
    from shared_models.job import Job

app = typer.Typer(name="run", help="Submit jobs to the server on this machine, and follow them.", no_args_is_help=True)
Run = Annotated[str, typer.Argument(help="The run's id, or `last`.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a setting, e.g. federation.rounds=5.")]
POLL = 0.3


@app.command()
def submit(
    job: Annotated[Path, typer.Argument(help="A job file.")],
    dir: Dir = DEFAULT_DIR,
    set: Set = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the run to its end.")] = False,
    as_json: Json = False,
) -> None:
    """Submit a job. Prints the run's id and the job's hash, which every site must approve."""
    from shared_models.job import Job

    resolved = Job.load(job, set or ())
    folder = submit_job(dir, resolved)
    if as_json:
        typer.echo(json.dumps({"run": folder.id, "job": resolved.hash, "folder": str(folder.path)}))
    else:
        typer.echo(f"submitted run {folder.id}")
        typer.echo(f"job hash {resolved.hash}")
        typer.echo(f"A site agrees with: fedzoo client approve {resolved.hash}")
        part = resolved.federation
        typer.echo(f"It needs {part.min_sites} sites within {part.wait:g} s; later: fedzoo run resume {folder.id}")
    if watch:
        _follow(folder, as_json)


def submit_job(server_dir: Path, job: Job) -> RunFolder:
    """Make a run of a resolved job and start it.

    Raises:
        DeploymentError: the server does not run; no folder is left then.
        CompatibilityError: the job can only be simulated.
        ConfigError: the folder is not a server's, or the model cannot take the job's images.
    """
    from server.runs import create_run, lease
    from shared_models.spec import build_model

    with _control(server_dir) as control:
        for step in job.steps:
            build_model(step)
        control.runs()
        folder = create_run(_runs(server_dir), job)
        lease(folder, control, server_dir)
    return folder


@app.command("list")
def list_(dir: Dir = DEFAULT_DIR, as_json: Json = False) -> None:
    """List all runs, the oldest first."""
    from server.runs import list_runs

    rows = [{"run": folder.id, **asdict(folder.status())} for folder in list_runs(_runs(dir))]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        typer.echo(f"{row['run']}  {row['state']}  {row['reason']}".rstrip())
    if not rows:
        typer.echo("no run yet")


@app.command()
def watch(run: Run = "last", dir: Dir = DEFAULT_DIR, as_json: Json = False) -> None:
    """Follow a run from its first event to its end; exits with 1 where it failed or was stopped."""
    from server.runs import find_run

    _follow(find_run(_runs(dir), run), as_json)


@app.command()
def stop(run: Run, dir: Dir = DEFAULT_DIR) -> None:
    """Stop a run; its checkpoint stays and `resume` carries on from it."""
    from server.runs import find_run, stop_run

    folder = find_run(_runs(dir), run)
    with _control(dir) as control:
        stop_run(folder, control)
    typer.echo(f"stopped run {folder.id}")


@app.command()
def resume(run: Run, dir: Dir = DEFAULT_DIR) -> None:
    """Carry on a failed or stopped run from its checkpoint."""
    from server.runs import ACTIVE, find_run, lease
    from shared_models.errors import RunError

    folder = find_run(_runs(dir), run)
    status = folder.status()
    if status.state in (*ACTIVE, "done"):
        raise RunError(f"run {folder.id} is {status.state}: there is nothing to resume")
    with _control(dir) as control:
        control.runs()
        folder.write(reason="", leases=0)
        lease(folder, control, dir)
    typer.echo(f"run {folder.id} goes on")


def follow(folder: RunFolder, poll: float = POLL) -> Iterator[dict[str, Any]]:
    """Every event of a run, from the first, until the run has ended.

    Raises:
        RunError: it failed or was stopped; with the reason.
    """
    from server.events import read_events
    from server.runs import ACTIVE
    from shared_models.errors import RunError

    offset = 0
    while True:
        status = folder.status()
        for event, behind in read_events(folder.path / "events.jsonl", offset):
            yield event
            offset = behind
        if status.state not in (*ACTIVE, "created"):
            break
        time.sleep(poll)
    if status.state != "done":
        raise RunError(
            f"run {folder.id} {status.state}" + (f": {status.reason}" if status.reason else ""),
            hint=f"To carry on from its checkpoint: fedzoo run resume {folder.id}",
        )


def describe(event: dict[str, Any]) -> str:
    """One event as one line, empty for those a person need not see."""
    kind = event["event"]
    if kind == "round":
        loss = event["validation"].get("loss")
        parts = [_headline(event, "validation"), "" if loss is None else f"loss {loss:.3f}"]
        measured = ", ".join(filter(None, parts)) or "of nothing"
        answered = f"{len(event['sites'])} of {len(event['sites']) + len(event['rejected'])} sites"
        return f"round {event['round'] + 1}/{event['rounds']}: {answered}; before it: validation {measured}"
    if kind == "waiting":
        missing = ", ".join(f"{site} ({why})" for site, why in event["missing"].items()) or "nobody is enrolled"
        return f"waiting for sites: {len(event['have'])} of {event['need']} ready; missing {missing}"
    if kind in ("rejected", "refused"):
        detail = f": {event['detail']}" if event.get("detail") else ""
        return f"{kind} {event['site']}: {event['code']}{detail}"
    if kind == "end":
        found = _headline(event, "test", " on all sites' tests")
        spent = event.get("privacy", {}).get("statement")
        return "; ".join(filter(None, (f"done: {found}" if found else "done", spent)))
    return {"resumed": f"resumed at round {event.get('round')}", "failed": f"failed: {event.get('reason')}"}.get(
        kind, ""
    )


def _headline(event: dict[str, Any], part: str, where: str = "") -> str:
    """`accuracy 91.0 %`; empty where it was not measured. An event that does not say how it is shown is of accuracy."""
    shown = {"metric": "accuracy", "unit": "%", "factor": 100.0, "digits": 1, **event.get("headline", {})}
    value = event[part].get(shown["metric"])
    if value is None:
        return ""
    return f"{shown['metric']}{where} {shown['factor'] * value:.{shown['digits']}f} {shown['unit']}".rstrip()


def _follow(folder: RunFolder, as_json: bool) -> None:
    for event in follow(folder):
        line = json.dumps(event) if as_json else describe(event)
        if line:
            typer.echo(line)
    if not as_json:
        typer.echo(f"model and result are in {folder.path}; a page: fedzoo report {folder.path}")


def _runs(dir: Path) -> Path:
    """Where a server's runs lie; raises a ConfigError where the folder is not a server's."""
    from server.config import ServerFolder, load

    load(dir)
    return ServerFolder(dir).runs


def _control(dir: Path) -> FlowerControl:
    from server.config import ServerFolder, load
    from server.flower_control import FlowerControl

    return FlowerControl(load(dir).control, ServerFolder(dir).pki / "ca.crt")
