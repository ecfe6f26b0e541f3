"""What a site protects its data with in a round: a secret, a ledger in which the round is booked first, and noise."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from client.forecast import Counts, require_room
from client.ledger import Ledger, MemoryLedger
from client.private import Plan, clip_factors
from client.spending import round_spend
from shared_models.errors import PrivacyError
from shared_models.job import Job
from shared_models.messages import Instruction
from shared_models.noise import derive, normal_like
from shared_models.privacy import client_noise
from shared_models.sums import Groups
from shared_models.wire import digest, flatten


class Protection:
    """A site's means of privacy.

    Args:
        site: its name.
        ledger: where rounds are booked; in memory by default.
        dataset: the name under which they are booked.
        secret: what all is drawn from that must be unknown to others; without one, jobs with privacy are refused.
        repeats: leave the run's id out of what is drawn, so that a simulation repeats; never at a node, where two runs
            of one job must not share their noise.
    """

    def __init__(
        self,
        site: str,
        ledger: Ledger | None = None,
        dataset: str = "",
        secret: Callable[[Job], bytes] | None = None,
        repeats: bool = False,
    ) -> None:
        self.site = site
        self.ledger = ledger or MemoryLedger()
        self.dataset = dataset or site
        self.secret = secret
        self.repeats = repeats

    def book(self, instruction: Instruction, counts: Sequence[int], kept: Mapping[str, Groups]) -> Plan | None:
        """Book a training round, before anything of it is drawn; None for a job without privacy.

        Args:
            instruction: to train.
            counts: the site's training examples, task by task of the stream.
            kept: what the site remembers; it is part of the key, so that no two different gradients get one noise.

        Raises:
            PrivacyError: there is no secret, or as `round_spend` and `Ledger.reserve`.
        """
        job, part = instruction.job, instruction.job.privacy
        if part.mode == "none":
            return None
        if self.secret is None:
            raise PrivacyError("this site has no secret to draw noise from", code="no-secret")
        spend = round_spend(job, instruction.round, instruction.budget, counts)
        named = replace(instruction, run="simulation") if self.repeats else instruction
        asked = digest(named)
        self.ledger.reserve(
            self.dataset,
            instruction.run,
            instruction.task,
            instruction.round,
            spend,
            part.delta,
            part.mode,
            digest=asked,
            job=job.name,
        )
        where = (named.run, self.site, named.task, named.round)
        return Plan(spend, derive(self.secret(job), "round", job.whole.hash, *where, asked, _digest(kept)))

    def require_room(self, probe: Instruction, counts: Counts) -> None:
        """Refuse a job with privacy that cannot end under the site's cap; raises as `forecast.require_room`."""
        if probe.job.privacy.mode != "none" and self.ledger.cap_epsilon != math.inf:
            require_room(self.ledger, self.dataset, probe, counts)

    def answered(self, instruction: Instruction) -> None:
        """Say that a booked round's answer is kept and may leave."""
        if instruction.kind == "train" and instruction.job.privacy.mode != "none":
            self.ledger.answered(instruction.run, instruction.task, instruction.round)


def with_share(job: Job, plan: Plan, model: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor]) -> Groups:
    """A site's model with its update clipped and its share of the noise added, as `noise_by = "clients"` wants it.

    `federation.min_sites` shares, the fewest of which a round is made, have the standard deviation sigma C together.
    """
    part = job.privacy
    change = {n: model[n].float() - start[n].float() for n in model}
    norm = torch.stack([c.norm() for c in change.values()]).norm()
    factor = clip_factors(norm[None], part.clip)[0]
    deviation = client_noise(job) * part.clip / math.sqrt(job.federation.min_sites)
    if deviation == 0 and factor == 1:
        return {"model": model}
    noise = normal_like(derive(plan.key, "share"), change) if deviation else {n: torch.zeros(()) for n in change}
    moved = {
        n: (start[n] + torch.nan_to_num(c) * factor + deviation * noise[n]).to(model[n].dtype)
        for n, c in change.items()
    }
    return {"model": moved}


def _digest(kept: Mapping[str, Groups]) -> str:
    found = hashlib.sha256()
    for owner in sorted(kept):
        for name, tensor in sorted(flatten(kept[owner]).items()):
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found.update(f"{owner}/{name}/{len(raw)}:".encode() + raw)
    return found.hexdigest()
