"""One line registers a thing by name; an unknown name lists the nearest; a duplicate is an error."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from shared_models.errors import ConfigError, UnknownNameError

T = TypeVar("T")


def nearest(name: str, known: list[str]) -> str:
    """`; did you mean 'a' or 'b'?`, or the whole list where nothing is near."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known: " + ", ".join(sorted(known))


class Registry(Generic[T]):
    """A name -> thing table that fills itself by importing a module, and every module in it, on first use.

    Args:
        kind: what the things are called in messages, e.g. `model`.
        package: the package whose modules register things when imported, or one such module.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._things: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: `@model("vit")`.

        Raises:
            ConfigError: the name is taken.
        """

        def add(thing: T) -> T:
            if name in self._things:
                raise ConfigError(f"{self.kind} '{name}' is registered twice: {self._things[name]!r} and {thing!r}")
            self._things[name] = thing
            return thing

        return add

    def __getitem__(self, name: str) -> T:
        return self.get(name)

    def get(self, name: str, where: str = "") -> T:
        """The thing of that name; raises an UnknownNameError that starts with the place, e.g. `job.toml: [model]`."""
        self._load()
        if name not in self._things:
            unknown = f"unknown {self.kind} '{name}'"
            raise UnknownNameError(f"{where}: {unknown}" if where else unknown, hint=nearest(name, list(self._things)))
        return self._things[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._things))

    def _load(self) -> None:
        if self._loaded:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
            importlib.import_module(f"{self.package}.{module.name}")
        self._loaded = True  # only now: an import that failed is tried, and reported, again
