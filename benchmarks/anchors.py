"""Runs jobs of published figures and writes ours beside theirs.

    FEDZOO_PREPARED=<folder> python benchmarks/anchors.py                 every one that has no result yet, in short
    FEDZOO_PREPARED=<folder> python benchmarks/anchors.py mnist-iid --full
    python benchmarks/anchors.py --write                                  only the page, docs/anchors.md

The jobs lie in `benchmarks/anchors/`, data are what `benchmarks/prepare_data.py` writes. The full protocol is the
paper's; the short one is the same with fewer rounds, and is compared with nothing. The global model is measured on the
10,000 test images after every round, as the papers do; nothing is chosen by that. With `--folder` a run that was
killed goes on at its last round, and so does its curve; not one whose sites remember something, such as a stream's.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.trainer import evaluate
from client.workbench import Benches
from server.coordinator import Coordinator
from server.events import Events
from shared_models.job import Job
from simulations.compare import environment, load_sites
from simulations.engines.inprocess import InProcess
from simulations.partition import SitePopulation
from simulations.plan import variant, with_memory

ROOT = Path(__file__).parent.parent
JOBS = ROOT / "benchmarks" / "anchors"
KEPT = ROOT / "benchmarks" / "results" / "anchors"
PAGE = ROOT / "docs" / "anchors.md"


@dataclass(frozen=True)
class Anchor:
    """A published figure.

    Attributes:
        what: the setting, in words.
        file: the job.
        changes: what differs from it.
        short: what differs besides in the short protocol.
        goal: accuracy whose first round is the figure; 0: the last accuracy is.
        published: the figure.
        accept: the lowest and the highest of ours that reproduces it.
        source: of the figure.
    """

    what: str
    file: str
    published: float
    accept: tuple[float, float]
    source: str
    changes: tuple[str, ...] = ()
    short: tuple[str, ...] = ()
    goal: float = 0.0
    seeds: tuple[int, ...] = field(default=(0,))


MCMAHAN, NIID, BUZZEGA = "McMahan et al. 2017, table 2", "Li et al. 2022, table 3", "Buzzega et al. 2020, table 2"
MARKS = (1, 2, 5, 10, 15, 20, 30, 40)  # rounds of a curve that are shown
SPLIT = "Split-CIFAR-10, class-incremental accuracy, "
ANCHORS = {
    "mnist-iid": Anchor(
        "MNIST, 100 clients, IID: rounds to 99 %", "mnist-iid.toml", 20, (1, 40), MCMAHAN, goal=0.99,
        short=("federation.rounds=3",),
    ),
    "mnist-shards": Anchor(
        "MNIST, 100 clients, two shards each: rounds to 97 %", "mnist-shards.toml", float("nan"), (1, 229), MCMAHAN,
        goal=0.97, short=("federation.rounds=3",),
    ),
    "niid-dirichlet": Anchor(
        "CIFAR-10, 10 parties, Dirichlet(0.5): accuracy", "niid-bench.toml", 0.682, (0.62, 0.70), NIID,
        short=("federation.rounds=5", "train.epochs=2"),
    ),
    "niid-labels": Anchor(
        "CIFAR-10, 10 parties, two labels each: accuracy", "niid-bench.toml", 0.498, (0.47, 0.53), NIID,
        changes=("simulation.partition=labels", "simulation.classes=2"),
        short=("federation.rounds=5", "train.epochs=2"),
    ),
    "split-joint": Anchor(
        SPLIT + "all data at once", "split-cifar10.toml", 0.922, (0.90, 0.95), BUZZEGA,
        changes=("time=offline",), short=("train.epochs=1",),
    ),
    "split-finetune": Anchor(
        SPLIT + "fine-tuning", "split-cifar10.toml", 0.1962, (0.19, 0.20), BUZZEGA,
        changes=("continual.name=finetune",), short=("train.epochs=1",),
    ),
    "split-er": Anchor(
        SPLIT + "ER, 200 images", "split-cifar10.toml", 0.4479, (0.41, 0.49), BUZZEGA, short=("train.epochs=1",),
    ),
    "split-der++": Anchor(
        SPLIT + "DER++, 200 images", "split-cifar10.toml", 0.6488, (0.62, 0.68), BUZZEGA,
        changes=("continual.name=der++", "train.lr=0.03"), short=("train.epochs=1",),
    ),
}  # fmt: skip


def load(anchor: Anchor, full: bool, extra: list[str]) -> Job:
    """The job of an anchor."""
    return Job.load(JOBS / anchor.file, [*anchor.changes, *(() if full else anchor.short), *extra])


def run(name: str, full: bool, extra: list[str], folder: Path | None = None) -> None:
    """One anchor with each of its seeds; what is known is written after every round."""
    anchor = ANCHORS[name]
    job = load(anchor, full, extra)
    sites = load_sites(job, ROOT)
    found: dict[str, Any] = {
        "anchor": name, "full": full, "job": job.model_dump(mode="json"), "partition": sites.partition.hash,
        "environment": environment(), "curves": [[] for _ in anchor.seeds], "matrices": [],
        "seconds": [0.0] * len(anchor.seeds),
    }  # fmt: skip
    path = kept(name, full, found["environment"]["device"])
    for i, seed in enumerate(anchor.seeds):
        step = with_memory(variant(job, job.place, job.time, seed), len(sites.names))
        with tempfile.TemporaryDirectory() as scratch:
            place = folder / f"{name}-{seed}" if folder else Path(scratch)
            if (place / "checkpoint").exists() and path.exists():
                before = json.loads(path.read_text(encoding="utf-8"))
                found["curves"][i], found["seconds"][i] = before["curves"][i], before["seconds"][i]
            one(i, step, sites, found, place, path)


def one(i: int, job: Job, sites: SitePopulation, found: dict[str, Any], folder: Path, path: Path) -> None:
    """The seed of number i: the round loop as it is, measured from outside."""
    name, curve, before = found["anchor"], found["curves"][i], found["seconds"][i]
    benches, started = Benches(), time.perf_counter()
    pooled = job.place == "centralized"
    names = ["all-sites"] if pooled else list(sites.names)
    engine = InProcess(names, lambda site: sites.pooled() if pooled else sites.splits(site), benches)
    test = sites.pooled().test

    def measure(event: dict[str, Any]) -> None:
        if event["event"] != "round":
            return
        bench = benches(job)
        bench.load(dict(loop.state["model"]), {})
        accuracy = bench.task.values(evaluate(bench, test))["accuracy"]
        done = event["round"] + 1
        curve[:] = [[round, value] for round, value in curve if round < done]  # a killed run may have measured it
        curve.append([done, round(accuracy, 5)])
        found["seconds"][i] = round(before + time.perf_counter() - started, 1)
        save(path, found)
        print(f"{name}: round {done} of {job.federation.rounds}, {accuracy:.4f}", flush=True)

    folder.mkdir(parents=True, exist_ok=True)
    if job.time == "continual" and (folder / "checkpoint").exists():
        raise SystemExit(f"error: {folder} holds a stream, whose sites have forgotten what they kept. Delete it")
    loop = Coordinator(job, engine, name, folder=folder, events=Events(None, measure), evaluators=names)
    outcome = loop.run()
    found["matrices"].append([list(row) for row in outcome.matrix])
    save(path, found)


def kept(name: str, full: bool, device: str) -> Path:
    """Where an anchor's figures lie: those of a CPU and of a GPU side by side."""
    return KEPT / f"{name}-{'full' if full else 'short'}-{'cpu' if device == 'CPU' else 'gpu'}.json"


