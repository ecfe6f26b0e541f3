"""`fedzoo attack membership` and `inversion`: what an attacker reaches on a job, beside what is guaranteed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simulations.options import JobFile, Json, Out, Set, SkipBad, typed
from simulations.output import run_folder, say

if TYPE_CHECKING:
    from shared_models.job import Job
    from simulations.attacks.results import Inversion, Membership
    from simulations.partition import SitePopulation

app = typer.Typer(
    name="attack", help="Attack a job's models and answers, with and without privacy.", no_args_is_help=True
)
Epsilons = Annotated[
    str | None,
    typer.Option(
        "--epsilons",
        help="Levels of privacy, comma-separated: none, or a target of epsilon.",
        show_default="none,8,3,1; none without [privacy]",
    ),
]


@app.command()
def membership(
    job: JobFile,
    epsilons: Epsilons = None,
    shadows: Annotated[int, typer.Option(help="Models that the attacker trains; even.")] = 16,
    targets: Annotated[int, typer.Option(help="Models that are attacked.")] = 8,
    set: Set = None,
    out: Out = None,
    skip_bad: SkipBad = 0,
    as_json: Json = False,
) -> None:
    """Who was in the training data? The likelihood-ratio attack (LiRA) on models that the job trains."""
    from simulations.attacks.levels import levels
    from simulations.attacks.membership import attack, require
    from simulations.progress import progress

    resolved, sites = _load("membership", job, set, skip_bad)
    chosen = levels(resolved, epsilons)
    require(resolved, sites, shadows, targets)
    folder = run_folder(out, f"{resolved.name}-membership")
    rounds = resolved.federation.rounds * len(chosen) * (shadows + targets)
    with progress(rounds, quiet=as_json) as listen:
        found = attack(resolved, chosen, sites, shadows=shadows, targets=targets, command=typed(), listen=listen)
    _leave(found, folder, "membership.json", as_json)


@app.command()
def inversion(
    job: JobFile,
    epsilons: Epsilons = None,
    images: Annotated[int, typer.Option(min=1, help="Images to reconstruct.")] = 6,
    batch: Annotated[int, typer.Option(min=1, help="Images in one answer.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Of the optimiser, for each start.")] = 500,
    starts: Annotated[int, typer.Option(min=1, help="Of the optimiser, for each answer.")] = 2,
    smooth: Annotated[float, typer.Option(min=0, help="Weight of the total variation.")] = 0.01,
    set: Set = None,
    out: Out = None,
    skip_bad: SkipBad = 0,
    as_json: Json = False,
) -> None:
    """Which images were in a site's answer? Gradient inversion of one step of a site."""
    from simulations.attacks.inversion import attack, require
    from simulations.attacks.levels import levels
    from simulations.attacks.reconstruct import Search
    from simulations.progress import progress

    resolved, sites = _load("inversion", job, set, skip_bad)
    chosen = levels(resolved, epsilons)
    require(resolved, sites, images, batch)
    folder = run_folder(out, f"{resolved.name}-inversion")
    with progress(len(chosen) * (images // batch), quiet=as_json) as listen:
        found = attack(
            resolved,
            chosen,
            sites,
            images=images,
            batch=batch,
            search=Search(steps=steps, starts=starts, smooth=smooth),
            command=typed(),
            listen=listen,
        )
    _leave(found, folder, "inversion.json", as_json)


def _load(attack: str, job: Path, set: list[str] | None, skip_bad: int) -> tuple[Job, SitePopulation]:
    from shared_models.job import Job
    from simulations.attacks.levels import require_classifier
    from simulations.compare import load_sites, require_enough

    resolved = Job.load(job, set or ())
    require_classifier(resolved, attack)
    sites = load_sites(resolved, job.parent, skip_bad)
    say(resolved, sites.store.skipped)
    if resolved.place == "federated":
        require_enough(resolved, sites)
    return resolved, sites


def _leave(found: Membership | Inversion, folder: Path, name: str, as_json: bool) -> None:
    """Write result and report, show the table."""
    from rich.console import Console

    from simulations.attacks import report, results

    results.save(found, folder / name)
    page = report.write(found, folder / "report.html")
    if as_json:
        typer.echo(found.model_dump_json())
        return
    console = Console()
    console.print(report.terminal(found))
    for line in report.says(found):
        console.print(line)
    typer.echo(f"report {page}")
