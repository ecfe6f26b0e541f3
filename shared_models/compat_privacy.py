"""The part of the compatibility table that differential privacy fills: what would be unsound, and what to do instead.

Methods cross privacy by where their pieces act. A term of the loss lies inside the clip; what changes the gradient or
moves parameters (FedProx, SCAFFOLD's control variates in mode `sample`, server optimizers) comes after the noise and
costs nothing. What reads examples in any other way is refused here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared_models.job import Job

Rule = tuple[Callable[["Job"], bool], str]


def _sample(job: Job) -> bool:
    return job.privacy.mode == "sample"


def _client(job: Job) -> bool:
    return job.privacy.mode == "client"


def _on(job: Job) -> bool:
    return job.privacy.mode != "none"


def _unit(job: Job) -> str:
    from shared_models.tasks.base import tasks

    return tasks[job.task.name].unit


def _model(job: Job) -> tuple[Any, Any]:
    from shared_models.models import configure

    return configure(job.model.name, job.model.keys)


def _no_gradients(job: Job) -> bool:
    return not _model(job)[0].per_sample_gradients


def _undeclared(job: Job) -> bool:
    return job.privacy.gradients not in ("auto", *_model(job)[0].per_sample_gradients)


def _normalises_over_batches(job: Job) -> bool:
    """Batch norm whose statistics move; those of frozen layers are constants."""
    model, settings = _model(job)
    return bool(model.unit(settings) == "batch") and not job.share.base and not job.lora.rank


def _pieces(job: Job, *hooks: str) -> bool:
    from shared_models.methods.base import make_pieces, overrides

    return any(overrides(piece, hook) for piece in make_pieces(job) for hook in hooks)


def _again(job: Job) -> bool:
    """Whether examples of earlier tasks are trained on in later ones."""
    from shared_models.methods.base import make_pieces

    piece = make_pieces(job)[-1]
    return bool(piece.draws) or piece.whole


def herds(job: Job) -> bool:
    """Whether a stream's examples are chosen by their features, of which sites then give sums."""
    from shared_models.methods.base import methods

    return len(job.tasks) > 1 and methods[job.continual.name].herds


def _sends_more(job: Job) -> bool:
    from shared_models.methods.base import make_method, overrides

    return overrides(make_method(job), "down")


def _weighs(job: Job) -> bool:
    from shared_models.methods.base import make_method

    return make_method(job).weighting != "uniform"


