"""What every entry of a model's state dict is, what is done with it, and the fingerprint two sides compare.

The one table of rules, by nature and share:

| nature       | share    | sent | averaged | on the client before a round |
|--------------|----------|------|----------|------------------------------|
| parameter    | averaged | yes  | yes      | from the server              |
| running-stat | averaged | yes  | yes      | from the server              |
| either       | personal | no   | no       | from the node's own state    |
| either       | base     | no   | no       | from the start values, never trained |
| counter      | -        | no   | no       | reset                        |
| constant     | -        | no   | no       | reset (covered by hash)      |
| alias        | as owner | no   | no       | restored with what it aliases |

An entry that both kinds of pattern match is personal. With `[lora]` all but what it trains and the head is base. Start
values are those that a stage before left, else those of the `[weights]` file where it has the entry, else of the keyed
initialisation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shared_models.errors import ConfigError, FingerprintError
from shared_models.job import Job
from shared_models.keys import key, keyed_global
from shared_models.lora import TRAINED, adapt, pairs
from shared_models.models import configure, models
from shared_models.tasks.base import make_task
from shared_models.weights import Match, find_weights, load_weights

HEAD = "@head"  # a `[share]` pattern that stands for `Model.heads`

Nature = Literal["parameter", "running-stat", "counter", "constant", "alias"]
Share = Literal["averaged", "personal", "base"]


@dataclass(frozen=True)
class Entry:
    """One key of the state dict.

    Attributes:
        digest: SHA-256 of the values where both sides must hold them already (base and constant), else empty.
        alias_of: the first key that shares this one's storage, else empty.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    nature: Nature
    share: Share
    digest: str = ""
    alias_of: str = ""

    @property
    def sent(self) -> bool:
        """Whether its values cross the network and are averaged."""
        return self.share == "averaged" and self.nature in ("parameter", "running-stat")

    @property
    def trains(self) -> bool:
        """Whether the optimizer moves it."""
        return self.nature == "parameter" and self.share != "base"

    def facts(self) -> dict[str, Any]:
        """What the fingerprint covers: a personal entry by its name only."""
        if self.share == "personal":
            return {"share": self.share}
        facts: dict[str, Any] = {
            "shape": list(self.shape),
            "dtype": self.dtype,
            "nature": self.nature,
            "share": self.share,
        }
        return facts | {k: v for k, v in (("digest", self.digest), ("alias_of", self.alias_of)) if v}


