"""From what a person wrote (TOML, `--set`) to a settings object, or to one line that says what is wrong and where."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from shared_models.errors import ConfigError

T = TypeVar("T", bound=BaseModel)

_LONGEST_VALUE = 60
_TYPES = {"model_type": "should be a table of settings", "tuple_type": "should be a list"}


def validate(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """`data` as a `cls`.

    Args:
        cls: the pydantic model of the settings.
        data: the keys as they were written.
        where: the place to name in the message, e.g. `job.toml` or `[model] vit`.

    Raises:
        ConfigError: one line with every problem: the path of the key, what is wrong with it, and the nearest known
            keys where it is unknown.
    """
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        problems = [_problem(cls, detail) for detail in error.errors(include_url=False)]
    raise ConfigError(f"{where}: {'; '.join(problems)}")


def _problem(cls: type[BaseModel], detail: ErrorDetails) -> str:
    """One pydantic error in the words of a person who has never heard of pydantic."""
    path = detail["loc"]
    key = ".".join(str(part) for part in path)
    kind = detail["type"]
    if kind == "extra_forbidden":
        return f"unknown key '{key}', {_nearest_key(str(path[-1]), _keys_at(cls, path[:-1]))}"
    if kind == "missing":
        return f"'{key}' is missing"
    if kind == "value_error":  # a ValueError of one of our own validators: already a whole sentence
        reason = str(detail["ctx"]["error"])
        return f"'{key}': {reason}" if key else reason
    message = _TYPES.get(kind) or detail["msg"].removeprefix("Input ").removeprefix("String ")
    value = repr(detail["input"])
    shown = value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]}…"
    return f"'{key}' {message}, not {shown}" if key else f"{message}, not {shown}"


def _nearest_key(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    return "known: " + ", ".join(names)


def _keys_at(cls: type[BaseModel], path: tuple[int | str, ...]) -> set[str]:
    """The keys known at `path` inside `cls`; parts that are no key (an index, the tag of a union) are stepped over."""
    here = {cls}
    for part in path:
        inner = {m for c in here for key, f in _fields(c).items() if key == part for m in _models_in(f.annotation)}
        here = inner or here
    return {key for c in here for key in _fields(c)}


def _fields(cls: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field for name, field in cls.model_fields.items()}


def _models_in(annotation: Any) -> set[type[BaseModel]]:
    """Every pydantic model named in an annotation such as `tuple[A, ...]` or `A | B | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {found for argument in get_args(annotation) for found in _models_in(argument)}
