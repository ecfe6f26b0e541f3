"""The trainer against a plain PyTorch loop that imports nothing of ours, and its own schedules and batches."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from client.readers.base import Examples, Splits
from client.trainer import batches, evaluate, learning_rate, train
from client.workbench import Workbench
from shared_models.job import Job
from shared_models.job_parts import TrainPart
from shared_models.messages import Budget, Instruction
from shared_models.schedule import count_steps

CPU = torch.device("cpu")


def plain_loop(model, x, y, kind, lr, momentum, weight_decay, batch_size, epochs, seed, site, round):
    """Thirty lines of PyTorch as anyone would write them; the batch order is the documented one, computed here."""
    if kind == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    model.train()
    for epoch in range(epochs):
        text = "\x1f".join((str(seed), "order", site, "0", str(round), str(epoch)))
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(number))
        for start in range(0, len(x), batch_size):
            rows = order[start : start + batch_size]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("model", ["mlp", "cnn", "vit", "resnet18", "logistic"])
@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01},
        {"optimizer": "adamw", "lr": 0.003, "weight_decay": 0.05},
    ],
    ids=["sgd", "momentum", "adamw"],
)
def test_equals_a_plain_loop(
    make_job: Callable[..., Job], make_splits: Callable[..., Splits], model: str, settings: dict[str, object]
) -> None:
    job = make_job(model={"name": model}, train={**settings, "epochs": 2, "batch_size": 8}, seed=5)
    data = make_splits(1, count=21).train
    bench = Workbench(job, CPU)
    by_hand = copy.deepcopy(bench.model)
    instruction = Instruction("train", "r", "site-x", job, "", round=1, rounds=2, budget=Budget(epochs=2))
    progress = train(bench, data, instruction, [{}, {}])
    x = (data.store.x[data.rows].float() - 127.5) / 127.5
    part = job.train
    expected = plain_loop(
        by_hand, x, data.y, part.optimizer, part.lr, part.momentum, part.weight_decay, 8, 2, 5, "site-x", 1
    )
    assert (progress.steps, progress.samples) == (6, 42)
    assert progress.lr_sum == pytest.approx(6 * part.lr)
    for name, value in expected.items():
        assert torch.equal(bench.entries[name], value), name


@pytest.mark.parametrize(
    ("examples", "batch", "budget", "sizes"),
    [
        (10, 4, Budget(epochs=1), [4, 4, 2]),
        (10, 4, Budget(epochs=2), [4, 4, 2, 4, 4, 2]),
        (10, 4, Budget(epochs=0.5), [4, 1]),
        (10, 4, Budget(epochs=1.3), [4, 4, 2, 3]),
        (10, 4, Budget(steps=4), [4, 4, 2, 4]),
        (3, 8, Budget(steps=2), [3, 3]),
        (10, 4, Budget(epochs=0.001), [1]),
    ],
)
def test_budget_is_exact(examples: int, batch: int, budget: Budget, sizes: list[int]) -> None:
    found = list(batches(examples, batch, budget, 0, site="a", task=0, round=0))
    assert [len(rows) for rows in found] == sizes
    assert count_steps(examples, batch, budget) == len(sizes)


def test_an_epoch_is_a_permutation_and_the_key_matters() -> None:
    def order(**where: object) -> list[int]:
        keys = {"seed": 0, "site": "a", "task": 0, "round": 0, **where}
        seed = keys.pop("seed")
        return torch.cat(list(batches(50, 8, Budget(epochs=1), seed, **keys))).tolist()  # type: ignore[arg-type]

    assert sorted(order()) == list(range(50))
    assert order() == order()
    others = [order(seed=1), order(site="b"), order(task=1), order(round=1)]
    assert all(other != order() for other in others)


def test_schedules_by_hand() -> None:
    constant = TrainPart(lr=0.2)
    assert [learning_rate(constant, p) for p in (0.0, 0.5, 0.99)] == [0.2] * 3
    cosine = TrainPart(lr=0.2, schedule="cosine", warmup=0.2)
    assert learning_rate(cosine, 0.0) == 0.0
    assert learning_rate(cosine, 0.1) == pytest.approx(0.1)
    assert learning_rate(cosine, 0.2) == pytest.approx(0.2)
    assert learning_rate(cosine, 0.6) == pytest.approx(0.1)
    assert learning_rate(cosine, 0.9) == pytest.approx(0.2 * (1 + math.cos(math.pi * 0.875)) / 2)


def test_schedule_does_not_restart_with_a_round(
    make_job: Callable[..., Job], make_splits: Callable[..., Splits]
) -> None:
    job = make_job(train={"schedule": "cosine", "lr": 1e-3})
    data = make_splits(1, count=16).train  # two steps a round
    sums = []
    for round in range(2):
        instruction = Instruction("train", "r", "a", job, "", round=round, rounds=2, budget=Budget(epochs=1))
        sums.append(train(Workbench(job, CPU), data, instruction, [{}, {}]).lr_sum)
    rates = [1e-3 * (1 + math.cos(math.pi * p)) / 2 for p in (0.125, 0.375, 0.625, 0.875)]
    assert sums == pytest.approx([rates[0] + rates[1], rates[2] + rates[3]])


def test_dropout_is_keyed_and_leaves_the_global_generator_alone(
    make_job: Callable[..., Job], make_splits: Callable[..., Splits]
) -> None:
    job = make_job(model={"name": "vit", "dropout": 0.3})
    data = make_splits(1).train

    def weights(round: int) -> torch.Tensor:
        bench = Workbench(job, CPU)
        train(bench, data, Instruction("train", "r", "a", job, "", round=round, rounds=2), [{}, {}])
        return torch.cat([v.flatten() for v in bench.sent().values()])

    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = weights(0)
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(77)
    assert torch.equal(weights(0), first)


def test_evaluate_equals_one_forward_over_everything(
    make_job: Callable[..., Job], make_splits: Callable[..., Splits]
) -> None:
    job = make_job()
    data = make_splits(4, count=300).train  # more than one evaluation batch
    bench = Workbench(job, CPU)
    sums = evaluate(bench, data)
    with torch.inference_mode():
        batch = data.batch(torch.arange(300))
        outputs = bench.model(batch.x)
    hits = int((outputs.argmax(1) == batch.y).sum())
    assert int(sums["confusion"].diag().sum()) == hits
    assert int(sums["confusion"].sum()) == 300
    assert float(sums["loss"]) == pytest.approx(float(F.cross_entropy(outputs, batch.y, reduction="sum")), rel=1e-5)
    assert evaluate(bench, Examples(data.store, data.rows[:0])) == {}


@pytest.mark.gpu
def test_a_gpu_does_the_same_work(make_job: Callable[..., Job], make_splits: Callable[..., Splits]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    job, data = make_job(model={"name": "vit"}), make_splits(1).train
    ends = []
    for device in (CPU, torch.device("cuda")):
        bench = Workbench(job, device)
        train(bench, data, Instruction("train", "r", "a", job, "", rounds=2), [{}, {}])
        ends.append({n: t.cpu() for n, t in bench.sent().items()})
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-3, atol=1e-4)
