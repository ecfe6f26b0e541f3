"""Runs the comparisons on real data and writes `docs/results.md` from what they left.

    FEDZOO_DATA=<folder> python benchmarks/real_data.py            every comparison that has no result yet
    FEDZOO_DATA=<folder> python benchmarks/real_data.py heart      one of them, again
    python benchmarks/real_data.py --write                         only the page, from benchmarks/results/real_data/

Each is one `fedzoo compare` command, which stands above its table. A model that several of them start from is trained
once, into the folder that FEDZOO_WEIGHTS names.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from simulations import results
from simulations.results import Comparison
from simulations.statistics import paired
from simulations.tables import as_markdown
from simulations.verdicts import verdicts

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
PRETEXT = "examples/pretext.toml --place federated"
RANDOM = "--set stages.pretext.federation.rounds=1 --set stages.pretext.train.lr=1e-9"
ALONE = "--set place=centralized --set simulation.partition=iid --set simulation.sites=1 --set federation.min_sites=1"
CONVOLUTIONS = (
    f"{PRETEXT} --seeds 4 --set model.name=cnn --set model.channels=[16,32,64] --set model.hidden=[] "
    "--set stages.probe.train.lr=0.003 --set stages.probe.train.epochs=10"
)
BEFORE = {
    "vit": "examples/digits-vit.toml --set simulation.reader=npz --set simulation.root=$FEDZOO_PREPARED/mnist.npz "
    f"--set federation.rounds=2 {ALONE}",
    "gpt": "examples/shakespeare.toml --set simulation.root=$FEDZOO_PREPARED/other_roles.txt --set federation.rounds=4 "
    f"--set train.epochs=1 {ALONE}",
}
VIT = (
    "examples/digits-vit.toml --place federated --seeds 5 --set weights.file=vit/model.safetensors "
    "--set federation.rounds=25 --set federation.select=best --set train.lr=0.2"
)
GPT = "examples/shakespeare.toml --place federated --set weights.file=gpt/model.safetensors --set federation.rounds=5"
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
    "news-t5": ("News: T5 fills gaps", f"{NEWS} {T5} --set federation.rounds=15 --set train.lr=0.006"),
    "translation": ("English to German: a Transformer", f"{TRANSLATION} --seeds 3 --set federation.rounds=5"),
    "captions": ("Photographs and captions: CLIP", "examples/captions.toml"),
    "pretext-random": ("CIFAR-10, few labels: a linear probe on random features", f"{PRETEXT} {RANDOM}"),
    "pretext-rotation": ("The probe after rotation", PRETEXT),
    "pretext-jigsaw": ("The probe after jigsaw puzzles", f"{PRETEXT} --set stages.pretext.task.name=jigsaw"),
    "pretext-colorization": (
        "The probe after colorization",
        f"{PRETEXT} --set stages.pretext.task.name=colorization",
    ),
    "convolutions-random": ("Three convolutions: a linear probe on random features", f"{CONVOLUTIONS} {RANDOM}"),
    "convolutions-rotation": (
        "Three convolutions: the probe after rotation",
        f"{CONVOLUTIONS} --set stages.pretext.federation.rounds=6",
    ),
    "vit-whole": ("A ViT that knows MNIST learns digits of three other sites: all of it", VIT),
    "vit-lora": ("The same with adapters (LoRA), one factor", f"{VIT} --set lora.rank=8"),
    "gpt-whole": ("A GPT that read all other roles learns the ten: all of it", f"{GPT} --set train.lr=0.001"),
    "gpt-lora": ("The same with adapters (LoRA), one factor", f"{GPT} --set train.lr=0.01 --set lora.rank=16"),
    "gpt-lora-both": (
        "The same with adapters, both factors",
        f"{GPT} --set train.lr=0.02 --set lora.rank=16 --set lora.train=both",
    ),
    "anomalies": ("Digits: an autoencoder finds the anomalous class", "examples/anomalies.toml"),
    "clusters": ("Digits: k-means from merged sums", "examples/clusters.toml"),
    "split-digits": (
        "Digits in five tasks: continual methods at three places",
        "examples/digits-continual.toml --time offline,continual --continual finetune,joint,er,er-ace,der,der++,a-gem,"
        "ewc,si,lwf,icarl --seeds 5",
    ),
    "split-cifar10": (
        "4,000 images of CIFAR-10 in five tasks: replay at three places",
        "examples/cifar-continual.toml --time offline,continual --continual finetune,er --seeds 5",
    ),
    "rotated-digits": (
        "Digits that turn from task to task (domain-incremental)",
        "examples/digits-continual.toml --time offline,continual --continual finetune,er,ewc --seeds 5 "
        "--set stream.kind=rotation",
    ),
}
NEEDS = {"vit-whole": "vit", "vit-lora": "vit", "gpt-whole": "gpt", "gpt-lora": "gpt", "gpt-lora-both": "gpt"}
AGAINST = {
    "pretext-rotation": "pretext-random", "pretext-jigsaw": "pretext-random", "pretext-colorization": "pretext-random",
    "convolutions-rotation": "convolutions-random", "vit-lora": "vit-whole", "gpt-lora": "gpt-whole",
    "gpt-lora-both": "gpt-whole",
}  # fmt: skip
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
A T5 must say where a gap ends as well. Frequencies of bytes and of such ends give a perplexity of 39.4 and are right
for 4.8 % of the bytes in the gaps (`python benchmarks/text_baselines.py examples/ag-news.toml model.name=t5
task.name=denoising task.noise=spans`).
""",
    "translation": """
Byte frequencies alone give a perplexity of 23.1, pairs 9.00
(`python benchmarks/text_baselines.py examples/translation.toml`).
""",
    "captions": """
Chance is 10 %. On the same parts and the same gallery a ridge regression from histograms of colours and gradients to
TF-IDF, without a network, finds 38 % of the texts and 39 % of the images (`python benchmarks/retrieval_baseline.py`):
the federated model finds 43, 44 and 46 % (`recall_at_10`) and 39, 40 and 42 % (`recall_at_10_text`). Settings were
chosen on validation images. One gallery of a hundred is few: with the thousand photographs divided anew five times, the
model finds 36.9 % and the ridge 36.1 %, a difference of 0.8 points (-8.3 to 9.9), so over divisions they are level
(`python benchmarks/retrieval_parts.py --parts 5`).
""",
    "pretext-random": """
One label in twenty, 200 in all; the ResNet's other weights are as they were drawn. What a probe finds there depends
much on the draw, so that three seeds do not tell it from the features that follow.
""",
    "vit-lora": """
Of what goes up, most are the sums of the metrics; of the model, 11 % of the bytes are sent. For both, the rate was
chosen among three by the validation of three seeds, and of each run the round with the best validation is measured.
""",
    "gpt-lora": """
With another start (both commands with `--set seed=1`) all of it ends at 2.519 and adapters at 2.525: the same 0.006
apart, where two starts differ by 0.03. Rank 32 ends at 2.552.
""",
    "gpt-lora-both": """
The server averages the products of the factors. The rate was chosen among 0.01, 0.02 and 0.03 by the validation of one
seed.
""",
    "split-digits": """
Each row of R[t, i], mean over the seeds, stands in the page of the comparison; here its figures. Methods that keep
examples keep 150 in all at every place. Their settings are the defaults.
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
(research), [Multi30k](https://github.com/multi30k/dataset) (CC BY-NC-SA 4.0), MNIST and CIFAR-10;
`benchmarks/prepare_data.py` writes the last four into `$FEDZOO_PREPARED`. Digits are scikit-learn's. Mean ± standard
deviation over seeds of initial weights and order; intervals are Student's t over seeds and cover neither another split
nor the size of the test sets. The machines had other work beside: seconds are to be read with that in mind.
"""


