"""`fedzoo client ledger`: what was spent of this site's data, and what is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

DEFAULT_DIR = Path("fedzoo-node")

app = typer.Typer(name="ledger", help="What jobs have spent of this site's data.", no_args_is_help=True)
Dir = Annotated[Path, typer.Option("--dir", help="The node's folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program.")]


@app.callback()
def root() -> None:
    """What jobs have spent of this site's data."""


@app.command()
def show(dir: Dir = DEFAULT_DIR, json_output: Json = False) -> None:
    """Show, for each data set, epsilon at the site's delta over all jobs, the cap, what is left, and every run."""
    from client.config import load
    from client.ledger import open_ledger
    from client.statement import statement

    config = load(dir)
    ledger = open_ledger(dir, config)
    accounts = statement(ledger.entries(), ledger.cap_epsilon, ledger.delta, config.dataset)
    if json_output:
        found = {"file": str(ledger.path), "dataset": config.dataset, "datasets": accounts}
        typer.echo(json.dumps(found, indent=2, allow_nan=False))
        return
    typer.echo(f"ledger {ledger.path}")
    for account in accounts:
        _say(account, config.dataset)


def _say(account: dict[str, Any], current: str) -> None:
    from shared_models.privacy import rest

    name = account["dataset"]
    typer.echo(f"\ndata set {_shown(name)}{'  (read by this node)' if name == current else ''}")
    cap = account["cap_epsilon"]
    left = "no cap" if cap is None else f"cap {cap:g}, left {rest(account['left'])}"
    typer.echo(f"  {_guarantee(account)}; {left}")
    if account["converted"]:
        typer.echo("  rounds with unit client count here at half their noise and without sampling (docs/ledger.md)")
    elif account["unsampled"]:
        typer.echo("  rounds with unit client count here without sampling; a job's own epsilon may count on it")
    if not account["runs"]:
        typer.echo("  no round has been booked")
    for run in account["runs"]:
        typer.echo(f"  run {run['run']}, site {run['site']}, job {run['job'] or 'unknown'}: {_rounds(run['rounds'])}")
        typer.echo(f"    alone {_guarantee(run)}")
        for step in run["mechanisms"]:
            typer.echo(f"    noise {step['noise']:.4g}, sampling rate {step['rate']:.4g}, {step['steps']} steps")
        if run["unanswered"]:
            typer.echo(f"    {run['unanswered']} booked and not answered; counted all the same")


def _guarantee(spent: dict[str, Any]) -> str:
    from shared_models.privacy import bound

    epsilon = "infinite" if spent["epsilon"] is None else bound(spent["epsilon"])
    return f"epsilon {epsilon} at delta {spent['delta']:g}, unit {spent['unit']} (neighbours: {spent['relation']})"


def _rounds(numbers: list[int]) -> str:
    return f"{len(numbers)} rounds ({numbers[0]} to {numbers[-1]})" if numbers[1:] else f"1 round ({numbers[0]})"


def _shown(name: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
