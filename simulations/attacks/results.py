"""What the attacks leave behind (`membership.json`, `inversion.json`): the contract between making and drawing."""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import FiniteFloat

from shared_models.job import Job
from simulations import results
from simulations.compare import provenance
from simulations.results import Document


class Facts(results.Facts):
    """Where figures come from; `seconds` are those of the whole attack."""

    seconds: float


class Guessed(Document):
    """How well membership is guessed at one level of privacy.

    Attributes:
        level: its name.
        epsilon: what was spent by the site that spent most; None without privacy.
        statement: the same in words, with all that gives it a meaning.
        accuracy: the job's headline on all sites' tests, one a target model.
        auc: one a target model.
        low, high: ends of the 95 % interval of their mean, Student's t over target models.
        most_auc: what (epsilon, delta) allows; None without privacy.
        tpr: false-positive rate -> TPR over all targets; None where non-members are too few to say.
        most_tpr: the same, what is allowed.
        least_epsilon: what the attack proves.
        fpr, hits: the ROC curve over all targets.
    """

    level: str
    epsilon: FiniteFloat | None
    statement: str
    accuracy: list[FiniteFloat]
    auc: list[FiniteFloat]
    low: float
    high: float
    most_auc: float | None
    tpr: dict[str, float | None]
    most_tpr: dict[str, float] | None
    least_epsilon: float
    fpr: list[float]
    hits: list[float]


class Membership(Document):
    """The result of membership inference.

    Attributes:
        metric: the job's headline.
        candidates: examples whose membership is guessed.
        shadows, targets: models.
        non_members: over all targets.
        delta: of the guarantees, and of what is proved.
    """

    facts: Facts
    metric: str
    candidates: int
    shadows: int
    targets: int
    non_members: int
    delta: float
    levels: list[Guessed]


class Quality(Document):
    """How near reconstructed images are to the true ones, mean over images and one for each.

    Attributes:
        mse: mean squared error of pixels from 0 to 1.
        psnr: `10 log10(1 / mse)`, dB.
        ssim: structural similarity (Wang et al. 2004).
    """

    mse: list[FiniteFloat]
    psnr: list[FiniteFloat]
    ssim: list[FiniteFloat]


class Inverted(Document):
    """What was reconstructed at one level of privacy in one way.

    Attributes:
        level: its name.
        way: how it was found.
        noise: noise multiplier of the step.
        similarity: cosine of the contribution and the gradient of what was found, one for each contribution.
        images: PNG files, base64.
    """

    level: str
    way: str
    noise: float
    similarity: list[FiniteFloat]
    quality: Quality
    images: list[str]


class Inversion(Document):
    """The result of gradient inversion.

    Attributes:
        site: that answered.
        held: its training examples, which the noise follows from.
        batch: images of one contribution.
        labels: of the images.
        truth: PNG files, base64.
        blind: what is reached without looking at the contribution: the mean validation image.
    """

    facts: Facts
    site: str
    held: int
    batch: int
    labels: list[str]
    truth: list[str]
    blind: Inverted
    levels: list[Inverted]


def facts(job: Job, title: str, command: str, started: float) -> Facts:
    """Of an attack that began at `started` of `time.perf_counter`."""
    seconds = round(time.perf_counter() - started, 1)
    return Facts(title=title, command=command, seconds=seconds, **provenance(job))


def save(found: Membership | Inversion, path: Path) -> Path:
    """Write it as JSON and return the path; raises RunError where that cannot be."""
    return results.write(found, path, "the result")
