"""What a GPU does: ViT-B/16 in the trainer, out-of-memory on purpose, and the in-process engine beside a plain loop.

    python benchmarks/gpu.py [--parts steps,memory,engine] [--out benchmarks/results/gpu.json]

steps: images a second and peak memory of training steps of ViT-B/16 at 224x224 (SGD with momentum), by precision and
    batch, and of a plain PyTorch loop on the same model beside it: batches already on the GPU, nothing else done.
memory: the same with 256 images a batch while torch may use 8 GB: how often the batch is halved, what is left of speed.
engine: `benchmarks/simulator.py`'s workload on the GPU: seconds of the engine by those of a plain loop.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import simulator
import torch
import torch.nn.functional as F

from client.readers.base import Examples, Store
from client.trainer import train
from client.workbench import Benches, Workbench, determinism
from shared_models.job import Job
from shared_models.messages import Budget, Instruction
from simulations.compare import environment

GPU = torch.device("cuda")
LIMIT = 8e9


def vit(batch_size: int, precision: str) -> Job:
    return Job.resolve({
        "name": "gpu",
        "model": {"name": "vit", "size": "b16"},
        "task": {"labels": [str(c) for c in range(10)]},
        "data": {"shape": [3, 224, 224]},
        "train": {
            "batch_size": batch_size, "precision": precision, "lr": 0.001, "momentum": 0.9, "deterministic": False,
        },
    })  # fmt: skip


def examples(job: Job) -> Examples:
    count = 2 * job.train.batch_size
    source = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8, generator=source)
    return Examples(Store(x, torch.arange(count) % 10, [str(i) for i in range(count)], job.data), torch.arange(count))


def seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def trainer(job: Job, count: int) -> dict[str, Any]:
    """The trainer as a node runs it: bytes from main memory, normalised, forward, backward, step."""
    bench, data = Workbench(job, GPU), examples(job)

    def work(count: int) -> int:
        asked = Instruction("train", "r", "a", job, bench.spec.fingerprint, budget=Budget(steps=count))
        return train(bench, data, asked, [{} for _ in bench.pieces]).halvings

    with determinism(job.train.deterministic):
        halvings = work(2)
        torch.cuda.reset_peak_memory_stats()
        spent = seconds(lambda: work(count))
    return {
        "images a second": round(count * job.train.batch_size / spent, 1),
        "peak memory, GB": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "halvings": halvings,
    }


def plain(job: Job, count: int) -> float:
    """Images a second of the loop in a tutorial."""
    bench, data = Workbench(job, GPU), examples(job)
    model, batch = bench.model.train(), data.batch(torch.arange(job.train.batch_size), GPU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)

    def work(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16, enabled=job.train.precision == "bf16"):
                loss = F.cross_entropy(model(batch.x), batch.y)
            loss.backward()
            optimizer.step()

    work(2)
    return round(count * job.train.batch_size / seconds(lambda: work(count)), 1)


def engine(rounds: int, repeat: int) -> dict[str, Any]:
    """Wall-clock seconds of both sides, one after the other, and their ratios."""
    job = simulator.make_job(rounds, simulator.COHORT / simulator.CLIENTS)
    job = job.replace(train={"deterministic": False})
    names, benches = simulator.Names(simulator.CLIENTS), Benches(GPU)
    splits = simulator.splits_of(simulator.make_store(job))
    sides = {
        "engine": lambda: simulator.ours(job, names, splits, benches),
        "plain": lambda: simulator.plain(job, names, splits, GPU),
    }
    ends = {name: work() for name, work in sides.items()}
    apart = max(float((ends["engine"][n].cpu() - ends["plain"][n].cpu()).abs().max()) for n in ends["plain"])
    spent = {name: [seconds(work) for _ in range(repeat)] for name, work in sides.items()}
    ratios = [a / b for a, b in zip(spent["engine"], spent["plain"], strict=True)]
    return {
        "largest difference of a weight": apart,
        "seconds": spent,
        "engine / plain": {"median": statistics.median(ratios), "all": ratios},
    }


def steps(count: int) -> dict[str, Any]:
    """Every precision and batch, with the plain loop beside it."""
    rows = []
    for precision in ("fp32", "bf16"):
        for batch_size in (32, 128, 256):
            job = vit(batch_size, precision)
            beside = {"plain loop, images a second": plain(job, count)}
            rows.append({"precision": precision, "batch": batch_size, **trainer(job, count), **beside})
            torch.cuda.empty_cache()
    return {"ViT-B/16, 224x224": rows}


def memory(count: int) -> dict[str, Any]:
    """A batch that does not fit into what torch may use."""
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.set_per_process_memory_fraction(LIMIT / total)
    found = trainer(vit(256, "bf16"), count)
    torch.cuda.set_per_process_memory_fraction(1.0)
    return {"out of memory": {"limit, GB": LIMIT / 1e9, "batch": 256, "precision": "bf16", **found}}


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "steps": steps, "memory": memory, "engine": lambda count: {"engine, CNN of 206,922 parameters": engine(8, 5)},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--parts", default="steps,memory,engine", help="what to measure; the rest of the file stays")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: this needs a CUDA device, and torch sees none. Try `fedzoo doctor`")
    result = json.loads(chosen.out.read_text()) if chosen.out and chosen.out.exists() else {}
    for part in chosen.parts.split(","):
        result |= PARTS[part](chosen.steps)
    result["environment"] = environment()
    print(json.dumps(result, indent=2))
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
