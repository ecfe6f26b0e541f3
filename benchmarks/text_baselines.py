"""How well counting does on the texts of a job: models of single tokens and of pairs, from all sites' training texts.

    FEDZOO_DATA=<folder> python benchmarks/text_baselines.py examples/shakespeare.toml [table.key=value ...]

Prints JSON: perplexity, bits per character and accuracy of the likeliest token on all sites' test texts, measured as
the tasks on texts measure them. Every count is raised by one, so that no token is impossible.

Where spans are hidden as in T5 a model must also say where a span ends: single tokens are counted there together with
these ends, of which none follows another.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from shared_models.job import Job
from shared_models.tasks.base import make_task
from shared_models.tasks.denoising import corrupt
from shared_models.tokens import PAD, make_tokenizer
from simulations.compare import load_sites


def measured(surprise: Tensor, hits: Tensor, tokens: int, characters: int) -> dict[str, float]:
    """From nats and hits over all test tokens."""
    nats = float(surprise.sum())
    return {
        "perplexity": float(torch.tensor(nats / tokens).exp()),
        "bits_per_character": nats / float(torch.tensor(2.0).log()) / characters,
        "accuracy": float(hits.double().mean()),
    }


def hidden_spans(job: Job, train: Tensor, test: Tensor, single: Tensor) -> dict[str, float]:
    """Frequencies of bytes and of ends of spans, on the hidden bytes of the test texts."""
    part = job.task.keys

    def written(texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(token, whether it is a hidden byte, whether the one before is an end), of all that is to be written."""
        torch.manual_seed(0)
        drawn = [corrupt(ids, part.get("hidden", 0.3), part.get("span", 3.0), spans=True)[1:] for ids in texts]
        write, gone = (torch.stack(parts) for parts in zip(*drawn, strict=True))
        kept = write[:, 1:] != PAD
        return write[:, 1:][kept], gone[:, 1:][kept], ~gone[:, :-1][kept]

    token, byte, first = written(train)
    ends = float((~byte[~first]).double().mean())
    table = single / single.sum()
    token, byte, first = written(test)
    token, stay = token[byte], torch.where(first[byte], 1.0, 1 - ends).double()
    hits = (token == table.argmax()) & (table.max() * stay > torch.where(first[byte], 0.0, ends))
    return {"share of ends": ends, **measured(-(table[token] * stay).log(), hits, len(token), len(token))}


def main(path: str, *overrides: str) -> None:
    job = Job.load(Path(path), overrides)
    pooled = load_sites(job, Path(path).parent).pooled()
    tokenizer = make_tokenizer(job.data.tokenizer)
    said = make_task(job).target == "tokens"
    train, test = ((part.y if said else part.store.x[part.rows]).long() for part in (pooled.train, pooled.test))
    single = torch.ones(tokenizer.size, dtype=torch.float64)
    single[PAD] = 0
    single += torch.bincount(train[:, 1:].flatten(), minlength=tokenizer.size) * (torch.arange(tokenizer.size) != PAD)
    pairs = single.clamp(max=1).repeat(tokenizer.size, 1)
    known = train[:, 1:] != PAD
    pairs.view(-1).index_add_(
        0, (train[:, :-1] * tokenizer.size + train[:, 1:])[known], torch.ones(int(known.sum()), dtype=torch.float64)
    )
    before, after = test[:, :-1], test[:, 1:]
    real = after != PAD
    characters = sum(len(tokenizer.decode(row)) for row in after.tolist())
    found = {}
    for name, table in (("single tokens", single.repeat(tokenizer.size, 1)), ("pairs", pairs)):
        table = table / table.sum(dim=1, keepdim=True)
        chosen = table[before[real], after[real]]
        hits = table.argmax(dim=1)[before[real]] == after[real]
        found[name] = measured(-chosen.log(), hits, int(real.sum()), characters)
    if job.task.name == "denoising" and job.task.keys.get("noise") == "spans":
        found["single tokens and ends of spans"] = hidden_spans(job, train, test, single)
    print(
        json.dumps(
            {"job": job.name, "data": job.simulation.root, "counted on all sites' training texts": found}, indent=1
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
