"""What `client.allocator` saves: CPU seconds of training with it and without, each in processes of its own; ratios.

    python benchmarks/allocator.py [--repeat 5] [--out benchmarks/results/allocator.json]

Drawn images, classification, one thread, batches of 32; the seconds are those of the rounds, user and system, without
imports. With and without take turns, so that a machine's changes of speed meet both.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch

WORK = {  # name: model, size of an image, images
    "cnn, 3x64x64": ({"name": "cnn", "channels": [32, 64, 128], "hidden": []}, 64, 512),
    "resnet18, 3x64x64": ({"name": "resnet18", "size": "tiny"}, 64, 256),
    "vit, 3x64x64": ({"name": "vit", "size": "tiny"}, 64, 256),
    "mlp, 3x32x32": ({"name": "mlp", "hidden": [256]}, 32, 4096),
}


def one(name: str, kept: bool) -> dict[str, float]:
    """Two rounds in this process, after one that warms up."""
    from client import workbench
    from client.readers.base import Examples, Splits, Store
    from client.workbench import Benches
    from server.coordinator import Coordinator
    from shared_models.job import Job
    from simulations.engines.inprocess import InProcess

    if not kept:
        workbench.keep_freed_memory = lambda: False
    torch.set_num_threads(1)
    model, side, count = WORK[name]
    job = Job.resolve({
        "name": "benchmark",
        "model": model,
        "task": {"labels": [str(c) for c in range(10)]},
        "data": {"shape": [3, side, side]},
        "train": {"batch_size": 32, "lr": 0.05},
        "federation": {"rounds": 3},
    })  # fmt: skip
    source = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (count, 3, side, side), generator=source, dtype=torch.uint8)
    store = Store(images, torch.randint(0, 10, (count,), generator=source), [str(i) for i in range(count)], job.data)
    every, nothing = (Examples(store, torch.arange(n)) for n in (count, 0))
    coordinator = Coordinator(
        job, InProcess(["site"], lambda _: Splits(every, nothing, nothing), Benches(torch.device("cpu"))), "benchmark"
    )
    coordinator.train_round(0)
    begun = resource.getrusage(resource.RUSAGE_SELF)
    for round in (1, 2):
        coordinator.train_round(round)
    ended = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "user": ended.ru_utime - begun.ru_utime,
        "system": ended.ru_stime - begun.ru_stime,
        "page faults": ended.ru_minflt - begun.ru_minflt,
        "peak MB": ended.ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(one(chosen.one[0], chosen.one[1] == "kept")))
        return
    from simulations.compare import environment

    result: dict[str, object] = {}
    for name in WORK:
        found: dict[str, list[dict[str, float]]] = {"kept": [], "returned": []}
        for _ in range(chosen.repeat):
            for way, runs in found.items():
                command = [sys.executable, __file__, "--one", name, way]
                runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        total = {way: [run["user"] + run["system"] for run in runs] for way, runs in found.items()}
        ratios = [a / b for a, b in zip(total["kept"], total["returned"], strict=True)]
        result[name] = {
            "kept / returned": {"median": statistics.median(ratios), "all": ratios},
            **{way: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for way, runs in found.items()},
        }
    result["environment"] = environment()
    print(json.dumps(result, indent=2))
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
