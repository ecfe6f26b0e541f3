"""What a comparison leaves behind (`comparison.json`): the contract between running it and reporting it.

Metrics are as the task gives them; `Comparison.measures` says how they are shown and whether a larger one is better. A
list "one a seed" follows the order of `Comparison.seeds`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from shared_models.errors import RunError
from shared_models.job import Job
from simulations.leaving import left_sites
from simulations.measures import PERCENT, Measure, measures_of

Place = Literal["centralized", "isolated", "federated"]
Time = Literal["offline", "continual"]
PerSeed = list[FiniteFloat]


class Document(BaseModel):
    """One table of a result."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Partition(Document):
    """How the examples lie at the sites; parts: train, validation, test.

    Attributes:
        sites: site -> part -> label -> how many of what `counted` says.
        sizes: site -> part -> examples.
        counted: e.g. `examples`, `boxes`, or `images that show it`.
    """

    kind: str
    hash: str = ""
    sites: dict[str, dict[str, dict[str, int]]] = {}
    sizes: dict[str, dict[str, int]] = {}
    counted: str = "examples"


class Budget(Document):
    """What one run of a cell consumed, summed over sites; `sequential_steps`: the longest chain of dependent steps."""

    rounds: int = 0
    samples: int = 0
    sequential_steps: int = 0
    optimizer_resets: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


class Picture(Document):
    """Test images of the simulation beside their truth and what a paradigm's model says of them.

    Attributes:
        paradigm: name of the cell, `truth` for the annotation.
        images: PNG files, base64, one for each of the test images, the same ones in every picture.
    """

    paradigm: str
    images: list[str]


class Quote(Document):
    """A test text of the simulation, what should be written for it, and what a paradigm's model writes."""

    paradigm: str
    given: str
    wanted: str
    said: str


class Guarantee(Document):
    """What a paradigm's run has spent of differential privacy, with all that gives its epsilon a meaning.

    Attributes:
        unit: whose presence is hidden, `sample` or `client`.
        neighbours: how two data sets differ that cannot be told apart.
        epsilon: site -> at `delta`, after the whole run; None where there is no guarantee.
        statement: the largest of them, in words.
    """

    unit: str
    neighbours: str
    delta: float
    accountant: str
    mechanism: str
    epsilon: dict[str, float | None]
    statement: str

    @classmethod
    def of(cls, spent: Mapping[str, Any]) -> Guarantee:
        """From what the server says."""
        found = {site: None if e is None or not math.isfinite(e) else e for site, e in spent["epsilon"].items()}
        return cls(**{**spent, "epsilon": found})

    @property
    def largest(self) -> float | None:
        """That of the site that spent most."""
        values = [e for e in self.epsilon.values() if e is not None]
        return max(values) if values and len(values) == len(self.epsilon) else None


def paradigm_name(place: str, time: str, method: str = "") -> str:
    """In words, e.g. `federated, offline` or `federated, continual (der++)`; plain fine-tuning is not named."""
    return f"{place}, {time}" + (f" ({method})" if time == "continual" and method not in ("", "finetune") else "")


class Cell(Document):
    """One paradigm (place x time, and the continual method) over all seeds.

    Attributes:
        error: why the cell failed; its figures are then ignored.
        all_sites: the metric over the tests of all sites together; isolated: the mean over the sites' models.
        own_site: the mean over sites of the metric on each site's own test.
        per_site: site -> the metric on its own test, one a seed.
        per_site_all: site -> the metric of that site's model on the tests of all sites, one a seed.
        metrics: every metric of the task on all sites' tests, one a seed; None where it is not defined.
        curves: one list a seed of `{"round", "loss", <metric>}`, measured on validation data.
        method: the continual method, where the cell is continual.
        buffer: examples that all sites together keep of the past; 0 where the method keeps none.
        matrix: one a seed: `R[t][i]`, the metric on task i after task t, T x T; None where there is one task.
        known: the same where the model is told the task (task-incremental); None where a task is no set of classes.
        untrained: one a seed: the metric on each task before any training; None where there is one task.
        budget: the same for every seed.
        seconds: wall-clock time, one a seed.
        rejections: contributions refused, summed over seeds.
        privacy: of each single run; None without privacy.
        left: what others got to hold of the sites' examples, or made of them, in words.
    """

    place: Place
    time: Time
    method: str = ""
    buffer: int = 0
    error: str | None = None
    all_sites: PerSeed = []
    own_site: PerSeed = []
    per_site: dict[str, PerSeed] = {}
    per_site_all: dict[str, PerSeed] = {}
    metrics: dict[str, list[float | None]] = {}
    curves: list[list[dict[str, float | None]]] = []
    matrix: list[list[list[FiniteFloat]]] | None = None
    known: list[list[list[FiniteFloat]]] | None = None
    untrained: list[list[FiniteFloat]] | None = None
    budget: Budget = Budget()
    seconds: list[float] = []
    rejections: int = 0
    privacy: Guarantee | None = None
    left: str = ""

    @property
    def name(self) -> str:
        """The paradigm in words, e.g. `federated, offline` or `federated, continual (der++)`."""
        return paradigm_name(self.place, self.time, self.method)


