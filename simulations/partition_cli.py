"""`fedzoo partition show`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from simulations.options import JobFile, Json, Set, SkipBad, typed

app = typer.Typer(name="partition", help="How simulated sites share the data.", no_args_is_help=True)


@app.callback()
def partition() -> None:
    """How simulated sites share the data."""


@app.command()
def show(
    job: JobFile,
    set: Set = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Draw it as a page of its own.")] = None,
    skip_bad: SkipBad = 0,
    as_json: Json = False,
) -> None:
    """Sizes, labels and figures of heterogeneity of every simulated site; nothing is trained."""
    from rich.console import Console

    from shared_models.job import Job
    from simulations.compare import make_sites
    from simulations.show import SITE_LIMIT, Shown

    resolved = Job.load(job, set or ())
    sites = make_sites(resolved, job.parent, skip_bad)
    for line in sites.store.skipped:
        typer.echo(f"passed over: {line}", err=True)
    shown = Shown.of(resolved, sites)
    page = shown.write(html, typed()) if html else None
    if as_json:
        typer.echo(json.dumps(shown.document() | ({"page": str(page)} if page else {})))
        return
    console = Console()
    console.print(f"{resolved.name}: {shown.summary}", highlight=False, markup=False)
    for table in shown.tables(console.width):
        console.print(table)
    if len(sites.names) > SITE_LIMIT:
        typer.echo(f"{len(sites.names) - SITE_LIMIT} more sites are not shown; --json has them all")
    for topic, claim in shown.sentences():
        console.print(f"{topic}: {claim}", highlight=False, markup=False)
    typer.echo(f"hash {shown.partition.hash}")
    if page:
        typer.echo(f"page {page}")
