"""The one table of settings that exclude each other, each with its reason. A pair that is not here is supported."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING

from shared_models.compat_privacy import PRIVACY_RULES, herds
from shared_models.errors import CompatibilityError

if TYPE_CHECKING:
    from shared_models.job import Job


def _wrong_task(job: Job) -> bool:
    from shared_models.models import models

    return job.task.name not in models[job.model.name].tasks


def _wrong_form(job: Job) -> bool:
    from shared_models.models import models

    return job.data.form not in models[job.model.name].inputs


def _not_continual(job: Job) -> bool:
    from shared_models.methods.base import methods

    return not methods[job.continual.name].continual


def _not_federated(job: Job) -> bool:
    from shared_models.methods.base import methods

    return methods[job.method.name].continual


def _target(job: Job) -> str:
    from shared_models.tasks.base import tasks

    return tasks[job.task.name].target


def _chooses(job: Job) -> bool:
    from shared_models.tasks.base import tasks

    return tasks[job.task.name].chooses


def _repeats(job: Job) -> bool:
    """Whether the continual method looks at choices among labels: what a model says now, or said before."""
    from shared_models.methods.base import make_pieces, overrides

    piece = make_pieces(job)[-1]
    return piece.keeps_outputs or overrides(piece, "former") or overrides(piece, "see")


def _replays(job: Job) -> bool:
    """Whether the continual method keeps examples."""
    from shared_models.methods.base import make_pieces

    return bool(make_pieces(job)[-1].draws)


def _unit(job: Job) -> str:
    from shared_models.tasks.base import tasks

    return tasks[job.task.name].unit


def _headless(job: Job) -> bool:
    from shared_models.models import models

    return not models[job.model.name].heads


def _joined(job: Job) -> bool:
    """Whether sites join one after the other."""
    return job.time == "continual" and job.stream.kind == "sites"


def _closed_form(job: Job) -> bool:
    """Whether sites answer with sums of examples, without training steps."""
    from shared_models.methods.base import make_method, overrides

    return overrides(make_method(job), "answer")


def _nothing_normal(job: Job) -> bool:
    """Whether a task of the stream has no labels but those that come with every task."""
    from shared_models.tasks.base import make_task

    if not job.cuts_labels or job.stream.tasks > len(job.task.labels):
        return False
    always = make_task(job).always
    return bool(always) and any(set(always).issuperset(classes) for classes in job.tasks)


def _draws_inputs(job: Job) -> bool:
    """Whether the server trains the model on inputs that it makes itself."""
    from shared_models.methods.base import make_method, overrides

    return overrides(make_method(job), "refine")


def _steps_at_server(job: Job) -> bool:
    """Whether the next model is not simply the mean of the sites'."""
    from shared_models.methods.base import make_method, overrides

    return overrides(make_method(job), "finish")


BY_CLASS = ("dirichlet", "shards", "labels")  # partitions

