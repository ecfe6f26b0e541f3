"""A registry fills itself once, on first use, and explains what it does not have."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shared_models.errors import ConfigError, UnknownNameError
from shared_models.registry import Registry, nearest

Package = Callable[..., "Registry[str]"]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """Write the package `shapes`, whose modules register into `shapes_base.registry`; `module="source"` each."""

    def write(**modules: str) -> Registry[str]:
        (tmp_path / "shapes").mkdir()
        (tmp_path / "shapes" / "__init__.py").write_text("")
        base = "from shared_models.registry import Registry\nregistry = Registry('shape', 'shapes')\nloads = []\n"
        (tmp_path / "shapes_base.py").write_text(base)
        for name, source in modules.items():
            (tmp_path / "shapes" / f"{name}.py").write_text(f"from shapes_base import loads, registry\n{source}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        for name in [m for m in sys.modules if m.partition(".")[0] in ("shapes", "shapes_base")]:
            monkeypatch.delitem(sys.modules, name)
        importlib.invalidate_caches()
        registry: Registry[str] = importlib.import_module("shapes_base").registry
        return registry

    return write


def loads() -> list[str]:
    found: list[str] = sys.modules["shapes_base"].loads
    return found


def test_nothing_is_imported_before_the_first_question_and_each_module_once(package: Package) -> None:
    registry = package(
        circle="loads.append('circle')\nregistry.register('circle')('a circle')",
        square="loads.append('square')\nregistry.register('square')('a square')\nregistry.register('cube')('a cube')",
    )
    assert loads() == []
    assert "shapes" not in sys.modules
    assert registry["square"] == "a square"
    assert list(registry) == ["circle", "cube", "square"]
    assert "cube" in registry
    assert "cone" not in registry
    assert sorted(loads()) == ["circle", "square"]


def test_a_module_may_ask_the_registry_while_it_is_loaded(package: Package) -> None:
    registry = package(a="loads.append(registry['b'])\nregistry.register('a')('1')", b="registry.register('b')('2')")
    assert list(registry) == ["a", "b"]
    assert loads() == ["2"]


def test_an_import_that_fails_is_reported_every_time_and_not_as_an_unknown_name(package: Package) -> None:
    registry = package(broken="import a_module_that_is_not_installed", circle="registry.register('circle')('a circle')")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_installed"):
            registry["circle"]


def test_a_single_module_may_be_the_package() -> None:
    registry: Registry[str] = Registry("thing", "shared_models.errors")
    registry.register("x")("y")
    assert list(registry) == ["x"]


def test_a_name_given_twice_is_an_error_that_shows_both() -> None:
    registry: Registry[str] = Registry("shape", "shared_models.errors")
    assert registry.register("circle")("first") == "first"
    with pytest.raises(ConfigError, match="shape 'circle' is registered twice: 'first' and 'second'"):
        registry.register("circle")("second")
    assert registry["circle"] == "first"


def test_an_unknown_name_lists_the_nearest_or_all() -> None:
    registry: Registry[str] = Registry("shape", "shared_models.errors")
    for name in ("square", "circle", "sphere"):
        registry.register(name)(name)
    with pytest.raises(UnknownNameError) as error:
        registry["circel"]
    assert str(error.value) == "unknown shape 'circel'. did you mean 'circle'?"
    with pytest.raises(UnknownNameError) as error:
        registry["x"]
    assert str(error.value) == "unknown shape 'x'. known: circle, sphere, square"


def test_nearest_puts_the_closest_first() -> None:
    assert nearest("resnet", ["vit", "resnet18", "resnet34"]) in (
        "did you mean 'resnet18' or 'resnet34'?",
        "did you mean 'resnet34' or 'resnet18'?",
    )
