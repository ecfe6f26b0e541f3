"""One answer of a site after one step on a few images, made by the site's own code, and the gradient in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from client.readers.base import Examples, Splits
from client.spending import round_spend
from client.trainer import learning_rate
from client.workbench import Benches
from shared_models.errors import ConfigError, RunError
from shared_models.job import Job
from shared_models.job_parts import AugmentPart
from shared_models.messages import Instruction
from shared_models.methods.base import make_method, overrides
from shared_models.schedule import round_budget
from shared_models.spec import build_model
from shared_models.sums import Groups
from simulations.engines.inprocess import InProcess


@dataclass(frozen=True)
class Answer:
    """What the server has in hand.

    Attributes:
        job: that was run.
        down: what it sent.
        gradient: name -> what the site's step went along, of every entry that is trained and sent.
        noise: noise multiplier of the step.
    """

    job: Job
    down: Groups
    gradient: dict[str, Tensor]
    noise: float


def single_step(job: Job, batch: int, held: int) -> Job:
    """The job with one step a round on so many images at once, and no augmentation.

    Noise and clip are those of a site that holds `held` training examples and takes part in the whole of the job as it
    stands. In its steps other examples stand beside those of interest; here there are none, which helps the attacker.

    Raises:
        ConfigError: the step does not go along the gradient.
        PrivacyError: no noise meets the target.
    """
    if job.train.optimizer != "sgd":
        raise ConfigError(
            f"the inversion attack reads the gradient out of a step of SGD, and train.optimizer = "
            f"'{job.train.optimizer}' does not go along it",
            hint="--set train.optimizer=sgd",
        )
    if overrides(make_method(job), "answer"):
        raise ConfigError(
            f"method '{job.method.name}' makes no step: its answer are sums, there is no gradient to invert",
            hint="--set method.name=fedavg",
        )
    if job.data.normalise_by == "sites":
        raise ConfigError(
            "data.normalise_by = 'sites': the inversion attack makes one round, and nothing was measured before it",
            hint="Give data.mean and data.std",
        )
    changes: dict[str, object] = {
        "train": {"steps": 1, "batch_size": batch, "accumulate": 1},
        "augment": AugmentPart().model_dump(),
    }
    if job.privacy.mode == "sample":
        spend = round_spend(job, 0, round_budget(job, 0), [held])
        changes["privacy"] = {"epsilon": 0.0, "noise": spend.noise}
    return job.replace(**changes)


def answer_of(job: Job, site: str, splits: Splits, rows: Tensor, draw: int = 0) -> Answer:
    """Ask the site in round 0 and take its answer apart.

    Args:
        job: of a single step.
        site: its name.
        splits: its examples.
        rows: of the store, the only ones it trains on.
        draw: of its secret.

    Raises:
        RunError: the site refused.
    """
    model, spec = build_model(job)
    method, entries = make_method(job), model.state_dict()
    down = method.down(method.init({n: entries[n].detach().clone() for n in spec.sent}, spec.trained))
    own = Splits(Examples(splits.train.store, rows), splits.validation, splits.test)
    engine = InProcess([site], lambda name: own, Benches(), draw=draw)
    asked = Instruction(
        "train",
        "inversion",
        site,
        job,
        spec.fingerprint,
        rounds=job.federation.rounds,
        budget=round_budget(job, 0),
        groups=down,
    )
    reply = engine.handler(site).handle(asked)
    if reply.code != "ok":
        raise RunError(f"site '{site}' answered '{reply.code}' instead of a contribution", hint="Its log says why")
    return Answer(job, down, gradient_of(job, down, reply.groups, spec.trained), reply.noise)


def gradient_of(job: Job, down: Groups, up: Groups, trained: tuple[str, ...]) -> dict[str, Tensor]:
    """The step backwards: `g = (w - w') / lr - weight_decay w`; momentum is not there yet in a first step."""
    before, after = down["model"], up["model"]
    lr = learning_rate(job.train, 0.5 / job.federation.rounds)
    found = {}
    for name in trained:
        if name in before:
            start = before[name].double().cpu()
            step = (start - after[name].double().cpu()) / lr - job.train.weight_decay * start
            found[name] = step.to(torch.float32)
    return found