RULES: tuple[tuple[Callable[[Job], bool], str], ...] = (
    (_wrong_task, "model '{job.model.name}' cannot serve the task '{job.task.name}'"),
    (
        _wrong_form,
        "model '{job.model.name}' cannot take what [data] describes, {job.data.form} of shape {job.data.shape}",
    ),
    (_not_federated, "'{job.method.name}' is a continual method: it goes into [continual], not [method]"),
    (_not_continual, "'{job.continual.name}' is a federated method: it goes into [method], not [continual]"),
    (
        lambda job: job.cuts_labels and _target(job) not in ("class", "none"),
        "a stream of classes cuts the labels into tasks, and an example of the task '{job.task.name}' has no single "
        "label; stream.kind = 'sites', 'blur' or 'drift', or time = 'offline', can train it",
    ),
    (
        lambda job: job.cuts_labels and _target(job) == "none" and not job.task.labels,
        "a stream of classes cuts the labels into tasks, and the task '{job.task.name}' has none; list them in "
        "task.labels, which tells its examples apart and nothing more, or change stream.kind",
    ),
    (
        lambda job: job.stream.kind not in ("classes", "sites") and len(job.data.shape) != 3,
        "stream.kind = '{job.stream.kind}' changes images, and [data] describes {job.data.form} of shape "
        "{job.data.shape}",
    ),
    (
        lambda job: job.stream.kind == "rotation" and _target(job) != "class",
        "stream.kind = 'rotation' turns images without their {target}; 'blur' and 'drift' leave everything in place",
    ),
    (
        lambda job: _repeats(job) and not _chooses(job),
        "continual method '{job.continual.name}' repeats choices among labels, and the task '{job.task.name}' makes "
        "none; 'finetune', 'joint', 'ewc', 'si' and 'er' can train it",
    ),
    (
        lambda job: _replays(job) and (_unit(job) != "sample" or _target(job) not in ("class", "none")),
        "continual method '{job.continual.name}' puts kept examples into a batch, and those of the task "
        "'{job.task.name}' cannot be kept one by one; 'finetune', 'joint', 'ewc' and 'si' can train it",
    ),
    (
        lambda job: herds(job) and job.stream.kind != "classes",
        "continual method '{job.continual.name}' answers for the classes of earlier tasks as the former model did, and "
        "with stream.kind = '{job.stream.kind}' they are all classes: a later task's labels would teach nothing",
    ),
    (
        lambda job: (herds(job) or _draws_inputs(job)) and len(job.tasks) > 1 and job.stream.order != "shared",
        "'{job.method.name}' with '{job.continual.name}' tells old classes from new ones by the task that all sites "
        "are at, and with stream.order = '{job.stream.order}' each is at its own",
    ),
    (
        lambda job: herds(job) and _headless(job),
        "continual method '{job.continual.name}' takes the input of the model's head for an example's features, and "
        "model '{job.model.name}' has no head",
    ),
    (
        lambda job: herds(job) and job.continual.keys["buffer"] < len(job.task.labels),
        "continual method '{job.continual.name}' keeps an example of every class, and continual.buffer = "
        "{job.continual.keys[buffer]} is fewer than the {labels} labels",
    ),
    (
        lambda job: herds(job) and bool(job.share.personal),
        "continual method '{job.continual.name}' has one mean a class over the features of all sites, and [share] "
        "personal makes each site's model its own",
    ),
    (
        lambda job: herds(job) and bool(job.task.keys.get("class_weights") or job.task.keys.get("label_smoothing")),
        "continual method '{job.continual.name}' has a loss of its own, a binary cross-entropy a class, in which "
        "[task] class_weights and label_smoothing have no part",
    ),
    (
        lambda job: job.stream.kind == "drift" and (job.stream.amount or 0) > 1,
        "stream.amount = {job.stream.amount} is a share of the contrast, and 1 is all of it",
    ),
    (
        lambda job: job.stream.kind == "blur" and 2 * (job.stream.amount or 0) >= min(job.data.shape[-2:]) - 1,
        "stream.amount = {job.stream.amount} blurs over more pixels than data.shape = {job.data.shape} has",
    ),
    (
        lambda job: _joined(job) and job.method.name == "scaffold",
        "scaffold's control variate is the mean over all sites of the federation, and in a stream of sites those of a "
        "round are others than those of the one before",
    ),
    (
        lambda job: job.simulation.partition in BY_CLASS and _target(job) != "class",
        "simulation.partition = '{job.simulation.partition}' shares out each class, and an example of the task "
        "'{job.task.name}' has no single class; 'iid', 'quantity', 'blocks' and 'column' can split it",
    ),
    (
        lambda job: bool(job.simulation.features.chosen) and job.data.form == "tokens",
        "[simulation.features] changes images, features and series, and [data] describes tokens",
    ),
    (
        lambda job: bool(job.simulation.features.chosen.keys() - {"noise"}) and len(job.data.shape) != 3,
        "[simulation.features] changes images but for its noise, and [data] describes {job.data.form} of shape "
        "{job.data.shape}",
    ),
    (
        lambda job: bool(job.data.tile) and _target(job) != "mask",
        "data.tile = {job.data.tile} cuts images with their masks, and the task '{job.task.name}' has no masks",
    ),
    (
        lambda job: job.augment.active and len(job.data.shape) != 3,
        "[augment] changes images, and [data] describes {job.data.form} of shape {job.data.shape}",
    ),
    (
        lambda job: job.augment.quarter_turns and len(set(job.data.shape[1:])) == 2,
        "augment.quarter_turns turns square images, and data.shape = {job.data.shape} is not square",
    ),
    (
        lambda job: job.augment.quarter_turns and job.task.name == "rotation",
        "augment.quarter_turns turns images before the task 'rotation' does, which then cannot tell how far",
    ),
    (
        lambda job: job.method.name == "scaffold" and job.train.clip > 0,
        "scaffold recovers the gradient from the distance moved, which train.clip = {job.train.clip} changes",
    ),
    (
        lambda job: job.method.name == "scaffold" and job.train.optimizer != "sgd",
        "scaffold's control variates are gradients of plain SGD (Karimireddy et al. 2020, Algorithm 1, option II), "
        "train.optimizer = '{job.train.optimizer}' rescales them",
    ),
    (
        lambda job: job.method.name == "scaffold" and job.train.momentum > 0,
        "scaffold recovers the gradient from the distance moved, which train.momentum = {job.train.momentum} changes",
    ),
    (
        lambda job: job.method.name == "scaffold" and job.train.weight_decay > 0,
        "scaffold's control variates would contain train.weight_decay = {job.train.weight_decay}",
    ),
    (
        lambda job: job.train.optimizer == "adamw" and job.train.momentum > 0,
        "train.momentum belongs to sgd; adamw has its own moments",
    ),
    (
        lambda job: job.cuts_labels and job.stream.tasks > len(job.task.labels),
        "stream.tasks = {job.stream.tasks} is more than the {labels} labels: every task needs at least one",
    ),
    (
        _nothing_normal,
        "stream.tasks = {job.stream.tasks} makes a task of anomalies alone, in which nothing normal could be learned; "
        "order task.labels otherwise, or have fewer tasks",
    ),
    (
        lambda job: job.time == "continual" and job.stream.tasks > job.federation.rounds,
        "stream.tasks = {job.stream.tasks} is more than federation.rounds = {job.federation.rounds}: "
        "every task needs at least one round",
    ),
    (
        lambda job: job.federation.select == "best" and len(job.tasks) > 1,
        "federation.select = 'best' looks back over tasks, which a stream forbids",
    ),
    (
        lambda job: job.federation.select == "best" and job.federation.fraction < 1,
        "federation.select = 'best' would compare validation scores of different cohorts, "
        "federation.fraction = {job.federation.fraction} changes the cohort every round",
    ),
    (
        lambda job: job.place != "federated" and bool(job.share.personal),
        "[share] personal belongs to a federation; with place = '{job.place}' a model is measured at sites that "
        "never trained those entries",
    ),
    (
        lambda job: job.method.name == "lloyd" and job.model.name != "kmeans",
        "method 'lloyd' moves the centroids of the model 'kmeans', and '{job.model.name}' has none",
    ),
    (
        lambda job: job.method.name == "pca" and job.model.name != "pca",
        "method 'pca' finds the components of the model 'pca', and '{job.model.name}' has none",
    ),
    (
        lambda job: job.method.name == "pca" and prod(job.data.shape) > 4096,
        "method 'pca' sends a number for every pair of the numbers of an example, and data.shape = {job.data.shape} "
        "has more than 4096 of them; 'fedavg' trains the model 'pca' without",
    ),
    (
        lambda job: _closed_form(job) and len(job.tasks) > 1,
        "method '{job.method.name}' solves for the data at hand and makes no training step that a continual method "
        "could change: after each task it would know that task alone",
    ),
    (
        lambda job: _closed_form(job) and job.augment.active,
        "method '{job.method.name}' sums the examples as they are, and [augment] would change nothing",
    ),
    (
        lambda job: _closed_form(job) and bool(job.share.personal or job.share.base),
        "method '{job.method.name}' solves for the whole model, and [share] would keep a part of it back",
    ),
    (
        lambda job: job.place == "isolated" and job.method.name != "fedavg" and not _closed_form(job),
        "isolated sites never aggregate, so method '{job.method.name}' would do nothing there",
    ),
    (
        lambda job: _draws_inputs(job) and (not _chooses(job) or bool(job.data.tokenizer)),
        "method '{job.method.name}' makes inputs by gradients towards labels that a model chooses: images, features or "
        "series of the task 'classification', not the task '{job.task.name}' on {job.data.form}",
    ),
    (
        lambda job: _draws_inputs(job) and job.data.form == "image" and job.data.normalise_by == "sites",
        "method '{job.method.name}' makes images within the range that data.mean and data.std leave, and "
        "data.normalise_by = 'sites' gives no numbers for it",
    ),
    (
        lambda job: _draws_inputs(job) and bool(job.share.personal),
        "method '{job.method.name}' trains the whole model at the server, and [share] personal keeps a part of it at "
        "the sites",
    ),
    (
        lambda job: job.lora.train == "both" and _steps_at_server(job),
        "method '{job.method.name}' takes a step of its own from the sites' mean, for each factor by itself, and "
        "lora.train = 'both' averages their product; 'fedavg' and 'fedprox' take the mean, or set lora.train = 'b'",
    ),
    *PRIVACY_RULES,
)


def require_compatible(job: Job) -> None:
    """Raise a CompatibilityError with the reason of the first rule that the job breaks."""
    for broken, reason in RULES:
        if broken(job):
            raise CompatibilityError(
                f"job '{job.name}': " + reason.format(job=job, labels=len(job.task.labels), target=_target(job)),
                hint="Change one of the two",
            )
