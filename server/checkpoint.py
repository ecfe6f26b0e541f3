"""A run's checkpoint: tensors in safetensors and the rest in JSON, replaced by one rename.

`state.json` names the tensor file it belongs to and that file's SHA-256; it is renamed into place after the tensors are
on disk. A crash at any point leaves the checkpoint of the round before or of this one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from shared_models.errors import RunError
from shared_models.files import write_whole
from shared_models.sums import Groups
from shared_models.wire import flatten, unflatten


def write_checkpoint(folder: Path, groups: Groups, facts: dict[str, Any]) -> None:
    """Replace the checkpoint in `folder` by these tensors and facts (plain data)."""
    folder.mkdir(parents=True, exist_ok=True)
    data = save({n: t.detach().cpu().contiguous() for n, t in flatten(groups).items()})
    digest = hashlib.sha256(data).hexdigest()
    name = f"state-{digest[:16]}.safetensors"
    write_whole(folder / name, data)
    write_whole(folder / "state.json", json.dumps({"tensors": name, "sha256": digest, **facts}).encode())
    for old in folder.glob("state-*.safetensors"):
        if old.name != name:
            old.unlink()


def read_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]] | None:
    """(groups, facts) of the last whole checkpoint, or None.

    Raises:
        RunError: the tensors do not match their SHA-256.
    """
    try:
        facts = json.loads((folder / "state.json").read_text())
    except FileNotFoundError:
        return None
    data = (folder / facts["tensors"]).read_bytes()
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise RunError(f"the checkpoint in {folder} is damaged: its SHA-256 differs", hint="Restore it from a backup")
    return unflatten(load(data)), facts
