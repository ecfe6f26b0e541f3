"""What the simulator's commands say and leave behind: the folder of a run, its files, the tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from shared_models.job import Job
    from simulations.results import Comparison


def leave(comparison: Comparison, folder: Path, as_json: bool) -> None:
    """Write comparison and report, show the table."""
    write_files(comparison, folder)
    show(comparison, folder, as_json)


def write_files(comparison: Comparison, folder: Path) -> None:
    """`comparison.json` and `report.html`."""
    from simulations import report, results

    results.save(comparison, folder / "comparison.json")
    report.write(comparison, folder / "report.html")


def show(comparison: Comparison, folder: Path, as_json: bool) -> None:
    """The tables and sentences of a comparison whose files lie in the folder."""
    from simulations import tables
    from simulations.verdicts import verdicts

    if as_json:
        typer.echo(comparison.model_dump_json())
        return
    said = [*tables.guarantees(comparison), *verdicts(comparison)]
    _print(lambda width: tables.for_terminal(comparison, width), said, folder / "report.html")


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


def leave_cube(found: Mapping[str, tuple[Job, Comparison]], folder: Path, as_json: bool) -> None:
    """What several jobs say together; each has its own files in its sub-folder already."""
    from simulations import cube, tables

    one = next(comparison for _, comparison in found.values())
    made = cube.Cube(
        title=f"{len(found)} jobs compared: {', '.join(found)}",
        created=one.created,
        version=one.version,
        command=one.command,
        entries=[cube.Entry.of(job, comparison) for job, comparison in found.values()],
    )
    cube.save(made, folder / "cube.json")
    page = cube.write(made, folder / "report.html")
    if as_json:
        typer.echo(made.model_dump_json())
        return
    private = [f"{name}: {line}" for name, (_, c) in found.items() for line in tables.guarantees(c)]
    _print(lambda width: cube.for_terminal(made, width), [*cube.says(made), *private], page)


def _print(shown: Callable[[int], Sequence[Table]], said: Sequence[str], page: Path) -> None:
    """Tables made for the terminal's width, then sentences, then where the page is."""
    from rich.console import Console

    console = Console()
    for table in shown(console.width):
        console.print(table)
    for line in said:
        console.print(line)
    typer.echo(f"report {page}")
