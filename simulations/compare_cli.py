"""`fedzoo compare`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simulations.options import Json, Out, Set, SkipBad, typed
from simulations.output import leave, leave_cube, run_folder, say

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
    """One job with its sites and all that will be run of it."""

    job: Job
    sites: SitePopulation
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
    for name, path, resolved in zip(cube.names(loaded), job, loaded, strict=True):
        streamed = resolved.replace(time="continual") if any(t == "continual" for _, t in paradigms) else resolved
        sites = compare.load_sites(streamed, path.parent, skip_bad)
        say(resolved, sites.store.skipped)
        if any(where == "federated" for where, _ in paradigms):
            compare.require_enough(resolved, sites)
        ready[name] = Planned(resolved, sites, plan(resolved, len(sites.names), paradigms, chosen, methods))
    cube.require_same_sites({name: (one.job, one.sites) for name, one in ready.items()})
    several = len(ready) > 1
    title = "-".join(ready) if len(ready) < 4 else f"{next(iter(ready))}-and-{len(ready) - 1}-more"
    identity = hashlib.sha256("".join(one.job.hash for one in ready.values()).encode()).hexdigest()
    folder = run_folder(out, f"{title}-compare", identity if several else loaded[0].hash)
    rounds = sum(count_rounds(one.sites, one.cells) for one in ready.values())
    found: dict[str, Comparison] = {}
    with progress(rounds, quiet=as_json) as listen:
        for name, one in ready.items():
            found[name] = compare.compare(
                one.job,
                one.sites,
                paradigms=paradigms,
                methods=methods,
                seeds=chosen,
                folder=run_folder(folder / name, name, one.job.hash) if several else folder,
                processes=jobs,
                command=typed(),
                listen=_named(listen, name) if several else listen,
            )
    if several:
        leave_cube({name: (one.job, found[name]) for name, one in ready.items()}, folder, as_json)
    else:
        leave(found[loaded[0].name], folder, as_json)
    if any(cell.error for comparison in found.values() for cell in comparison.cells):
        raise typer.Exit(1)


def _named(listen: Listen, name: str) -> Listen:
    """The same listener, which hears the job's name before the cell's."""
    return lambda cell, seed, event: listen(f"{name}: {cell}", seed, event)
