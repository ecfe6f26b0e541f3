"""What left the sites for a paradigm's model, in words: the price of what it reached."""

from __future__ import annotations

from shared_models.job import Job
from shared_models.sent import sent

NOISE = {
    ("sample", "server"): ", trained with noise",
    ("client", "server"): ", to a server that adds noise to their sum",
    ("client", "clients"): ", each with its share of the noise",
}


def left_sites(job: Job, size: int) -> str:
    """What of the sites' examples, or made of them, others got to hold in one run, and its size in bytes.

    Counts of examples and steps, and the sums of metrics that every paradigm is measured with, are not named, and not
    part of the size.
    """
    amount = f"{size / 1e6:,.2f} MB"
    if job.place == "isolated":
        return "nothing"
    if job.place == "centralized":
        return f"all training examples, {amount}"
    *others, last = sent(job)
    kinds = f"{', '.join(others)} and {last}" if others else last
    noise = NOISE.get((job.privacy.mode, job.privacy.noise_by), "") if job.privacy.noise != 0 else ""
    return f"{kinds}, {amount}{noise}"
