"""The likelihood-ratio attack (Carlini et al. 2022, "Membership Inference Attacks From First Principles"): its score.

Was the example (x, y) among those a model f was trained on? Shadow models are trained with and without it. Their
confidence in the right class, scaled to be about normal (section IV.A),

    phi = log( p_y / (1 - p_y) )

is fitted by one Gaussian for the models that saw the example and one for those that did not, and the score is the
likelihood ratio of the target's own phi (equation 4; the online attack):

    Lambda = p( phi | N(mu_in, sigma_in^2) ) / p( phi | N(mu_out, sigma_out^2) )

Each example has its own means. The variances are its own too from 64 shadow models on; with fewer there is one for all
examples, as in section VI.C.
"""

from __future__ import annotations

import torch
from torch import Tensor

OWN_VARIANCE = 64  # shadow models from which on an example's own variance is taken
LEAST = 1e-9  # variance


def scaled_confidence(logits: Tensor, y: Tensor) -> Tensor:
    """`log(p_y / (1 - p_y)) = z_y - log sum_{c != y} exp(z_c)`: finite where p_y rounds to 1.

    Args:
        logits: (B, C) with C > 1.
        y: (B,) int64.

    Returns:
        (B,) float64.
    """
    z, own = logits.double(), y[:, None]
    return z.gather(1, own)[:, 0] - z.scatter(1, own, -torch.inf).logsumexp(dim=1)


def log_ratio(phi: Tensor, shadows: Tensor, seen: Tensor) -> Tensor:
    """log Lambda of every example under every target.

    Args:
        phi: (T, N) of T target models on N examples.
        shadows: (S, N) of S shadow models.
        seen: (S, N) bool, whether a shadow model was trained on the example; of each at least two were and two not.

    Returns:
        (T, N) float64; above 0 where the example is more likely to have been seen.
    """
    mean_in, variance_in = _fit(shadows, seen)
    mean_out, variance_out = _fit(shadows, ~seen)
    return _log_normal(phi, mean_in, variance_in) - _log_normal(phi, mean_out, variance_out)


def _fit(shadows: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (N,) over the chosen models, and variance: (N,), or one for all examples where models are few."""
    count = chosen.sum(dim=0)
    mean = torch.where(chosen, shadows, 0.0).sum(dim=0) / count
    squares = torch.where(chosen, (shadows - mean) ** 2, 0.0).sum(dim=0) / (count - 1)
    variance = squares if len(shadows) >= OWN_VARIANCE else squares.mean()
    return mean, variance.clamp(min=LEAST)


def _log_normal(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """log N(x; mean, variance) but for the constant that falls out of a ratio."""
    return -((x - mean) ** 2) / (2 * variance) - variance.log() / 2
