"""MNIST with differential privacy: accuracy against epsilon, centralized beside ten sites, both units.

    python benchmarks/prepare_data.py <folder that holds the data sets> <prepared>
    FEDZOO_PREPARED=<prepared> python benchmarks/private_mnist.py            what has no result yet, then the table
    FEDZOO_PREPARED=<prepared> python benchmarks/private_mnist.py client-30  one of them, again
    python benchmarks/private_mnist.py --write                               only the table

Every row is `fedzoo simulate examples/mnist-private.toml` with the settings shown; results in
`benchmarks/results/private_mnist.json`. A minutes' run each on one core.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from shared_models.job import Job
from shared_models.job_parts import PrivacyPart
from shared_models.privacy import bound
from simulations.compare import environment, load_sites
from simulations.paradigms import Benches, Setting, paradigms

ROOT = Path(__file__).parent.parent
JOB = ROOT / "examples" / "mnist-private.toml"
RESULTS = ROOT / "benchmarks" / "results" / "private_mnist.json"
POOLED = ["place=centralized"]
CLIENT = [
    "privacy.mode=client", "privacy.clip=1.0", "method.weighting=uniform", "federation.rounds=5", "train.lr=0.1",
    "train.batch_size=50",
]  # fmt: skip
ROWS = {
    "centralized-1.2": [*POOLED, "privacy.epsilon=1.2"],
    "centralized-2.9": [*POOLED, "privacy.epsilon=2.9"],
    "centralized-6.9": [*POOLED, "privacy.epsilon=6.9"],
    "centralized-2.9 seed 1": [*POOLED, "privacy.epsilon=2.9", "seed=1"],
    "centralized-6.9 seed 1": [*POOLED, "privacy.epsilon=6.9", "seed=1"],
    **{
        f"sample-{target} batch {size}": [f"train.batch_size={size}", f"privacy.epsilon={target}"]
        for size in (500, 100)
        for target in (1.2, 2.9, 6.9)
    },
    "client-6.9": [*CLIENT, "privacy.epsilon=6.9"],
    "client-30": [*CLIENT, "privacy.epsilon=30.0"],
    "client-100": [*CLIENT, "privacy.epsilon=100.0"],
    "client-1000": [*CLIENT, "privacy.epsilon=1000.0"],
    "centralized-none": [*POOLED, "train.lr=0.1", "train.batch_size=50", "federation.rounds=5"],
    "sites-none": ["train.lr=0.1", "train.batch_size=50", "federation.rounds=5"],
}
PUBLISHED = {"1.2": "94.63 ± 0.34 (1.16)", "2.9": "96.78 ± 0.21 (2.91)", "6.9": "97.09 ± 0.17 (6.86)"}


def run(name: str) -> dict[str, Any]:
    """One row: settings, test accuracy in percent, what was spent, noise of the first site, seconds."""
    job = Job.load(JOB, ROWS[name])
    if name.endswith("none"):
        job = job.replace(privacy=PrivacyPart().model_dump())
    noise: list[float] = []

    def hear(event: dict[str, Any]) -> None:
        if event["event"] == "round" and "privacy" in event:
            said = event["privacy"]["noise"]
            noise.append(said[0] if isinstance(said, list) else said)

    torch.set_num_threads(1)
    sites, started = load_sites(job, JOB.parent), time.perf_counter()
    found = paradigms[job.place](Setting(job, sites, Benches(), listener=hear))
    return {
        "settings": ROWS[name],
        "accuracy": 100 * found.all_sites,
        "privacy": dict(found.privacy),
        "noise": noise[0] if noise else 0.0,
        "samples": found.totals.samples,
        "seconds": round(time.perf_counter() - started, 1),
        "job_hash": job.hash,
        "environment": environment(),
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """As Markdown."""
    lines = ["| row | unit | epsilon, delta 1e-5 | noise | test accuracy, % | published | seconds |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name, row in found.items():
        spent, target = row["privacy"], name.rpartition("-")[2].partition(" ")[0]
        epsilon = bound(max(spent["epsilon"].values())) if spent else "none"
        published = PUBLISHED.get(target, "") if name.startswith("centralized") else ""
        unit, noise = (spent["unit"], f"{row['noise']:.3g}") if spent else ("none", "0")
        lines.append(
            f"| {name} | {unit} | {epsilon} | {noise} | {row['accuracy']:.2f} | {published} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main(words: list[str]) -> None:
    found: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    chosen = [word for word in words if not word.startswith("-")]
    for name in () if "--write" in words else chosen or [n for n in ROWS if n not in found]:
        print(name, flush=True)
        found[name] = run(name)
        ordered = {n: found[n] for n in ROWS if n in found}
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    print(table({n: found[n] for n in ROWS if n in found}))


if __name__ == "__main__":
    main(sys.argv[1:])
