"""The server's part in differential privacy: what each round has cost, and the noise that hides a site.

With the sample as the unit the sites do all of it, and the server adds up what they say. With the site as the unit the
server bounds and hides each site's update (McMahan et al. 2018, DP-FedAvg with a fixed denominator):

    w <- w + 1/m ( sum_k D_k min(1, C / ||D_k||) + N(0, sigma^2 C^2) )          m: the sites expected in a round

Its noise comes from a secret in the run's folder, never from the job's seed, which everybody knows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from server.selection import select
from shared_models.checks import check_spend
from shared_models.errors import CompatibilityError, RunError
from shared_models.job import Job
from shared_models.keys import chooser
from shared_models.messages import OK, Contribution, Instruction
from shared_models.noise import derive, normal, normal_like, uniform
from shared_models.privacy import (
    RELATIONS,
    SHRINK,
    Spend,
    accounted,
    assumptions,
    client_noise,
    client_spend,
    epsilon,
    merged,
    sampling_rate,
    statement,
    turns,
)
from shared_models.spec import ModelSpec
from shared_models.sums import Groups

COUNT_NOISE = 2.0  # of the noisy count below the clip, relative to the whole noise, where a cohort is small
EVERY = "every site"


class Privacy:
    """A job without privacy: every hook leaves things as they are.

    Attributes:
        state: plain data that a checkpoint holds.
        earlier: what earlier stages of the job have spent, as `spends` says it.
    """

    def __init__(self, job: Job, spec: ModelSpec, secret: bytes | None = None) -> None:
        self.job, self.part = job, job.privacy
        self.secret = secret or hashlib.sha256(f"simulated secret {job.seed}".encode()).digest()
        if job.stage:  # the rounds of each stage begin at 0
            self.secret = derive(self.secret, "stage", job.stage)
        self.state: dict[str, Any] = {}
        self.earlier: Mapping[str, Sequence[Spend]] = {}

    def cohort(self, population: Sequence[str], round: int) -> list[str]:
        """The sites of a round."""
        return select(population, self.job.federation.fraction, self.job.seed, round)

    def note(self, reply: Contribution, asked: Instruction) -> None:
        """Any answer that came, also one that is then rejected; raises Rejected where it cannot be accounted for."""

    def bounded(self, groups: Groups, down: Groups) -> Groups:
        """What of a site's answer goes into the mean."""
        return groups

    def released(self, means: Groups | None, down: Groups, accepted: int, population: int, round: int) -> Groups | None:
        """What the method makes the next state of; None: nothing came."""
        return means

    def settle(self, round: int) -> None:
        """The round is done."""

    def spends(self) -> dict[str, list[Spend]]:
        """Site -> what was spent of it, from the first stage on."""
        return {}

    def facts(self, sites: Sequence[str]) -> dict[str, Any]:
        """What an event says about the guarantee so far, in the order of `sites`; nothing without privacy."""
        return {}

    def summary(self) -> dict[str, Any]:
        """What the run as a whole has spent; empty without privacy."""
        return {}


class SamplePrivacy(Privacy):
    """Each site protects its examples; here their spending is added up."""

    def __init__(self, job: Job, spec: ModelSpec, secret: bytes | None = None) -> None:
        super().__init__(job, spec, secret)
        self.state = {"spends": {}}
        self._came: dict[str, Spend] = {}

    def note(self, reply: Contribution, asked: Instruction) -> None:
        """The site's noise, its sampling rate and its steps, if they can be; a repeated answer counts once."""
        if reply.code != OK:
            return
        check_spend(reply, asked)
        rate = sampling_rate(reply.examples, reply.samples, reply.steps)
        spend = Spend(reply.noise, rate, reply.steps)
        accounted([*self.spends().get(reply.site, ()), spend], self.part.delta, self.part.accountant)
        self._came[reply.site] = spend

    def settle(self, round: int) -> None:
        """Add this round's."""
        spends = self.state["spends"]
        for site, spend in self._came.items():
            before = [Spend(*row) for row in spends.get(site, [])]
            spends[site] = [list(asdict(s).values()) for s in merged([*before, spend])]
        self._came.clear()

    def spends(self) -> dict[str, list[Spend]]:
        """Each site its own."""
        own = {site: [Spend(*row) for row in rows] for site, rows in self.state["spends"].items()}
        return {site: [*self.earlier.get(site, ()), *own.get(site, ())] for site in {**self.earlier, **own}}

    def facts(self, sites: Sequence[str]) -> dict[str, Any]:
        """Epsilon and the last noise of each site."""
        spends = self.spends()
        noise = [spends[s][-1].noise if s in spends else None for s in sites]
        return {**_terms(self.job), "noise": noise, "epsilon": [self._epsilon(s) for s in sites]}

    def summary(self) -> dict[str, Any]:
        """Epsilon of each site that trained."""
        found = {site: self._epsilon(site) for site in sorted(self.spends())}
        return _summary(self.job, found)

    def _epsilon(self, site: str) -> float:
        return epsilon(self.spends().get(site, []), self.part.delta, self.part.accountant)


class ClientPrivacy(Privacy):
    """The server clips, averages alike and adds noise; or, where the clients do, averages and adds up the cost.

    Raises:
        CompatibilityError: running statistics would be averaged.
    """

    def __init__(self, job: Job, spec: ModelSpec, secret: bytes | None = None) -> None:
        super().__init__(job, spec, secret)
        if running := next((e.key for e in spec.entries if e.sent and e.nature == "running-stat"), ""):
            raise CompatibilityError(
                f"job '{job.name}': '{running}' is a running statistic of batch normalisation, which noise would make "
                "negative",
                hint="Set model.norm = 'group', train the head only ([share] base = ['!@head']), or use [lora]",
            )
        self.noise = client_noise(job)
        self.state = {"rounds": 0, "clip": self.part.clip}
        self._below = 0

    @property
    def by_server(self) -> bool:
        """Whether the server clips and adds noise."""
        return self.part.noise_by == "server"

    def cohort(self, population: Sequence[str], round: int) -> list[str]:
        """Each site on its own with the probability `fraction`, unknown to all but the server."""
        self._below = 0
        fraction = self.job.federation.fraction
        if fraction == 1:
            return list(population)
        chosen = uniform(derive(self.secret, "cohort", round), len(population)) < fraction
        return [population[int(place)] for place in chosen.nonzero()[:, 0]]

    def expected(self, population: int) -> float:
        """The sites of a round by expectation, m: what the sum is divided by, however many came."""
        return self.job.federation.fraction * population

    def bounded(self, groups: Groups, down: Groups) -> Groups:
        """The model with its update clipped; one that is short enough is not touched."""
        if not self.by_server or not self.state["clip"]:
            return groups
        start, clip = down["model"], self.state["clip"]
        change = {n: t.float() - start[n].float() for n, t in groups["model"].items()}
        norm = float(torch.stack([c.norm() for c in change.values()]).norm())
        if norm <= clip * SHRINK:
            self._below += 1
            return groups
        self._below += norm <= clip
        factor = clip * SHRINK / norm if math.isfinite(norm) else 0.0
        return {**groups, "model": {n: start[n] + (factor * c).to(start[n].dtype) for n, c in change.items()}}

    def released(self, means: Groups | None, down: Groups, accepted: int, population: int, round: int) -> Groups | None:
        """The mean over the sites that were expected, with noise; where nobody came, noise alone.

        Raises:
            RunError: the sites add the noise, and too few did.
        """
        start, count, least = down["model"], self.expected(population), self.job.federation.min_sites
        if not self.by_server and self.noise and accepted < least:
            raise RunError(
                f"round {round}: {accepted} sites added their share of the noise, {least} make the whole of it",
                hint="The model was not given out; the run can be resumed from its checkpoint",
            )
        if means is None:
            if self.noise == 0 or not self.by_server:
                return None
            means = {"model": dict(start)}
            accepted = 0
        model = dict(means["model"])
        if accepted != count:
            model = {n: start[n] + (t - start[n]) * (accepted / count) for n, t in model.items()}
        if self.by_server and self.noise:
            scale, deviation = split_noise(self.noise, self.part.quantile, count)
            for name, noise in self.drawn(model, round).items():
                model[name] = model[name] + noise * (scale * self.state["clip"] / count)
            self._follow(accepted, count, deviation, round)
        return {**means, "model": model}

    def drawn(self, model: Mapping[str, Tensor], round: int) -> dict[str, Tensor]:
        """This round's noise, standard normal."""
        return normal_like(derive(self.secret, "noise", round), model)

    def _follow(self, came: int, count: float, deviation: float, round: int) -> None:
        """Andrew et al. 2021: C <- C exp(-rate (b - quantile)), b the noisy share of updates below the clip.

        What is added up is 1/2 for an update below the clip and -1/2 for one above, so that a site more or less moves
        the sum by 1/2, which is what `split_noise` counts on.
        """
        if not self.part.quantile:
            return
        noisy = self._below - came / 2 + deviation * float(normal(derive(self.secret, "count", round), 1)[0])
        self.state["clip"] *= math.exp(-self.part.clip_rate * (noisy / count + 0.5 - self.part.quantile))

    def settle(self, round: int) -> None:
        """One round more."""
        self.state["rounds"] = round + 1

    def facts(self, sites: Sequence[str]) -> dict[str, Any]:
        """One epsilon, the same for every site, and the clip of the next round."""
        found = {**_terms(self.job), "noise": self.noise, "epsilon": self._epsilon(), "clip": self.state["clip"]}
        return found if self.part.mechanism == "ftrl" else {**found, "rate": self.job.federation.fraction}

    def summary(self) -> dict[str, Any]:
        """The same for every site."""
        return _summary(self.job, {EVERY: self._epsilon()})

    def spends(self) -> dict[str, list[Spend]]:
        """One account for all."""
        rounds = self.state["rounds"]
        return {EVERY: [*self.earlier.get(EVERY, ()), *([client_spend(self.job, rounds)] if rounds else [])]}

    def _epsilon(self) -> float:
        return epsilon(self.spends()[EVERY], self.part.delta, self.part.accountant)


def split_noise(noise: float, quantile: float, count: float) -> tuple[float, float]:
    """(multiplier for the updates, deviation of the count) that cost together what `noise` costs alone.

    Andrew et al. 2021, Theorem 1: z_D = (z^-2 - (2 s)^-2)^(-1/2), with s a twentieth of the cohort there, and here at
    least twice z, so that it exists for few sites too.
    """
    if not quantile or not noise:
        return noise, 0.0
    deviation = max(count / 20, COUNT_NOISE * noise)
    return (noise**-2 - (2 * deviation) ** -2) ** -0.5, deviation


class TreePrivacy(ClientPrivacy):
    """DP-FTRL (Kairouz et al. 2021): the noise of a prefix sum is that of the nodes of a binary tree that make it up.

    The sites have their turns, each once in the `turns` rounds of a tree; then a new tree begins. No chance is assumed.
    """

    def __init__(self, job: Job, spec: ModelSpec, secret: bytes | None = None) -> None:
        super().__init__(job, spec, secret)
        self.state |= {"used": [], "count": 0}
        self._taken: list[str] = []

    def cohort(self, population: Sequence[str], round: int) -> list[str]:
        """Those whose turn it is, at random among the sites that had none since the tree began."""
        leaf = round % turns(self.job)
        if leaf == 0:
            self.state |= {"used": [], "count": math.ceil(self.job.federation.fraction * len(population) - 1e-9)}
        used = set(self.state["used"])
        left = [site for site in population if site not in used]
        take = min(self.state["count"], len(left))
        places = chooser(self.job.seed, "turns", round=round).sample(range(len(left)), take)
        self._taken = [left[place] for place in sorted(places)]
        return list(self._taken)

    def expected(self, population: int) -> float:
        """The sites of a turn, fixed for a tree."""
        return float(self.state["count"])

    def drawn(self, model: Mapping[str, Tensor], round: int) -> dict[str, Tensor]:
        """The noise of the prefix with this round less that of the one before."""
        tree, leaf = divmod(round, turns(self.job))
        total = {n: torch.zeros_like(t) for n, t in model.items()}
        for sign, prefix in ((1.0, leaf + 1), (-1.0, leaf)):
            for level, index in nodes(prefix):
                for name, noise in normal_like(derive(self.secret, "tree", tree, level, index), model).items():
                    total[name] += sign * noise
        return total

    def settle(self, round: int) -> None:
        """Those who were asked have had their turn."""
        super().settle(round)
        self.state["used"] = [*self.state["used"], *self._taken]


def nodes(prefix: int) -> list[tuple[int, int]]:
    """(level, index) of the nodes whose leaves are the first `prefix` ones: one for each binary digit that is 1."""
    found, start = [], 0
    for level in reversed(range(prefix.bit_length())):
        if prefix >> level & 1:
            found.append((level, start >> level))
            start += 1 << level
    return found


def make_privacy(job: Job, spec: ModelSpec, secret: bytes | None = None) -> Privacy:
    """What the job asks for.

    Args:
        job: of this run.
        spec: of its model.
        secret: what the server's noise is drawn from; without one, from the job's seed, which protects nothing: for
            simulations.
    """
    if job.privacy.mode == "sample":
        return SamplePrivacy(job, spec, secret)
    if job.privacy.mode == "client":
        return (TreePrivacy if job.privacy.mechanism == "ftrl" else ClientPrivacy)(job, spec, secret)
    return Privacy(job, spec, secret)


def _terms(job: Job) -> dict[str, Any]:
    """What makes an epsilon mean something."""
    part = job.privacy
    return {
        "unit": part.mode,
        "neighbours": RELATIONS[part.mode],
        "delta": part.delta,
        "accountant": part.accountant,
        "mechanism": part.mechanism if part.mode == "client" else "dp-sgd",
    }


def _summary(job: Job, found: Mapping[str, float]) -> dict[str, Any]:
    most = max(found.values(), default=0.0)
    said = statement(job.privacy.mode, most, job.privacy.delta, job.privacy.accountant)
    if job.privacy.mode == "client" and math.isfinite(most):
        said = f"{said}; assumes that {' and that '.join(assumptions(job))}"
    return {**_terms(job), "epsilon": dict(found), "statement": said}
