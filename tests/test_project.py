"""What holds for the whole project: who imports whom, what starts light, what is in the wheel."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("shared_models", "client", "server", "simulations", "fedzoo")
MAY_IMPORT = {
    "shared_models": {"shared_models"},
    "client": {"shared_models", "client"},
    "server": {"shared_models", "server"},
    "simulations": {"shared_models", "client", "server", "simulations"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_who_may_import_whom(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        wrong = imported(path) & set(OURS) - MAY_IMPORT[package]
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_help_imports_neither_torch_nor_flwr() -> None:
    code = (
        "import sys, fedzoo\n"
        "for words in (['--help'], ['compare', '--help'], ['server', 'start', '--help'], ['client', '--help'],"
        "              ['attack', '--help'], ['attack', 'membership', '--help']):\n"
        "    try: fedzoo.main(words)\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'flwr', 'grpc', 'sklearn', 'scipy', 'jinja2', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "simulate" in done.stdout


@pytest.mark.parametrize("name", ["client", "simulations"])
def test_an_intruder_with_a_generic_name_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "fedzoo", "models"], capture_output=True, text=True, env=env, cwd=tmp_path, check=False
    )
    assert done.returncode == 1
    assert f"the package '{name}' was found in {tmp_path}" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_wheel_holds_the_product_and_no_tests(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"server", "client", "shared_models", "simulations", "fedzoo.py"}
    for needed in ("simulations/templates/report.html.j2", "simulations/demo.toml", "shared_models/py.typed"):
        assert needed in names


def test_examples_load() -> None:
    from shared_models.job import Job

    jobs = sorted((ROOT / "examples").rglob("*.toml"))
    assert len(jobs) >= 3
    for path in jobs:
        Job.load(path)
