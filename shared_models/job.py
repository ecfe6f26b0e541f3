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
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from shared_models.errors import ConfigError, FedzooError
from shared_models.files import read_toml
from shared_models.validation import validate

Place = Literal["centralized", "isolated", "federated"]
Time = Literal["offline", "continual"]
Form = Literal["image", "features", "tokens", "series", "image-text"]
Positive = Annotated[int, Field(gt=0)]


class Part(BaseModel):
    """One table of the job; an unknown key is an error, and so is a number that JSON cannot carry."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Choice(BaseModel):
    """A registered name and the settings that belong to it, checked by the thing itself when the job is resolved."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def keys(self) -> dict[str, Any]:
        """The settings beside the name."""
        return dict(self.model_extra or {})


class TaskPart(Choice):
    """`[task]`: the loss, the metric and the label list that fixes every class index."""

    name: str = "classification"
    labels: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _distinct(self) -> TaskPart:
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("a label stands twice in the list")
        return self


class DataPart(Part):
    """`[data]`: the preprocessing all sites share.

    Images become float32 (C, H, W), `(x / 255 - mean) / std`; features float32 (F,) and series float32 (T, C),
    `(x - mean) / std`; texts become the ids of their tokens, (T,) int64, a shorter one padded.

    Attributes:
        shape: (C, H, W) with C = 1 (grey) or 3 (colour); (F,): as many as `features`; (T, C): T steps of C numbers;
            (T,), with a `tokenizer`: tokens of a text at most.
        tokenizer: `bytes`, or a file of the library `tokenizers` (JSON), whose content becomes part of the job.
        cut: what an example of a text file is: one of its `lines`, one of its `windows` of as many tokens as `shape`
            says, or `roles`: windows of all that a role of a play says.
        text_length: tokens of the text that goes with an image, at most.
        captions: how many of an image's texts are read, in their order; each is an example, with a copy of the image.
            Validation and test hold the first alone.
        text: columns of a table that hold a text, joined by a space.
        stride: steps from the start of one window of a long series to that of the next; 0: as many as a window has, so
            that none overlap. Each window is a copy in memory.
        resize: how an image of another size gets to H x W: `stretch` it, or `pad` it to its longer side first. Masks
            and boxes follow.
        tile: (height, width) in an image's own pixels: it and its mask are cut into tiles of that size before they are
            resized, and every tile is an example. What reaches beyond the edge is black and counts nowhere. The tiles
            of one image stay together, at one site and in one part. Empty: whole images.
        mean: one number per channel or feature, or one for all.
        std: the same.
        normalise_by: `job`: the two above; `sites`: both are measured over the sites' training examples, in a round
            before the first in which each site answers with sums and a count.
        parts: how examples are cut into train, validation and test where their owner has not: by a `hash` of each
            name, or in `blocks` of their order (slices of one volume, where a neighbour would give a test image away).
        train_share: share of the train part that is used; chosen by the names, so that a larger share holds a smaller
            one, and tiles of one image stay together. To learn from few labels; the other two parts are whole.
        features: columns of a table, in order; `"cp=3"` is 1 where column cp holds 3, else 0.
        target: the column that holds the class.
        missing: of a row that lacks a feature: `drop` it, or put the `mean` (after normalisation: 0).
        proposals: regions of each image for models that need them from outside (R-CNN and its kin), best first.
    """

    shape: tuple[Positive, ...]
    resize: Literal["stretch", "pad"] = "stretch"
    tile: tuple[Positive, Positive] | tuple[()] = ()
    mean: tuple[float, ...] = (0.5,)
    std: tuple[Annotated[float, Field(gt=0)], ...] = (0.5,)
    normalise_by: Literal["job", "sites"] = "job"
    parts: Literal["hash", "blocks"] = "hash"
    train_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    tokenizer: str = ""
    cut: Literal["lines", "windows", "roles"] = "lines"
    text_length: Positive = 64
    captions: Positive = 1
    text: Annotated[tuple[str, ...], Field(min_length=1)] = ("text",)
    features: tuple[str, ...] = ()
    stride: Annotated[int, Field(ge=0)] = 0
    target: str = "label"
    missing: Literal["drop", "mean"] = "drop"
    proposals: Positive = 300

    @field_validator("shape")
    @classmethod
    def _image_or_features(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) not in (1, 2, 3):
            raise ValueError(
                f"should be (C, H, W) of an image, (T, C) of a series, or (F,) of features or tokens, not {len(shape)} "
                "numbers"
            )
        if len(shape) == 3 and shape[0] not in (1, 3):
            raise ValueError(f"an image has 1 (grey) or 3 (colour) channels, not {shape[0]}")
        return shape

    @model_validator(mode="after")
    def _per_channel(self) -> DataPart:
        if self.normalise_by == "sites" and (self.mean, self.std) != ((0.5,), (0.5,)):
            raise ValueError("mean and std are measured where normalise_by = 'sites'; leave them out")
        if self.form == "tokens":
            if (self.mean, self.std, self.normalise_by) != ((0.5,), (0.5,), "job"):
                raise ValueError("tokens are not normalised; leave mean, std and normalise_by out")
            if len(self.shape) != 1 or self.shape[0] < 2:
                raise ValueError("shape of a text is one number, of at least 2 tokens")
        elif not {len(self.mean), len(self.std)} <= {1, self.channels}:
            raise ValueError(f"mean and std need one number, or one per channel or feature ({self.channels})")
        if self.form == "features" and len(self.features) != self.shape[0]:
            raise ValueError(f"shape says {self.shape[0]} features and the list 'features' names {len(self.features)}")
        if self.form == "series" and self.features and len(self.features) != self.shape[1]:
            raise ValueError(f"shape says {self.shape[1]} numbers a step and 'features' names {len(self.features)}")
        if self.stride and self.form != "series":
            raise ValueError("stride belongs to a series, whose shape is two numbers, e.g. shape = [96, 7]")
        if 0 < self.stride < self.shape[0] and self.parts == "hash":
            raise ValueError(
                f"windows of {self.shape[0]} steps, one every {self.stride}, overlap, and parts = 'hash' would put the "
                "same steps into train and test; parts = 'blocks' cuts in time"
            )
        if self.form not in ("features", "series") and self.features:
            raise ValueError("'features' belongs to a table, whose shape is one number, e.g. shape = [13]")
        return self

    @property
    def form(self) -> Form:
        """What an example is."""
        if self.tokenizer:
            return "image-text" if len(self.shape) == 3 else "tokens"
        forms: dict[int, Form] = {1: "features", 2: "series", 3: "image"}
        return forms[len(self.shape)]

    @property
    def channels(self) -> int:
        """How many numbers `mean` and `std` have at most: channels, features, or numbers of a step."""
        return self.shape[-1] if self.form == "series" else self.shape[0]

    @property
    def sample(self) -> tuple[int, ...]:
        """What a model is built for (`shared_models.models.FORMS`): with the vocabulary where there are tokens."""
        if not self.tokenizer:
            return self.shape
        from shared_models.tokens import make_tokenizer

        size = make_tokenizer(self.tokenizer).size
        return (*self.shape, self.text_length, size) if self.form == "image-text" else (*self.shape, size)


