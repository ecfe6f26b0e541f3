"""The levels of privacy at which a job is attacked: without, and with several targets of epsilon."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shared_models.errors import ConfigError
from shared_models.job import Job
from shared_models.job_parts import PrivacyPart
from shared_models.tasks.base import make_task

NONE = "none"
PLAIN = "no privacy"
USUAL = "none,8,3,1"


@dataclass(frozen=True)
class Level:
    """A job with its target.

    Attributes:
        target: of the whole run; None without privacy.
    """

    target: float | None
    job: Job

    @property
    def name(self) -> str:
        """As tables and legends say it."""
        return PLAIN if self.target is None else f"epsilon {self.target:g}"


def levels(job: Job, text: str | None) -> list[Level]:
    """`none,8,3,1` -> the job at each of them, in that order; by default these, or `none` for a job without privacy.

    Raises:
        ConfigError: an entry is neither `none` nor a number above 0, or the job does not say whose presence an epsilon
            should hide.
    """
    private = job.privacy.mode != "none"
    words = [w.strip() for w in (text or (USUAL if private else NONE)).split(",") if w.strip()]
    found: dict[float | None, Level] = {}
    for word in words:
        target = None if word == NONE else _number(word)
        if target is not None and not private:
            raise ConfigError(
                f"--epsilons {word}: job '{job.name}' has no [privacy], which says whose presence epsilon hides",
                hint="Give it one, e.g. --set privacy.mode=sample --set privacy.epsilon=8, or attack it with none",
            )
        part = {"epsilon": target, "noise": None} if target else PrivacyPart().model_dump()
        found.setdefault(target, Level(target, job.replace(privacy=part)))
    if not found:
        raise ConfigError("--epsilons names no level", hint=f"E.g. --epsilons {USUAL}")
    return list(found.values())


def _number(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"--epsilons: '{word}' is neither '{NONE}' nor a number above 0", hint=f"E.g. {USUAL}")
    return value


def require_classifier(job: Job, attack: str) -> None:
    """Raise a ConfigError where the job is not one training of one model that tells classes apart."""
    if make_task(job).target != "class" or job.task.name != "classification":
        raise ConfigError(
            f"the {attack} attack is made for classification, and the task of job '{job.name}' is '{job.task.name}'",
            hint="Attack a job with [task] name = 'classification'",
        )
    if job.stages or job.time != "offline" or job.place == "isolated":
        what = "stages" if job.stages else "time = 'continual'" if job.time != "offline" else "place = 'isolated'"
        raise ConfigError(
            f"job '{job.name}' has {what}, and the {attack} attack is on one model from one training",
            hint="Attack it with time = 'offline', place = 'federated' or 'centralized' and without stages",
        )
