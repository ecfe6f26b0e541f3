"""Published weights into a model of ours: from a file or a Hugging Face folder on this machine, never from a hub.

Keys find their place in three steps: the model's own `renames`, the job's `[weights] rename` (`["^", "backbone."]` puts
a whole file below `backbone`), then prefixes that a wrapper left behind come off where that makes more keys match. What
was loaded, what was not, and why, is a `Match`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from shared_models.errors import ConfigError
from shared_models.job_parts import WeightsPart

FOLDER = "FEDZOO_WEIGHTS"
IN_A_FOLDER = (  # as Hugging Face names them; an index lists the file of every key
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
NESTED = ("state_dict", "model", "module")  # where training scripts put the state dict
PREFIXES = ("module.", "model.", "backbone.", "_orig_mod.")  # of DataParallel, Lightning, detectors, torch.compile
COUNTER = "num_batches_tracked"  # starts at zero in every run
SHOWN = 4  # names that a summary gives of each kind

Renames = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Difference:
    """An entry that both have, with different shapes."""

    key: str
    theirs: tuple[int, ...]
    ours: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.key} ({self.theirs} there, {self.ours} here)"


@dataclass(frozen=True)
class Match:
    """What a file of weights and a model had in common.

    Attributes:
        file: as the job names it.
        sha256: of the weights file; of several files (shards) one after the other, in the order of their names.
        loaded: our keys that took their values from it.
        missing: our keys that it does not have; they stay as initialised.
        mismatched: of a shape that does not fit, e.g. a head of another number of classes; they stay as initialised.
        reshaped: loaded after their leading dimension of 1 was dropped.
        unused: its keys that have no place here.
    """

    file: str
    sha256: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    mismatched: tuple[Difference, ...] = ()
    reshaped: tuple[Difference, ...] = ()
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for a person."""
        entries = len(self.loaded) + len(self.missing) + len(self.mismatched)
        left = [*map(str, self.mismatched), *(f"{key} (not there)" for key in self.missing)]
        said = [f"weights {self.file}: {len(self.loaded)} of {entries} entries loaded"]
        said += [f"left as initialised: {_shown(left)}"] if left else []
        said += [f"not used: {_shown(self.unused)}"] if self.unused else []
        return "; ".join(said)


def load_weights(model: nn.Module, part: WeightsPart, renames: Renames = ()) -> Match:
    """Copy what fits of a file of weights into a model, in the model's own dtypes.

    Tensors of one shape fit, and those that are equal once a leading dimension of 1 is dropped. A tied tensor is loaded
    under any of its names. Counters of batches stay at zero.

    Args:
        model: is changed in place.
        part: the file, its hash where the job gives one, and the job's renames.
        renames: the model's own.

    Raises:
        ConfigError: there is no such file, a link leads out of the folder, it cannot be read, it is another one than
            the job's hash says, or nothing in it has a place in this model.
    """
    path = find_weights(part.file)
    if path is None:
        raise ConfigError(
            f"there is no weights file '{part.file}' in {_root()}",
            hint=f"Put it there, or name its folder in the environment variable {FOLDER}; nothing is ever downloaded",
        )
    sha256, theirs = _read(tuple(_stamp(file) for file in _files(path)))
    if part.sha256 not in ("", sha256):
        raise ConfigError(
            f"weights {path} are not those of the job: their SHA-256 is {sha256[:16]}…, "
            f"and [weights] sha256 is {part.sha256[:16]}…",
            hint="Get the file that the job means",
        )
    state = model.state_dict(keep_vars=True)
    names = _names(list(theirs), set(state), (*renames, *part.rename))
    given = {name: key for key, name in reversed(names.items())}  # of two keys for one place the first has it
    ours = {key: value for key, value in state.items() if not key.endswith(COUNTER)}
    loaded: set[int] = set()  # ids of our tensors: a tied one has several names
    reshaped, mismatched = [], []
    for key, value in ours.items():
        if key not in given:
            continue
        source = theirs[given[key]]
        difference = Difference(key, tuple(source.shape), tuple(value.shape))
        if difference.theirs == (1, *difference.ours):
            reshaped.append(difference)
            source = source[0]
        if source.shape == value.shape:
            value.detach().copy_(source)
            loaded.add(id(value))
        else:
            mismatched.append(difference)
    found = Match(
        file=part.file,
        sha256=sha256,
        loaded=tuple(key for key, value in ours.items() if id(value) in loaded),
        missing=tuple(key for key, value in ours.items() if key not in given and id(value) not in loaded),
        mismatched=tuple(d for d in mismatched if id(ours[d.key]) not in loaded),
        reshaped=tuple(reshaped),
        unused=tuple(key for key, name in names.items() if name not in state or given[name] != key),
    )
    if not found.loaded:
        raise ConfigError(
            f"nothing in weights {path} has a place in this model: they have {_shown(list(theirs))}, "
            f"and the model has {_shown(list(ours))}",
            hint="[weights] rename = [['pattern', 'replacement']] can turn their keys into the model's",
        )
    return found


