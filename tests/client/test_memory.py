"""Less memory, the same step: accumulation, halving when memory runs out, bfloat16 and gradient clipping."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from client.handler import Handler
from client.policy import Policy
from client.readers.base import Examples, Splits, Store
from client.state import MemoryState
from client.trainer import evaluate, train
from client.workbench import Workbench
from shared_models.job import Job
from shared_models.messages import Budget, Instruction
from shared_models.methods.base import Progress

CPU = torch.device("cpu")
MakeJob = Callable[..., Job]
MakeSplits = Callable[..., Splits]


def instruction(job: Job) -> Instruction:
    return Instruction("train", "r", "s", job, "", budget=Budget(epochs=1))


def trained(job: Job, splits: Splits, limit: int | None = None) -> tuple[dict[str, Tensor], Progress, Workbench]:
    bench = Workbench(job, CPU)
    if limit is not None:
        bench.model.register_forward_pre_hook(Small(limit))
    progress = train(bench, splits.train, instruction(job), [{}, {}])
    return {n: t.clone() for n, t in bench.entries.items()}, progress, bench


class Small:
    """A device that holds no more than `limit` samples at once."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.seen: list[int] = []

    def __call__(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        self.seen.append(len(given[0]))
        if len(given[0]) > self.limit:
            raise torch.OutOfMemoryError("too large for this device")


def test_accumulated_parts_make_the_same_step(make_job: MakeJob, make_splits: MakeSplits) -> None:
    splits = make_splits(1, count=29)
    whole, *_ = trained(make_job(model={"name": "vit"}, train={"batch_size": 12}), splits)
    for parts in (2, 5, 12):
        job = make_job(model={"name": "vit"}, train={"batch_size": 12, "accumulate": parts})
        found, progress, _ = trained(job, splits)
        assert (progress.steps, progress.samples, progress.halvings) == (3, 29, 0)
        for name, value in whole.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


def test_a_batch_that_does_not_fit_is_halved_until_it_does_and_the_site_says_so(
    make_job: MakeJob, make_splits: MakeSplits
) -> None:
    splits, job = make_splits(1, count=30), make_job(train={"batch_size": 16})
    whole, *_ = trained(job, splits)
    found, progress, bench = trained(job, splits, limit=5)
    assert progress.halvings == bench.halvings == 2
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
    again = train(bench, splits.train, instruction(job), [{}, {}])
    assert again.halvings == 0, "what was learnt about the memory stays"
    assert evaluate(bench, splits.test)["confusion"].sum() == len(splits.test), "measuring keeps within it too"


def test_a_part_that_failed_lets_go_of_its_memory_before_the_halves_are_tried(
    make_job: MakeJob, make_splits: MakeSplits
) -> None:
    """Memory that runs out on the way back: outputs and graph of the failed part must not stand in the next's way."""
    bench = Workbench(make_job(train={"batch_size": 16}), CPU)
    kept: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def forward(module: nn.Module, given: tuple[Any, ...], outputs: Tensor) -> None:
        alive.append(sum(ref() is not None for ref in kept))
        kept.append(weakref.ref(outputs))
        if len(outputs) > 4:
            outputs.register_hook(fail)

    def fail(grad: Tensor) -> None:
        raise torch.OutOfMemoryError("too large for this device")

    bench.model.register_forward_hook(forward)
    progress = train(bench, make_splits(1).train, instruction(bench.job), [{}, {}])
    assert progress.halvings == 2
    assert set(alive) == {0}


def test_the_contribution_carries_the_halvings(make_job: MakeJob, make_splits: MakeSplits) -> None:
    job, splits = make_job(train={"batch_size": 16}), make_splits(1)
    bench = Workbench(job, CPU)
    bench.model.register_forward_pre_hook(Small(8))
    site = Handler("s", lambda job: splits, MemoryState(), Policy(approve_all=True), lambda job, start: bench)
    model = {n: t.clone() for n, t in bench.sent().items()}
    asked = Instruction("train", "r", "s", job, bench.spec.fingerprint, groups={"model": model})
    answer = site.handle(asked)
    assert (answer.code, answer.halvings) == ("ok", 1)


def test_not_even_one_example_fits(make_job: MakeJob, make_splits: MakeSplits) -> None:
    job, splits = make_job(), make_splits(1)
    bench = Workbench(job, CPU)
    bench.model.register_forward_pre_hook(Small(0))
    site = Handler("s", lambda job: splits, MemoryState(), Policy(approve_all=True), lambda job, start: bench)
    model = {n: t.clone() for n, t in bench.sent().items()}
    answer = site.handle(Instruction("train", "r", "s", job, bench.spec.fingerprint, groups={"model": model}))
    assert answer.code == "out-of-memory"
    assert not answer.groups


@pytest.mark.gpu
def test_a_gpu_that_runs_out_of_memory_is_survived(make_job: MakeJob) -> None:
    """ViT-B/16 on a batch of 256 images of 224x224 within 6 GB, which hold a few of them."""
    job = make_job(
        model={"name": "vit", "size": "b16"}, data={"shape": [3, 224, 224]},
        train={"batch_size": 256, "precision": "bf16", "deterministic": False},
    )  # fmt: skip
    x = torch.randint(0, 256, (256, 3, 224, 224), dtype=torch.uint8)
    store = Store(x, torch.arange(256) % 10, [str(i) for i in range(256)], job.data)
    data = Examples(store, torch.arange(256))
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(6e9 / total)
    try:
        bench = Workbench(job, torch.device("cuda"))
        progress = train(bench, data, instruction(job), [{}, {}])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert progress.halvings > 0
    assert all(bool(torch.isfinite(t).all()) for t in bench.entries.values())


def test_bfloat16_computes_in_it_and_keeps_float32_weights(make_job: MakeJob, make_splits: MakeSplits) -> None:
    splits = make_splits(1)
    exact, *_ = trained(make_job(), splits)
    job = make_job(train={"precision": "bf16"})
    bench = Workbench(job, CPU)
    seen: list[torch.dtype] = []
    next(m for m in bench.model.modules() if isinstance(m, nn.Linear)).register_forward_hook(
        lambda module, given, out: seen.append(out.dtype)
    )
    train(bench, splits.train, instruction(job), [{}, {}])
    assert set(seen) == {torch.bfloat16}
    for name, value in bench.entries.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name], atol=0.02, rtol=0.1)
    assert any(not torch.equal(value, exact[name]) for name, value in bench.entries.items())
    evaluate(bench, splits.test)
    assert set(seen) == {torch.bfloat16}


def test_a_clipped_step_is_no_longer_than_the_rate_times_the_limit(make_job: MakeJob, make_splits: MakeSplits) -> None:
    job = make_job(train={"lr": 0.5, "clip": 0.01, "batch_size": 30})
    bench = Workbench(job, CPU)
    before = {n: t.clone() for n, t in bench.entries.items()}
    progress = train(bench, make_splits(1, count=30).train, instruction(job), [{}, {}])
    assert progress.steps == 1
    moved = torch.cat([(t - before[n]).flatten() for n, t in bench.entries.items()]).norm().item()
    assert moved == pytest.approx(0.5 * 0.01, rel=1e-4)