@dataclass(frozen=True)
class ModelSpec:
    """All entries of one built model, in state-dict order, and the settings that give them meaning.

    Attributes:
        match: what was loaded from the `[weights]` file; None where the job has none or this side needs none.
    """

    entries: tuple[Entry, ...]
    settings: dict[str, Any]
    match: Match | None = field(default=None, compare=False)

    @property
    def sent(self) -> tuple[str, ...]:
        """Keys that cross the network."""
        return tuple(e.key for e in self.entries if e.sent)

    @property
    def trained(self) -> tuple[str, ...]:
        """Keys the optimizer moves."""
        return tuple(e.key for e in self.entries if e.trains)

    @property
    def kept(self) -> tuple[str, ...]:
        """Keys whose start values a node needs although no round sends them."""
        natures = ("parameter", "running-stat")
        return tuple(e.key for e in self.entries if e.share != "averaged" and e.nature in natures)

    @property
    def personal(self) -> tuple[str, ...]:
        """Keys that never leave a node."""
        return tuple(e.key for e in self.entries if e.share == "personal" and e.nature in ("parameter", "running-stat"))

    @cached_property
    def document(self) -> dict[str, Any]:
        """Everything the fingerprint covers, as plain data."""
        return {**self.settings, "entries": {e.key: e.facts() for e in self.entries}}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the document's canonical JSON, 64 hex digits."""
        return hashlib.sha256(json.dumps(self.document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def build_model(
    job: Job, *, receives: bool = False, start: Mapping[str, Tensor] | None = None
) -> tuple[nn.Module, ModelSpec]:
    """The job's model with its start values, and its spec. The same job gives the same values everywhere.

    Args:
        job: the resolved job.
        receives: whether every sent entry will come from another side: then `[weights]` is needed only where `[share]`
            keeps entries here, and a missing file is no matter otherwise.
        start: values of entries that an earlier stage of the job left; see `carried`.

    Raises:
        FingerprintError: the start values are not of this model.
        ConfigError: the model cannot be built for this shape, `[share]` does not fit it (see `describe`), or its
            weights cannot be loaded (see `load_weights`).
    """
    declared, settings = configure(job.model.name, job.model.keys)
    task = make_task(job)
    with keyed_global(key(job.seed, "init")):
        model = declared.build(settings, task.shape(job.data.sample), task.outputs, each=task.each)
        model = task.attach(model, job.data.sample)
    match = None
    if job.weights.file and (not receives or _keeps(job) or find_weights(job.weights.file)):
        match = load_weights(model, job.weights, declared.renames)
    if job.lora.rank:
        with keyed_global(key(job.seed, "lora")):
            adapt(model, job.lora.rank, job.lora.alpha, job.lora.targets, declared.heads)
    if start:
        _put(model, start)
    return model, describe(model, job, match)


@torch.no_grad()
def _put(model: nn.Module, start: Mapping[str, Tensor]) -> None:
    entries = model.state_dict()
    for name, value in start.items():
        if name not in entries or entries[name].shape != value.shape or entries[name].dtype != value.dtype:
            raise FingerprintError(f"the start value of '{name[:80]}' does not fit this model")
        entries[name].copy_(value)


def carried(before: Job, after: Job, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a stage's model the next stage starts from.

    Args:
        before: the stage that is done.
        after: the next one.
        values: entries of the model before.

    Returns:
        Those of the same name, shape and dtype that the next model has, without its head where the task is another.
    """
    model, spec = build_model(after)
    entries = model.state_dict()
    heads = () if before.task == after.task else models[after.model.name].heads
    fitting = {e.key for e in spec.entries if e.nature in ("parameter", "running-stat") and not _any(e.key, heads)}
    return {
        name: value for name, value in values.items()
        if name in fitting and entries[name].shape == value.shape and entries[name].dtype == value.dtype
    }  # fmt: skip


def describe(model: nn.Module, job: Job, match: Match | None = None) -> ModelSpec:
    """The spec of a model under a job's `[share]`; base parameters stop requiring a gradient.

    Args:
        model: with its start values.
        job: says which entries are personal or base.
        match: what was loaded into the model.

    Raises:
        ConfigError: a pattern matches nothing, takes one name of a tied tensor and leaves the other, makes an adapter's
            first factor personal and not its second, or nothing is left that is both trained and averaged.
    """
    natures, aliases = _natures(model)
    shares = _shares(list(natures), job)
    if job.lora.rank:  # a head that is the embedding stays as it is with it
        shares |= {name: "base" for pair in aliases.items() for name in pair}
        for a, b in pairs(shares):
            if (shares[a], shares[b]) == ("personal", "averaged"):
                raise ConfigError(
                    f"[share] averages '{b}' over sites that each have their own '{a}', whose product it is part of",
                    hint="Keep the second factors personal as well, or in place of the first",
                )
    for name, owner in aliases.items():
        if shares[name] != shares[owner]:
            raise ConfigError(
                f"[share] makes '{name}' {shares[name]} and '{owner}' {shares[owner]}, but they are one tensor",
                hint="Let the patterns take both names or none",
            )
    entries = []
    for name, value in model.state_dict().items():
        nature, share = natures[name], shares[name]
        fixed = nature == "constant" or (share == "base" and nature in ("parameter", "running-stat"))
        entries.append(
            Entry(
                key=name,
                shape=tuple(value.shape),
                dtype=str(value.dtype).removeprefix("torch."),
                nature=nature,
                share=share,
                digest=digest(value) if fixed else "",
                alias_of=aliases.get(name, ""),
            )
        )
    if not any(e.sent and e.trains for e in entries):
        raise ConfigError(
            f"[share] leaves no entry of model '{job.model.name}' that is trained and averaged",
            hint="Narrow its patterns; place = 'isolated' trains without averaging",
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(shares[name] != "base")
    settings: dict[str, Any] = {
        "model": job.model.model_dump(mode="json"),
        "task": job.task.model_dump(mode="json"),
        "preprocessing": job.data.model_dump(mode="json"),
    }
    if job.lora.rank:
        settings["lora"] = job.lora.model_dump(mode="json")
    if match and _keeps(job):  # personal entries start from that file at every site
        settings["weights"] = match.sha256
    return ModelSpec(tuple(entries), settings, match)


def frozen_modules(model: nn.Module, spec: ModelSpec) -> list[nn.Module]:
    """Modules whose running statistics are base: they must be in evaluation mode in training too, or they would move.

    Only the module's own statistics freeze so: its weight and bias still train where they are not base.
    """
    owners = (e.key.rpartition(".")[0] for e in spec.entries if e.nature == "running-stat" and e.share == "base")
    return [model.get_submodule(owner) for owner in dict.fromkeys(owners)]


def require_same(ours: ModelSpec, theirs: dict[str, Any], who: str) -> None:
    """Raise a FingerprintError that names the first difference between our spec and another side's document."""
    found = first_difference(ours.document, theirs)
    if found:
        where, here, there = found
        raise FingerprintError(
            f"{who} would train another model: '{where}' is {here} here and {there} there",
            hint="Both sides need the same fedzoo, torch and torchvision versions and the same job",
        )


def first_difference(ours: Any, theirs: Any, path: str = "") -> tuple[str, str, str] | None:
    """(place, ours, theirs) of the first difference between two documents of plain data, or None."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in (*ours, *(k for k in theirs if k not in ours)):
            shown = (
                name if str(name).isprintable() and len(str(name)) <= 120 else repr(name)[:80]
            )  # it may come from a peer
            place = f"{path}.{shown}" if path else str(shown)
            if name not in ours or name not in theirs:
                return place, "present" if name in ours else "absent", "present" if name in theirs else "absent"
            if found := first_difference(ours[name], theirs[name], place):
                return found
        return None
    if isinstance(ours, list) and isinstance(theirs, list):
        if len(ours) != len(theirs):
            return path, f"{len(ours)} items", f"{len(theirs)} items"
        places = (first_difference(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(ours, theirs, strict=True)))
        return next((found for found in places if found), None)
    return None if ours == theirs else (path, repr(ours)[:80], repr(theirs)[:80])


def digest(value: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


def _keeps(job: Job) -> bool:
    """Whether a node holds entries that no other side sends it."""
    return bool(job.share.personal or job.share.base or job.lora.rank)


def _shares(names: list[str], job: Job) -> dict[str, Share]:
    """What `[share]` makes of each entry.

    Raises:
        ConfigError: a pattern, or what stands behind its `!`, matches no entry.
    """
    heads = models[job.model.name].heads
    for pattern in (*job.share.personal, *job.share.base):
        for part in (pattern.removeprefix("!"), pattern):
            if not any(_matches(name, part, heads) for name in names):
                meaning = f"; {HEAD} is {', '.join(heads) or 'nothing: the model has no head'}" if "@" in part else ""
                raise ConfigError(
                    f"[share] pattern '{part}' matches no entry of model '{job.model.name}'",
                    hint=f"Its entries are {', '.join(names[:6])}, ...{meaning}",
                )

    def share(name: str) -> Share:
        if job.lora.rank and not _any(name, (*heads, *TRAINED[job.lora.train])):
            return "base"
        if any(_matches(name, p, heads) for p in job.share.personal):
            return "personal"
        return "base" if any(_matches(name, p, heads) for p in job.share.base) else "averaged"

    return {name: share(name) for name in names}


def _any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, p) for p in patterns)


def _matches(name: str, pattern: str, heads: tuple[str, ...]) -> bool:
    """Whether a `[share]` pattern takes an entry: `!` turns it round, `@head` is any of `heads`."""
    bare = pattern.removeprefix("!")
    found = _any(name, heads if bare == HEAD else (bare,))
    return found != (bare != pattern)


def _natures(model: nn.Module) -> tuple[dict[str, Nature], dict[str, str]]:
    """The nature of each state-dict key, and for aliases the key they repeat."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    statistics = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name in ("running_mean", "running_var")
        if isinstance(getattr(module, name, None), Tensor)
    }
    natures: dict[str, Nature] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        owner = first.setdefault(id(value), name)
        if owner != name:
            natures[name], aliases[name] = "alias", owner
        elif name in parameters:
            natures[name] = "parameter"
        elif name in statistics:
            natures[name] = "running-stat"
        else:
            natures[name] = "counter" if name.rpartition(".")[2] == "num_batches_tracked" else "constant"
    return natures, aliases
