"""Arguments and options that several commands of the simulator share."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

JobFile = Annotated[Path, typer.Argument(metavar="JOB.toml", help="A job file.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a setting, e.g. federation.rounds=5.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for the results.", show_default="runs/<job>-<time>")]
SkipBad = Annotated[int, typer.Option("--skip-bad", min=0, help="Pass over up to N unusable files, and list them.")]


def typed() -> str:
    """The command line as it can be typed again."""
    return shlex.join(["fedzoo", *sys.argv[1:]])
