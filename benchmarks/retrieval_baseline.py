"""What images and captions can be matched by without a network: the figure that CLIP has to beat on Flickr8k-1000.

    FEDZOO_DATA=<folder> python benchmarks/retrieval_baseline.py [--out benchmarks/results/retrieval_baseline.json]

Ridge regression from histograms of an image's colours and gradients to the TF-IDF of all its captions. The texts of a
gallery of 100 images that were not trained with, the first caption of each, are ranked by their cosine with what is
predicted, less the mean over the training images; recall@10 both ways, 0.1 by chance. The strength of the ridge is
chosen on validation galleries. Captions, parts and galleries are those of `examples/captions.toml`, as its reader gives
them, the pixels 64x64, which suit the ridge better than the job's; then the same with random parts, 60 / 20 / 20.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from skimage.color import rgb2hsv
from skimage.feature import hog
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler, normalize

from shared_models.job import Job
from shared_models.tokens import make_tokenizer
from simulations.compare import environment, load_sites

JOB = Path(__file__).parent.parent / "examples" / "captions.toml"
GALLERY, RANK = 100, 10
ALPHAS = (1e3, 3e3, 1e4, 3e4, 1e5)
GRIDS = {1: (8, 3, 3), 2: (8, 3, 3), 4: (6, 2, 2)}  # cells of a side -> bins of hue, saturation and value in a cell


def features(image: np.ndarray) -> np.ndarray:
    """Root of the colour histograms of all cells, then histograms of oriented gradients: (S, S, 3) bytes -> (F,)."""
    side, colours = len(image), rgb2hsv(image)
    found = []
    for grid, bins in GRIDS.items():
        step = side // grid
        for top in range(0, step * grid, step):
            for left in range(0, step * grid, step):
                cell = colours[top : top + step, left : left + step].reshape(-1, 3)
                counts, _ = np.histogramdd(cell, bins=bins, range=((0, 1),) * 3)
                found.append(np.sqrt(counts.ravel() / len(cell)))
    cells = (side // 8, side // 8)
    found.append(hog(image.mean(axis=2), orientations=8, pixels_per_cell=cells, cells_per_block=(2, 2)))
    return np.concatenate(found)


class Baseline:
    """Fitted on some images; ranks galleries of others."""

    def __init__(self, x: np.ndarray, captions: Sequence[Sequence[str]], rows: np.ndarray) -> None:
        self.x, self.captions, self.rows = x, captions, rows
        joined = [" ".join(captions[row]) for row in rows]
        self.words = TfidfVectorizer(min_df=2, sublinear_tf=True, stop_words="english").fit(joined)
        self.targets = self.words.transform(joined).toarray()
        self.scaler = StandardScaler().fit(x[rows])

    def fit(self, alpha: float) -> Ridge:
        """The regression with this strength."""
        return Ridge(alpha=alpha).fit(self.scaler.transform(self.x[self.rows]), self.targets)

    def nearness(self, model: Ridge, rows: np.ndarray) -> np.ndarray:
        """Of each image (rows) to the first caption of each (columns): (N, N)."""
        guess = model.predict(self.scaler.transform(self.x[rows])) - self.targets.mean(axis=0)
        texts = self.words.transform([self.captions[row][0] for row in rows]).toarray()
        return np.asarray(normalize(guess) @ normalize(texts).T)


def recalls(nearness: np.ndarray) -> tuple[float, float]:
    """Image to text, text to image; what is as near as the right one counts as nearer."""
    own = nearness.diagonal()
    ranks = (nearness >= own[:, None]).sum(axis=1), (nearness >= own[None]).sum(axis=0)
    first, second = (float((rank <= RANK).mean()) for rank in ranks)
    return first, second


@dataclass(frozen=True)
class Photographs:
    """What the job's reader gives: features (N, F), captions, and which image is in which part."""

    x: np.ndarray
    captions: list[list[str]]
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def read(*settings: str) -> Photographs:
    """The photographs of `examples/captions.toml` at 64x64, with these settings."""
    job = Job.load(JOB, ["data.shape=[3, 64, 64]", *settings])
    pooled = load_sites(job, JOB.parent).pooled()
    store, tokenizer = pooled.train.store, make_tokenizer(job.data.tokenizer)
    images = list(dict.fromkeys(store.together))
    place = {name: i for i, name in enumerate(images)}
    captions: list[list[str]] = [[] for _ in images]
    for name, ids in zip(store.together, store.y.tolist(), strict=True):
        captions[place[name]].append(tokenizer.decode(ids))
    first = {name: row for row, name in reversed(list(enumerate(store.together)))}
    x = np.stack([features(store.x[first[name]].permute(1, 2, 0).numpy()) for name in images])
    parts = (pooled.train, pooled.validation, pooled.test)
    return Photographs(x, captions, *(np.unique([place[store.together[r]] for r in p.rows.tolist()]) for p in parts))


def measure(
    x: np.ndarray, captions: Sequence[Sequence[str]], train: np.ndarray, validation: np.ndarray, test: np.ndarray
) -> dict[str, Any]:
    """One split: the strength that the validation galleries like best, and the recalls of the test's."""
    baseline = Baseline(x, captions, train)

    def mean_over(model: Ridge, rows: np.ndarray) -> np.ndarray:
        galleries = [rows[i : i + GALLERY] for i in range(0, len(rows) - GALLERY + 1, GALLERY)]
        return np.mean([recalls(baseline.nearness(model, gallery)) for gallery in galleries], axis=0)

    models = {alpha: baseline.fit(alpha) for alpha in ALPHAS}
    best = max(models, key=lambda alpha: float(mean_over(models[alpha], validation).mean()))
    image, text = mean_over(models[best], test)
    return {"alpha": best, "recall_at_10": round(float(image), 4), "recall_at_10_text": round(float(text), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/retrieval_baseline.json"))
    chosen = parser.parse_args()
    started = time.process_time()
    data = read()
    x, captions = data.x, data.captions
    own = measure(x, captions, data.train, data.validation, data.test)
    splits = []
    for seed in range(chosen.splits):
        order = np.random.default_rng(seed).permutation(len(x))
        splits.append(measure(x, captions, *np.split(order, [len(order) * 6 // 10, len(order) * 8 // 10])))
    result = {
        "images": len(x),
        "gallery": GALLERY,
        "chance": RANK / GALLERY,
        "parts of the job": own,
        "random parts": {
            name: {
                "mean": round(statistics.mean(split[name] for split in splits), 4),
                "sd": round(statistics.stdev(split[name] for split in splits), 4),
            }
            for name in ("recall_at_10", "recall_at_10_text")
        },
        "splits": splits,
        "seconds": round(time.process_time() - started, 1),
        "environment": environment(),
    }
    print(json.dumps({key: value for key, value in result.items() if key != "splits"}, indent=2))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
