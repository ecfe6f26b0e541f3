"""What a site remembers between rounds: its methods' and personal tensors, and its last answer.

Everything is named by run and site, never by an id of the network's. The answer to an instruction is kept until the
next one, so that a round repeated after a crash is answered with the identical bytes instead of being trained again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError
from safetensors.torch import load, save

from shared_models.errors import DataError, Rejected
from shared_models.files import private_folder, write_whole
from shared_models.messages import Contribution, Instruction
from shared_models.sums import Groups
from shared_models.wire import decode_contribution, encode_contribution, flatten, unflatten


class State(Protocol):
    """Where one site keeps what it remembers of a run."""

    def load(self, run: str) -> dict[str, Groups]:
        """Owner (a method's name, or `personal`) -> its groups; empty before the first round."""

    def replay(self, instruction: Instruction) -> Contribution | None:
        """The answer already given to this very instruction."""

    def save(self, instruction: Instruction, kept: dict[str, Groups], answer: Contribution) -> None:
        """Remember, all or nothing."""


class MemoryState:
    """For simulated sites: memory only. Tensors are copied, because an engine reuses its model's memory."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, Groups]] = {}

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


class DiskState:
    """For nodes: one folder per run below `root`, replaced by one rename.

    A run's folder holds `<slot>.kept`, `<slot>.answer.json` and `<slot>.answer.bin` for one of two slots, and `current`,
    which names the slot and the instruction it answers. `current` is renamed into place last, so a crash at any point
    leaves the state before or after the round, never between.
    """

    def __init__(self, root: Path, site: str) -> None:
        self.root = root
        self.site = site

    def load(self, run: str) -> dict[str, Groups]:
        """What was saved, or nothing.

        Raises:
            DataError: the files are damaged.
        """
        folder = self._folder(run)
        current = self._current(folder)
        if not current:
            return {}
        path = folder / f"{current['slot']}.kept"
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
        """The stored answer where the last one belongs to this very instruction."""
        folder = self._folder(instruction.run)
        current = self._current(folder)
        if not current or current["answers"] != _identity(instruction):
            return None
        slot = current["slot"]
        try:
            return decode_contribution(
                (folder / f"{slot}.answer.json").read_bytes(), (folder / f"{slot}.answer.bin").read_bytes()
            )
        except (OSError, Rejected) as error:
            raise DataError(f"the site's stored answer in {folder} cannot be read: {error}") from None

    def save(self, instruction: Instruction, kept: dict[str, Groups], answer: Contribution) -> None:
        """Write the other slot, then point `current` at it."""
        folder = self._folder(instruction.run)
        private_folder(folder)
        slot = "b" if self._current(folder).get("slot") == "a" else "a"
        flat = {f"{owner}:{name}": t for owner, groups in kept.items() for name, t in flatten(groups).items()}
        manifest, blob = encode_contribution(answer)
        write_whole(folder / f"{slot}.kept", save({n: t.detach().cpu().contiguous() for n, t in flat.items()}))
        write_whole(folder / f"{slot}.answer.json", manifest)
        write_whole(folder / f"{slot}.answer.bin", blob)
        current = json.dumps({"slot": slot, "answers": _identity(instruction)}).encode()
        write_whole(folder / "current", current)

    def _folder(self, run: str) -> Path:
        return self.root / self.site / run

    def _current(self, folder: Path) -> dict[str, str]:
        try:
            found: dict[str, str] = json.loads((folder / "current").read_text())
        except FileNotFoundError:
            return {}
        return found


def _identity(instruction: Instruction) -> str:
    return f"{instruction.job.hash} {instruction.kind} {instruction.task} {instruction.round}"