class Facts(Document):
    """Where figures come from, and all it takes to make them again."""

    title: str
    created: datetime
    version: str
    command: str
    job: dict[str, Any]
    job_hash: str
    environment: dict[str, str]


class Comparison(Facts):
    """Cells that share job, seeds, sites and labels, and all it takes to repeat them.

    Attributes:
        metric: the headline.
        measures: metric -> how it is shown; one that is missing is a percentage of which a larger one is better.
        colours: those of the labels in the pictures, `#rrggbb`; empty for a label that is not coloured.
    """

    fingerprint: str
    demo: bool = False
    partition: Partition
    seeds: list[int] = Field(min_length=1)
    metric: str = "accuracy"
    metrics: list[str] = []
    measures: dict[str, Measure] = {}
    pictures: list[Picture] = []
    quotes: list[Quote] = []
    colours: dict[str, str] = {}
    sites: list[str]
    labels: list[str]
    cells: list[Cell]

    @model_validator(mode="after")
    def _one_value_a_seed(self) -> Comparison:
        names = [cell.name for cell in self.cells]
        if len(set(names)) < len(names):
            raise ValueError(f"a paradigm appears twice among {names}")
        for cell in self.cells:
            if cell.error is not None:
                continue
            if cell.per_site.keys() != set(self.sites):
                raise ValueError(f"{cell.name}: per_site has {sorted(cell.per_site)}, the sites are {self.sites}")
            series = {"all_sites": cell.all_sites, "own_site": cell.own_site}
            series |= {f"per_site '{site}'": values for site, values in cell.per_site.items()}
            series |= {f"per_site_all '{site}'": values for site, values in cell.per_site_all.items()}
            for what, values in series.items():
                if len(values) != len(self.seeds):
                    raise ValueError(f"{cell.name}: {what} has {len(values)} values for {len(self.seeds)} seeds")
            matrices = cell.matrix or []
            if cell.matrix is not None and len(matrices) != len(self.seeds):
                raise ValueError(f"{cell.name}: {len(matrices)} matrices for {len(self.seeds)} seeds")
            if any(len(row) != len(m) for m in matrices for row in m) or len({len(m) for m in matrices}) > 1:
                raise ValueError(f"{cell.name}: every matrix must be T x T with the same T")
        return self

    def measure(self, metric: str) -> Measure:
        """How a metric is shown; `dice:membrane` as `dice`."""
        return self.measures.get(metric.partition(":")[0], PERCENT)

    @property
    def headline(self) -> Measure:
        """How the headline is shown."""
        return self.measure(self.metric)

    def cell(self, place: Place, time: Time, method: str | None = None) -> Cell | None:
        """The first cell of that paradigm (with that continual method), or None where it was not run or failed."""
        found = (c for c in self.cells if (c.place, c.time) == (place, time) and method in (None, c.method))
        return next((c for c in found if c.error is None), None)

    @property
    def methods(self) -> list[str]:
        """The continual methods of its cells, in order."""
        return list(dict.fromkeys(c.method for c in self.cells if c.time == "continual"))


