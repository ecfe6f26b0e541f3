"""Self-contained HTML pages, in one style: no network, script or font. Templates lie in `templates/`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from shared_models.errors import RunError


def write(template: str, view: Mapping[str, Any], path: Path, what: str) -> Path:
    """Fill a template in and write the page; returns its path.

    Raises:
        RunError: the file cannot be written; `what` says what it is.
    """
    page = _environment().get_template(template).render(view)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{what} cannot be written to {path}: {error.strerror}") from None
    return path


def sentence(text: str) -> str:
    """With a capital letter in front."""
    return text[:1].upper() + text[1:]


def flat(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings as dotted names and values, in the form `--set` takes them."""
    settings: list[tuple[str, str]] = []
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            settings += flat(value, f"{prefix}{key}.")
        else:
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            settings.append((f"{prefix}{key}", shown))
    return settings


def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("simulations", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["sentence"] = sentence
    made.filters["behind"] = lambda unit: f" {unit}" if unit else ""
    return made
