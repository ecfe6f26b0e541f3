"""One command, every paradigm: same data, same split, same seeds, same budget."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from client.readers import read
from client.readers.base import Store, Wanted, readers
from client.workbench import Benches
from server.outcome import Totals
from shared_models.errors import ConfigError, FedzooError, RunError
from shared_models.job import Job
from shared_models.spec import build_model
from shared_models.tasks.base import Target, make_task
from simulations.arrivals import settled
from simulations.leaving import left_sites
from simulations.measures import measures_of
from simulations.paradigms import Result, Setting
from simulations.paradigms import paradigms as places
from simulations.partition import SitePopulation, make_partition, same_sites
from simulations.partitions.base import partitions
from simulations.pictures import colours, pictures, with_truth
from simulations.plan import OFFLINE, plan, variant, with_memory
from simulations.quotes import quotes
from simulations.results import Budget, Cell, Comparison, Guarantee, Partition, Place, Time
from simulations.runs import Listen, Run, side_by_side

COUNTED: dict[Target, str] = {"mask": "images that show it", "boxes": "boxes"}  # else examples


def read_pool(job: Job, base: Path, skip_bad: int = 0) -> Store:
    """All examples of a simulated federation.

    Args:
        job: its `[simulation]` names reader and root.
        base: the folder that a relative root starts from.
        skip_bad: how many files or rows that cannot be used are passed over.

    Raises:
        UnknownNameError: there is no such reader.
        ConfigError: the root, or an environment variable in it, is not set.
        DataError: the data cannot be read.
    """
    import os
    import re

    root = job.simulation.root
    for name in re.findall(r"\$\{?(\w+)\}?", root):
        if name not in os.environ:
            raise ConfigError(
                f"simulation.root = '{root}' needs the environment variable {name}, which is not set",
                hint=f"export {name}=<folder>",
            )
    reader = readers.get(job.simulation.reader, "simulation.reader")
    if reader.needs_root and not root:
        raise ConfigError(
            f"simulation.root is not set, and the reader '{job.simulation.reader}' needs a folder",
            hint="A relative one starts at the job file",
        )
    wanted = Wanted.by(job, skip_bad=skip_bad, values=job.simulation.values)
    return read(job.simulation.reader, base / os.path.expandvars(root), wanted)


def compare(
    job: Job,
    sites: SitePopulation,
    *,
    paradigms: Sequence[tuple[Place, Time]] = OFFLINE,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    folder: Path | None = None,
    processes: int = 1,
    command: str = "",
    title: str = "",
    demo: bool = False,
    listen: Listen | None = None,
) -> Comparison:
    """Run every cell with every seed. A cell that fails is reported as failed, the others go on.

    Args:
        job: place, time, seed and continual method of it are replaced by the cells'.
        sites: the one split that all cells share.
        paradigms: (place, time) of each cell.
        methods: continual methods, each a cell of its own at every place; by default the job's.
        seeds: of initialisation and order.
        folder: receives one sub-folder for each run, in which a finished one is found again; None keeps nothing.
        processes: how many runs are carried out side by side; more than one need a folder.
        command: how to repeat it, for the report.
        title: of the report.
        demo: whether the report says that it is a demonstration.
        listen: hears every event.
    """
    job = settled(job, sites.names)
    planned, benches = plan(job, len(sites.names), paradigms, seeds, methods), Benches()
    ahead = None
    if processes > 1 and folder:
        ahead = side_by_side([run for runs in planned for run in runs], sites, folder, processes, listen)
    cells, failures, drawn, said = [], [], [], []
    for runs in planned:
        results: list[Result] = []
        error: FedzooError | None = None
        for run in runs:
            try:
                found = next(ahead) if ahead else run.carry_out(sites, benches, folder, listen)
                if isinstance(found, FedzooError):
                    raise found
                if error is None:
                    results.append(_with_figures(found, job))
            except FedzooError as problem:
                error = error or problem
                if ahead is None:
                    break
        if error is not None:
            failures.append(error)
        cells.append(_cell(runs[0], results, None if error is None else str(error), len(sites.names)))
        if results and error is None:
            shown = (runs[0].job.steps[-1], sites, results[0], cells[-1].name)
            drawn += pictures(*shown)
            said += quotes(*shown)
    if len(failures) == len(cells):
        raise failures[0]
    return Comparison(
        **_facts(job, sites),
        title=title or f"{job.name}: paradigms compared",
        command=command,
        fingerprint=build_model(job.steps[-1])[1].fingerprint,
        demo=demo,
        seeds=list(seeds),
        cells=cells,
        pictures=with_truth(job.steps[-1], sites, drawn),
        quotes=said,
    )


def run_one(job: Job, sites: SitePopulation, folder: Path, command: str, listen: Listen | None = None) -> Comparison:
    """One job as it stands, its traces in `folder` itself: the comparison of a single cell with itself."""
    job = settled(job, sites.names)
    alone = job if job.place == "federated" else variant(job, job.place, job.time, job.seed)
    run = Run(with_memory(alone, len(sites.names)))
    listener = (lambda event: listen(run.cell, job.seed, event)) if listen else None
    setting = Setting(run.job, sites, Benches(), run=folder.name, folder=folder, listener=listener)
    result = _with_figures(places[job.place](setting), job)
    cell = _cell(run, [result], None, len(sites.names))
    return Comparison(
        **_facts(job, sites),
        title=job.name,
        command=command,
        fingerprint=result.fingerprint,
        seeds=[job.seed],
        cells=[cell],
        pictures=with_truth(job.steps[-1], sites, pictures(alone.steps[-1], sites, result, cell.name)),
        quotes=quotes(alone.steps[-1], sites, result, cell.name),
    )


def _facts(job: Job, sites: SitePopulation) -> dict[str, Any]:
    """What a comparison says of its job, its data and this machine."""
    task = make_task(job.steps[-1])
    return {
        **provenance(job),
        "partition": partition_of(job, sites),
        "metric": task.headline,
        "metrics": list(task.metrics),
        "measures": measures_of(task),
        "sites": list(sites.names),
        "labels": list(job.steps[-1].task.labels),
        "colours": colours(job.steps[-1]),
    }


def load_sites(job: Job, base: Path, skip_bad: int = 0) -> SitePopulation:
    """The simulated sites of a job, once it is known that they and its model can be used.

    Raises:
        ConfigError: the model cannot take the job's images, or as `make_sites`.
        DataError: as `make_sites`.
    """
    for step in job.steps:
        build_model(step)
    return make_sites(job, base, skip_bad)


def make_sites(job: Job, base: Path, skip_bad: int = 0) -> SitePopulation:
    """The simulated sites of a job, whatever its model.

    Raises:
        ConfigError: as `read_pool`, `make_partition` and `settled`.
        DataError: the data cannot be read, or a site would have no example for one of the three parts.
    """
    partitions.get(job.simulation.partition, "simulation.partition")  # before anything is read
    *before, last = job.steps
    store = read_pool(last, base, skip_bad)
    partition = make_partition(store, job.simulation)
    test = job.simulation.test
    earlier = []
    for step in before:
        own = read_pool(step, base, skip_bad)
        same = same_sites(partition, store, own)
        earlier.append(SitePopulation(same.seen(own, make_task(step).target), same, test=test))
    settled(last, list(partition.rows))
    sites = SitePopulation(partition.seen(store, make_task(last).target), partition, earlier, test)
    for population in (*earlier, sites):
        for name in population.names:
            population.splits(name)
    return sites


def require_enough(job: Job, sites: SitePopulation) -> None:
    """Raise a ConfigError where the federation has fewer sites than `federation.min_sites`: it would never start."""
    need = max(step.federation.min_sites for step in job.steps)
    if len(sites.names) < need:
        raise ConfigError(
            f"federation.min_sites = {need}, but the simulation has {len(sites.names)} sites",
            hint="Lower federation.min_sites or raise simulation.sites",
        )


def provenance(job: Job) -> dict[str, Any]:
    """When, by what, of which job and where: the part of a result's facts that is the same for every kind."""
    return {
        "created": datetime.now(UTC).replace(microsecond=0),
        "version": product_version(),
        "job": job.model_dump(mode="json"),
        "job_hash": job.hash,
        "environment": environment(),
    }


