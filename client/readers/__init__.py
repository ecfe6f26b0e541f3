"""Readers of private data. `check` tells a site's owner what is there before any job comes."""

from pathlib import Path
from typing import Any


def check(folder: Path, data_format: str) -> dict[str, Any]:
    """Counts per part and class, and every unreadable file; raises UnknownNameError or DataError."""
    from client.readers.base import readers

    return readers[data_format]().check(folder)
