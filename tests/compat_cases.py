"""What breaks each rule of the compatibility table, with a job beside it that may run: (reason, broken, sound)."""

from __future__ import annotations

from typing import Any

Parts = dict[str, Any]

SCAFFOLD: Parts = {"method": {"name": "scaffold"}}
SEGMENTATION: Parts = {"model": {"name": "unet"}, "task": {"name": "segmentation", "labels": ["a", "b"]}}
FEATURES: Parts = {"data": {"shape": [2], "features": ["age", "sex=1"]}}
ROTATION: Parts = {"model": {"name": "cnn"}, "task": {"name": "rotation"}}
KMEANS: Parts = {"model": {"name": "kmeans"}, "task": {"name": "clustering"}}
LLOYD: Parts = {**KMEANS, "method": {"name": "lloyd"}}
PCA: Parts = {"model": {"name": "pca"}, "task": {"name": "reconstruction"}}
SAMPLE: Parts = {"privacy": {"mode": "sample", "noise": 1.0}}
CLIENT: Parts = {"privacy": {"mode": "client", "noise": 1.0}, "method": {"name": "fedavg", "weighting": "uniform"}}
SHARES: Parts = {**CLIENT, "privacy": {"mode": "client", "noise": 1.0, "noise_by": "clients"}}
IN_TURN: Parts = {**CLIENT, "privacy": {"mode": "client", "noise": 1.0, "mechanism": "ftrl"}}
PAIRS: Parts = {"data": {"shape": [3, 32, 32], "tokenizer": "bytes"}}
CLIP: Parts = {**PAIRS, "model": {"name": "clip"}, "task": {"name": "contrastive", "labels": []}}
ZERO_SHOT: Parts = {**CLIP, "task": {"name": "zero-shot", "labels": ["a", "b"]}}
TEXTS: Parts = {
    "model": {"name": "gpt"},
    "task": {"name": "language-modelling", "labels": []},
    "data": {"shape": [16], "tokenizer": "bytes"},
}
RESNET: Parts = {"model": {"name": "resnet18", "norm": "batch"}, "data": {"shape": [1, 32, 32]}}
ICARL: Parts = {"time": "continual", "stream": {"tasks": 2}, "continual": {"name": "icarl", "buffer": 20}}
DFKD: Parts = {"method": {"name": "dfkd"}}
JOINING: Parts = {"time": "continual", "stream": {"kind": "sites", "tasks": 2}}
ANOMALY: Parts = {
    "model": {"name": "autoencoder"},
    "task": {"name": "anomaly", "labels": ["a", "b", "c", "d"], "anomalous": ["c", "d"]},
    "time": "continual",
}
STAGES: Parts = {"stages": [{"name": "one"}]}