def save(path: Path, found: dict[str, Any]) -> None:
    """Write what is known."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def figure(anchor: Anchor, curve: list[list[float]]) -> float | None:
    """The anchor's figure of one curve: the first round that reaches the goal, None where none does; or the last."""
    if anchor.goal:
        return next((round for round, accuracy in curve if accuracy >= anchor.goal), None)
    return curve[-1][1] if curve else None


def shown(anchor: Anchor, value: float | None) -> str:
    """A figure in words."""
    if value is None:
        return "not reached"
    return f"{value:g}" if anchor.goal else f"{100 * value:.1f} %"


def write() -> None:
    """The page."""
    lines = [
        "# Published figures, and ours beside them", "",
        "Written by `python benchmarks/anchors.py`; jobs in `benchmarks/anchors/`, figures in "
        "`benchmarks/results/anchors/`. The heart-disease row stands in [results.md](results.md). Measured on the "
        "10,000 test images after every round; nothing was chosen by that. One seed each. The machine with two cores "
        "had other work beside: its seconds are to be read with that in mind.", "",
        "| what | published | accepted | ours | protocol | rounds run | hardware | seconds |",
        "| --- | ---: | ---: | ---: | --- | ---: | --- | ---: |",
    ]  # fmt: skip
    for name, anchor in ANCHORS.items():
        for path in sorted(KEPT.glob(f"{name}-*-[cg]pu.json")):
            found = json.loads(path.read_text(encoding="utf-8"))
            kind = "full" if found["full"] else "short"
            values = [figure(anchor, curve) for curve in found["curves"]]
            done = max(len(curve) for curve in found["curves"])
            good = all(v is not None and anchor.accept[0] <= v <= anchor.accept[1] for v in values)
            said = ", ".join(shown(anchor, v) for v in values)
            low, high = anchor.accept
            accepted = f"{low:g} to {high:g}" if anchor.goal else f"{100 * low:g} to {100 * high:g} %"
            verdict = ("reproduced" if good else "not reproduced") if kind == "full" else "not to be compared"
            rounds = f"{done} of {found['job']['federation']['rounds']}"
            published = "-" if math.isnan(anchor.published) else shown(anchor, anchor.published)
            lines.append(
                f"| {anchor.what} ({anchor.source}) | {published} | {accepted} | {said} | {kind}: {verdict} | {rounds} "
                f"| {hardware(found)} | {sum(found['seconds']):,.0f} |"
            )
    PAGE.write_text("\n".join([*lines, *curves()]) + "\n", encoding="utf-8")


