"""The engine that calls sites directly, one after another, in one process with one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

from torch import Tensor

from client.handler import Handler
from client.policy import Policy
from client.private import simulated_secret
from client.protection import Protection
from client.readers.base import Splits
from client.state import MemoryState, State
from client.workbench import Benches, Workbench
from shared_models.errors import DeploymentError
from shared_models.job import Job
from shared_models.messages import Contribution, Instruction


class InProcess:
    """An executor over simulated sites. Cost follows the cohort: a site costs nothing until it is selected.

    A site's secret is made from the job's seed and its name, so that a simulation repeats: its noise protects nothing.

    Args:
        names: the population, any sequence; a million names may be made on demand.
        splits: name -> that site's examples.
        benches: shared by all sites; give the same one to several runs to build models once.
        states: name -> where that site remembers; in memory by default, on disk a run survives its process.
        draw: of the sites' secrets; see `simulated_secret`.
    """

    def __init__(
        self,
        names: Sequence[str],
        splits: Callable[[str], Splits],
        benches: Callable[[Job, Mapping[str, Tensor]], Workbench] | None = None,
        states: Callable[[str], State] | None = None,
        draw: int = 0,
    ) -> None:
        self.names = names
        self.splits = splits
        self.benches = benches or Benches()
        self._make_state = states or (lambda name: MemoryState())
        self._draw = draw
        self._left: tuple[str, int, Mapping[str, Tensor]] = ("", 0, {})
        self._states: dict[str, State] = {}
        self._protections: dict[str, Protection] = {}
        self._policy = Policy(approve_all=True)

    def admit(self, probe: Callable[[str], Instruction], need: int, wait: float) -> None:
        """Nobody to wait for: every instruction's fingerprint is checked where it is handled.

        What an earlier stage left is the same for all sites, and lies in memory once.
        """
        asked = probe("")
        self._left = (asked.run, asked.job.stage, asked.groups.get("start", {}))
        for state in self._states.values():
            state.keep_start(*self._left)

    def population(self, need: int, wait: float) -> Sequence[str]:
        """All of them; raises DeploymentError where that is not enough, for no more will come."""
        if len(self.names) < need:
            raise DeploymentError(
                f"{need} sites are needed (federation.min_sites) and the simulation has {len(self.names)}",
                hint="Lower federation.min_sites or add sites",
            )
        return self.names

    def run(self, instructions: Iterable[Instruction]) -> Iterator[Contribution]:
        """Answers in the order of asking; tensors are views of the one model, valid until the next answer."""
        for instruction in instructions:
            yield self.handler(instruction.site).handle(instruction)

    def handler(self, site: str) -> Handler:
        """The site's entry; what it remembers lives as long as this engine."""
        if site not in self._states:
            self._states[site] = self._make_state(site)
            secret = partial(simulated_secret, site=site, draw=self._draw)
            self._protections[site] = Protection(site, secret=secret, repeats=True)
            if self._left[2]:
                self._states[site].keep_start(*self._left)
        return Handler(
            site,
            lambda job: self.splits(site),
            self._states[site],
            self._policy,
            self.benches,
            check=False,
            protection=self._protections[site],
        )