def find_weights(file: str) -> Path | None:
    """The file or folder below the folder of weights, where there is one."""
    path = _root() / file
    return path if os.path.exists(path) else None


def _root() -> Path:
    """The one folder that weights are read from: $FEDZOO_WEIGHTS, or else the current one."""
    return Path(os.environ.get(FOLDER) or Path.cwd())


def _confined(path: Path) -> Path:
    """The path, once it is known that no link on it leads out of the folder of weights."""
    if not path.resolve().is_relative_to(_root().resolve()):
        raise ConfigError(
            f"weights {path} lead to {path.resolve()}, which is not in {_root()}",
            hint=f"Copy what is meant into that folder, or name the folder that holds both in {FOLDER}",
        )
    return path


def _names(theirs: Sequence[str], ours: set[str], renames: Renames) -> dict[str, str]:
    """Their keys -> the names they take here: of all ways to strip wrappers' prefixes the one that fits most of ours.

    Prefixes come off after the renames, or before them too, for patterns that start with `^`.
    """

    def rename(key: str) -> str:
        for pattern, replacement in renames:
            try:
                key = re.sub(pattern, replacement, key)
            except re.error as error:
                raise ConfigError(f"[weights] rename: '{pattern}' -> '{replacement}': {error}") from None
        return key

    def strip(key: str, prefixes: tuple[str, ...]) -> str:
        while found := next((p for p in prefixes if key.startswith(p)), ""):
            key = key.removeprefix(found)
        return key

    best = {key: rename(key) for key in theirs}
    there = [p for p in PREFIXES if any(p in text for pair in best.items() for text in pair)]
    for prefixes in (chosen for count in range(len(there)) for chosen in combinations(there, count + 1)):
        for before in ((), prefixes):
            names = {key: strip(rename(strip(key, before)), prefixes) for key in theirs}
            if len(ours.intersection(names.values())) > len(ours.intersection(best.values())):
                best = names
    return best


def _files(path: Path) -> list[Path]:
    """The files that hold the tensors: the path itself, or what is in a Hugging Face folder."""
    if not _confined(path).is_dir():
        return [path]
    name = next((n for n in IN_A_FOLDER if (path / n).is_file()), None)
    if name is None:
        raise ConfigError(f"the folder {path} holds no weights", hint=f"It needs one of {', '.join(IN_A_FOLDER)}")
    _confined(path / name)
    if not name.endswith(".index.json"):
        return [path / name]
    try:
        listed = json.loads((path / name).read_text(encoding="utf-8"))["weight_map"].values()
        shards = sorted({str(shard) for shard in listed})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path / name} is not an index of weights ({_line(error)})") from None
    for shard in shards:
        if Path(shard).name != shard or not (path / shard).is_file():
            raise ConfigError(f"the weights in {path} are not complete: {name} names '{shard}', which is not there")
    return [_confined(path / shard) for shard in shards]


def _stamp(path: Path) -> tuple[Path, int, int]:
    """What tells one version of a file from another without reading it."""
    state = path.stat()
    return path, state.st_mtime_ns, state.st_size


@lru_cache(maxsize=1)
def _read(stamped: tuple[tuple[Path, int, int], ...]) -> tuple[str, Mapping[str, Tensor]]:
    """SHA-256 and all tensors of some files; the last ones stay in memory, for a run builds its model several times."""
    sha256 = hashlib.sha256()
    tensors: dict[str, Tensor] = {}
    for path, _, _ in stamped:
        try:
            with path.open("rb") as source:
                while block := source.read(2**20):
                    sha256.update(block)
        except OSError as error:
            raise ConfigError(f"cannot read weights {path}: {error.strerror}") from None
        tensors |= _tensors(path)
    return sha256.hexdigest(), tensors


def _tensors(path: Path) -> dict[str, Tensor]:
    """The state dict in one file."""
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can fail in any way
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise ConfigError(
                f"weights {path} hold more than tensors ({code[1]}), and to load that would run code",
                hint="Where you trust it, save its state dict alone: torch.save(model.state_dict(), ...)",
            ) from None
        raise ConfigError(
            f"cannot read weights {path} ({_line(error)})",
            hint="The file is not whole, or neither safetensors nor written by torch.save",
        ) from None
    while isinstance(content, Mapping) and (inner := next((k for k in NESTED if _is_table(content.get(k))), "")):
        content = content[inner]
    found = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if _is_table(content) else {}
    if not found:
        raise ConfigError(f"weights {path} hold no tensors by name", hint="A state dict is wanted")
    return found


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping)


def _line(error: Exception) -> str:
    """What went wrong, in a few words; torch's own text on a refused pickle is advice for programmers."""
    kind, text = type(error).__name__, str(error).partition("\n")[0][:160]
    return f"{kind}: {text}" if text and not isinstance(error, UnpicklingError) else kind


def _shown(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
