"""`fedzoo demo`, `simulate`, `compare`, `report`, `privacy` and `partition`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simulations import partition_cli
from simulations.options import JobFile, Json, Set, SkipBad, typed

if TYPE_CHECKING:
    from shared_models.job import Job
    from simulations.results import Comparison

app = typer.Typer()
app.add_typer(partition_cli.app)
Out = Annotated[Path | None, typer.Option("--out", help="Folder for the results.", show_default="runs/<job>-<time>")]


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
    rounds = count_rounds(resolved, sites, planned)
    with progress(rounds, quiet=as_json) as listen:
        comparison = run_one(resolved, sites, folder, typed(), listen)
    _leave(comparison, folder, as_json)


@app.command()
def compare(
    job: JobFile,
    place: Annotated[str, typer.Option(help="Places of learning, comma-separated.")] = "centralized,federated,isolated",
    time: Annotated[str, typer.Option(help="Times of learning, comma-separated: offline, continual.")] = "offline",
    continual: Annotated[
        str, typer.Option(help="Continual methods, comma-separated, e.g. finetune,er,der++.", show_default="the job's")
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, counted from the job's own.")] = 3,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Runs side by side, each on one CPU core.")] = 1,
    set: Set = None,
    out: Out = None,
    skip_bad: SkipBad = 0,
    as_json: Json = False,
) -> None:
    """Compare paradigms: same data, same split, same seeds, same budget.

    A comparison that was stopped goes on where it was: name its folder with --out again.
    """
    from shared_models.job import Job
    from simulations.compare import compare, load_sites, require_enough
    from simulations.plan import as_paradigms, count_rounds, plan
    from simulations.progress import progress

    resolved = Job.load(job, set or ())
    paradigms = as_paradigms(place, time)
    chosen = range(resolved.seed, resolved.seed + seeds)
    sites = load_sites(resolved, job.parent, skip_bad)
    say(resolved, sites.store.skipped)
    if any(name == "federated" for name, _ in paradigms):
        require_enough(resolved, sites)
    methods = [name.strip() for name in continual.split(",") if name.strip()]
    planned = plan(resolved, len(sites.names), paradigms, chosen, methods)
    folder = run_folder(out, f"{resolved.name}-compare", resolved.hash)
    with progress(count_rounds(resolved, sites, planned), quiet=as_json) as listen:
        comparison = compare(
            resolved,
            sites,
            paradigms=paradigms,
            methods=methods,
            seeds=chosen,
            folder=folder,
            processes=jobs,
            command=typed(),
            listen=listen,
        )
    _leave(comparison, folder, as_json)
    if any(cell.error for cell in comparison.cells):
        raise typer.Exit(1)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run's or a comparison's folder.")], as_json: Json = False
) -> None:
    """Draw the page of a finished run or comparison again."""
    from simulations.report import write
    from simulations.results import load, of_run, save

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


def _leave(comparison: Comparison, folder: Path, as_json: bool) -> None:
    """Write comparison and report, show the table."""
    from rich.console import Console

    from simulations import report, results, tables
    from simulations.verdicts import verdicts

    results.save(comparison, folder / "comparison.json")
    page = report.write(comparison, folder / "report.html")
    if as_json:
        typer.echo(comparison.model_dump_json())
        return
    console = Console()
    for table in tables.for_terminal(comparison, console.width):
        console.print(table)
    for line in (*tables.guarantees(comparison), *verdicts(comparison)):
        console.print(line)
    typer.echo(f"report {page}")


def say(job: Job, skipped: Sequence[str]) -> None:
    """What was passed over in the data, and what was loaded of pretrained weights."""
    from shared_models.spec import build_model

    for line in skipped:
        typer.echo(f"passed over: {line}", err=True)
    if match := build_model(job)[1].match:
        typer.echo(str(match), err=True)


def run_folder(out: Path | None, name: str, job: str = "") -> Path:
    """The folder of a run, empty; or that of a comparison, which may hold the runs of a stopped one of the same job."""
    from shared_models.errors import ConfigError
    from shared_models.files import write_whole

    path = out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    begun = path / "job.sha256"
    hint = "Name another one with --out"
    try:
        path.mkdir(parents=True, exist_ok=True)
        empty = not any(path.iterdir())
        known = begun.read_text(encoding="utf-8").strip() if job and begun.exists() else ""
        if job and empty:
            write_whole(begun, job + "\n")
    except OSError as error:
        raise ConfigError(f"the folder {path} cannot be made: {error.strerror}", hint=hint) from None
    if known and known != job:
        raise ConfigError(f"the folder {path} holds a comparison of another job or other settings", hint=hint)
    if not empty and not known:
        raise ConfigError(f"the folder {path} is not empty", hint=hint)
    return path
