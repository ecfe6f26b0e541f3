"""What a site lets run on its data. Every instruction passes here first; without approval nothing runs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from shared_models.errors import ConfigError, PolicyError
from shared_models.messages import Instruction


class Policy:
    """Approves jobs by the hash that this node computed itself.

    Args:
        approved: job hashes, 64 hex digits each.
        approve_all: approve whatever comes: for demos and simulations.
        requests: folder that receives the text of each job that asked and was not approved, `<hash>.toml`.

    Raises:
        ConfigError: an approved hash is not 64 hex digits.
    """

    def __init__(
        self, approved: Iterable[str] = (), *, approve_all: bool = False, requests: Path | None = None
    ) -> None:
        self.approved = frozenset(approved)
        self.approve_all = approve_all
        self.requests = requests
        for name in self.approved:
            if not re.fullmatch(r"[0-9a-f]{64}", name):
                raise ConfigError(
                    f"'{name}' is not a job hash (64 hex digits)", hint="`fedzoo run submit` prints the hash of a job"
                )

    def require(self, instruction: Instruction) -> None:
        """Raise a PolicyError where the site has not approved the instruction's job."""
        job = instruction.job
        if self.approve_all or job.hash in self.approved:
            return
        if self.requests is not None:
            self.requests.mkdir(parents=True, exist_ok=True)
            (self.requests / f"{job.hash}.toml").write_text(job.to_toml(), encoding="utf-8")
        raise PolicyError(
            f"job '{job.name}' asks to {instruction.kind} on this site's data and is not approved",
            hint=f"Read the request and restart with --approve {job.hash}",
        )
