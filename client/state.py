"""What a site remembers between rounds: its methods' and personal tensors, and its last answer.

Everything is named by run and site, never by an id of the network's. The answers to the last two instructions (a round
and the end of its task) are kept, so that those repeated after a crash are answered with the identical bytes instead of
being done again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from shutil import rmtree
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from shared_models.errors import ConfigError, DataError, Rejected
from shared_models.files import private_folder, write_whole
from shared_models.messages import Contribution, Instruction
from shared_models.sums import Groups
from shared_models.wire import NAME, decode_contribution, encode_contribution, flatten, unflatten

SLOTS = ("a", "b", "c")


class State(Protocol):
    """Where one site keeps what it remembers of a run."""

    def load(self, run: str) -> dict[str, Groups]:
        """Owner (a method's name, or `personal`) -> its groups; empty before the first round."""

    def replay(self, instruction: Instruction) -> Contribution | None:
        """The answer already given to this very instruction."""

    def save(self, instruction: Instruction, kept: dict[str, Groups], answer: Contribution) -> None:
        """Remember, all or nothing."""

    def start(self, run: str, stage: int) -> Mapping[str, torch.Tensor]:
        """What an earlier stage left, of entries that no round sends; empty in a first stage."""

    def keep_start(self, run: str, stage: int, values: Mapping[str, torch.Tensor]) -> None:
        """Remember that."""


class MemoryState:
    """For simulated sites: memory only. Tensors are copied, because an engine reuses its model's memory."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, Groups]] = {}
        self._start: dict[tuple[str, int], Mapping[str, torch.Tensor]] = {}

    def start(self, run: str, stage: int) -> Mapping[str, torch.Tensor]:
        """What was kept, or nothing."""
        return self._start.get((run, stage), {})

    def keep_start(self, run: str, stage: int, values: Mapping[str, torch.Tensor]) -> None:
        """By reference: all sites of a process share it."""
        self._start[run, stage] = values

    def load(self, run: str) -> dict[str, Groups]:
        """What was saved, or nothing."""
        return self._kept.get(run, {})

    def replay(self, instruction: Instruction) -> Contribution | None:
        """Nothing is repeated inside one process."""
        return None

    def save(self, instruction: Instruction, kept: dict[str, Groups], answer: Contribution) -> None:
        """Keep copies; a run whose methods keep nothing costs no memory."""
        if any(tensors for groups in kept.values() for tensors in groups.values()):
            self._kept[instruction.run] = {
                owner: {g: {n: t.detach().clone() for n, t in ts.items()} for g, ts in groups.items()}
                for owner, groups in kept.items()
            }
        else:
            self._kept.pop(instruction.run, None)


class DiskState:
    """For nodes: one folder per run below `root`, replaced by one rename.

    A run's folder holds `<slot>.kept`, `<slot>.answer.json` and `<slot>.answer.bin` for three slots that take turns,
    and `current`, which names the newest slot and the instructions that it and the one before it answer. `current` is
    renamed into place last and never names the slot that is written next, so a crash at any point leaves the state
    before or after the round, never between.
    """

    def __init__(self, root: Path, site: str) -> None:
        self.root = root
        self.site = site

    def start(self, run: str, stage: int) -> Mapping[str, torch.Tensor]:
        """What was kept, or nothing; raises as `load`."""
        path = self._folder(run) / f"start-{stage}"
        try:
            return load(path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, SafetensorError) as error:
            raise DataError(f"the site's start values {path} cannot be read: {error}", hint="Restore them") from None

    def keep_start(self, run: str, stage: int, values: Mapping[str, torch.Tensor]) -> None:
        """One file of the run's folder; raises as `load`."""
        folder = self._folder(run)
        private_folder(folder)
        write_whole(folder / f"start-{stage}", save({n: t.detach().contiguous().cpu() for n, t in values.items()}))

    def load(self, run: str) -> dict[str, Groups]:
        """What was saved, or nothing.

        Raises:
            DataError: the files are damaged.
            Rejected: the run's id names no folder.
        """
        folder = self._folder(run)
        slot, _ = _current(folder)
        if not slot:
            return {}
        path = folder / f"{slot}.kept"
        try:
            flat = load(path.read_bytes())
        except (OSError, SafetensorError) as error:
            raise DataError(f"the site's saved state {path} cannot be read: {error}", hint="Restore it") from None
        kept: dict[str, dict[str, dict[str, object]]] = {}
        for name, tensor in flat.items():
            owner, _, rest = name.partition(":")
            for group, tensors in unflatten({rest: tensor}).items():
                kept.setdefault(owner, {}).setdefault(group, {}).update(tensors)
        return kept  # type: ignore[return-value]

    def replay(self, instruction: Instruction) -> Contribution | None:
        """The stored answer where one of the last two belongs to this very instruction; raises as `load`."""
        folder = self._folder(instruction.run)
        _, answers = _current(folder)
        slot = answers.get(_identity(instruction))
        if slot is None:
            return None
        try:
            return decode_contribution(
                (folder / f"{slot}.answer.json").read_bytes(), (folder / f"{slot}.answer.bin").read_bytes()
            )
        except (OSError, Rejected) as error:
            raise DataError(f"the site's stored answer in {folder} cannot be read: {error}") from None

    def save(self, instruction: Instruction, kept: dict[str, Groups], answer: Contribution) -> None:
        """Write the oldest slot, then point `current` at it; raises as `load`."""
        folder = self._folder(instruction.run)
        last, answers = _current(folder)
        slot = SLOTS[(SLOTS.index(last) + 1) % len(SLOTS)] if last else SLOTS[0]
        flat = {f"{owner}:{name}": t for owner, groups in kept.items() for name, t in flatten(groups).items()}
        manifest, blob = encode_contribution(answer)
        private_folder(folder)
        # a copy of each: two owners may keep the same memory, which safetensors refuses
        copies = {n: t.detach().clone(memory_format=torch.contiguous_format).cpu() for n, t in flat.items()}
        write_whole(folder / f"{slot}.kept", save(copies))
        write_whole(folder / f"{slot}.answer.json", manifest)
        write_whole(folder / f"{slot}.answer.bin", blob)
        answers = {asked: s for asked, s in answers.items() if s == last} | {_identity(instruction): slot}
        write_whole(folder / "current", json.dumps({"slot": slot, "answers": answers}).encode())

    def runs(self) -> list[str]:
        """The runs of which something is kept."""
        folder = self.root / self.site
        return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []

    def forget(self, run: str) -> tuple[Path, int, int]:
        """Remove all that is kept of a run: its folder, how many files were in it, and their bytes.

        Cut off in between, the run is as before its first round; call it again.

        Raises:
            ConfigError: nothing is kept of such a run.
            DataError: the files cannot be removed.
        """
        kept = self.runs()
        if run not in kept:
            raise ConfigError(
                f"site '{self.site}' keeps nothing of a run '{run}'",
                hint=f"It keeps {', '.join(kept)}" if kept else "It keeps nothing of any run",
            )
        folder = self._folder(run)
        try:
            sizes = [path.stat().st_size for path in folder.iterdir()]
            (folder / "current").unlink(missing_ok=True)
            rmtree(folder)
        except OSError as error:
            raise DataError(f"cannot remove {folder}: {error.strerror}", hint="Try again") from None
        return folder, len(sizes), sum(sizes)

    def _folder(self, run: str) -> Path:
        if not re.fullmatch(NAME, run):
            raise Rejected(f"{run[:80]!r} cannot be the id of a run", code="malformed")
        return self.root / self.site / run


def _current(folder: Path) -> tuple[str, dict[str, str]]:
    """(newest slot, instruction -> slot with its answer); no slot before the first round."""
    path = folder / "current"
    try:
        found = json.loads(path.read_bytes())
        slot, answers = found["slot"], dict(found["answers"])
        if slot not in SLOTS or not all(s in SLOTS for s in answers.values()):
            raise ValueError("it names no slot")
    except FileNotFoundError:
        return "", {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"the site's state {path} cannot be read: {error}", hint="Restore it") from None
    return slot, answers


def _identity(instruction: Instruction) -> str:
    return f"{instruction.job.hash} {instruction.kind} {instruction.task} {instruction.round}"
