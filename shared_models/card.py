"""The card of a model: what the zoo declares about it, and what one of its sizes costs on this machine.

Times are medians over a few repetitions after a warm-up, on random examples of the task's form. A training step is
forward pass, loss, backward pass and a step of SGD at rate zero: the same work, and the weights stay.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from shared_models.errors import ConfigError
from shared_models.job import Job
from shared_models.keys import generator, key, keyed_global
from shared_models.messages import payload_bytes
from shared_models.models import FORMS, Model, Shape, configure, models
from shared_models.registry import nearest
from shared_models.spec import build_model
from shared_models.tasks.base import Batch, Task, make_task, tasks
from shared_models.tokens import BYTES
from shared_models.weights import Match

REPEATS, SECONDS = 5, 4.0  # a measurement ends after so many repetitions, or once they took so long
PROPOSALS = 64  # random regions per example, for models that need them
COUNTED = "counted: values kept for the backward pass, parameters, buffers and gradients; without temporaries"
ALLOCATED = "largest amount allocated on the device"


@dataclass(frozen=True)
class Cost:
    """One model on this machine.

    Attributes:
        parameters: numbers that make up the model, a tied one once.
        payload_bytes: of the entries that cross the network, each way, per site and round.
        fingerprint: of a job with this model, task, shape and classes and defaults otherwise.
        step_seconds: one training step.
        inference_seconds: one forward pass in evaluation mode.
        memory_bytes: of a training step.
        memory: how that was measured.
        match: what was loaded from a file of weights.
    """

    parameters: int
    payload_bytes: int
    fingerprint: str
    step_seconds: float
    inference_seconds: float
    memory_bytes: int
    memory: str
    match: Match | None


def make_card(
    name: str,
    *,
    size: str = "tiny",
    task: str = "",
    shape: Shape = (),
    classes: int = 10,
    batch: int = 32,
    weights: str = "",
) -> dict[str, Any]:
    """The card as plain data.

    Args:
        name: of the model.
        size: the one that is measured.
        task: that it is measured on; by default its first.
        shape: of one example; by default the usual one at that size.
        classes: labels of the job.
        batch: examples in a step.
        weights: a file of weights to load, as in `[weights]`.

    Raises:
        ConfigError: no such model, size or task (names the nearest), the model does not serve the task or cannot take
            the shape, or the weights do not fit.
    """
    declared, settings = configure(name, {"size": size}, "fedzoo models show")
    task = task or declared.tasks[0]
    kind = tasks.get(task)
    if task not in declared.tasks:
        raise ConfigError(f"model '{name}' does not serve the task '{task}'", hint=nearest("", list(declared.tasks)))
    shape = shape or _usual(declared, size)
    if len(shape) != 1 or "tokens" not in declared.inputs:  # of a text its length will do
        declared.require(shape)
    job = default_job(name, size=size, task=task, shape=shape, classes=classes, weights=weights)
    cost = measure(job, batch)
    unit = "batch" if "batch" in (declared.unit(settings), kind.unit) else "sample"
    return {
        "model": name,
        "paper": declared.paper,
        "notes": declared.notes,
        "tasks": list(declared.tasks),
        "inputs": list(declared.inputs),
        "unit": unit,
        "privacy": list(declared.privacy),
        "per_sample_gradients": list(declared.per_sample_gradients),
        "stackable": declared.stackable,
        "proposals": declared.proposals,
        "heads": list(declared.heads),
        "sizes": [_size_row(declared, row, job) for row in declared.sizes],
        "settings": settings.model_dump(mode="json", exclude={"size"}),
        "measured": {
            "size": size,
            "task": task,
            "shape": list(shape),
            "classes": classes,
            "batch": batch,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            **asdict(cost),
            "weights": str(cost.match or ""),
        },
        "family": _family(declared, task, shape if size == "tiny" else _usual(declared, "tiny"), classes, batch),
    }


def default_job(name: str, *, size: str, task: str, shape: Shape, classes: int, weights: str = "") -> Job:
    """A job that says nothing but these."""
    labels = [str(c) for c in range(classes)]
    return Job.resolve(
        {
            "name": "card",
            "model": {"name": name, "size": size},
            "task": {"name": task, **({"labels": labels} if wants_labels(task) else {})},
            "data": usual_data(models[name], shape),
            "weights": {"file": weights},
        },
        where="fedzoo models show",
    )


def wants_labels(task: str) -> bool:
    """Whether a job has to list labels for a task."""
    return tasks[task].Settings.model_fields["labels"].is_required()


def usual_data(declared: Model, shape: Shape) -> dict[str, Any]:
    """`[data]` for a model and the shape of what it is built for; texts are bytes, whatever the vocabulary was."""
    form = next((f for f in declared.inputs if len(FORMS[f]) == len(shape)), declared.inputs[0])
    if form == "tokens":
        return {"shape": shape[:1], "tokenizer": BYTES}
    if form == "image-text":
        return {"shape": shape[:3], "tokenizer": BYTES, **({"text_length": shape[3]} if len(shape) > 3 else {})}
    features = [f"feature {i}" for i in range(shape[0])] if len(shape) == 1 else []
    return {"shape": shape, "features": features}


def measure(job: Job, batch_size: int) -> Cost:
    """Build the job's model on this machine's device and measure it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, spec = build_model(job)
    model.to(device)
    task, state = make_task(job), model.state_dict()
    batch = draw(task, job, batch_size).to(device)
    with keyed_global(key(job.seed, "card"), device):
        memory, how = _memory(model, task, batch)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            task.loss(task.forward(model, batch), batch).mean().backward()
            optimizer.step()

        step_seconds = _seconds(step, device)
        model.eval()
        with torch.inference_mode():
            inference_seconds = _seconds(lambda: task.forward(model, batch), device)
    return Cost(
        parameters=_count(model),
        payload_bytes=payload_bytes({"model": {name: state[name] for name in spec.sent}}),
        fingerprint=spec.fingerprint,
        step_seconds=step_seconds,
        inference_seconds=inference_seconds,
        memory_bytes=memory,
        memory=how,
        match=spec.match,
    )