class WeightsPart(Part):
    """`[weights]`: where the model starts from, instead of random numbers.

    Attributes:
        file: a file (safetensors, torch) or a Hugging Face folder, below the folder that the environment variable
            FEDZOO_WEIGHTS names, or the current one; never a hub. A node needs it where `[share]` keeps something.
        sha256: of the file; another file is refused. Of a folder: of its weights file.
        rename: (pattern, replacement) pairs, regular expressions that turn its keys into the model's, after the
            model's own.
    """

    file: str = ""
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    rename: tuple[tuple[str, str], ...] = ()


class SharePart(Part):
    """`[share]`: patterns (fnmatch on state-dict keys) of entries that are not averaged over sites.

    `@head` stands for the patterns of the model's head, and a leading `!` turns a pattern round: `base = ["!@head"]`
    trains heads only.

    Attributes:
        personal: stay on the node and are trained there; only their names are known elsewhere.
        base: are not sent and not trained; both sides hold them, covered by hash.
    """

    personal: tuple[str, ...] = ()
    base: tuple[str, ...] = ()


class LoraPart(Part):
    """`[lora]`: low-rank adapters beside linear layers (`shared_models.lora`); all else but the head stays as it is.

    Attributes:
        rank: of the product that is learned; 0: no adapters.
        alpha: the product is multiplied by `alpha / rank`.
        targets: patterns of layers' names; empty: every linear layer but the head's.
    """

    rank: Annotated[int, Field(ge=0)] = 0
    alpha: Annotated[float, Field(gt=0)] = 16.0
    targets: tuple[str, ...] = ()


