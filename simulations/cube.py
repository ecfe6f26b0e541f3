"""Labels as a dial beside place and time: several jobs on the same sites, each compared over all paradigms.

| labels            | what is learned from              | e.g.                                          |
|-------------------|-----------------------------------|-----------------------------------------------|
| `supervised`      | labels that were given            | classification                                |
| `self-supervised` | answers made from the examples    | rotation, masked tokens; then a probe         |
| `unsupervised`    | none                              | autoencoder, clusters                         |

Jobs whose headline is the same metric of the same labels are held against the first of them; others stand side by side.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator
from rich.table import Table
from rich.text import Text

from shared_models.errors import ConfigError, RunError
from shared_models.job import Job
from shared_models.tasks.base import Supervision, tasks
from simulations import pages
from simulations.partition import SitePopulation
from simulations.report import overview
from simulations.results import Cell, Comparison, Document, Place, paradigm_name
from simulations.results import write as write_document
from simulations.tables import NOTHING, guarantees, spread
from simulations.verdicts import together, verdicts

FILES = ("cube.json", "report.html", "job.sha256")  # in the folder of a cube
PLACES: tuple[Place, ...] = ("centralized", "federated", "isolated")


class Entry(Document):
    """One job of a cube, with its comparison of paradigms.

    Attributes:
        labels: what it learns from.
        at_once: its stages that see all examples at once in a continual run too.
    """

    name: str
    labels: Supervision
    at_once: list[str] = []
    comparison: Comparison

    @staticmethod
    def of(job: Job, comparison: Comparison) -> Entry:
        """A job with what its comparison found; what it learns from says its first stage: a probe only measures."""
        whole = [s.name for s, step in zip(job.stages, job.steps, strict=False) if step.stream.tasks == 1]
        first = tasks[job.steps[0].task.name]
        return Entry(name=job.name, labels=first.supervision, at_once=whole, comparison=comparison)


class Cube(Document):
    """Jobs on the same sites, all it takes to repeat them, and what they reached."""

    title: str
    created: datetime
    version: str
    command: str
    entries: list[Entry] = Field(min_length=2)

    @model_validator(mode="after")
    def _on_the_same_sites(self) -> Cube:
        first = self.entries[0].comparison
        for entry in self.entries[1:]:
            if (entry.comparison.sites, entry.comparison.seeds) != (first.sites, first.seeds):
                raise ValueError(f"'{entry.name}' has other sites or seeds than '{self.entries[0].name}'")
        return self


def require_same_sites(jobs: Mapping[str, tuple[SitePopulation, Path]]) -> None:
    """Raise a ConfigError where two of the jobs do not have the very same examples at the same sites.

    Args:
        jobs: name -> its sites, and the file or folder that its data are read from.
    """
    (first, (sites, source)), *others = jobs.items()
    held = _held(sites)
    for name, (found, path) in others:
        if (_held(found), found.test, path) != (held, sites.test, source):
            raise ConfigError(
                f"'{name}' has other examples, or has them at other sites, than '{first}', and nothing could be "
                "compared",
                hint="Give both the same [simulation]; `fedzoo partition show` tells the hash of a split",
            )


def _held(sites: SitePopulation) -> dict[str, list[str]]:
    """The names of each site's examples."""
    return {site: sorted(sites.store.names[i] for i in rows) for site, rows in sites.partition.rows.items()}


def table(cube: Cube) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the headline on all sites' tests by job, time and place, mean and sd over seeds."""
    head = ["job", "time", *PLACES, "labels", "metric", "samples"]
    rows = []
    for entry in cube.entries:
        c = entry.comparison
        for time, method in dict.fromkeys((cell.time, cell.method) for cell in c.cells):
            cells = {cell.place: cell for cell in c.cells if (cell.time, cell.method) == (time, method)}
            samples = {cell.budget.samples for cell in cells.values() if cell.error is None}
            name = paradigm_name("", time, method).removeprefix(", ")
            if time == "continual" and entry.at_once:
                name += f"; {', '.join(entry.at_once)} at once"
            reached = [_reached(c, cells.get(place)) for place in PLACES]
            shown = " to ".join(f"{count:,}" for count in sorted({min(samples), max(samples)})) if samples else NOTHING
            rows.append([entry.name, name, *reached, entry.labels, c.headline.title(c.metric), shown])
    return head, rows


