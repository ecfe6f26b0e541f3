"""What breaks each rule on privacy, with a job beside it that may run: (reason, broken, sound)."""

from __future__ import annotations

from compat_cases import (
    CLIENT,
    CLIP,
    ICARL,
    IN_TURN,
    JOINING,
    KMEANS,
    LLOYD,
    RESNET,
    SAMPLE,
    SHARES,
    STAGES,
    ZERO_SHOT,
    Parts,
)

PRIVACY_CASES: list[tuple[str, Parts, Parts]] = [
    (
        "the task 'contrastive' compares the examples of a batch with each other; privacy.mode = 'client' protects",
        {**SAMPLE, **CLIP},
        {**CLIENT, **CLIP},
    ),
    (
        "model 'clip' has no per-sample gradients, so privacy.mode = 'sample' cannot clip what one example does",
        {**SAMPLE, **ZERO_SHOT},
        {**CLIENT, **ZERO_SHOT},
    ),
    (
        "model 'lstm' has no per-sample gradients by privacy.gradients = 'hooks'; 'auto' takes the soundest",
        {
            "model": {"name": "lstm"},
            "data": {"shape": [8], "tokenizer": "bytes"},
            "privacy": {"mode": "sample", "noise": 1.0, "gradients": "hooks"},
        },
        {**SAMPLE, "model": {"name": "lstm"}, "data": {"shape": [8], "tokenizer": "bytes"}},
    ),
    (
        "statistics are not protected by privacy.mode = 'client'; norm = 'group', [share] base = ['!@head']",
        {**CLIENT, **RESNET},
        {**SAMPLE, **RESNET, "share": {"base": ["!@head"]}},
    ),
    (
        "train.clip = 1.0 clips the gradient of a batch after the noise of privacy.mode = 'sample'",
        {**SAMPLE, "train": {"clip": 1.0}},
        {**SAMPLE, "train": {"clip": 0.0}},
    ),
    (
        "data.normalise_by = 'sites' sends sums of examples without noise, outside of what privacy.mode = 'sample'",
        {**SAMPLE, "data": {"normalise_by": "sites"}},
        {**SAMPLE, "data": {"mean": [0.2], "std": [0.3]}},
    ),
    (
        "privacy.epsilon is the target of one training, and [[stages]] are several on the same examples",
        {**STAGES, "privacy": {"mode": "sample", "epsilon": 3.0}},
        {**SAMPLE, **STAGES},
    ),
    (
        "method 'lloyd' sends sums of examples without noise, and privacy.mode = 'sample' has none for them",
        {**SAMPLE, **LLOYD},
        {**SAMPLE, **KMEANS},
    ),
    (
        "continual method 'rehearsal' trains on examples of earlier tasks again, otherwise than by the Poisson",
        {**SAMPLE, "continual": {"name": "rehearsal"}},
        {**CLIENT, "continual": {"name": "rehearsal"}},
    ),
    (
        "continual method 'importance' keeps what it measured on a task's examples without noise",
        {**SAMPLE, "continual": {"name": "importance"}},
        {**CLIENT, "continual": {"name": "importance"}},
    ),
    (
        "continual method 'icarl' sends sums of examples' features without noise, and privacy.mode = 'client' has none",
        {**CLIENT, **ICARL},
        {**CLIENT, **ICARL, "continual": {"name": "rehearsal"}},
    ),
    (
        "train.deterministic = false: a round that is done again after a crash would give other numbers under the same",
        {**SAMPLE, "train": {"deterministic": False}},
        {**CLIENT, "train": {"deterministic": False}},
    ),
    (
        "place = 'centralized' makes rounds of different length where federation.fraction = 0.5",
        {"privacy": {"mode": "sample", "epsilon": 3.0}, "place": "centralized", "federation": {"fraction": 0.5}},
        {**SAMPLE, "place": "centralized", "federation": {"fraction": 0.5}},
    ),
    (
        "privacy.mode = 'client' hides a site among others, and place = 'isolated' has no others",
        {**CLIENT, "place": "isolated"},
        {**SAMPLE, "place": "isolated"},
    ),
    (
        "[method] weighting = 'examples' would let a large site weigh more; set weighting = 'uniform'",
        {**CLIENT, "method": {"name": "fedprox"}},
        {**CLIENT, "method": {"name": "fedprox", "weighting": "uniform"}},
    ),
    (
        "method 'scaffold' sends more than the model, and privacy.mode = 'client' clips the model's update alone",
        {**CLIENT, "method": {"name": "scaffold", "weighting": "uniform"}},
        {**SAMPLE, "method": {"name": "scaffold", "weighting": "uniform"}},
    ),
    (
        "lora.train = 'both' averages the products of two factors, and privacy.mode = 'client' bounds what a site does",
        {**CLIENT, "lora": {"rank": 2, "train": "both"}},
        {**CLIENT, "lora": {"rank": 2}},
    ),
    (
        "federation.select = 'best' chooses by what sites measure, without noise",
        {**CLIENT, "federation": {"select": "best"}},
        {**SAMPLE, "federation": {"select": "best"}},
    ),
    (
        "federation.fraction = 0.5 leaves to chance how many come; noise_by = 'server' samples",
        {**SHARES, "federation": {"fraction": 0.5}},
        {**CLIENT, "federation": {"fraction": 0.5}},
    ),
    (
        "privacy.mechanism = 'ftrl' correlates the noise of rounds, which privacy.noise_by = 'clients' cannot",
        {**IN_TURN, "privacy": {**IN_TURN["privacy"], "noise_by": "clients"}},
        {**IN_TURN, "federation": {"fraction": 0.5}},
    ),
    (
        "privacy.quantile moves the clip by a count of unclipped updates, which only privacy.noise_by = 'server' sees",
        {**SHARES, "privacy": {**SHARES["privacy"], "quantile": 0.5}},
        {**CLIENT, "privacy": {**CLIENT["privacy"], "quantile": 0.5}},
    ),
    (
        "privacy.quantile changes the clip between rounds, and the noise of privacy.mechanism = 'ftrl' is that of one",
        {**IN_TURN, "privacy": {**IN_TURN["privacy"], "quantile": 0.5}},
        IN_TURN,
    ),
    (
        "privacy.mode = 'client' hides whether a site takes part, and stream.kind = 'sites' says in which rounds",
        {**JOINING, **CLIENT},
        {**JOINING, **SAMPLE},
    ),
    (
        "stream.stay gives each site another number of passes a round, and privacy.mode = 'sample' finds the noise",
        {**JOINING, **SAMPLE, "stream": {"kind": "sites", "tasks": 2, "stay": True}},
        {**JOINING, "stream": {"kind": "sites", "tasks": 2, "stay": True}},
    ),
]