PRIVACY_RULES: tuple[Rule, ...] = (
    (
        lambda job: _sample(job) and _unit(job) != "sample",
        "privacy.mode = 'sample' clips what one example does, and the task '{job.task.name}' compares the examples of "
        "a batch with each other; privacy.mode = 'client' protects a site as a whole",
    ),
    (
        lambda job: _sample(job) and _no_gradients(job),
        "model '{job.model.name}' has no per-sample gradients, so privacy.mode = 'sample' cannot clip what one example "
        "does; privacy.mode = 'client' protects a site as a whole",
    ),
    (
        lambda job: _sample(job) and _undeclared(job),
        "model '{job.model.name}' has no per-sample gradients by privacy.gradients = '{job.privacy.gradients}'; 'auto' "
        "takes the soundest that it has",
    ),
    (
        lambda job: _on(job) and _normalises_over_batches(job),
        "model.norm = 'batch' mixes the examples of a batch, and its running statistics are not protected by "
        "privacy.mode = '{job.privacy.mode}'; norm = 'group', [share] base = ['!@head'] (the head only) or [lora] can "
        "be protected",
    ),
    (
        lambda job: _on(job) and job.train.clip > 0,
        "train.clip = {job.train.clip} clips the gradient of a batch after the noise of privacy.mode = "
        "'{job.privacy.mode}', which shrinks noise and signal alike; privacy.clip bounds what one unit does",
    ),
    (
        lambda job: _on(job) and job.data.normalise_by == "sites",
        "data.normalise_by = 'sites' sends sums of examples without noise, outside of what privacy.mode = "
        "'{job.privacy.mode}' guarantees; give data.mean and data.std",
    ),
    (
        lambda job: _on(job) and bool(job.stages) and job.privacy.noise is None,
        "privacy.epsilon is the target of one training, and [[stages]] are several on the same examples, each with "
        "steps and rates of its own; give privacy.noise: what all stages spend is added up, `fedzoo privacy` tells it",
    ),
    (
        lambda job: _on(job) and _pieces(job, "answer"),
        "method '{job.method.name}' sends sums of examples without noise, and privacy.mode = '{job.privacy.mode}' has "
        "none for them; 'fedavg' can train this model",
    ),
    (
        lambda job: _on(job) and herds(job),
        "continual method '{job.continual.name}' sends sums of examples' features without noise, and privacy.mode = "
        "'{job.privacy.mode}' has none for them; 'finetune' can be protected, with privacy.mode = 'client' 'er' too",
    ),
    (
        lambda job: _sample(job) and _again(job),
        "continual method '{job.continual.name}' trains on examples of earlier tasks again, otherwise than by the "
        "Poisson sampling that privacy.mode = 'sample' accounts for; 'finetune' can be protected, or "
        "privacy.mode = 'client'",
    ),
    (
        lambda job: _sample(job) and _pieces(job, "end_task"),
        "continual method '{job.continual.name}' keeps what it measured on a task's examples without noise, and later "
        "rounds would tell of it past privacy.mode = 'sample'; 'finetune' can be protected, or privacy.mode = 'client'",
    ),
    (
        lambda job: _sample(job) and not job.train.deterministic,
        "train.deterministic = false: a round that is done again after a crash would give other numbers under the same "
        "noise, which privacy.mode = 'sample' cannot allow",
    ),
    (
        lambda job: (
            _sample(job) and job.place == "centralized" and job.federation.fraction < 1 and not job.privacy.noise
        ),
        "place = 'centralized' makes rounds of different length where federation.fraction = {job.federation.fraction}, "
        "and no one noise meets privacy.epsilon; give privacy.noise",
    ),
    (
        lambda job: _client(job) and job.time == "continual" and job.stream.kind == "sites",
        "privacy.mode = 'client' hides whether a site takes part, and stream.kind = 'sites' says in which rounds it "
        "does; privacy.mode = 'sample' protects examples",
    ),
    (
        lambda job: _sample(job) and job.time == "continual" and job.stream.kind == "sites" and job.stream.stay,
        "stream.stay gives each site another number of passes a round, and privacy.mode = 'sample' finds the noise for "
        "one; stay = false can be protected",
    ),
    (
        lambda job: _client(job) and job.place != "federated",
        "privacy.mode = 'client' hides a site among others, and place = '{job.place}' has no others; privacy.mode = "
        "'sample' protects examples there",
    ),
    (
        lambda job: _client(job) and _weighs(job),
        "privacy.mode = 'client' clips each site's update alike, and [method] weighting = 'examples' would let a large "
        "site weigh more; set weighting = 'uniform'",
    ),
    (
        lambda job: _client(job) and _sends_more(job),
        "method '{job.method.name}' sends more than the model, and privacy.mode = 'client' clips the model's update "
        "alone; 'fedprox' limits drift too and can be protected, or privacy.mode = 'sample'",
    ),
    (
        lambda job: _client(job) and job.lora.train == "both",
        "lora.train = 'both' averages the products of two factors, and privacy.mode = 'client' bounds what a site does "
        "to the factors, not to their product; set lora.train = 'b'",
    ),
    (
        lambda job: _client(job) and job.federation.select == "best",
        "federation.select = 'best' chooses by what sites measure, without noise, and privacy.mode = 'client' hides "
        "all of a site's data; set select = 'last'",
    ),
    (
        lambda job: job.privacy.noise_by == "clients" and job.federation.fraction < 1,
        "privacy.noise_by = 'clients' counts on federation.min_sites shares of noise in each round, and "
        "federation.fraction = {job.federation.fraction} leaves to chance how many come; noise_by = 'server' samples",
    ),
    (
        lambda job: job.privacy.noise_by == "clients" and job.privacy.mechanism == "ftrl",
        "privacy.mechanism = 'ftrl' correlates the noise of rounds, which privacy.noise_by = 'clients' cannot: the "
        "sites of a round are others than those of the one before",
    ),
    (
        lambda job: job.privacy.quantile > 0 and job.privacy.noise_by == "clients",
        "privacy.quantile moves the clip by a count of unclipped updates, which only privacy.noise_by = 'server' sees",
    ),
    (
        lambda job: job.privacy.quantile > 0 and job.privacy.mechanism == "ftrl",
        "privacy.quantile changes the clip between rounds, and the noise of privacy.mechanism = 'ftrl' is that of one "
        "clip; set quantile = 0",
    ),
)
