"""A job: what is trained, how, and for how long. Never where private data lies.

One TOML file runs in the simulator and on real nodes; only `[simulation]` is read by the simulator alone. A job is
*resolved* when it is loaded: every setting of the chosen model, task and method stands in it, and its hash covers all
of them except `[simulation]`. That hash is what a site approves.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared_models.errors import ConfigError, FedzooError
from shared_models.files import read_toml
from shared_models.job_parts import (
    AugmentPart,
    Choice,
    DataPart,
    FederationPart,
    LoraPart,
    Part,
    Place,
    PrivacyPart,
    SharePart,
    TaskPart,
    Time,
    TrainPart,
    WeightsPart,
)
from shared_models.simulation_part import SimulationPart
from shared_models.stream_part import StreamPart
from shared_models.validation import validate

STAGED = ("model", "task", "data", "method", "share", "lora", "train", "augment", "federation", "stream")


class Stage(BaseModel):
    """`[[stages]]`: one of several trainings that follow one another, each from the weights of the one before.

    Beside its name a stage has tables of the job (`[stages.task]`, ...) that say what is different in it. Entries of
    the model whose names and shapes are those of the stage before are carried over; the head is not, where the task
    is another. In a continual job each stage is a stream of its own, or, with `[stages.stream] tasks = 1`, sees all
    examples at once.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$")

    @property
    def changes(self) -> dict[str, dict[str, Any]]:
        """Table -> its keys."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _known_tables(self) -> Stage:
        for table, keys in self.changes.items():
            if table not in STAGED:
                raise ValueError(f"a stage cannot change '{table}'; it can change {', '.join(STAGED)}")
            if not isinstance(keys, dict):
                raise ValueError(f"'{table}' should be a table")
        return self


class Job(Part):
    """A whole job. Load one with `Job.load`, which also resolves it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    seed: int = 0
    place: Place = "federated"
    time: Time = "offline"
    model: Choice
    task: TaskPart
    data: DataPart
    method: Choice = Choice(name="fedavg")
    continual: Choice = Choice(name="finetune")
    weights: WeightsPart = WeightsPart()
    share: SharePart = SharePart()
    lora: LoraPart = LoraPart()
    train: TrainPart = TrainPart()
    augment: AugmentPart = AugmentPart()
    privacy: PrivacyPart = PrivacyPart()
    federation: FederationPart = FederationPart()
    stream: StreamPart = StreamPart()
    stages: tuple[Stage, ...] = ()
    simulation: SimulationPart = SimulationPart()

    @staticmethod
    def load(path: Path, overrides: Sequence[str] = ()) -> Job:
        """Read, override and resolve a job file.

        Args:
            path: a TOML file.
            overrides: `table.key=value` each, the value as in TOML (a bare word is a string).

        Raises:
            ConfigError: the file is missing or broken (line), a key is unknown (nearest), a value or pair cannot be.
        """
        data = read_toml(path)
        for override in overrides:
            _override(data, override)
        _take_in_tokenizer(data, path.parent)
        return Job.resolve(data, where=str(path))

    @staticmethod
    def resolve(data: dict[str, Any], where: str = "job") -> Job:
        """Validate plain data and fill in every default of the chosen model and methods; raises as `load`."""
        from shared_models.compat import require_compatible
        from shared_models.methods.base import methods
        from shared_models.models import configure
        from shared_models.tasks.base import require_headline, tasks
        from shared_models.tokens import make_tokenizer

        job = validate(Job, data, where)
        if job.data.tokenizer:
            make_tokenizer(job.data.tokenizer)
        _, model = configure(job.model.name, job.model.keys, f"{where}: [model]")
        filled: dict[str, Any] = {"model": {"name": job.model.name, **model.model_dump()}}
        keys = {"labels": job.task.labels, **job.task.keys}
        task = validate(tasks.get(job.task.name, f"{where}: [task]").Settings, keys, f"{where}: [task]")
        filled["task"] = {"name": job.task.name, **task.model_dump()}
        require_headline(job, f"{where}: [task]")
        for part, choice in (("method", job.method), ("continual", job.continual)):
            place = f"{where}: [{part}]"
            settings = validate(methods.get(choice.name, place).Settings, choice.keys, place)
            filled[part] = {"name": choice.name, **settings.model_dump()}
        job = validate(Job, {**job.model_dump(), **filled}, where)
        require_compatible(job)
        return job._with_stages(where) if job.stages else job

    def _with_stages(self, where: str) -> Job:
        """The same with every default of its stages filled in, and with the job of each."""
        twice = next((s.name for i, s in enumerate(self.stages) if s.name in [t.name for t in self.stages[:i]]), "")
        if twice:
            raise ConfigError(f"{where}: two stages are called '{twice}'", hint="Rename one")
        steps, full = [], []
        for stage in self.stages:
            own = {} if stage is self.stages[-1] else {"simulation": {"partition": "iid"}}  # the last one's is taken
            try:
                step = self.replace(stages=[], **stage.changes, **own)
            except FedzooError as error:
                raise ConfigError(f"{where}: stage '{stage.name}': {error.what}", hint=error.hint) from None
            written = step.model_dump(mode="json", exclude_none=True)
            full.append({"name": stage.name, **{table: written[table] for table in stage.changes}})
            steps.append(step)
        _require_chain(steps, self.stages, where)
        whole = validate(Job, {**self.model_dump(), "stages": full}, where)
        for index, step in enumerate(steps):
            step.__dict__.update(whole=whole, stage=index)
        whole.__dict__["steps"] = tuple(steps)
        return whole

    @cached_property
    def steps(self) -> tuple[Job, ...]:
        """The jobs that are carried out one after another: of its stages, or itself."""
        return (self,)

    @cached_property
    def whole(self) -> Job:
        """The job that this is a stage of, or itself: what is sent, hashed and approved."""
        return self

    @cached_property
    def stage(self) -> int:
        """Which stage of the whole job this is."""
        return 0

    def replace(self, **changes: Any) -> Job:
        """A resolved copy; `part={"key": value}` changes keys of that part, `key=value` a top-level key.

        A change that names another model, size of the model or method replaces that part whole: its old settings mean
        nothing there.
        """
        data = self.model_dump()
        for name, change in changes.items():
            if isinstance(change, dict):
                before = data.get(name, {})
                kind = ("name", "size") if name == "model" else ("name",)
                other = any(k in change and change[k] != before.get(k) for k in kind)
                change = {**({"name": before.get("name")} if other else before), **change}
            data[name] = change
        return Job.resolve(data)

    @cached_property
    def canonical(self) -> str:
        """Canonical JSON of everything but `[simulation]`: what is sent, hashed and approved."""
        return json.dumps(self.model_dump(mode="json", exclude={"simulation"}), sort_keys=True, separators=(",", ":"))

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON, 64 hex digits."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()

    @property
    def tasks(self) -> tuple[tuple[int, ...], ...]:
        """The class indices of each task of the stream: one task with all of them when offline."""
        classes = tuple(range(len(self.task.labels)))
        count = self.stream.tasks if self.time == "continual" else 1
        if self.stream.kind != "classes":
            return (classes,) * count
        edges = [round(t * len(classes) / count) for t in range(count + 1)]
        return tuple(classes[a:b] for a, b in pairwise(edges))

    @property
    def cuts_labels(self) -> bool:
        """Whether its tasks are sets of classes."""
        return self.stream.kind == "classes" and len(self.tasks) > 1

    def to_toml(self) -> str:
        """The resolved job as a TOML file that loads to the same job."""
        import tomli_w

        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def _require_chain(steps: Sequence[Job], stages: Sequence[Stage], where: str) -> None:
    """Raise a ConfigError where a later stage would lose what an earlier one has."""
    for step, stage in zip(steps, stages, strict=True):
        if step.share.personal:
            raise ConfigError(
                f"{where}: stage '{stage.name}' has personal entries, and what a site keeps for itself is not carried "
                "from stage to stage",
                hint="Leave share.personal out",
            )
        if step.data.normalise_by == "sites":
            raise ConfigError(
                f"{where}: stage '{stage.name}' measures mean and deviation anew, and a later stage would see other "
                "numbers than the one before was trained on",
                hint="Give data.mean and data.std",
            )
    for (a, first), (b, second) in pairwise(zip(steps, stages, strict=True)):
        if a.lora.rank and a.lora.model_copy(update={"train": b.lora.train}) != b.lora:
            raise ConfigError(
                f"{where}: stage '{second.name}' has not the adapters of stage '{first.name}', and what these learned "
                "would be lost",
                hint="Give both the same [lora]",
            )


