"""`fedzoo demo`, `simulate`, `compare`, `report` and `privacy`."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from shared_models.job import Job
    from simulations.results import Comparison

app = typer.Typer()
JobFile = Annotated[Path, typer.Argument(metavar="JOB.toml", help="A job file.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a setting, e.g. federation.rounds=5.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program.")]
SkipBad = Annotated[int, typer.Option("--skip-bad", min=0, help="Pass over up to N unusable files, and list them.")]
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
    from simulations.compare import count_rounds, load_sites, require_enough, run_one
    from simulations.progress import progress

    resolved = Job.load(job, set or ())
    sites = load_sites(resolved, job.parent, skip_bad)
    say(resolved, sites.store.skipped)
    if resolved.place == "federated":
        require_enough(resolved, sites)
    folder = new_folder(out, resolved.name)
    rounds = count_rounds(resolved, sites, [(resolved.place, resolved.time)], 1)
    with progress(rounds, quiet=as_json) as listen:
        comparison = run_one(resolved, sites, folder, command_line(), listen)
    _leave(comparison, folder, as_json)


@app.command()
def compare(
    job: JobFile,
    place: Annotated[str, typer.Option(help="Places of learning, comma-separated.")] = "centralized,federated,isolated",
    time: Annotated[str, typer.Option(help="Times of learning, comma-separated: offline, continual.")] = "offline",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, counted from the job's own.")] = 3,
    set: Set = None,
    out: Out = None,
    skip_bad: SkipBad = 0,
    as_json: Json = False,
) -> None:
    """Compare paradigms: same data, same split, same seeds, same budget."""
    from shared_models.job import Job
    from simulations.compare import as_paradigms, compare, count_rounds, load_sites, require_enough
    from simulations.progress import progress

    resolved = Job.load(job, set or ())
    paradigms = as_paradigms(place, time)
    chosen = range(resolved.seed, resolved.seed + seeds)
    sites = load_sites(resolved, job.parent, skip_bad)
    say(resolved, sites.store.skipped)
    if any(name == "federated" for name, _ in paradigms):
        require_enough(resolved, sites)
    folder = new_folder(out, f"{resolved.name}-compare")
    with progress(count_rounds(resolved, sites, paradigms, seeds), quiet=as_json) as listen:
        comparison = compare(
            resolved,
            sites,
            paradigms=paradigms,
            seeds=chosen,
            folder=folder,
            command=command_line(),
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

    from simulations import report, results
    from simulations.statistics import verdicts

    results.save(comparison, folder / "comparison.json")
    page = report.write(comparison, folder / "report.html")
    if as_json:
        typer.echo(comparison.model_dump_json())
        return
    console = Console()
    for table in report.tables(comparison, console.width):
        console.print(table)
    for line in (*report.guarantees(comparison), *verdicts(comparison)):
        console.print(line)
    typer.echo(f"report {page}")


def say(job: Job, skipped: Sequence[str]) -> None:
    """What was passed over in the data, and what was loaded of pretrained weights."""
    from shared_models.spec import build_model

    for line in skipped:
        typer.echo(f"passed over: {line}", err=True)
    if match := build_model(job)[1].match:
        typer.echo(str(match), err=True)


def new_folder(out: Path | None, name: str) -> Path:
    """The folder for results, made and empty; raises ConfigError where that cannot be."""
    from shared_models.errors import ConfigError

    path = out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    hint = "Name another one with --out"
    try:
        path.mkdir(parents=True, exist_ok=True)
        empty = not any(path.iterdir())
    except OSError as error:
        raise ConfigError(f"the folder {path} cannot be made: {error.strerror}", hint=hint) from None
    if not empty:
        raise ConfigError(f"the folder {path} is not empty", hint=hint)
    return path


def command_line() -> str:
    """The command line as it can be typed again."""
    return shlex.join(["fedzoo", *sys.argv[1:]])
