"""Readers of private data: `read` is the one way in; `check` tells a site's owner what is there before any job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared_models.errors import ConfigError, DataError

if TYPE_CHECKING:  # torch is loaded by who reads, not by who asks for help
    from client.readers.base import Reader, Store, Wanted

GIVES = {
    "class": "classes",
    "mask": "masks",
    "box": "one box an image",
    "boxes": "boxes",
    "tokens": "texts",
    "none": "inputs",
}


def read(format: str, root: Path, wanted: Wanted) -> Store:
    """Decode everything below `root` that a job wants.

    Raises:
        UnknownNameError: there is no such reader; lists the nearest.
        ConfigError: the reader cannot give what the job's task wants for every example.
        DataError: the data are not there, or more of them than `wanted.skip_bad` cannot be used.
    """
    from client.readers.base import readers

    targets = readers[format].targets
    if wanted.target not in targets:
        gives = " or ".join(GIVES[t] for t in targets if t != "none" or len(targets) == 1)
        able = [name for name in readers if wanted.target in readers[name].targets]
        raise ConfigError(
            f"reader '{format}' gives {gives}, the task wants {GIVES[wanted.target]}",
            hint=f"Readers that give them: {', '.join(able)}",
        )
    from client.streams import streamed

    store = streamed(_reader(format, root).read(root, wanted), wanted.stream)
    if not wanted.proposals:
        return store
    from client.proposals import propose

    return replace(store, proposals=propose(store.x, wanted.proposals))


def check(folder: Path, format: str) -> dict[str, Any]:
    """Counts per part and class, and every unreadable file; raises UnknownNameError or DataError."""
    return _reader(format, folder).check(folder)


def _reader(format: str, root: Path) -> Reader:
    from client.readers.base import readers
    from client.readers.folders import shown

    chosen = readers[format]
    if chosen.needs_root and not root.exists():
        raise DataError(f"{shown(root)} does not exist", hint="Name the folder or file that holds the data")
    return chosen()