CASES: list[tuple[str, Parts, Parts]] = [
    (
        "augment.quarter_turns turns images before the task 'rotation' does, which then cannot tell how far",
        {**ROTATION, "augment": {"quarter_turns": True}},
        {**ROTATION, "augment": {"flip": True}},
    ),
    (
        "'finetune' is a continual method: it goes into [continual], not [method]",
        {"method": {"name": "finetune"}},
        {"continual": {"name": "finetune"}},
    ),
    (
        "'fedprox' is a federated method: it goes into [method], not [continual]",
        {"continual": {"name": "fedprox"}},
        {"method": {"name": "fedprox"}},
    ),
    (
        "data.tile = (64, 64) cuts images with their masks, and the task 'classification' has no masks",
        {"data": {"tile": [64, 64]}},
        {**SEGMENTATION, "data": {"tile": [64, 64]}},
    ),
    (
        "model 'gpt' cannot take what [data] describes, image of shape (1, 8, 8)",
        {"model": {"name": "gpt"}},
        {"model": {"name": "gpt"}, "data": {"shape": [8], "tokenizer": "bytes"}},
    ),
    (
        "train.optimizer = 'adamw' rescales them",
        {**SCAFFOLD, "train": {"optimizer": "adamw"}},
        {"train": {"optimizer": "adamw"}},
    ),
    (
        "scaffold recovers the gradient from the distance moved, which train.momentum = 0.9 changes",
        {**SCAFFOLD, "train": {"momentum": 0.9}},
        {"method": {"name": "fedprox"}, "train": {"momentum": 0.9}},
    ),
    (
        "scaffold's control variate is the mean over all sites of the federation, and in a stream of sites",
        {**JOINING, **SCAFFOLD},
        {**JOINING, "time": "offline", **SCAFFOLD},
    ),
    (
        "scaffold's control variates would contain train.weight_decay = 0.1",
        {**SCAFFOLD, "train": {"weight_decay": 0.1}},
        {**SCAFFOLD, "train": {"weight_decay": 0.0}},
    ),
    (
        "train.momentum belongs to sgd; adamw has its own moments",
        {"train": {"optimizer": "adamw", "momentum": 0.9}},
        {"train": {"optimizer": "sgd", "momentum": 0.9}},
    ),
    (
        "stream.tasks = 11 is more than the 10 labels: every task needs at least one",
        {"time": "continual", "stream": {"tasks": 11}, "federation": {"rounds": 11}},
        {"time": "continual", "stream": {"tasks": 10}, "federation": {"rounds": 11}},
    ),
    (
        "stream.tasks = 2 makes a task of anomalies alone, in which nothing normal could be learned",
        {**ANOMALY, "stream": {"tasks": 2}},
        {**ANOMALY, "stream": {"tasks": 2}, "task": {**ANOMALY["task"], "labels": ["a", "c", "b", "d"]}},
    ),
    (
        "stream.tasks = 5 is more than federation.rounds = 4: every task needs at least one round",
        {"time": "continual", "stream": {"tasks": 5}, "federation": {"rounds": 4}},
        {"time": "offline", "stream": {"tasks": 5}, "federation": {"rounds": 4}},
    ),
    (
        "federation.select = 'best' looks back over tasks, which a stream forbids",
        {"time": "continual", "stream": {"tasks": 2}, "federation": {"select": "best"}},
        {"time": "offline", "federation": {"select": "best"}},
    ),
    (
        "'best' would compare validation scores of different cohorts",
        {"federation": {"select": "best", "fraction": 0.5}},
        {"federation": {"select": "best"}},
    ),
    (
        "[share] personal belongs to a federation; with place = 'centralized'",
        {"place": "centralized", "share": {"personal": ["head.*"]}},
        {"place": "federated", "share": {"personal": ["head.*"]}},
    ),
    (
        "a stream of classes cuts the labels into tasks, and an example of the task 'segmentation' has no single label",
        {"time": "continual", "stream": {"tasks": 2}, **SEGMENTATION},
        {"time": "continual", "stream": {"tasks": 2, "kind": "blur"}, **SEGMENTATION},
    ),
    (
        "a stream of classes cuts the labels into tasks, and the task 'rotation' has none; list them in task.labels",
        {"time": "continual", "stream": {"tasks": 2}, **ROTATION, "task": {"name": "rotation", "labels": []}},
        {"time": "continual", "stream": {"tasks": 2}, **ROTATION},
    ),
    (
        "stream.kind = 'drift' changes images, and [data] describes features of shape (2,)",
        {"stream": {"kind": "drift"}, **FEATURES},
        {"stream": {"kind": "sites"}, **FEATURES},
    ),
    (
        "stream.kind = 'rotation' turns images without their mask",
        {"stream": {"kind": "rotation"}, **SEGMENTATION},
        {"stream": {"kind": "drift"}, **SEGMENTATION},
    ),
    (
        "continual method 'rehearsal' puts kept examples into a batch, and those of the task 'segmentation' cannot be",
        {"continual": {"name": "rehearsal"}, **SEGMENTATION},
        {"continual": {"name": "ewc"}, **SEGMENTATION},
    ),
    (
        "continual method 'der' repeats choices among labels, and the task 'rotation' makes none",
        {"continual": {"name": "der"}, **ROTATION},
        {"continual": {"name": "rehearsal"}, **ROTATION},
    ),
    (
        "and with stream.kind = 'blur' they are all classes: a later task's labels would teach nothing",
        {**ICARL, "stream": {"tasks": 2, "kind": "blur"}},
        {**ICARL, "stream": {"tasks": 2, "kind": "blur"}, "continual": {"name": "er"}},
    ),
    (
        "tells old classes from new ones by the task that all sites are at, and with stream.order = 'rotated' each is",
        {**ICARL, "stream": {"tasks": 2, "order": "rotated"}},
        {**ICARL, "stream": {"tasks": 2, "order": "rotated"}, "continual": {"name": "er"}},
    ),
    (
        "takes the input of the model's head for an example's features, and model 'clip' has no head",
        {**ICARL, **ZERO_SHOT},
        {**ICARL, **ZERO_SHOT, "continual": {"name": "er"}},
    ),
    (
        "keeps an example of every class, and continual.buffer = 9 is fewer than the 10 labels",
        {**ICARL, "continual": {"name": "icarl", "buffer": 9}},
        {**ICARL, "continual": {"name": "icarl", "buffer": 10}},
    ),
    (
        "continual method 'icarl' has one mean a class over the features of all sites, and [share] personal makes",
        {**ICARL, "share": {"personal": ["head.*"]}},
        {**ICARL, "share": {"base": ["head.*"]}},
    ),
    (
        "continual method 'icarl' has a loss of its own, a binary cross-entropy a class, in which [task]",
        {**ICARL, "task": {"label_smoothing": 0.1}},
        {**ICARL, "time": "offline", "task": {"label_smoothing": 0.1}},
    ),
    (
        "stream.amount = 1.5 is a share of the contrast, and 1 is all of it",
        {"stream": {"kind": "drift", "amount": 1.5}},
        {"stream": {"kind": "drift", "amount": 1.0}},
    ),
    (
        "stream.amount = 5.0 blurs over more pixels than data.shape = (1, 8, 8) has",
        {"stream": {"kind": "blur", "amount": 5.0}},
        {"stream": {"kind": "blur", "amount": 2.0}},
    ),
    (
        "simulation.partition = 'dirichlet' shares out each class, and an example of the task 'segmentation'",
        {"simulation": {"partition": "dirichlet"}, **SEGMENTATION},
        {"simulation": {"partition": "blocks"}, **SEGMENTATION},
    ),
    (
        "simulation.partition = 'shards' shares out each class, and an example of the task 'segmentation'",
        {"simulation": {"partition": "shards"}, **SEGMENTATION},
        {"simulation": {"partition": "quantity"}, **SEGMENTATION},
    ),
    (
        "[simulation.features] changes images, features and series, and [data] describes tokens",
        {"simulation": {"features": {"noise": 0.1}}, **TEXTS},
        {"simulation": {"features": {"noise": 0.0}}, **TEXTS},
    ),
    (
        "[simulation.features] changes images but for its noise, and [data] describes features of shape (2,)",
        {"simulation": {"features": {"noise": 0.1, "blur": 1.0}}, **FEATURES},
        {"simulation": {"features": {"noise": 0.1}}, **FEATURES},
    ),
    (
        "[augment] changes images, and [data] describes features of shape (2,)",
        {"augment": {"flip": True}, **FEATURES},
        {"augment": {"flip": False}, **FEATURES},
    ),
    (
        "augment.quarter_turns turns square images, and data.shape = (1, 8, 6) is not square",
        {"augment": {"quarter_turns": True}, "data": {"shape": [1, 8, 6]}},
        {"augment": {"quarter_turns": True}, "data": {"shape": [1, 8, 8]}},
    ),
    (
        "scaffold recovers the gradient from the distance moved, which train.clip = 1.0 changes",
        {**SCAFFOLD, "train": {"clip": 1.0}},
        {"train": {"clip": 1.0}},
    ),
    (
        "method 'lloyd' moves the centroids of the model 'kmeans', and 'mlp' has none",
        {"method": {"name": "lloyd"}},
        LLOYD,
    ),
    (
        "method 'pca' finds the components of the model 'pca', and 'kmeans' has none",
        {**KMEANS, "method": {"name": "pca"}},
        {**PCA, "method": {"name": "pca"}},
    ),
    (
        "data.shape = (3, 64, 64) has more than 4096 of them",
        {**PCA, "method": {"name": "pca"}, "data": {"shape": [3, 64, 64]}},
        {**PCA, "method": {"name": "fedavg"}, "data": {"shape": [3, 64, 64]}},
    ),
    (
        "method 'lloyd' solves for the data at hand and makes no training step that a continual method could change",
        {**LLOYD, "time": "continual", "stream": {"tasks": 2}},
        {**KMEANS, "time": "continual", "stream": {"tasks": 2}},
    ),
    (
        "method 'lloyd' sums the examples as they are, and [augment] would change nothing",
        {**LLOYD, "augment": {"flip": True}},
        {**KMEANS, "augment": {"flip": True}},
    ),
    (
        "method 'pca' solves for the whole model, and [share] would keep a part of it back",
        {**PCA, "method": {"name": "pca"}, "share": {"base": ["mean"]}},
        {**PCA, "share": {"base": ["mean"]}},
    ),
    (
        "isolated sites never aggregate, so method 'scaffold' would do nothing there",
        {"place": "isolated", **SCAFFOLD},
        {"place": "isolated", "method": {"name": "fedavg"}},
    ),
    (
        "isolated sites never aggregate, so method 'fedprox' would do nothing there",
        {**KMEANS, "place": "isolated", "method": {"name": "fedprox"}},
        {**LLOYD, "place": "isolated"},  # a closed form is how that model is found, at one site too
    ),
    (
        "features or series of the task 'classification', not the task 'segmentation' on image",
        {**SEGMENTATION, **DFKD},
        {**FEATURES, **DFKD},
    ),
    (
        "not the task 'zero-shot' on image-text",
        {**ZERO_SHOT, **DFKD},
        {**DFKD, "time": "continual", "stream": {"tasks": 2}},
    ),
    (
        "images within the range that data.mean and data.std leave, and data.normalise_by = 'sites' gives no numbers",
        {**DFKD, "data": {"normalise_by": "sites"}},
        {**DFKD, "data": {**FEATURES["data"], "normalise_by": "sites"}},
    ),
    (
        "method 'dfkd' trains the whole model at the server, and [share] personal keeps a part of it at the sites",
        {**DFKD, "share": {"personal": ["@head"]}},
        {**DFKD, "share": {"base": ["!@head"]}},
    ),
    (
        "method 'fedadam' takes a step of its own from the sites' mean, for each factor by itself",
        {"method": {"name": "fedadam"}, "lora": {"rank": 2, "train": "both"}},
        {"method": {"name": "fedadam"}, "lora": {"rank": 2}},
    ),
]
