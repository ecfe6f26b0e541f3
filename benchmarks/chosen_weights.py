"""What a server reads out of a site's honest answers when it makes up the weights, with and without privacy.

    python benchmarks/chosen_weights.py [--out benchmarks/results/chosen_weights.json]

The job is approved and stays as written; the node's own policy and handler answer. Only the weights that are sent are
chosen (Boenisch et al. 2021, "When the Curious Abandon Honesty"; Fowl et al. 2021, "Robbing the Fed"): each neuron of
the first layer looks along a random direction, with a threshold above nearly all of the server's own digits, so that
few of the site's images wake it. An answer's change of such a neuron's weights, divided by that of its bias, is the
mean of the images that woke it: where it was one, that image. An image counts as read where the mean squared error is
below 0.001, pixels in [0, 1]; the truth is used for nothing but this count.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from client.handler import Handler
from client.policy import Policy
from client.protection import Protection
from client.readers.base import Examples, Splits, Store
from client.state import MemoryState
from client.workbench import Benches
from server.coordinator import Coordinator
from shared_models.job import Job
from shared_models.messages import Instruction
from shared_models.schedule import round_budget
from simulations.compare import environment
from simulations.engines.inprocess import InProcess

EXAMPLE = Path(__file__).parent.parent / "examples" / "digits-vit.toml"
PRIVATE = ("method.name=fedavg", "train.momentum=0", "privacy.mode=sample", "privacy.delta=1e-4")
LEVELS = {"no privacy": (), "epsilon 8": (*PRIVATE, "privacy.epsilon=8"), "epsilon 1": (*PRIVATE, "privacy.epsilon=1")}
SITE, TRAIN, READ = 120, 90, 1e-3
FIRST = "hidden1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    found = {level: list(read(settings, chosen.answers)) for level, settings in LEVELS.items()}
    for level, counts in found.items():
        print(f"{level}: of {TRAIN} training images {counts[0]} read after 1 answer, {counts[-1]} after {len(counts)}")
    if chosen.out:
        text = {"images": TRAIN, "read": found, "environment": environment()}
        chosen.out.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


def read(settings: tuple[str, ...], answers: int) -> Iterator[int]:
    """After each answer, how many of the site's training images were read so far."""
    job = Job.load(EXAMPLE, ["model.name=mlp", "model.size=2nn", *settings])
    digits = load_digits()
    x = torch.from_numpy(digits.images / 16 * 255).round().to(torch.uint8)[:, None]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    ours, theirs = order[:SITE], order[SITE:]  # the server's own digits are others
    store = Store(x[ours], torch.from_numpy(digits.target)[ours], [f"{i:03}" for i in range(SITE)], job.data)
    rows = torch.arange(SITE).split([TRAIN, (SITE - TRAIN) // 2, (SITE - TRAIN) // 2])
    splits = Splits(*(Examples(store, part) for part in rows))
    policy, guard = Policy((job.hash,), as_written=True), Protection("a", secret=lambda _: bytes(32))
    handler = Handler("a", lambda _: splits, MemoryState(), policy, Benches(), protection=guard)
    loop = Coordinator(job, InProcess(["a"], lambda _: splits), "honest")
    honest = loop.method.down(loop.state)

    def as_seen(images: Tensor) -> Tensor:
        return ((images.float() / 255 - job.data.mean[0]) / job.data.std[0]).flatten(1)

    own, truth, known = as_seen(x[theirs]), as_seen(x[ours[:TRAIN]]), set[int]()
    for answer in range(answers):
        model = dict(honest["model"])
        weight, bias = f"{FIRST}.weight", f"{FIRST}.bias"
        away = torch.randn(model[weight].shape, generator=torch.Generator().manual_seed(answer))
        away /= away.norm(dim=1, keepdim=True)
        model |= {weight: away, bias: -(own @ away.T).quantile(1 - 1 / TRAIN, dim=0)}
        asked = Instruction(
            "train", f"run-{answer}", "a", job, loop.spec.fingerprint, rounds=job.federation.rounds,
            budget=round_budget(job, 0, "a"), groups={**honest, "model": model},
        )  # fmt: skip
        reply = handler.handle(asked)
        assert reply.code == "ok", reply.code
        change = {name: reply.groups["model"][name] - model[name] for name in (weight, bias)}
        woken = change[bias].abs() > 1e-7
        images = change[weight][woken] / change[bias][woken, None]
        errors = torch.cdist(images, truth).square() / truth.shape[1] * job.data.std[0] ** 2
        known |= set(errors.argmin(dim=1)[errors.amin(dim=1) < READ].tolist())
        yield len(known)


if __name__ == "__main__":
    main()
