"""What left the sites for a paradigm's model, in words: the price of what it reached."""

from __future__ import annotations

from shared_models.job import Job
from shared_models.methods.base import make_method, overrides

NOISE = {
    ("sample", "server"): ", trained with noise",
    ("client", "server"): ", to a server that adds noise to their sum",
    ("client", "clients"): ", each with its share of the noise",
}


def left_sites(job: Job, bytes_up: int) -> str:
    """What of the sites' examples, or made of them, others got to hold in one run.

    Counts of examples and steps, and the sums of metrics that every paradigm is measured with, are not named.
    """
    amount = f"{bytes_up / 1e6:,.2f} MB"
    if job.place == "isolated":
        return "nothing"
    if job.place == "centralized":
        return f"all training examples, {amount}"
    solved = any(overrides(make_method(step), "answer") for step in job.steps)
    kind = "sums over examples" if solved else "trained weights"
    return f"{kind}, {amount}{NOISE.get((job.privacy.mode, job.privacy.noise_by), '')}"