def product_version() -> str:
    """Of the installed distribution."""
    try:
        return version("fedzoo")
    except PackageNotFoundError:
        return "not installed"


def environment() -> dict[str, str]:
    """What the figures were measured on."""
    cuda = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "cpu": _cpu_name(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def _cell(run: Run, results: Sequence[Result], error: str | None, sites: int) -> Cell:
    which: dict[str, Any] = {"place": run.job.place, "time": run.job.time, "method": run.method}
    if error is not None:
        return Cell(**which, error=error)
    kept = run.job.continual.keys.get("buffer", 0) if run.method else 0
    first = results[0]
    totals: Totals = first.totals
    counted = {k: v for k, v in asdict(totals).items() if k in Budget.model_fields}
    matrices = [[list(row) for row in r.matrix] for r in results if r.matrix]
    return Cell(
        **which,
        buffer=kept * (1 if run.job.place == "centralized" else sites),
        all_sites=[r.all_sites for r in results],
        own_site=[r.own_site for r in results],
        per_site={site: [r.per_site[site] for r in results] for site in first.per_site},
        per_site_all={site: [r.per_site_all[site] for r in results] for site in first.per_site_all},
        metrics={name: [_number(r.metrics[name]) for r in results] for name in first.metrics if name != "examples"},
        curves=[[_plain(row) for row in r.curve] for r in results],
        matrix=matrices or None,
        known=[[list(row) for row in r.known] for r in results if r.known] or None,
        untrained=[list(r.untrained) for r in results if r.untrained] or None,
        budget=Budget(**counted),
        seconds=[r.totals.seconds for r in results],
        rejections=sum(r.totals.rejections for r in results),
        privacy=Guarantee.of(first.privacy) if first.privacy else None,
        left=left_sites(run.job, totals.bytes_up - totals.bytes_metrics),
    )


def _with_figures(result: Result, job: Job) -> Result:
    """The same; raises a RunError where the headline is no finite number on some test, for nothing can be compared."""
    measured = [("all sites", result.all_sites), *result.per_site.items(), *result.per_site_all.items()]
    measured += [(f"task {i}", value) for row in result.matrix or () for i, value in enumerate(row)]
    if wrong := dict.fromkeys(name for name, value in measured if not math.isfinite(value)):
        headline = make_task(job.steps[-1]).headline
        raise RunError(
            f"the headline '{headline}' is no finite number on the tests of {', '.join(wrong)}",
            hint="Name another metric in task.headline, or give every site's test what it needs",
        )
    return result


def _plain(row: Mapping[str, float]) -> dict[str, float | None]:
    return {k: _number(v) for k, v in row.items()}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def partition_of(job: Job, sites: SitePopulation) -> Partition:
    """How a job's examples lie at its sites, with the names of its labels."""
    labels = job.steps[-1].task.labels or ("all",)
    counts = {
        site: {part: {labels[c]: n for c, n in found.items()} for part, found in parts.items()}
        for site, parts in sites.counts(len(labels)).items()
    }
    return Partition(
        kind=sites.partition.kind,
        hash=sites.partition.hash,
        sites=counts,
        sizes=sites.sizes(),
        counted=COUNTED.get(make_task(job.steps[-1]).target, "examples"),
    )
