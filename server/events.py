"""`events.jsonl`: one line per round, rejection and fault: the one source of progress bar, dashboard and report."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

Listener = Callable[[dict[str, Any]], None]


class Events:
    """Appends to a run's event file (where there is one) and tells a listener (where there is one)."""

    def __init__(self, path: Path | None = None, listener: Listener | None = None) -> None:
        self.path = path
        if path is not None and path.exists() and not path.read_bytes().endswith(b"\n"):
            with path.open("a") as sink:  # a crash left half a line
                sink.write("\n")
        self.listener = listener

    def emit(self, event: str, **facts: Any) -> None:
        """Write one line, at once."""
        line = {"event": event, "time": round(time.time(), 3), **without_nan(facts)}
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as sink:
                sink.write(json.dumps(line) + "\n")
        if self.listener is not None:
            self.listener(line)


def without_nan(value: Any) -> Any:
    """Plain data in which a number that is none (a metric of no examples) is null, as JSON wants it."""
    if isinstance(value, dict):
        return {name: without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """(event, offset behind it) of every whole line from `offset`; a line still being written is left for later."""
    if not path.exists():
        return
    with path.open("rb") as source:
        source.seek(offset)
        for line in source:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            with suppress(ValueError):  # half a line that a crash left
                yield json.loads(line), offset
