"""`fedzoo compare`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared_models.errors import FedzooError
from simulations.options import Json, Out, Set, SkipBad, typed
from simulations.output import leave_cube, run_folder, say, show, write_files

if TYPE_CHECKING:
    from shared_models.job import Job
    from simulations.partition import SitePopulation
    from simulations.results import Comparison
    from simulations.runs import Listen, Run

app = typer.Typer()
Jobs = Annotated[
    list[Path], typer.Argument(metavar="JOB.toml...", help="A job file; several are compared on the same sites.")
]


@dataclass(frozen=True)
class Planned:
    """One job with its sites, where their data are read from, and all that will be run of it."""

    job: Job
    sites: SitePopulation
    source: Path
    cells: Sequence[Sequence[Run]]


@app.command()
def compare(
    job: Jobs,
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

    Several jobs, of other labels for example (given, made from the input, none), make one table: place x time x job.
    A comparison that was stopped goes on where it was: name its folder with --out again.
    """
    from shared_models.job import Job
    from simulations import compare, cube
    from simulations.plan import as_paradigms, count_rounds, plan
    from simulations.progress import progress

    paradigms = as_paradigms(place, time)
    methods = [name.strip() for name in continual.split(",") if name.strip()]
    loaded = [Job.load(path, set or ()) for path in job]
    first = loaded[0].seed
    chosen = range(first, first + seeds)
    ready: dict[str, Planned] = {}
    several = len(loaded) > 1
    for name, path, resolved in zip(cube.names(loaded), job, loaded, strict=True):
        with _of_job(name if several else ""):
            streamed = resolved.replace(time="continual") if any(t == "continual" for _, t in paradigms) else resolved
            sites = compare.load_sites(streamed, path.parent, skip_bad)
            say(resolved, sites.store.skipped)
            if any(where == "federated" for where, _ in paradigms):
                compare.require_enough(resolved, sites)
            cells = plan(resolved, len(sites.names), paradigms, chosen, methods)
            source = (path.parent / os.path.expandvars(resolved.simulation.root)).resolve()
            ready[name] = Planned(resolved, sites, source, cells)
    cube.require_same_sites({name: (one.sites, one.source) for name, one in ready.items()})
    title = "-".join(ready) if len(ready) < 4 else f"{next(iter(ready))}-and-{len(ready) - 1}-more"
    identity = hashlib.sha256("".join(one.job.hash for one in ready.values()).encode()).hexdigest()
    folder = run_folder(out, f"{title}-compare", identity if several else loaded[0].hash)
    rounds = sum(count_rounds(one.sites, one.cells) for one in ready.values())
    found: dict[str, tuple[Job, Comparison]] = {}
    failed: list[str] = []
    with progress(rounds, quiet=as_json) as listen:
        for name, one in ready.items():
            place_of = run_folder(folder / name, name, one.job.hash) if several else folder
            try:
                comparison = compare.compare(
                    one.job,
                    one.sites,
                    paradigms=paradigms,
                    methods=methods,
                    seeds=chosen,
                    folder=place_of,
                    processes=jobs,
                    command=typed(),
                    listen=_named(listen, name) if several else listen,
                )
            except FedzooError as error:  # not one paradigm of this job could be carried out
                if not several:
                    raise
                failed.append(f"error: job '{name}': {error}")
                continue
            found[name] = one.job, comparison
            write_files(comparison, place_of)
    for line in failed:
        typer.echo(line, err=True)
    if len(found) > 1:
        leave_cube(found, folder, as_json)
    elif found:
        name, (_, comparison) = next(iter(found.items()))
        show(comparison, folder / name if several else folder, as_json)
    if failed or any(cell.error for _, comparison in found.values() for cell in comparison.cells):
        raise typer.Exit(1)


@contextmanager
def _of_job(name: str) -> Iterator[None]:
    """What goes wrong with one of several jobs says with which."""
    try:
        yield
    except FedzooError as error:
        if name:
            error.what = f"job '{name}': {error.what}"
        raise


def _named(listen: Listen, name: str) -> Listen:
    """The same listener, which hears the job's name before the cell's."""
    return lambda cell, seed, event: listen(f"{name}: {cell}", seed, event)
