"""The ServerApp that SuperLink starts: a thin adapter from a Flower run to the round loop of our run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from server.chain import run_stages, stage_folder
from server.config import ServerFolder
from server.coordinator import Coordinator
from server.events import Events, without_nan
from server.flower_executor import FlowerExecutor
from server.nodes import Roster
from server.runs import ACTIVE, RunFolder, find_run
from shared_models.errors import FedzooError
from shared_models.files import write_whole
from shared_models.flower import shorten_object_backoff
from shared_models.job import Job
from shared_models.schedule import stage_run
from shared_models.secret import load_secret

log = logging.getLogger("fedzoo.server")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run, or carry on, the run named in the Flower run's configuration."""
    shorten_object_backoff()
    server = ServerFolder(Path(str(context.run_config["server-dir"])))
    run = find_run(server.runs, str(context.run_config["run"]))
    with run.carried():
        if run.status().state not in (*ACTIVE, "created"):
            return
        run.write(state="running")
        _carry(run, server, grid)


def _carry(run: RunFolder, server: ServerFolder, grid: Grid) -> None:
    """The round loop, to its end or to the error that stops it."""
    events = Events(run.path / "events.jsonl")
    try:
        job = run.job()
        executor = FlowerExecutor(grid, Roster(server.nodes), job.federation.round_timeout, events)

        def round_loop(step: Job, start: Mapping[str, Tensor]) -> Coordinator:
            folder, executor.timeout = stage_folder(run.path, step), step.federation.round_timeout
            secret = load_secret(run.secret, "the run's secret") if step.privacy.mode == "client" else None
            return Coordinator(
                step, executor, stage_run(run.id, step), folder=folder, events=events, start=start, secret=secret
            )

        outcome = run_stages(job, round_loop)
    except FedzooError as error:
        events.emit("failed", code=error.code, reason=str(error))
        run.write(only_from=("running",), state="failed", reason=str(error))
        log.error("run %s failed: %s", run.id, error)
        return
    write_whole(run.path / "result.json", json.dumps({"version": version("fedzoo"), **without_nan(outcome.document())}))
    run.write(only_from=("running",), state="done")
    run.secret.unlink(missing_ok=True)  # nobody needs to draw that noise again
