"""DP-SGD (Abadi et al. 2016): the gradient of one step, private per training example.

    g~ = 1/L ( sum_i g_i min(1, C / ||g_i||) + N(0, sigma^2 C^2) )

Each example is in a step on its own with the probability q (Poisson); a step without any is noise alone; L = q n is the
expected number, not the one that came. The norm is over all trained parameters together. Sampling, noise, and the seed
of whatever else is drawn come from the site's secret.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from client.per_sample import PerSample, choose
from client.readers.base import Examples
from client.workbench import Workbench
from shared_models.errors import PrivacyError
from shared_models.job import Job
from shared_models.methods.base import Pieces
from shared_models.noise import derive, normal_like, uniform
from shared_models.privacy import SHRINK, Spend
from shared_models.tasks.base import Batch

NUMBERS = 2**24  # of per-sample gradients that are held at once


@dataclass(frozen=True)
class Plan:
    """What a site's round is in terms of privacy.

    Attributes:
        spend: noise multiplier, sampling rate and steps.
        key: what its random numbers are derived from; unknown to all others.
    """

    spend: Spend
    key: bytes


class PrivateSteps:
    """The steps of one round at one site.

    Args:
        bench: with the model, in training mode.
        data: the site's training examples of this task.
        plan: of this round.
        pieces: methods that add a term to the loss.

    Raises:
        PrivacyError: samples see each other in the model, or per-sample gradients differ from a one-sample loop.
    """

    def __init__(self, bench: Workbench, data: Examples, plan: Plan, pieces: Pieces) -> None:
        self.bench, self.data, self.plan, self.part = bench, data, plan, bench.job.privacy
        self.expected = plan.spend.rate * len(data)
        numbers = sum(p.numel() for p in bench.trained.values())
        self.largest = max(1, NUMBERS // max(numbers, 1))  # examples whose gradients are computed at once
        self._step = 0
        if self.part.clip and (pieces or not bench.per_sample):  # a method's term may be silent in one round only
            require_unmixed(bench)
            first = data.batch(torch.arange(min(2, len(data))), bench.device)
            bench.per_sample = choose(bench, pieces, first)
        self.per_sample = PerSample(bench, pieces, bench.per_sample)

    def seed(self, purpose: str) -> int:
        """For torch's generators: augmentation, dropout, and what a task draws."""
        return int.from_bytes(derive(self.plan.key, purpose)[:8], "big") >> 1

    def order(self) -> Iterator[Tensor]:
        """Row indices of each step; a step may have none."""
        for step in range(self.plan.spend.steps):
            chosen = uniform(derive(self.plan.key, "sampling", step), len(self.data)) < self.plan.spend.rate
            yield chosen.nonzero()[:, 0]

    @property
    def poisson(self) -> bool:
        """Whether examples are sampled; else batches are those of plain training, and there is no guarantee."""
        return self.part.sampling == "poisson"

    def gradients(self, batch: Batch, plain: Callable[[Batch], object]) -> None:
        """Put the private gradient of this step where the optimizer finds it.

        Args:
            batch: may be empty.
            plain: puts the gradient of a batch's mean loss there. Without a clip it is all there is, so that no clip,
                no noise and no sampling are plain training, bit for bit.
        """
        trained, expected = self.bench.trained, self.expected if self.poisson else float(len(batch))
        if not self.part.clip and len(batch):
            plain(batch)
            if self.poisson:
                for parameter in trained.values():
                    if parameter.grad is not None:
                        parameter.grad *= len(batch) / expected
            return
        total = {n: torch.zeros_like(p) for n, p in trained.items()}
        if len(batch):
            self._add_clipped(total, batch)
        if self.plan.spend.noise:
            drawn = normal_like(derive(self.plan.key, "noise", self._step), total)
            for name, noise in drawn.items():
                total[name] += noise * (self.plan.spend.noise * self.part.clip)
        for name, parameter in trained.items():
            parameter.grad = total[name] / expected
        self._step += 1

    def _add_clipped(self, total: dict[str, Tensor], batch: Batch) -> None:
        start = 0
        while start < len(batch):
            size = max(1, self.largest >> self.bench.halvings)
            try:
                add_clipped(total, self.per_sample(batch[start : start + size]), self.part.clip)
                start += size
                continue
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            self.bench.halvings += 1
            self.bench.free()


def add_clipped(total: dict[str, Tensor], gradients: dict[str, Tensor], clip: float) -> None:
    """Add the sum of clipped per-sample gradients, in place. One that is not finite counts as zero."""
    flat = {n: g.flatten(1) for n, g in gradients.items()}
    norms = torch.stack([g.float().norm(dim=1) for g in flat.values()]).norm(dim=0)  # (B,)
    factors = clip_factors(norms, clip)
    if not bool(torch.isfinite(norms).all()):
        flat = {n: torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0) for n, g in flat.items()}
    for name, g in flat.items():
        total[name] += (factors.to(g.dtype) @ g).reshape(total[name].shape)


def clip_factors(norms: Tensor, clip: float) -> Tensor:
    """min(1, C / norm), so that rounding stays below C too; 0 where the norm is not finite. `clip` 0 is no clip."""
    bound = clip * SHRINK if clip else math.inf
    factors = torch.where(norms > bound, bound / norms, torch.ones_like(norms))
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(norms))


def require_unmixed(bench: Workbench) -> None:
    """Raise a PrivacyError where a layer shows the samples of a batch to each other and keeps their statistics."""
    for name, module in bench.model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise PrivacyError(
                f"'{name}' normalises over the batch: samples see each other, and its statistics are not protected",
                hint="Set model.norm = 'group', train the head only ([share] base = ['!@head']), or use [lora]",
            )


def simulated_secret(job: Job, site: str, draw: int = 0) -> bytes:
    """A site's secret in a simulation, from the job's seed so that it repeats: its noise protects nothing.

    Another `draw` is another secret: the same job with the same start and other noise.
    """
    again = f" {draw}" if draw else ""
    return hashlib.sha256(f"simulated secret {job.seed} {site}{again}".encode()).digest()