def says(cube: Cube) -> list[str]:
    """What may be said of jobs that measure the same, each against the first of them; no more than intervals do."""
    said = []
    for i, entry in enumerate(cube.entries):
        first = next(e for e in cube.entries[: i + 1] if _same_measure(e.comparison, entry.comparison))
        if first is entry:
            continue
        a, b = entry.comparison, first.comparison
        for time in dict.fromkeys(cell.time for cell in a.cells):
            own = len(a.methods) == len(b.methods) == 1  # each with its own continual method
            pairs = []
            for cell in a.cells:
                other = b.cell(cell.place, time, None if own else cell.method)
                if cell.time == time and cell.error is None and other:
                    pairs.append((_pair_name(cell, other), cell, other))
            whole = [f"{', '.join(e.at_once)} of {e.name} at once" for e in (entry, first) if e.at_once]
            aside = f" ({'; '.join(whole)})" if time == "continual" and whole else ""
            said += together(a, f"{time.capitalize()}, {entry.name} against {first.name}{aside}", pairs)
    return said


def for_terminal(cube: Cube, width: int = 120) -> list[Table]:
    """The table for a terminal; below 120 columns what was reached and how apart."""
    head, rows = table(cube)
    cuts = [range(len(head))] if width >= 120 else [(0, 1, 2, 3, 4), (0, 1, 5, 6, 7)]
    found = []
    for number, columns in enumerate(cuts):
        shown = Table(title=None if number else Text(cube.title), title_justify="left")
        for i in columns:
            shown.add_column(Text(head[i]), justify="right" if head[i] in (*PLACES, "samples") else "left")
        for row in rows:
            shown.add_row(*(Text(row[i]) for i in columns))
        found.append(shown)
    return found


def write(cube: Cube, path: Path) -> Path:
    """Write the page and return its path; raises RunError where that cannot be."""
    jobs = [
        {
            "name": entry.name,
            "labels": entry.labels,
            "verdicts": [sentence.split(": ", 1) for sentence in verdicts(entry.comparison)],
            "privacy": guarantees(entry.comparison),
            "overview": overview(entry.comparison, f"job{i}-"),
            "metric": entry.comparison.metric,
            "hash": entry.comparison.job_hash,
        }
        for i, entry in enumerate(cube.entries)
    ]
    first = cube.entries[0].comparison
    view: dict[str, Any] = {
        "cube": cube,
        "created": f"{cube.created:%Y-%m-%d %H:%M %Z}".strip(),
        "verdicts": [sentence.split(": ", 1) for sentence in says(cube)],
        "table": table(cube),
        "jobs": jobs,
        "first": first,
        "pooled": any(cell.place == "centralized" for entry in cube.entries for cell in entry.comparison.cells),
    }
    return pages.write("cube.html.j2", view, path, "the report")


def save(cube: Cube, path: Path) -> Path:
    """Write `cube.json` and return its path; raises RunError where that cannot be."""
    return write_document(cube, path, "the comparison of jobs")


def load(path: Path) -> Cube:
    """Read `cube.json`; raises RunError where it is not there or lacks something."""
    try:
        return Cube.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}", hint="Run `fedzoo compare` first") from None
    except (ValueError, ValidationError) as error:
        raise RunError(f"{path} cannot be used: {error}") from None


def _reached(c: Comparison, cell: Cell | None) -> str:
    if cell is None:
        return NOTHING
    return spread(cell.all_sites, c.headline) if cell.error is None else "failed"


def _pair_name(cell: Cell, other: Cell) -> str:
    methods = dict.fromkeys(one.method for one in (cell, other) if one.method)
    plain = list(methods) in ([], ["finetune"])
    return cell.place if plain else f"{cell.place} ({' against '.join(methods)})"


def _same_measure(a: Comparison, b: Comparison) -> bool:
    return (a.metric, a.labels, a.headline, _measured(a)) == (b.metric, b.labels, b.headline, _measured(b))


def _measured(c: Comparison) -> dict[str, Any]:
    """The task that is measured, the last stage's, without what concerns its training and its data alone."""
    stages = c.job.get("stages") or [{}]
    task = {**(stages[-1].get("task") or c.job.get("task", {}))}
    return {key: value for key, value in task.items() if key not in ("aliases", "class_weights", "label_smoothing")}


def names(jobs: Sequence[Job]) -> list[str]:
    """The jobs' names, which their folders get; raises a ConfigError where one cannot be, or two are the same."""
    found = [job.name for job in jobs]
    if taken := next((name for name in found if len(jobs) > 1 and name in FILES), ""):
        raise ConfigError(f"a job is called '{taken}', as a file of the comparison is", hint="Give it another name")
    if twice := next((name for name in found if found.count(name) > 1), ""):
        raise ConfigError(f"two of the jobs are called '{twice}'", hint="Give one of them another name")
    return found
