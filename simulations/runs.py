"""The runs of a comparison: one for each paradigm and seed. What is finished is found again, some run side by side.

A run leaves `outcome.json` and `models.safetensors` in its folder when it has ended; a run that was killed before
begins anew, because what simulated sites remember lives in memory.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from client.workbench import Benches
from server.outcome import Totals
from shared_models.errors import FedzooError, RunError
from shared_models.files import write_whole
from shared_models.job import Job
from shared_models.tasks.base import make_task
from simulations.paradigms import Result, Setting
from simulations.paradigms import paradigms as places
from simulations.partition import SitePopulation
from simulations.results import paradigm_name

Listen = Callable[[str, int, dict[str, Any]], None]
"""(cell name, seed, event) for every event of every run."""


@dataclass(frozen=True)
class Run:
    """One paradigm with one seed.

    Attributes:
        job: place, time, continual method and seed are in it.
    """

    job: Job

    @property
    def cell(self) -> str:
        """The name of the paradigm."""
        return paradigm_name(self.job.place, self.job.time, self.method)

    @property
    def method(self) -> str:
        """The continual method; empty offline."""
        return self.job.continual.name if self.job.time == "continual" else ""

    @property
    def name(self) -> str:
        """Of its folder."""
        method = "" if self.method in ("", "finetune") else f"-{self.method.replace('+', 'p')}"
        return f"{self.job.place}-{self.job.time}{method}-{self.job.seed}"

    def rounds(self, sites: int) -> int:
        """How many it makes: an isolated one makes its own at each of so many sites."""
        return sum(step.federation.rounds for step in self.job.steps) * (sites if self.job.place == "isolated" else 1)

    def carry_out(self, sites: SitePopulation, benches: Benches, folder: Path | None, listen: Listen | None) -> Result:
        """The result, found again where it was finished with this very job on these very sites.

        Args:
            sites: the split that all runs share.
            benches: keeps models warm from run to run.
            folder: that of the comparison; None keeps nothing.
            listen: hears every event.

        Raises:
            FedzooError: it failed, or the folder holds a finished run of another job or of other data.
        """
        place, last = folder / self.name if folder else None, self.job.steps[-1]
        identity = {
            "job": self.job.hash,
            "simulation": self.job.simulation.model_dump(mode="json"),
            "sites": sites.partition.hash,
            "data": sites.digest(last.cuts_labels or make_task(last).target != "none"),
        }
        found = _found(place, identity) if place else None
        if found is not None:
            if listen:
                listen(self.cell, self.job.seed, {"event": "found", "rounds": self.rounds(len(sites.names))})
            return found
        if place:
            shutil.rmtree(place, ignore_errors=True)
        listener = (lambda event: listen(self.cell, self.job.seed, event)) if listen else None
        setting = Setting(self.job, sites, benches, run=self.name, folder=place, listener=listener)
        result = places[self.job.place](setting)
        if place:
            _leave(place, identity, result)
        return result


def side_by_side(
    runs: Sequence[Run], sites: SitePopulation, folder: Path, processes: int, listen: Listen | None
) -> Iterator[Result | FedzooError]:
    """The results of runs in their order, carried out in so many processes; an error stands for one that failed.

    Each process computes with one thread.
    """
    context = multiprocessing.get_context("spawn")
    events = context.Queue() if listen else None
    drain = threading.Thread(target=_drain, args=(events, listen), daemon=True)
    if events:
        drain.start()
    pool = ProcessPoolExecutor(processes, context, _begin, (sites, folder, events))
    try:
        for run, done in [(run, pool.submit(_one, run)) for run in runs]:
            try:
                failed = done.result()
            except BrokenProcessPool:
                raise RunError(
                    f"the process that carried out {run.name} has died, perhaps for want of memory",
                    hint="Go on with the same command and --out, and fewer --jobs",
                ) from None
            yield failed or run.carry_out(sites, Benches(), folder, None)  # which finds what the process has left
    finally:
        pool.shutdown(cancel_futures=True)
        if events:
            events.put(None)
            drain.join()


_shared: dict[str, Any] = {}


def _begin(sites: SitePopulation, folder: Path, events: Any) -> None:
    torch.set_num_threads(1)
    _shared.update(sites=sites, folder=folder, benches=Benches(), events=events)


def _one(run: Run) -> FedzooError | None:
    """What failed; the result lies in the folder, where the parent finds it: tensors do not travel."""
    events = _shared["events"]
    listen = (lambda *said: events.put(said)) if events else None
    try:
        run.carry_out(_shared["sites"], _shared["benches"], _shared["folder"], listen)
        return None
    except FedzooError as error:
        return error


def _drain(events: Any, listen: Listen) -> None:
    while (said := events.get()) is not None:
        listen(*said)


def _leave(place: Path, identity: Mapping[str, Any], result: Result) -> None:
    """The models first: without the other file a run is not finished."""
    flat = {f"{name}/{entry}": t.contiguous() for name, model in result.models.items() for entry, t in model.items()}
    write_whole(place / "models.safetensors", save(flat))
    write_whole(place / "outcome.json", json.dumps({**identity, "result": asdict(replace(result, models={}))}))


def _found(place: Path, identity: Mapping[str, Any]) -> Result | None:
    """The result of a finished run; None where there is none."""
    try:
        left = json.loads((place / "outcome.json").read_bytes())
        if {name: left[name] for name in identity} != identity:
            raise RunError(
                f"{place} holds a finished run of another job, other data or another split",
                hint="Name another folder, or delete that one",
            )
        models: dict[str, dict[str, torch.Tensor]] = {}
        for path, tensor in load((place / "models.safetensors").read_bytes()).items():
            name, _, entry = path.partition("/")
            models.setdefault(name, {})[entry] = tensor
        fields = left["result"]
        return Result(**{**fields, "totals": Totals(**fields["totals"]), "models": models})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(
            f"{place} holds a run that cannot be read: {error}", hint="Delete it, or name another folder"
        ) from None