def curves() -> list[str]:
    """The way to a goal, round by round."""
    lines = [
        "", "## Curves", "",
        "Accuracy after so many rounds, %. In the paper 99 % is reached after 20 rounds IID, 229 with two shards.", "",
        "| what | hardware | " + " | ".join(map(str, MARKS)) + " |", "| --- | --- |" + " ---: |" * len(MARKS),
    ]  # fmt: skip
    for name, anchor in ANCHORS.items():
        for path in sorted(KEPT.glob(f"{name}-full-[cg]pu.json")) if anchor.goal else ():
            found = json.loads(path.read_text(encoding="utf-8"))
            curve = dict(found["curves"][0])
            figures = " | ".join(f"{100 * curve[r]:.1f}" if r in curve else "" for r in MARKS)
            lines.append(f"| {anchor.what.partition(':')[0]} | {hardware(found)} | {figures} |")
    return lines


def hardware(found: dict[str, Any]) -> str:
    """What computed."""
    environment = found["environment"]
    return str(environment["cpu"] if environment["device"] == "CPU" else environment["device"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *ANCHORS], metavar="NAME", help=", ".join(ANCHORS))
    parser.add_argument("--full", action="store_true", help="the paper's protocol")
    parser.add_argument("--set", action="append", default=[], help="override a setting")
    parser.add_argument("--folder", type=Path, help="keeps checkpoints, from which a killed run goes on")
    parser.add_argument("--write", action="store_true", help="only the page")
    words = parser.parse_args()
    device = environment()["device"]
    without = [name for name in ANCHORS if not kept(name, words.full, device).exists()]
    for name in () if words.write else words.names or without:
        run(name, words.full, words.set, words.folder)
    write()


if __name__ == "__main__":
    main()
