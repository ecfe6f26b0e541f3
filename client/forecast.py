"""Before a job begins: whether what it will spend of a site's data fits under the site's cap."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

from client.ledger import Entry, Ledger, composed, spent
from client.spending import planned
from shared_models.errors import PrivacyError
from shared_models.job import Job
from shared_models.messages import Instruction
from shared_models.privacy import RELATIONS, bound, epsilon
from shared_models.schedule import stage_run, task_of

log = logging.getLogger("fedzoo.client")

Counts = Callable[[Job], Sequence[int]]


def require_room(ledger: Ledger, dataset: str, probe: Instruction, counts: Counts) -> None:
    """Refuse a job that cannot end under the cap, where all that other jobs have spent stays as it is.

    Rounds that are booked already count once. Where each round takes a part of the sites (`federation.fraction`), that
    part of the rounds is expected; the cap itself holds in each round nevertheless.

    Args:
        ledger: of the site.
        dataset: the name under which its rounds will be booked.
        probe: says job, run and the next round.
        counts: a stage of the job -> the site's training examples, task by task.

    Raises:
        PrivacyError: it does not fit (`privacy-cap`), or as `planned` and `Ledger.entries`.
    """
    job = probe.job
    known = ledger.entries()
    booked = {e.key for e in known}
    ahead: list[Entry] = []
    for step in reversed(job.whole.steps[job.stage :]):  # this stage last: its data are those that are wanted next
        run = probe.run if step.stage == job.stage else stage_run(probe.run.removesuffix(f".{job.stage}"), step)
        rounds = [
            Entry(dataset, run, task_of(step, r), r, spend, step.privacy.delta, step.privacy.mode, "", site=ledger.site)
            for r, spend in planned(step, counts(step)).items()
            if step.stage != job.stage or r >= probe.round
        ]
        ahead += _expected([e for e in rounds if e.key not in booked], step.federation.fraction)
    if (examples := sum(counts(job))) and ledger.delta >= 1 / examples:
        log.warning(
            "delta = %g in [privacy] of client.toml is not below 1/%d, one by the number of training examples: what "
            "the ledger says would allow to publish one of them; lower it",
            ledger.delta,
            examples,
        )
    mine = [e for e in known if e.dataset == dataset]
    unit, spends = composed([*mine, *ahead])
    after = epsilon(spends, ledger.delta)
    if ahead and not after <= ledger.cap_epsilon:
        before = bound(spent(mine, ledger.delta))
        raise PrivacyError(
            f"job '{job.name}' cannot end under this site's cap of epsilon {ledger.cap_epsilon:g}: with the "
            f"{len(ahead)} rounds to come of it, data set '{dataset}' would be at {bound(after)}, now at {before}, at "
            f"delta {ledger.delta:g} (unit: {unit}; neighbours: {RELATIONS[unit]})",
            hint="Nothing was trained. Ask for fewer rounds or more noise, or raise cap_epsilon in [privacy] of "
            "client.toml; `fedzoo client ledger show` lists what was spent",
            code="privacy-cap",
        )


def _expected(rounds: list[Entry], fraction: float) -> list[Entry]:
    """As many rounds as the site will be asked for, evenly among these."""
    count = max(1, math.floor(fraction * len(rounds) + 1e-9)) if rounds else 0
    return [rounds[i * len(rounds) // count] for i in range(count)]
