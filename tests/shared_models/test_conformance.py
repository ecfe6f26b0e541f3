"""What every model of the zoo must do, at its size `tiny` and with every task that it declares."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from client.readers.base import Examples, Splits, Store
from client.workbench import Benches
from server.coordinator import Coordinator
from shared_models.card import usual_data, wants_labels
from shared_models.job import Job
from shared_models.keys import keyed_global
from shared_models.messages import Contribution
from shared_models.models import models
from shared_models.spec import build_model
from shared_models.tasks.base import Batch, Task, make_task
from shared_models.wire import decode_contribution, encode_contribution
from simulations.engines.inprocess import InProcess

PAIRS = [(name, task) for name in models for task in models[name].tasks]
LABELS = ["disc", "square", "cross"]


def a_job(name: str, task: str, **keys: Any) -> Job:
    shape = models[name].usual["tiny"]
    data = usual_data(models[name], (3, *shape[1:]) if task == "colorization" else shape)
    labels = {"labels": LABELS} if wants_labels(task) else {}
    return Job.resolve({
        "name": "conformance", "model": {"name": name, **keys}, "task": {"name": task, **labels}, "data": data,
        "train": {"batch_size": 3, "lr": 0.01}, "federation": {"rounds": 2, "min_sites": 2},
    })  # fmt: skip


def a_batch(job: Job, count: int = 4, seed: int = 1) -> Batch:
    source = torch.Generator().manual_seed(seed)
    batch = make_task(job).draw(job.data.shape, count, source)
    if not models[job.model.name].proposals:
        return batch
    low = torch.rand(count, 12, 2, generator=source) * 0.6
    high = low + 0.1 + 0.3 * torch.rand(count, 12, 2, generator=source)
    return replace(batch, proposals=torch.cat([low, high], dim=2))


def a_site(job: Job, seed: int) -> Splits:
    """Four training examples, two to validate and two to test, drawn by the task."""
    batch = a_batch(job, 8, seed)
    x = batch.x
    if job.data.form in ("image", "image-text"):
        x = (batch.x * 40 + 128).clamp(0, 255).to(torch.uint8)
    elif job.data.form == "tokens":
        x = batch.x.int()
    store = Store(x, batch.y, [str(i) for i in range(8)], job.data, proposals=batch.proposals)
    return Splits(*(Examples(store, torch.tensor(rows)) for rows in ([0, 1, 2, 3], [4, 5], [6, 7])))


def losses(model: nn.Module, task: Task, batch: Batch) -> Tensor:
    with keyed_global(11):
        return task.loss(task.forward(model, batch), batch)


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_two_builds_have_one_fingerprint_and_natures_are_complete(name: str, task: str) -> None:
    job = a_job(name, task)
    (first, spec), (second, again) = build_model(job), build_model(job)
    assert spec.fingerprint == again.fingerprint
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert [e.key for e in spec.entries] == list(first.state_dict())
    trained = {n for n, p in first.named_parameters() if p.requires_grad}
    owners = {e.alias_of for e in spec.entries if e.alias_of}
    assert trained | owners <= set(spec.trained) | owners
    unknown = [e.key for e in spec.entries if e.nature == "constant" and not e.digest]
    assert not unknown, "a constant is covered by its hash"
    personal = [k for k in first.state_dict() if any(fnmatchcase(k, p) for p in models[name].heads)]
    assert personal or not wants_labels(task) or task == "zero-shot", "a model says which entries belong to the labels"
    if 0 < len(personal) < len(first.state_dict()):
        assert list(build_model(job.replace(share={"personal": ["@head"]}))[1].personal) == personal


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_every_parameter_gets_a_gradient_and_the_loss_is_one_value_per_sample(name: str, task: str) -> None:
    job = a_job(name, task)
    model, _ = build_model(job)
    batch = a_batch(job)
    loss = losses(model.train(), make_task(job), batch)
    assert loss.shape == (len(batch),)
    assert torch.isfinite(loss).all()
    loss.mean().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


@pytest.mark.parametrize(("name", "task"), PAIRS)
@pytest.mark.parametrize("training", [True, False])
def test_the_unit_is_as_declared(name: str, task: str, training: bool) -> None:
    """`sample`: the first sample's loss does not move when all others change. With batch norm it must.

    A task whose unit is the batch compares its samples with each other.
    """
    job = a_job(name, task)
    batch, other = a_batch(job), a_batch(job, seed=2)
    x = torch.cat([batch.x[:1], other.x[1:] if job.data.form == "tokens" else 3 * other.x[1:]])
    mixed = Batch(x, _joined(batch.y, other.y))
    if batch.proposals is not None and other.proposals is not None:
        mixed = replace(mixed, proposals=torch.cat([batch.proposals[:1], other.proposals[1:]]))
    model, _ = build_model(job)
    model.train(training)
    chosen = models[name]
    settings = chosen.settings.model_validate(job.model.keys)
    assert chosen.unit(settings) == "sample"
    with torch.no_grad():
        first, again = (losses(model, make_task(job), b)[0] for b in (batch, mixed))
        if make_task(job).unit == "batch":
            assert abs(float(first - again)) > 1e-6
            return
        torch.testing.assert_close(first, again, atol=2e-5, rtol=1e-4)
        if "batch" in str(chosen.settings.model_fields.get("norm", "")) and training:
            normed = a_job(name, task, norm="batch")
            assert chosen.unit(chosen.settings.model_validate(normed.model.keys)) == "batch"
            model = build_model(normed)[0].train()
            first, again = (losses(model, make_task(normed), b)[0] for b in (batch, mixed))
            assert abs(float(first - again)) > 1e-6


def _joined(a: Tensor, b: Tensor) -> Tensor:
    """The first target of `a`, the others of `b`; lists of boxes are padded to one length."""
    if a.dim() == 3 and a.dtype == torch.float32 and a.shape[1] != b.shape[1]:
        most = max(a.shape[1], b.shape[1])
        padded = torch.zeros(len(a), most, 5)
        padded[..., 0] = -1
        padded[:1, : a.shape[1]], padded[1:, : b.shape[1]] = a[:1], b[1:]
        return padded
    return torch.cat([a[:1], b[1:]])


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_saved_and_loaded_it_says_the_same(name: str, task: str, tmp_path: Path) -> None:
    job = a_job(name, task)
    model, spec = build_model(job)
    batch, made = a_batch(job), make_task(job)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    kept = {e.key: model.state_dict()[e.key].contiguous() for e in spec.entries if e.nature != "alias"}
    save_file(kept, tmp_path / "model.safetensors")
    other, _ = build_model(job.replace(seed=job.seed + 1))
    values = load_file(tmp_path / "model.safetensors")
    state = other.state_dict()
    for entry in spec.entries:
        state[entry.key].copy_(values[entry.alias_of or entry.key])  # an alias comes back with what it repeats

    def says(asked: nn.Module) -> dict[str, Tensor]:
        with torch.no_grad(), keyed_global(11):
            return made.sums(made.forward(asked.eval(), batch), batch)

    said, again = says(model), says(other)
    assert all(torch.equal(said[n], again[n]) for n in said)
    assert said.keys() == made.no_sums().keys()
    for n, zero in made.no_sums().items():
        assert (said[n].shape, said[n].dtype) == (zero.shape, zero.dtype), n
        assert not zero.any()


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_two_clients_train_two_rounds(name: str, task: str) -> None:
    job = a_job(name, task)
    sites = {site: a_site(job, seed) for seed, site in enumerate(("a", "b"))}
    heard: list[dict[str, Any]] = []

    def run() -> Coordinator:
        coordinator = Coordinator(job, InProcess(list(sites), sites.__getitem__, Benches(torch.device("cpu"))), "run")
        coordinator.events.listener = heard.append
        outcome = coordinator.run()
        headline = make_task(job).headline
        assert headline in outcome.all_sites
        assert outcome.all_sites["examples"] == 4
        return coordinator

    first, second = run(), run()
    assert not [e for e in heard if e["event"] == "rejected"]
    assert all(torch.equal(second.state["model"][n], t) for n, t in first.state["model"].items())
    start = {n: t for n, t in build_model(job)[0].state_dict().items() if n in first.state["model"]}
    assert any(not torch.equal(start[n], t) for n, t in first.state["model"].items())


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_its_dtypes_survive_the_wire(name: str, task: str) -> None:
    job = a_job(name, task)
    model, spec = build_model(job)
    sent = {n: model.state_dict()[n].detach() for n in spec.sent}
    answer = Contribution("train", "r", "s", groups={"model": sent})
    there = decode_contribution(*encode_contribution(answer)).groups["model"]
    assert there.keys() == sent.keys()
    assert all(there[n].dtype == t.dtype and torch.equal(there[n], t) for n, t in sent.items())