class TrainPart(Part):
    """`[train]`: one site's work in one round.

    Attributes:
        epochs: passes over the local data a round; `steps` replaces it by a fixed number of optimizer steps.
        schedule: of the learning rate over all rounds; it does not restart with a round.
        warmup: share of all rounds in which the rate rises linearly from zero.
        clip: largest L2 norm of a step's gradient; a larger one is scaled down to it. 0 is none.
        accumulate: parts in which a batch is computed, their gradients added: less memory, the same step.
        precision: `bf16` computes the forward pass in bfloat16 where torch deems it safe (autocast); slow on a CPU.
        deterministic: one thread per operation and deterministic kernels, so that the same job gives the same bits.
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Positive = 32
    accumulate: Positive = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    epochs: Annotated[float, Field(gt=0)] = 1.0
    steps: Positive | None = None
    deterministic: bool = True


class AugmentPart(Part):
    """`[augment]`: random changes of training images; masks and boxes move along. Every default is no change.

    Attributes:
        flip: mirror left and right, for half of the images.
        flip_vertical: mirror top and bottom, for half of the images.
        quarter_turns: turn by 0, 90, 180 or 270 degrees; square images only.
        crop: pad all sides by so many pixels and cut the size out again at a random place (Krizhevsky: 4).
        rotate: turn by up to so many degrees either way.
        scale: grow or shrink by up to this share: 0.2 is 0.8 to 1.2.
        brightness: change by up to this share.
        contrast: the same.
    """

    flip: bool = False
    flip_vertical: bool = False
    quarter_turns: bool = False
    crop: Annotated[int, Field(ge=0)] = 0
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.0
    brightness: Annotated[float, Field(ge=0, lt=1)] = 0.0
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def active(self) -> bool:
        """Whether anything is changed at all."""
        return self != AugmentPart()


class FederationPart(Part):
    """`[federation]`: the round loop.

    Attributes:
        rounds: of the whole run, over all tasks of a stream.
        fraction: share of the sites selected a round (C in McMahan et al. 2017), at least one site.
        min_sites: how many willing nodes a start waits for, and how many contributions a round needs (all of the
            cohort where `fraction` makes it smaller).
        wait: seconds a start, or a round that has lost sites, waits for enough willing nodes; a day, for people must
            read and approve.
        round_timeout: seconds the server waits for the answers of one round.
        max_update_norm: largest L2 norm of a site's update; a larger one is rejected.
        select: the model that is tested and kept: of the `last` round, or of the round with the `best` validation.
    """

    rounds: Positive = 10
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_sites: Positive = 1
    wait: Annotated[float, Field(ge=0)] = 86400.0
    round_timeout: Annotated[float, Field(gt=0)] = 3600.0
    max_update_norm: Annotated[float, Field(gt=0)] = 1e6
    select: Literal["last", "best"] = "last"


class StreamPart(Part):
    """`[stream]`: how `time = "continual"` cuts the labels, in their order, into tasks (class-incremental)."""

    tasks: Positive = 5


class SimulationPart(Part):
    """`[simulation]`: the data and the split of a simulated federation; nodes never read it.

    Attributes:
        reader: a registered reader, e.g. `digits` or `imagefolder`.
        root: the reader's folder; `$NAME` is replaced by that environment variable, a relative path starts at the job.
        partition: `iid`, `dirichlet` (per class, Hsu et al. 2019), `blocks` (contiguous in the order of names) or
            `column` (the site column that the reader gives).
        sites: how many (not for `column`).
        alpha: concentration of the Dirichlet distribution.
        min_examples: smallest site a Dirichlet draw may give; it is drawn again until all have that many.
        smallest: sites of a column with fewer examples are left out.
        test: which test examples measure at each site: its `own`, or those of all sites, `shared`, where a metric needs
            more examples than one site has (recall in a gallery). Training and validation examples stay its own.
        seed: of the split alone, so that several training seeds share one split.
        values: site -> column of a table -> its own word -> the word that all sites share: what each site's
            `client.toml` says under `[data.values]`.
    """

    reader: str = "digits"
    root: str = ""
    partition: Literal["iid", "dirichlet", "blocks", "column"] = "iid"
    sites: Positive = 3
    alpha: Annotated[float, Field(gt=0)] = 0.5
    min_examples: Positive = 10
    smallest: Positive = 1
    test: Literal["own", "shared"] = "own"
    seed: int = 0
    values: dict[str, dict[str, dict[str, str]]] = {}


STAGED = ("model", "task", "data", "method", "share", "lora", "train", "augment", "federation")


class Stage(BaseModel):
    """`[[stages]]`: one of several trainings that follow one another, each from the weights of the one before.

    Beside its name a stage has tables of the job (`[stages.task]`, ...) that say what is different in it. Entries of
    the model whose names and shapes are those of the stage before are carried over; the head is not, where the task
    is another.
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
        edges = [round(t * len(classes) / count) for t in range(count + 1)]
        return tuple(classes[a:b] for a, b in pairwise(edges))

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
        if a.lora.rank and a.lora != b.lora:
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
