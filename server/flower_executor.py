"""The executor of a deployment: instructions travel through SuperLink to enrolled nodes, contributions come back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import httpx
from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from server.events import Events
from server.nodes import Roster
from shared_models.errors import DeploymentError, FedzooError
from shared_models.flower import from_record, to_record
from shared_models.messages import OK, Contribution, Instruction, refusal
from shared_models.spec import first_difference
from shared_models.wire import decode_contribution, encode_instruction

POLL = 0.1  # seconds between looks for answers
WAIT_POLL = 1.0  # seconds between looks for nodes
REPROBE = 10.0  # seconds before a site that refused is asked again
PROBE_SECONDS = 60.0  # for the answer to a probe; a site that reads a large folder answers the next one
SILENT = 300.0  # seconds before a site that did not answer its probe is asked again
LOST_AFTER = 75.0  # seconds offline after which a site's answer is given up; SuperLink notices a death within 60

log = logging.getLogger("fedzoo.server")
_TYPES = {"train": MessageType.TRAIN, "evaluate": MessageType.EVALUATE}


class FlowerExecutor:
    """Sites behind Flower's grid.

    Args:
        grid: of the ServerApp.
        roster: says which site a Flower node is, and who is revoked; read anew at every use.
        timeout: seconds to wait for the answers of one dispatch.
        events: receives `waiting` lines.
    """

    def __init__(self, grid: Grid, roster: Roster, timeout: float, events: Events) -> None:
        self.grid = grid
        self.roster = roster
        self.timeout = timeout
        self.events = events
        self._willing: set[str] = set()
        self._refused: dict[str, tuple[float, str]] = {}
        self._probe: Callable[[str], Instruction] | None = None
        self._said: dict[str, str] = {}
        self._looked = 0.0

    # ---- who is there ------------------------------------------------------------------------------------------------
    def admit(self, probe: Callable[[str], Instruction], need: int, wait: float) -> None:
        """Wait until `need` sites are online, willing and would train the same model."""
        self._probe = probe
        self._willing.clear()
        self._refused.clear()
        self.population(need, wait)

    def population(self, need: int, wait: float) -> Sequence[str]:
        """Names, sorted, of the sites that are enrolled, online and willing."""
        deadline = time.monotonic() + wait
        while True:
            online = self._online()
            self._ask(online)
            here = sorted(online.keys() & self._willing)
            if len(here) >= need:
                self._said = {}
                return here
            missing = self._missing(online)
            if missing != self._said:
                self._said = missing
                self.events.emit("waiting", have=here, need=need, missing=missing)
            if time.monotonic() >= deadline:
                reasons = ", ".join(f"{site}: {why}" for site, why in missing.items()) or "no site is enrolled"
                raise DeploymentError(
                    f"{len(here)} of {need} needed sites are ready after {wait:g} s ({reasons})",
                    hint="Start or approve them, or lower federation.min_sites",
                )
            time.sleep(WAIT_POLL)

    def _online(self) -> dict[str, int]:
        """Site -> Flower node id."""
        alive = set(self.grid.get_node_ids())
        return {site: node_id for site, node_id in self._active().items() if node_id in alive}

    def _active(self) -> dict[str, int]:
        return {node.site: node.node_id for node in self.roster.nodes() if node.revoked is None}

    def _missing(self, online: Mapping[str, int]) -> dict[str, str]:
        offline = {site: "offline" for site in self._active() if site not in online}
        return dict(sorted((offline | {s: code for s, (_, code) in self._refused.items() if s in online}).items()))

    def _ask(self, online: Mapping[str, int]) -> None:
        """Probe the sites that have not agreed yet; one that refused is left alone for a while."""
        assert self._probe is not None, "admit comes first"
        now = time.monotonic()
        due = [s for s in sorted(online) if s not in self._willing and self._refused.get(s, (0.0, ""))[0] <= now]
        for reply in self._exchange([self._probe(site) for site in due], min(self.timeout, PROBE_SECONDS)):
            if reply.code == OK:
                self._willing.add(reply.site)
                self._refused.pop(reply.site, None)
                continue
            detail = ""
            if reply.document and (found := first_difference(self._probe("").document, dict(reply.document))):
                detail = f"'{found[0]}' is {found[1]} here and {found[2]} there"
            if self._refused.get(reply.site, (0.0, ""))[1] != reply.code:
                self.events.emit("refused", site=reply.site, code=reply.code, detail=detail)
            pause = SILENT if reply.code == "timeout" and self._willing else REPROBE
            self._refused[reply.site] = (time.monotonic() + pause, reply.code)

    # ---- asking ------------------------------------------------------------------------------------------------------
    def run(self, instructions: Iterable[Instruction]) -> Iterator[Contribution]:
        """Push all, then hand over answers as they come; what does not come is answered with a code."""
        for reply in self._exchange(instructions, self.timeout):
            if reply.code == "not-approved":
                self._willing.discard(reply.site)
            yield reply

    def _exchange(self, instructions: Iterable[Instruction], timeout: float) -> Iterator[Contribution]:
        open_: dict[str, Instruction] = {}
        nodes = self._active()
        for instruction in instructions:
            if instruction.site not in nodes:
                yield refusal(instruction, "revoked")
                continue
            message = Message(
                to_record(*encode_instruction(instruction)),
                nodes[instruction.site],
                _TYPES.get(instruction.kind, MessageType.QUERY),
                ttl=timeout,
            )
            (message_id,) = self.grid.push_messages([message])
            open_[message_id] = instruction
        deadline = time.monotonic() + timeout
        seen = dict.fromkeys(open_, time.monotonic())
        while open_:
            looked = 0.0  # seconds of looks that found nothing
            for message_id, instruction in list(open_.items()):
                began = time.monotonic()
                reply = self._pull(message_id, instruction)
                if reply is None:
                    looked += time.monotonic() - began
                else:
                    del open_[message_id]
                    yield reply
            now = time.monotonic()
            if now >= deadline:
                yield from (refusal(i, "timeout") for i in open_.values())
                return
            yield from self._give_up(open_, seen, now)
            if open_:
                time.sleep(max(POLL, looked))  # a large fleet is asked half the time at most

    def _pull(self, message_id: str, instruction: Instruction) -> Contribution | None:
        """The answer to one message, if it is there. Asked one by one: what a node uploaded can make flwr raise.

        What is answered is what was asked for, whatever the upload names.
        """
        try:
            message = next(iter(self.grid.pull_messages([message_id])), None)
            return None if message is None else self._read(message, instruction)
        except httpx.HTTPError:  # SuperLink's, not the site's
            raise
        except Exception:
            log.exception("what site '%s' sent cannot be read", instruction.site)
            return refusal(instruction, "malformed")

    def _read(self, message: Message, instruction: Instruction) -> Contribution:
        if message.has_error():
            return refusal(instruction, f"flower-error-{message.error.code}")
        if instruction.site not in self._active():
            return refusal(instruction, "revoked")
        try:
            return _of(decode_contribution(*from_record(message.content)), instruction)
        except FedzooError as error:
            return refusal(instruction, error.code)

    def _give_up(self, open_: dict[str, Instruction], seen: dict[str, float], now: float) -> Iterator[Contribution]:
        """Sites that were revoked meanwhile, or have been offline for longer than a restart takes."""
        if now - self._looked < WAIT_POLL:
            return
        self._looked = now
        active, online = self._active(), self._online()
        for message_id, instruction in list(open_.items()):
            if instruction.site in online:
                seen[message_id] = now
            lost = now - seen[message_id] > LOST_AFTER
            if instruction.site not in active or lost:
                del open_[message_id]
                yield refusal(instruction, "lost" if lost else "revoked")


def _of(reply: Contribution, instruction: Instruction) -> Contribution:
    """An answer under another site's name is not believed."""
    return reply if reply.site == instruction.site else refusal(instruction, "wrong-site")
