"""The in-process engine against a plain PyTorch loop that makes the same steps, in one run; ratios of CPU seconds.

    python benchmarks/simulator.py [--rounds 8] [--repeat 5] [--out benchmarks/results/simulator.json]

Workload: a CNN of 206,922 parameters, 100 clients of 50 images 1x28x28, 20 clients a round, 5 steps of batch 10 each.
Both sides train the same clients on the same rows in the same order, on one thread, and must end with the same weights.
The plain loop is what a researcher would write: no checks, no events, no metrics, no engine. The second part runs the
engine with 1,000 and with 1,000,000 registered clients and the same cohort: the cost must follow the cohort.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from client.readers.base import Examples, Splits, Store
from client.trainer import batches
from client.workbench import Benches
from server.coordinator import Coordinator
from server.selection import select
from shared_models.job import Job
from shared_models.messages import Budget
from shared_models.spec import build_model
from simulations.compare import environment
from simulations.engines.inprocess import InProcess

CLIENTS, EXAMPLES, COHORT = 100, 50, 20


class Names(Sequence[str]):
    """A population of any size that costs no memory."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> str:  # type: ignore[override]
        return f"client-{place:07d}"


def make_job(rounds: int, fraction: float) -> Job:
    return Job.resolve({
        "name": "benchmark",
        "model": {"name": "cnn", "channels": [16, 32], "kernel": 3, "hidden": [128]},
        "task": {"labels": [str(c) for c in range(10)]},
        "data": {"shape": [1, 28, 28]},
        "train": {"batch_size": 10, "lr": 0.05},
        "federation": {"rounds": rounds, "fraction": fraction},
    })  # fmt: skip


def make_store(job: Job) -> Store:
    source = torch.Generator().manual_seed(7)
    count = CLIENTS * EXAMPLES
    labels = torch.randint(0, 10, (count,), generator=source)
    prototypes = torch.rand(10, 1, 28, 28, generator=source)
    noise = torch.rand(count, 1, 28, 28, generator=source)
    images = ((0.4 * prototypes[labels] + 0.6 * noise) * 255).to(torch.uint8)
    return Store(images, labels, [str(i) for i in range(count)], job.data)


def splits_of(store: Store) -> Callable[[str], Splits]:
    """Client k holds block k mod CLIENTS; nothing is held out, because neither side measures anything."""
    nothing = Examples(store, torch.empty(0, dtype=torch.int64))
    blocks = [Examples(store, torch.arange(k * EXAMPLES, (k + 1) * EXAMPLES)) for k in range(CLIENTS)]
    parts = [Splits(block, nothing, nothing) for block in blocks]
    return lambda name: parts[int(name.removeprefix("client-")) % CLIENTS]


def ours(job: Job, names: Sequence[str], splits: Callable[[str], Splits], benches: Benches) -> dict[str, torch.Tensor]:
    coordinator = Coordinator(job, InProcess(names, splits, benches), "benchmark")
    for round in range(job.federation.rounds):
        coordinator.train_round(round)
    return dict(coordinator.state["model"])


def plain(
    job: Job, names: Sequence[str], splits: Callable[[str], Splits], device: torch.device | None = None
) -> dict[str, torch.Tensor]:
    """FedAvg by hand, batches normalised ahead and on the device (the CPU)."""
    model = build_model(job)[0].to(device)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=job.train.lr)
    data = {name: splits(name).train for name in {names[k] for k in range(CLIENTS)}}
    ready = {name: examples.batch(torch.arange(len(examples)), device) for name, examples in data.items()}
    start = [p.detach().clone() for p in parameters]
    model.train()
    for round in range(job.federation.rounds):
        cohort = select(names, job.federation.fraction, job.seed, round)
        total = [torch.zeros_like(p) for p in parameters]
        for name in cohort:
            with torch.no_grad():
                torch._foreach_copy_(parameters, start)
            x, y = ready[name].x, ready[name].y
            for rows in batches(EXAMPLES, 10, Budget(epochs=1.0), job.seed, site=name, task=0, round=round):
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
            with torch.no_grad():
                torch._foreach_add_(total, parameters, alpha=1 / len(cohort))
        start = total
    return dict(zip([n for n, _ in model.named_parameters()], start, strict=True))


def cpu(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    job = make_job(chosen.rounds, COHORT / CLIENTS)
    splits, names, benches = splits_of(make_store(job)), Names(CLIENTS), Benches(torch.device("cpu"))
    by_engine, by_hand = ours(job, names, splits, benches), plain(job, names, splits)  # also warms both up
    apart = max(float((by_engine[n] - by_hand[n]).abs().max()) for n in by_hand)
    if apart > 1e-4:
        raise SystemExit(f"the two sides do not do the same work: weights differ by {apart:.2g}")
    sizes = {count: make_job(chosen.rounds, COHORT / count) for count in (1_000, 1_000_000)}
    rows: dict[str, list[float]] = {"plain": [], "engine": [], "1000": [], "1000000": []}
    for _ in range(chosen.repeat):
        rows["plain"].append(cpu(lambda: plain(job, names, splits)))
        rows["engine"].append(cpu(lambda: ours(job, names, splits, benches)))
        for count, large in sizes.items():
            rows[str(count)].append(cpu(lambda c=count, j=large: ours(j, Names(c), splits, benches)))  # type: ignore[misc]
    engine = [a / b for a, b in zip(rows["engine"], rows["plain"], strict=True)]
    population = [a / b for a, b in zip(rows["1000000"], rows["1000"], strict=True)]
    result = {
        "largest difference of a weight": apart,
        "cpu seconds": rows,
        "engine / plain": {
            "of the sums": sum(rows["engine"]) / sum(rows["plain"]),
            "median": statistics.median(engine),
            "all": engine,
        },
        "1,000,000 / 1,000 clients": {
            "of the sums": sum(rows["1000000"]) / sum(rows["1000"]),
            "median": statistics.median(population),
            "all": population,
        },
        "environment": environment(),
    }
    print(json.dumps(result, indent=2))
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
