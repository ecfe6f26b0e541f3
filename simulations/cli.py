"""`fedzoo demo`, `simulate`, `compare`, `report`, `privacy` and `partition`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from simulations import compare_cli, partition_cli
from simulations.options import JobFile, Json, Out, Set, SkipBad, typed
from simulations.output import leave, run_folder, say

app = typer.Typer()
app.add_typer(compare_cli.app)
app.add_typer(partition_cli.app)


@app.command()
def demo(
    dir: Annotated[Path, typer.Option("--dir", help="Where server, nodes and results go.")] = Path("fedzoo-demo"),
) -> None:
    """Three hospitals, one server, TLS, a ViT: a real federation on this machine, then the paradigms compared."""
    from simulations.demo import run

    run(dir)


@app.command()
def simulate(job: JobFile, set: Set = None, out: Out = None, skip_bad: SkipBad = 0, as_json: Json = False) -> None:
    """Run one job as it stands, in this process, on simulated sites."""
    from shared_models.job import Job
    from simulations.compare import load_sites, require_enough, run_one
    from simulations.plan import count_rounds, plan
    from simulations.progress import progress

    resolved = Job.load(job, set or ())
    sites = load_sites(resolved, job.parent, skip_bad)
    say(resolved, sites.store.skipped)
    if resolved.place == "federated":
        require_enough(resolved, sites)
    folder = run_folder(out, resolved.name)
    planned = plan(resolved, len(sites.names), [(resolved.place, resolved.time)], [resolved.seed])
    rounds = count_rounds(sites, planned)
    with progress(rounds, quiet=as_json) as listen:
        comparison = run_one(resolved, sites, folder, typed(), listen)
    leave(comparison, folder, as_json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run's or a comparison's folder.")], as_json: Json = False
) -> None:
    """Draw the page of a finished run or comparison again."""
    from simulations import cube
    from simulations.report import write
    from simulations.results import load, of_run, save

    if (run / "cube.json").exists():
        found = cube.load(run / "cube.json")
        for entry in found.entries:
            write(entry.comparison, run / entry.name / "report.html")
        path = cube.write(found, run / "report.html")
        typer.echo(json.dumps({"report": str(path)}) if as_json else f"report {path}")
        return
    if (run / "comparison.json").exists():
        comparison = load(run / "comparison.json")
    else:
        comparison = of_run(run)
        save(comparison, run / "comparison.json")
    path = write(comparison, run / "report.html")
    typer.echo(json.dumps({"report": str(path)}) if as_json else f"report {path}")


@app.command()
def privacy(
    job: JobFile,
    examples: Annotated[int | None, typer.Option(min=1, help="A site's training examples, for mode 'sample'.")] = None,
    set: Set = None,
    as_json: Json = False,
) -> None:
    """What a job spends of differential privacy, before it runs: noise, sampling and epsilon."""
    from shared_models.job import Job
    from simulations.privacy_cost import cost

    found = cost(Job.load(job, set or ()), examples)
    if as_json:
        typer.echo(json.dumps(found.document()))
        return
    for line in found.lines():
        typer.echo(line)
