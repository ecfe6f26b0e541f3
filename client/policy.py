"""What a site lets run on its data. Without approval an instruction is read and its job's hash computed, no more.

Reading is JSON, bytes of tensors and the form of the job; nothing that the job names is built, opened or run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from client.config import PolicyPart
from shared_models.errors import ConfigError, PolicyError
from shared_models.files import write_whole
from shared_models.job import Job
from shared_models.messages import Instruction
from shared_models.schedule import round_budget, task_of
from shared_models.sent import sent

MAX_REQUESTS = 100
MAX_REQUEST_BYTES = 16_000_000  # of one job as TOML: a large tokenizer's file has about 10 MB
MAX_BYTES = 64_000_000  # of all requests together
Required = Literal["none", "sample", "client", "any"]


class Policy:
    """Approves jobs by the hash that this node computed itself.

    Args:
        approved: job hashes, 64 hex digits each, approved as long as this policy lives.
        approve_all: approve whatever comes, as long: for demos and simulations.
        requests: folder that receives the text of each job that asked and was not approved, `<hash>.toml`: the newest
            100, or 64 MB. A job of more than 16 MB is not kept (code `too-large`).
        as_written: refuse work that the job does not say: another budget, round or task. A node's choice; the
            simulator's baselines share a budget out in other ways.
        statistics: whether the site gives sums over its training examples, where a job wants them. If not, it refuses
            jobs that rest on such sums; where they only normalise, it trains by what other sites measured.
        privacy: which jobs the site takes: `none`, any; `sample` or `client`, those of that privacy mode; `any`, those
            of either. It holds for approved jobs too.
        written: asked at each instruction for `[policy]` and what privacy is required, as they stand then: what it
            approves is approved too, and its `statistics` and its requirement take the place of the two above. So a
            site agrees and withdraws while its node runs. While it raises a ConfigError, nothing is approved.

    Raises:
        ConfigError: an approved hash is not 64 hex digits.
    """

    def __init__(
        self,
        approved: Iterable[str] = (),
        *,
        approve_all: bool = False,
        requests: Path | None = None,
        as_written: bool = False,
        statistics: bool = True,
        privacy: Required = "none",
        written: Callable[[], tuple[PolicyPart, Required]] | None = None,
    ) -> None:
        self.approved = frozenset(approved)
        self.approve_all = approve_all
        self.requests = requests
        self.as_written = as_written
        self.written = written
        self._now = PolicyPart(statistics=statistics), privacy
        for name in self.approved:
            if not re.fullmatch(r"[0-9a-f]{64}", name):
                raise ConfigError(
                    f"'{name}' is not a job hash (64 hex digits)", hint="`fedzoo run submit` prints the hash of a job"
                )

    def approves(self, job: Job) -> bool:
        """Whether the site has approved it, by its hash alone; not while what it permits cannot be read."""
        try:
            return self._agrees(job, self._read()[0])
        except PolicyError:
            return False

    def _agrees(self, job: Job, now: PolicyPart) -> bool:
        return self.approve_all or now.approve_all or job.hash in self.approved or job.hash in now.approve

    def require(self, instruction: Instruction) -> None:
        """Raise a PolicyError where the site has not approved the job, or more is asked than the job says."""
        job = instruction.job.whole
        now, privacy = self._read()
        if self._agrees(job, now):
            if self.as_written and not _is_as_written(instruction):
                raise PolicyError(
                    f"the server asks for more than job '{job.name}' says ({instruction.kind}, "
                    f"round {instruction.round}, task {instruction.task}, {instruction.budget})",
                    hint="Nothing was run; ask the server's operator",
                    code="beyond-job",
                )
            part = instruction.job.stream
            varies = instruction.job.time == "continual" and part.by_site
            if self.as_written and varies and instruction.site not in part.groups:
                raise PolicyError(
                    f"job '{job.name}' says which site is when at which task, and '{instruction.site}' is not named",
                    hint="Nothing was run; ask the server's operator to name it in stream.sites",
                    code="not-named",
                )
            _require_privacy(job, privacy)
            if not now.statistics:
                _require_no_sums(instruction)
            return
        if self.requests is not None:
            _keep(self.requests, job)
        raise PolicyError(
            f"job '{job.name}' asks to {instruction.kind} on this site's data and is not approved",
            hint=f"Read the request, then: fedzoo client approve {job.hash}",
        )

    def _read(self) -> tuple[PolicyPart, Required]:
        """What holds now; never what held before, for it may have been withdrawn."""
        if self.written is None:
            return self._now
        try:
            return self.written()
        except ConfigError as error:
            raise PolicyError(
                f"what this site permits cannot be read: {error}",
                hint="Nothing runs until client.toml can be",
                code="policy-unreadable",
            ) from None


def _keep(requests: Path, job: Job) -> None:
    """Write the request, once; the oldest ones make room for it.

    Raises:
        PolicyError: it is too large, or cannot be written.
    """
    path = requests / f"{job.hash}.toml"
    try:
        requests.mkdir(parents=True, exist_ok=True)
        if path.exists():
            return
        text = job.to_toml().encode()
        if len(text) > MAX_REQUEST_BYTES:
            raise PolicyError(
                f"job '{job.name}' has {len(text) / 1e6:.1f} MB, and a request of more than "
                f"{MAX_REQUEST_BYTES / 1e6:g} MB is not kept: nothing was written",
                hint=f"Who has the job from the server's operator agrees by: fedzoo client approve {job.hash}",
                code="too-large",
            )
        known = sorted(requests.glob("*.toml"), key=lambda p: (p.stat().st_mtime_ns, p.name))
        sizes = [p.stat().st_size for p in known]
        while known and (len(known) >= MAX_REQUESTS or sum(sizes) + len(text) > MAX_BYTES):
            known.pop(0).unlink(missing_ok=True)
            sizes.pop(0)
        write_whole(path, text)
    except OSError as error:
        raise PolicyError(
            f"job '{job.name}' is not approved, and its request cannot be kept in {requests}: "
            f"{error.strerror or error}; nothing was written",
            hint="Free space or mend the folder, and it is kept when the server asks again",
        ) from None


def _require_privacy(job: Job, required: Required) -> None:
    taken = {"none": None, "any": ("sample", "client")}.get(required, (required,))
    if taken is not None and any(_guarantee(step) not in taken for step in job.steps):
        raise PolicyError(
            f"job '{job.name}' gives no guarantee that this site requires ({' or '.join(taken)}): its "
            f"privacy mode is '{job.privacy.mode}'{' without noise' if job.privacy.noise == 0 else ''}",
            hint="It is `require` in [privacy] of client.toml",
            code="privacy-required",
        )


def _require_no_sums(instruction: Instruction) -> None:
    job = instruction.job.whole
    asked: list[str] = [kind for kind in sent(job) if kind in ("sums over examples", "sums of exemplars' features")]
    if instruction.kind == "statistics":
        asked.append("sums of the inputs by channel")
    if asked:
        raise PolicyError(
            f"job '{job.name}' asks for sums that this site does not give: {' and '.join(asked)}",
            hint="It is statistics = false in [policy] of client.toml",
            code="no-statistics",
        )


def _guarantee(job: Job) -> str:
    """The privacy mode, where there is any noise."""
    return "none" if job.privacy.noise == 0 else job.privacy.mode


def _is_as_written(instruction: Instruction) -> bool:
    """Whether the job itself, whose hash was approved, says everything that is asked."""
    job, tasks = instruction.job, len(instruction.job.tasks)
    rounds = job.federation.rounds
    known = (
        job.place == "federated"
        and instruction.rounds == rounds
        and 0 <= instruction.round <= rounds
        and 0 <= instruction.task < tasks
        and len(set(instruction.evaluate)) == len(instruction.evaluate)
        and all(task < tasks for _, task in instruction.evaluate)
        and (job.data.normalise_by == "sites" or not (instruction.statistics or instruction.kind == "statistics"))
    )
    if instruction.kind != "train":
        return known
    return (
        known
        and all(part == "validation" for part, _ in instruction.evaluate)
        and instruction.round < rounds
        and instruction.task == task_of(job, instruction.round)
        and instruction.budget == round_budget(job, instruction.round, instruction.site)
    )