def parse(raw: Comparison | Mapping[str, Any], where: str = "the comparison") -> Comparison:
    """Check a dict as it stands in `comparison.json`; a `Comparison` is returned as it is.

    Raises:
        RunError: a value is missing or cannot be; the message names the first one.
    """
    if isinstance(raw, Comparison):
        return raw
    try:
        return Comparison.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RunError(f"{where} cannot be used: {place + ': ' if place else ''}{first['msg']}") from None


def save(comparison: Comparison | Mapping[str, Any], path: Path) -> Path:
    """Write `comparison.json` and return its path.

    Raises:
        RunError: a value is missing or cannot be, or the file cannot be written.
    """
    return write(parse(comparison), path, "the comparison")


def write(document: Document, path: Path, what: str) -> Path:
    """Write it as JSON and return the path.

    Raises:
        RunError: the file cannot be written; `what` says what it is.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document.model_dump_json() + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{what} cannot be written to {path}: {error.strerror}") from None
    return path


def load(path: Path) -> Comparison:
    """Read `comparison.json`.

    Raises:
        RunError: it is not there, is no JSON, or lacks something.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}", hint="Run `fedzoo compare` first") from None
    except ValueError as error:
        raise RunError(f"{path} is not JSON: {error}") from None
    return parse(raw, where=str(path))


def of_run(folder: Path) -> Comparison:
    """The one-cell comparison of a run that real nodes made, from its job, result and status.

    Raises:
        RunError: the folder is not a finished run's.
    """
    import tomllib

    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        text = (folder / "job.toml").read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"{folder} holds neither a comparison nor a finished run: {error.strerror} ({error.filename})",
            hint="See: fedzoo run list",
        ) from None
    job = Job.resolve(tomllib.loads(text), where=str(folder / "job.toml"))
    try:
        return _of_result(result, job, folder)
    except (ValidationError, KeyError, TypeError, ZeroDivisionError) as error:
        raise RunError(f"{folder / 'result.json'} has no figures that a report could show: {error}") from None


def _of_result(result: Mapping[str, Any], job: Job, folder: Path) -> Comparison:
    from shared_models.tasks.base import make_task

    task = make_task(job.steps[-1])
    headline = task.headline
    per_site = {site: values[headline] for site, values in result["per_site"].items()}
    totals = result["totals"]
    everywhere = result["all_sites"][headline]
    cell = Cell(
        place="federated",
        time=job.time,
        all_sites=[everywhere],
        own_site=[sum(per_site.values()) / len(per_site)],
        per_site={site: [value] for site, value in per_site.items()},
        per_site_all={site: [everywhere] for site in per_site},
        metrics={name: [result["all_sites"].get(name)] for name in task.metrics},
        curves=[result["curve"]],
        method=job.continual.name if job.time == "continual" else "",
        buffer=job.continual.keys.get("buffer", 0) * len(per_site) if job.time == "continual" else 0,
        matrix=[result["matrix"]] if result["matrix"] else None,
        known=[result["known"]] if result.get("known") else None,
        untrained=[result["untrained"]] if result.get("untrained") else None,
        budget=Budget(**{k: v for k, v in totals.items() if k in Budget.model_fields}),
        seconds=[totals["seconds"]],
        rejections=totals["rejections"],
        privacy=Guarantee.of(result["privacy"]) if result.get("privacy") else None,
        left=left_sites(job, totals["bytes_up"] - totals.get("bytes_metrics", 0)),
    )
    return Comparison(
        title=f"{folder.name}: a federation of {len(per_site)} sites",
        created=datetime.fromtimestamp((folder / "result.json").stat().st_mtime).astimezone().replace(microsecond=0),
        version=result.get("version", ""),
        command=f"fedzoo run submit {folder / 'job.toml'}",
        job=job.model_dump(mode="json"),
        job_hash=job.hash,
        fingerprint=result["fingerprint"],
        partition=Partition(kind="real sites: what each of them holds stays there"),
        environment={},
        seeds=[job.seed],
        metric=headline,
        metrics=list(task.metrics),
        measures=measures_of(task),
        sites=sorted(per_site),
        labels=list(job.steps[-1].task.labels),
        cells=[cell],
    )
