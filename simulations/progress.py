"""The progress bar of simulations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress(rounds: int, quiet: bool = False) -> Iterator[Callable[[str, int, dict[str, Any]], None]]:
    """A progress bar over all rounds of all runs, on stderr; yields the listener that moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task("starting", total=rounds)

        def listen(cell: str, seed: int, event: dict[str, Any]) -> None:
            if event["event"] == "round":
                bar.update(task, advance=1, description=f"{cell}, seed {seed}")
            elif (
                event["event"] == "found"
            ):  # it was finished before: no work, and nothing that tells how long work takes
                total = (bar.tasks[task].total or 0) - event["rounds"]
                bar.update(task, total=total, description=f"{cell}, seed {seed}: found finished")
            elif event["event"] == "rejected":
                bar.console.print(f"rejected {event['site']} in round {event['round']}: {event['detail']}")

        yield listen