def _take_in_tokenizer(data: dict[str, Any], folder: Path) -> None:
    """Replace the name of a tokenizer file by its content, which is then hashed, approved and sent with the job."""
    stages = data.get("stages")
    for stage in stages if isinstance(stages, list) else ():
        if isinstance(stage, dict):
            _take_in_tokenizer(stage, folder)
    part = data.get("data")
    if not isinstance(part, dict):
        return
    name = part.get("tokenizer")
    if not isinstance(name, str) or not name.endswith(".json"):
        return
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"data.tokenizer: {folder / name} cannot be read: {error}", hint="Name a tokenizer.json beside the job file"
        ) from None
    data["data"] = {**part, "tokenizer": json.dumps(content, ensure_ascii=False, separators=(",", ":"))}


def _override(data: dict[str, Any], override: str) -> None:
    path, found, text = override.partition("=")
    keys = path.strip().split(".")
    if not found or not all(keys):
        raise ConfigError(f"--set {override!r} is not of the form table.key=value", hint="E.g. --set train.lr=0.1")
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except ValueError:  # not TOML, or an integer of more digits than Python reads
        value = text.strip()
    table = data
    for name in keys[:-1]:
        if isinstance(table.get(name), list):  # stages, by their names
            table = {str(part.get("name")): part for part in table[name] if isinstance(part, dict)}
            if keys[1] not in table:
                raise ConfigError(f"--set {override!r}: no stage is called '{keys[1]}', there is {', '.join(table)}")
            continue
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override!r}: '{name}' is a value, not a table")
    table[keys[-1]] = value
