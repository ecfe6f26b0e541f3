"""Test texts with what each paradigm's model writes, for the report of a simulation; a node never sends one."""

from __future__ import annotations

import torch

from client.workbench import Workbench, determinism
from shared_models.job import Job
from shared_models.keys import key, keyed_global
from shared_models.tasks.base import Task, make_task
from simulations.paradigms import Result
from simulations.partition import SitePopulation
from simulations.pictures import first_tests
from simulations.results import Quote


def quotes(job: Job, sites: SitePopulation, result: Result, name: str) -> list[Quote]:
    """What the result's (first) model writes for the first test texts; nothing for tasks that write none."""
    task = make_task(job)
    if type(task).quote is Task.quote:
        return []
    examples = first_tests(sites)
    bench = Workbench(job, start=next(iter(result.models.values())))
    bench.model.eval()
    with (
        determinism(job.train.deterministic),
        torch.inference_mode(),
        keyed_global(key(job.seed, "quotes"), bench.device),
    ):
        batch = examples.batch(torch.arange(len(examples)), bench.device)
        said = task.quote(task.examine(bench.model, batch, "test"), batch)
    return [Quote(paradigm=name, given=given, wanted=wanted, said=written) for given, wanted, written in said]