def draw(task: Task, job: Job, count: int) -> Batch:
    """Random examples of the task's form, with random regions where the model needs some."""
    source = generator(job.seed, "card")
    batch = task.draw(job.data.shape, count, source)
    if models[job.model.name].proposals and batch.proposals is None:
        corners = torch.rand(count, PROPOSALS, 2, 2, generator=source).sort(dim=2).values  # low corner first
        batch = replace(batch, proposals=corners.flatten(2))  # (B, R, 4)
    return batch


def _size_row(declared: Model, size: str, job: Job) -> dict[str, Any]:
    """A size, its usual shape and how many parameters it has there, counted without memory for them."""
    _, settings = configure(declared.name, {"size": size})
    shape, task = _usual(declared, size), make_task(job)
    vocabulary = job.data.tokenizer and task.outputs == job.data.sample[-1]
    outputs = shape[-1] if vocabulary else task.outputs
    with torch.device("meta"):
        return {
            "size": size,
            "shape": list(shape),
            "parameters": _count(declared.build(settings, task.shape(shape), outputs, each=task.each)),
        }


def _family(declared: Model, task: str, shape: Shape, classes: int, batch: int) -> dict[str, Any]:
    """All models of the family that serve the task, measured side by side at `tiny` on examples of one shape."""
    members: list[dict[str, Any]] = []
    for name in models:
        if not declared.family or models[name].family != declared.family or task not in models[name].tasks:
            continue
        row: dict[str, Any] = {"model": name, "notes": models[name].notes, "refused": ""}
        try:
            cost = asdict(measure(default_job(name, size="tiny", task=task, shape=shape, classes=classes), batch))
        except ConfigError as error:
            row["refused"] = str(error)
        else:
            columns = ("parameters", "step_seconds", "inference_seconds", "memory_bytes")
            row |= {column: cost[column] for column in columns}
        members.append(row)
    return {"name": declared.family, "shape": list(shape), "members": members}


def _usual(declared: Model, size: str) -> Shape:
    return declared.usual.get(size, declared.usual["tiny"])


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median time of a few repetitions after one that warms up."""
    times: list[float] = []
    work()
    while not times or (len(times) < REPEATS and sum(times) < SECONDS):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(model: nn.Module, task: Task, batch: Batch) -> tuple[int, str]:
    """Bytes that one training step needs, and how they were found.

    A CPU does not say how much it lent, so there the storages that autograd keeps are counted, each once.
    """
    device = batch.x.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    kept: dict[int, int] = {}  # address of a storage -> its bytes

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return value

    for standing in (*model.parameters(), *model.buffers()):
        keep(standing)
    with saved_tensors_hooks(keep, lambda value: value):
        loss = task.loss(task.forward(model, batch), batch).mean()
    loss.backward()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), ALLOCATED
    gradients = sum(p.grad.untyped_storage().nbytes() for p in model.parameters() if p.grad is not None)
    return sum(kept.values()) + gradients, COUNTED