def command(name: str) -> list[str]:
    """The words after `fedzoo`."""
    return ["compare", *TITLES[name][1].split()]


def pretrained(name: str) -> list[str]:
    """The words that make the model which a comparison starts from."""
    made = NEEDS[name]
    return ["simulate", *BEFORE[made].split(), "--out", f"$FEDZOO_WEIGHTS/{made}"]


def run(name: str) -> None:
    """One comparison, its pictures left out: they show the data."""
    if name in NEEDS:
        weights = os.environ.get("FEDZOO_WEIGHTS")
        if not weights:
            raise SystemExit(f"error: {name} starts from a trained model. Name a folder for it in FEDZOO_WEIGHTS")
        if not (Path(weights) / NEEDS[name] / "model.safetensors").exists():
            words = [sys.executable, "-m", "fedzoo", *map(os.path.expandvars, pretrained(name)), "--json"]
            subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "fedzoo", *command(name), "--out", f"{folder}/out", "--json"]
        subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        found = results.load(Path(folder) / "out" / "comparison.json")
    told = shlex.join(["fedzoo", *command(name)])
    results.save(found.model_copy(update={"pictures": [], "command": told}), KEPT / f"{name}.json")


def difference(name: str, found: Comparison) -> str:
    """A sentence on this comparison's federated cell and that of the one it is measured against, seed by seed."""
    other = results.load(KEPT / f"{AGAINST[name]}.json")
    here, there = (c.cell("federated", "offline") for c in (found, other))
    if not here or not there:
        raise SystemExit(f"error: {name} and {AGAINST[name]} both need a federated cell")
    apart, measure = paired(here.all_sites, there.all_sites), found.headline
    low, high = (measure.figure(value or 0.0) for value in (apart.low, apart.high))
    sent = here.budget.bytes_up / there.budget.bytes_up
    wire = f" {100 * sent:.1f} % of its bytes go up." if name in NEEDS else ""
    return (
        f'- Against "{TITLES[AGAINST[name]][0]}": {measure.figure(apart.mean)} {measure.step(found.metric)} '
        f"(95 % interval {low} to {high}, {apart.n} seeds{measure.judged(apart.mean)}).{wire}\n"
    )


def section(name: str, found: Comparison) -> str:
    """Title, command, hardware, tables and what may be said."""
    where = f"{found.environment['cpu']}, {found.environment['device']}, torch {found.environment['torch']}"
    split = f"partition {found.partition.kind}, hash `{found.partition.hash[:16]}`"
    said = "".join(f"- {line}\n" for line in verdicts(found))
    if name in AGAINST and (KEPT / f"{AGAINST[name]}.json").exists():
        said += difference(name, found)
    before = f"    fedzoo {' '.join(pretrained(name))}\n" if name in NEEDS else ""
    shown = f"{before}    {found.command}\n{NOTES.get(name, '')}\n{where}; {split}.\n\n{as_markdown(found)}"
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
