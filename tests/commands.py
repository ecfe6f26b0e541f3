"""What tests of the command line share: a sound job, a process of its own, and what lies in a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from typer import Typer
from typer.testing import CliRunner

import fedzoo
from shared_models.errors import FedzooError
from shared_models.process import free_ports

ROOT = Path(fedzoo.__file__).resolve().parent
JOB = """\
name = "job"
model = { name = "logistic" }
task = { labels = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"] }
data = { shape = [1, 8, 8] }
train = { momentum = 0.9 }
federation = { rounds = 2, min_sites = 3 }
"""


PORTS = ("fleet", "control", "enroll", "member")


def port_options() -> list[str]:
    """Options of `server init` with ports that nothing listens on."""
    return [w for name, port in zip(PORTS, free_ports(len(PORTS)), strict=True) for w in (f"--{name}-port", str(port))]


def files(folder: Path) -> dict[str, bytes | None]:
    """Every path below, with what files hold."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def has(line: str, *words: str) -> None:
    """All words stand in the line."""
    assert [word for word in words if word not in line] == [], line


def process(*words: str) -> subprocess.Popen[str]:
    """The command as a process of its own in this folder."""
    command = [sys.executable, "-m", "fedzoo", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_here(app: Typer, *words: str) -> str:
    """What a command prints, carried out in this process; our own errors are raised."""
    result = CliRunner().invoke(app, list(words))
    if isinstance(result.exception, FedzooError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout
