"""CLIP beside the ridge on other parts of the same photographs: what one gallery of a hundred cannot tell.

    FEDZOO_DATA=<folder> python benchmarks/retrieval_parts.py [--out benchmarks/results/retrieval_parts.json]

The part of a photograph (train, validation, test) and its site follow from its name, so the thousand are linked under
other names, 1_, 2_, ...: as many divisions into parts and sites. (CLIP's settings were chosen on the first division's
validation images, of which about a fifth are test images in each of these.) In each the ridge of
`retrieval_baseline.py` and the federated model of `examples/captions.toml` (seed 0) rank the same 40 random galleries
of 100 test images: recall@10, the mean of both ways. The trainings share photographs, so the interval of the difference
is widened as Nadeau and Bengio (2003, section 3) have it: 1 / parts becomes 1 / parts + test / train.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from retrieval_baseline import ALPHAS, GALLERY, JOB, Baseline, read, recalls
from scipy.stats import t as student

from client.trainer import in_order
from shared_models.job import Job
from simulations.compare import Benches, Setting, environment, load_sites, places, variant

GALLERIES = 40


def renamed(source: Path, target: Path, prefix: str) -> None:
    """The folder of photographs and captions again, each name with a prefix; images are links."""
    (target / "images").mkdir(parents=True)
    for image in (source / "images").iterdir():
        (target / "images" / f"{prefix}{image.name}").symlink_to(image.resolve())
    head, *rows = (source / "captions.txt").read_text(encoding="utf-8").splitlines()
    (target / "captions.txt").write_text("\n".join([head, *(prefix + row for row in rows)]) + "\n", encoding="utf-8")


def recall(nearness: np.ndarray, seed: int) -> float:
    """Mean of both ways over random galleries; (N, N), an image's own text on the diagonal."""
    source = np.random.default_rng(seed)
    galleries = [source.permutation(len(nearness))[:GALLERY] for _ in range(GALLERIES)]
    return float(np.mean([recalls(nearness[np.ix_(rows, rows)]) for rows in galleries]))


def by_ridge(root: Path) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Nearness of images (rows) to first captions in each part, by the ridge that validation likes best; its alpha."""
    data = read(f"simulation.root={root}")
    baseline = Baseline(data.x, data.captions, data.train)
    models = {alpha: baseline.fit(alpha) for alpha in ALPHAS}
    best = max(ALPHAS, key=lambda alpha: recall(baseline.nearness(models[alpha], data.validation), 0))
    found = {part: baseline.nearness(models[best], getattr(data, part)) for part in ("validation", "test")}
    return found, {"alpha": best, "training images": len(data.train)}


def by_clip(root: Path) -> dict[str, np.ndarray]:
    """The same by the federated model."""
    job = variant(Job.load(JOB, [f"simulation.root={root}"]), "federated", "offline", 0)
    sites, benches = load_sites(job, JOB.parent), Benches(torch.device("cpu"))
    ended = places["federated"](Setting(job, sites, benches))
    bench, found = benches(job, {}), {}
    bench.load(ended.models["model"], {})
    bench.model.eval()
    for part in ("validation", "test"):
        images, texts = [], []
        with torch.no_grad():
            for batch in in_order(getattr(sites.pooled(), part), bench):
                images.append(bench.model.image(batch.x))
                texts.append(bench.model.text(batch.y if batch.y.dim() == 2 else batch.y[:, 0]))
        found[part] = (torch.cat(images) @ torch.cat(texts).T).numpy()
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of two divisions at least."""
    apart = [row["clip test"] - row["ridge test"] for row in rows]
    share = statistics.mean(row["test images"] / row["training images"] for row in rows)
    wide = float(student.ppf(0.975, len(rows) - 1)) * statistics.stdev(apart) * math.sqrt(1 / len(rows) + share)
    mean = statistics.mean(apart)
    return {
        "rows": rows,
        "mean": {way: round(statistics.mean(row[f"{way} test"] for row in rows), 4) for way in ("ridge", "clip")},
        "clip - ridge": {"mean": round(mean, 4), "low": round(mean - wide, 4), "high": round(mean + wide, 4)},
        "environment": environment(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=6, help="divisions, two at least")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    source = Path(os.environ["FEDZOO_DATA"]) / "flickr8k_1000"
    rows: list[dict[str, Any]] = []
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, chosen.parts + 1):
            root = Path(folder) / str(number)
            renamed(source, root, f"{number}_")
            (ridge, about), clip = by_ridge(root), by_clip(root)
            rows.append({"names": f"{number}_", **about, "test images": len(ridge["test"])})
            for way, found in (("ridge", ridge), ("clip", clip)):
                rows[-1].update({f"{way} {part}": round(recall(n, number), 4) for part, n in found.items()})
            print(json.dumps(rows[-1]), flush=True)
            if chosen.out and number > 1:  # each takes minutes
                result = {**summary(rows), "seconds": round(time.process_time() - started, 1)}
                chosen.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary(rows), indent=2))


if __name__ == "__main__":
    main()
