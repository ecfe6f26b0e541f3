"""Every rule of the compatibility table: one job that breaks it and is told why, one beside it that may run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from shared_models.compat import RULES
from shared_models.errors import CompatibilityError
from shared_models.job import Job
from shared_models.methods.base import Method, methods
from shared_models.models import models

MakeJob = Callable[..., Job]
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
STAGES: Parts = {"stages": [{"name": "one"}]}


class Rehearsal(Method):
    """A continual method that replays."""

    continual, name, draws = True, "rehearsal", 1


class Importance(Method):
    """A continual method that measures a task's examples and keeps the result."""

    continual, name = True, "importance"

    def end_task(self, model, task, batches, kept):  # type: ignore[no-untyped-def]
        return kept


@pytest.fixture(autouse=True)
def continual_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "finetune" in list(methods)
    for declared in (Rehearsal, Importance):
        monkeypatch.setitem(methods._things, declared.name, declared)


CASES: list[tuple[str, Parts, Parts]] = [
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
        "privacy.mode = 'client' hides whether a site takes part, and stream.kind = 'sites' says in which rounds",
        {**JOINING, **CLIENT},
        {**JOINING, **SAMPLE},
    ),
    (
        "stream.stay gives each site another number of passes a round, and privacy.mode = 'sample' finds the noise",
        {**JOINING, **SAMPLE, "stream": {"kind": "sites", "tasks": 2, "stay": True}},
        {**JOINING, "stream": {"kind": "sites", "tasks": 2, "stay": True}},
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
]


@pytest.mark.parametrize(("reason", "broken", "counterpart"), CASES)
def test_each_rule_refuses_with_its_reason_and_lets_its_counterpart_pass(
    make_job: MakeJob, reason: str, broken: Parts, counterpart: Parts
) -> None:
    with pytest.raises(CompatibilityError) as error:
        make_job(**broken)
    assert str(error.value).startswith("job 'test': ")
    assert reason in str(error.value)
    assert make_job(**counterpart).name == "test"


def test_a_model_that_cannot_serve_the_task_is_refused(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_job(model={"name": "mlp"}).model.name == "mlp"
    monkeypatch.setitem(models._things, "mlp", replace(models["mlp"], tasks=("detection",)))
    with pytest.raises(CompatibilityError, match="model 'mlp' cannot serve the task 'classification'"):
        make_job(model={"name": "mlp"})


def test_what_replays_choices_goes_with_every_task_that_makes_them(make_job: MakeJob) -> None:
    for parts in ({}, ZERO_SHOT):
        assert make_job(**parts, continual={"name": "er"}).continual.name == "er"


def test_no_rule_is_without_a_case(make_job: MakeJob) -> None:
    """The cases above and the model's break each rule of the table alone, so a new rule needs a new case."""
    covered = set()
    for _, broken, _ in CASES:
        job = Job.model_validate({**make_job().model_dump(), **merged(make_job().model_dump(), broken)})
        covered |= {i for i, (breaks, _) in enumerate(RULES) if breaks(job)}
    assert covered == set(range(1, len(RULES)))  # rule 0 is the model's


def merged(base: Parts, parts: Parts) -> Parts:
    return {k: {**base[k], **v} if isinstance(v, dict) and "name" not in v else v for k, v in parts.items()}
