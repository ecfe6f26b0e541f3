"""Variational autoencoder (Kingma & Welling 2014), with the encoder and the decoder of `autoencoder`.

    q(z | x) = N(mu(x), sigma(x)^2),   p(z) = N(0, I),   p(x | z) = N(decoder(z), s^2 I)
    -ELBO = -log p(x | z) + KL(q || p),   KL = 1/2 sum_j (mu_j^2 + sigma_j^2 - 1 - log sigma_j^2)       (eq. 10)

Times 2 s^2 / D for an example of D numbers, and without the constant, that is the mean squared error plus
`beta / D * KL` with beta = 2 s^2: beta = 1 is a decoder of variance 1/2 in the units of the normalised example, a
smaller beta a more exact one. (Higgins et al. 2017 call the same factor beta, with the variance held fixed.)

======  ================  ====  ==========================  ====
size    widths            code  parameters                  from
======  ================  ====  ==========================  ====
tiny    16, 32            8     15,265 at one channel, 8x8  ours
medium  32, 64, 128, 256  128   2,364,515 at 3x64x64        ours
======  ================  ====  ==========================  ====
"""

from __future__ import annotations

import math

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from shared_models.models import Shape, model
from shared_models.zoo.autoencoder import AutoencoderSettings, make_decoder, make_encoder


class VAESettings(AutoencoderSettings):
    """Those of the autoencoder, and `beta` >= 0, the weight of the KL divergence; with 0 the code is not held back."""

    beta: NonNegativeFloat = 1.0


class VAE(nn.Module):
    """Draws the code in training, from torch's global generator, and takes its mean in evaluation."""

    def __init__(self, settings: VAESettings, shape: Shape) -> None:
        super().__init__()
        self.encoder = make_encoder(settings.widths, shape, 2 * settings.code)
        self.decoder = make_decoder(settings.widths, settings.code, shape)
        self.weight = settings.beta / math.prod(shape)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, *shape) -> (B, *shape) and beta / D * KL, (B,)."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)  # (B, code) each
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.training else mean
        return self.decoder(code), self.weight * divergence(mean, log_variance)


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, I)), (B, code) twice -> (B,); appendix B there."""
    mean, log_variance = mean.float(), log_variance.float()
    return 0.5 * (mean * mean + log_variance.exp() - 1 - log_variance).sum(dim=1)


@model(
    "vae",
    settings=VAESettings,
    sizes={
        "tiny": {"widths": (16, 32), "code": 8},
        "medium": {"widths": (32, 64, 128, 256), "code": 128},
    },
    paper="Kingma & Welling 2014, Auto-Encoding Variational Bayes",
    tasks=("reconstruction", "anomaly"),
    inputs=("image", "features"),
    heads=("decoder.head.*",),
    family="reconstruction",
    notes="An autoencoder whose codes are held near a normal distribution; its loss is the negative ELBO.",
    usual={"tiny": (1, 8, 8), "medium": (3, 64, 64)},
)
def build(settings: VAESettings, shape: Shape, outputs: int) -> nn.Module:
    """(B, *shape) -> ((B, *shape), (B,)), for images of any size and rows of features."""
    return VAE(settings, shape)
