"""Runs the comparisons on real data and writes `docs/results.md` from what they left.

    FEDZOO_DATA=<folder> python benchmarks/real_data.py            every comparison that has no result yet
    FEDZOO_DATA=<folder> python benchmarks/real_data.py heart      one of them, again
    python benchmarks/real_data.py --write                         only the page, from benchmarks/results/real_data/

Each is one `fedzoo compare` command, which stands above its table.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from simulations import results
from simulations.report import as_markdown
from simulations.results import Comparison
from simulations.statistics import verdicts

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks" / "results" / "real_data"
PAGE = ROOT / "docs" / "results.md"

MEMBRANES, CELLS = "examples/em-membranes.toml", "examples/blood-cells.toml"
SEGMENTER = "--set model.name=segmenter --set train.lr=0.001 --set train.epochs=4 --set task.loss=both"
DETR = (
    "--set model.name=detr --set train.lr=0.001 --set train.schedule=cosine --set train.clip=1 --set train.epochs=5 "
    "--set federation.rounds=20"
)
NEWS = "examples/ag-news.toml --place federated --seeds 3"
BART = "--set model.name=bart --set task.name=denoising"
T5 = "--set model.name=t5 --set task.name=denoising --set task.noise=spans"
TRANSLATION = "examples/translation.toml --place federated"
TITLES = {
    "chest-xray": ("Pneumonia in chest X-rays, four label-skewed sites", "examples/chest-xray.toml"),
    "heart": ("Heart disease in four hospitals as they are, logistic regression", "examples/heart.toml --seeds 5"),
    "heart-fedadam": (
        "The same with FedAdam",
        "examples/heart.toml --seeds 5 --place federated --set method.name=fedadam",
    ),
    "em-unet": ("Membranes in electron microscopy: U-Net", MEMBRANES),
    "em-fcn": ("Membranes: FCN", f"{MEMBRANES} --set model.name=fcn"),
    "em-segmenter": ("Membranes: Segmenter", f"{MEMBRANES} {SEGMENTER}"),
    "cells-faster-rcnn": ("Blood cells: Faster R-CNN", CELLS),
    "cells-yolo": ("Blood cells: YOLO", f"{CELLS} --set model.name=yolo"),
    "cells-detr": ("Blood cells: DETR, three times as long", f"{CELLS} {DETR}"),
    "shakespeare": ("Shakespeare by role: GPT", "examples/shakespeare.toml"),
    "news-bert": ("News: BERT finds hidden tokens", NEWS),
    "news-bart": ("News: BART fills gaps", f"{NEWS} {BART} --set federation.rounds=6"),
    "news-t5": ("News: T5 fills gaps", f"{NEWS} {T5} --set federation.rounds=6"),
    "translation": ("English to German: a Transformer", f"{TRANSLATION} --seeds 1 --set federation.rounds=5"),
    "anomalies": ("Digits: an autoencoder finds the anomalous class", "examples/anomalies.toml"),
    "clusters": ("Digits: k-means from merged sums", "examples/clusters.toml"),
}
NOTES = {
    "heart": """
To be compared with FLamby (Ogier du Terrail et al. 2022, 5 seeds, mean over the four clients' tests): pooled 73.5,
FedAvg 68.5, FedAdam 72.55, local models 63.9 on all sites' tests and 73.0 on their own. Here that is the row
`accuracy:mean of sites`, and for local models on their own tests the column `own test`. The split into train and test
is not FLamby's. In the copy at hand Cleveland's file is coded otherwise than the other three (its target is turned
round); the job says so under `[simulation.values]`, a hospital would in its `client.toml`.
""",
    "em-unet": """
Each site is a contiguous block of ten slices of one volume; its last two slices are its test, the two before them its
validation. Dice is that of the membranes.
""",
    "shakespeare": """
Ten roles that speak most, each a site; the last fifth of what each says is its test. Counting pairs of characters in
all sites' training texts gives 3.60 bits a character, single ones 4.57
(`python benchmarks/text_baselines.py examples/shakespeare.toml`).
""",
    "news-bert": """
Byte frequencies alone give a perplexity of 31.0 and an accuracy of 13.7 %
(`python benchmarks/text_baselines.py examples/ag-news.toml`).
""",
    "news-bart": """
Of the bytes in the gaps, the most frequent one is right 13.7 % of the time.
""",
    "news-t5": """
In this budget it stays below that.
""",
    "translation": """
Byte frequencies alone give a perplexity of 23.1, pairs 9.00
(`python benchmarks/text_baselines.py examples/translation.toml`). One seed.
""",
    "cells-faster-rcnn": """
The split into train, validation and test is the data's own; sites are drawn from all images at random.
""",
}
HEAD = """# Results on real data

Written by `python benchmarks/real_data.py`; the figures stand in `benchmarks/results/real_data/`. `$FEDZOO_DATA` is a
folder with the data sets: [PneumoniaMNIST](https://medmnist.com) (CC BY 4.0), UCI's heart disease (CC BY 4.0), the
electron microscopy of the ISBI 2012 challenge (free with citation: Arganda-Carreras et al. 2015, Cardona et al. 2010),
[BCCD](https://github.com/Shenggan/BCCD_Dataset) (MIT), Shakespeare's plays as Karpathy's char-rnn has them, AG News
(research) and [Multi30k](https://github.com/multi30k/dataset) (CC BY-NC-SA 4.0); `benchmarks/prepare_data.py` writes
the last two into `$FEDZOO_PREPARED`. Digits are scikit-learn's. Mean ± standard deviation over seeds of initial
weights and order; intervals are Student's t over seeds and cover neither another split nor the size of the test sets.
The machine had other work beside: seconds are to be read with that in mind.
"""


def command(name: str) -> list[str]:
    """The words after `fedzoo`."""
    return ["compare", *TITLES[name][1].split()]


def run(name: str) -> None:
    """One comparison, its pictures left out: they show the data."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "fedzoo", *command(name), "--out", f"{folder}/out", "--json"]
        subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        found = results.load(Path(folder) / "out" / "comparison.json")
    told = shlex.join(["fedzoo", *command(name)])
    results.save(found.model_copy(update={"pictures": [], "command": told}), KEPT / f"{name}.json")


def section(name: str, found: Comparison) -> str:
    """Title, command, hardware, tables and what may be said."""
    where = f"{found.environment['cpu']}, {found.environment['device']}, torch {found.environment['torch']}"
    split = f"partition {found.partition.kind}, hash `{found.partition.hash[:16]}`"
    said = "".join(f"- {line}\n" for line in verdicts(found))
    shown = f"    {found.command}\n{NOTES.get(name, '')}\n{where}; {split}.\n\n{as_markdown(found)}"
    return f"\n## {TITLES[name][0]}\n\n{shown}\n{said}"


def write() -> None:
    """The page, from every result that is there."""
    kept = {name: KEPT / f"{name}.json" for name in TITLES}
    PAGE.write_text(
        HEAD + "".join(section(n, results.load(p)) for n, p in kept.items() if p.exists()), encoding="utf-8"
    )


def main(words: list[str]) -> None:
    chosen = [w for w in words if not w.startswith("-")]
    if "--write" not in words:
        for name in chosen or [n for n in TITLES if not (KEPT / f"{n}.json").exists()]:
            print(name, flush=True)
            run(name)
            write()
    write()


if __name__ == "__main__":
    main(sys.argv[1:])
