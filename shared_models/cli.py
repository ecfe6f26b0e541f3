"""`fedzoo models` and `fedzoo doctor`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

app = typer.Typer()
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program.")]


@app.command()
def models(
    task: Annotated[str, typer.Option(help="Only models that can serve this task.")] = "",
    as_json: Json = False,
) -> None:
    """List the zoo: every model, its sizes and where it comes from."""
    from shared_models.models import models
    from shared_models.tasks.base import tasks

    if task:
        tasks[task]  # an unknown name is an error
    rows: list[dict[str, Any]] = [
        {
            "model": name,
            "sizes": list(models[name].sizes),
            "tasks": list(models[name].tasks),
            "settings": [key for key in models[name].settings.model_fields if key != "size"],
            "paper": models[name].paper,
            "stackable": models[name].stackable,
            "per_sample_gradients": list(models[name].per_sample_gradients),
        }
        for name in models
        if not task or task in models[name].tasks
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        typer.echo(f"{row['model']:10} sizes {', '.join(row['sizes'])}")
        typer.echo(f"{'':10} {row['paper']}")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this installation: versions, devices, and whether everything that fedzoo starts is there."""
    from shared_models.doctor import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps([vars(f) for f in findings], indent=2))
    else:
        for finding in findings:
            typer.echo(f"{'ok   ' if finding.ok else 'WRONG'} {finding.what}: {finding.detail}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)
