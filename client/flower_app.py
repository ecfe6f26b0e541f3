"""The node's end of Flower: a message in, a message out, through the same handler as in the simulator."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message

from client.audit import Audit
from client.config import ClientConfig, NodeFolder, PolicyPart, load
from client.handler import Handler
from client.ledger import open_ledger
from client.policy import Policy, Required
from client.protection import Protection
from client.readers import read
from client.readers.base import Splits, Wanted
from client.readers.parts import split
from client.state import DiskState
from client.workbench import Benches, make_device
from shared_models.errors import FedzooError, PolicyError, PrivacyError
from shared_models.flower import from_record, to_record
from shared_models.job import Job
from shared_models.messages import Contribution, Instruction, refusal
from shared_models.secret import load_secret
from shared_models.spec import digest
from shared_models.sums import Groups
from shared_models.wire import decode_instruction, encode_contribution, flatten

log = logging.getLogger("fedzoo.client")


def client_app(
    node_dir: Path, approve: Sequence[str] = (), approve_all: bool = False
) -> Callable[[Message, Context], Message]:
    """What the resident worker runs for each message of one node.

    Args:
        node_dir: an enrolled node's folder.
        approve: job hashes approved on the command line, as long as this process lives, besides those that
            `client.toml` names when an instruction comes.
        approve_all: approve every job, as long.

    Raises:
        ConfigError: `client.toml` or an approved hash cannot be, or this machine has not that device.
        PolicyError: the site's record cannot be written.
    """
    config, folder = load(node_dir), NodeFolder(node_dir)

    def written() -> tuple[PolicyPart, Required]:
        now = load(node_dir)
        return now.policy, now.privacy.require

    policy = Policy(approve, approve_all=approve_all, requests=folder.requests, as_written=True, written=written)
    device = make_device(config.device)
    log.info("models train on %s", torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU")
    ledger = open_ledger(node_dir, config)
    try:
        ledger.begin()
    except PrivacyError as error:  # jobs that book nothing may run nevertheless
        log.error("%s", error)
    protection = Protection(config.site, ledger, config.dataset, lambda _: load_secret(folder.secret))
    state = DiskState(folder.state, config.site)
    handler = Handler(config.site, NodeData(config), state, policy, Benches(device), protection=protection)

    audit = Audit(folder.audit)
    audit.write("start", approve=list(approve), approve_all=approve_all)

    def answer(message: Message, context: Context) -> Message:
        began, instruction = time.monotonic(), None
        try:
            instruction = decode_instruction(*from_record(message.content), policy.approves)
        except FedzooError as error:  # another version of the server, most likely
            log.error("an instruction cannot be understood: %s", error)
            reply = Contribution("probe", "unknown", config.site, code=error.code)
        else:
            reply = handler.handle(instruction)
        sent = encode_contribution(reply)
        facts = {"bytes": sum(map(len, sent)), "seconds": round(time.monotonic() - began, 3)}
        try:
            audit.write("instruction", **_said(instruction, reply), **facts)
        except PolicyError as error:
            log.error("%s", error)
            sent = encode_contribution(refusal(instruction, error.code)) if instruction else sent
        return Message(to_record(*sent), reply_to=message)

    return answer


def _said(instruction: Instruction | None, reply: Contribution) -> dict[str, Any]:
    """What the site's record says of an instruction, where it was understood, and of the answer."""
    answered = {"code": reply.code, "examples": reply.examples}
    if instruction is None:
        return answered
    job = instruction.job
    asked = {"job": job.whole.hash, "name": job.whole.name, "run": instruction.run, "kind": instruction.kind}
    where = {"stage": job.stage, "task": instruction.task, "round": instruction.round}
    measured = sorted({name.rpartition("/")[0] for name in reply.metrics})
    return {**asked, **where, "measured": measured, "model": _digest(instruction.groups), **answered}


def _digest(groups: Groups) -> str:
    """SHA-256 over the names, types, shapes and bytes of the tensors that came, in whatever order; empty for none."""
    tensors = sorted(flatten(groups).items())
    lines = (f"{name} {t.dtype} {tuple(t.shape)} {digest(t)}\n" for name, t in tensors)
    return hashlib.sha256("".join(lines).encode()).hexdigest() if tensors else ""


class NodeData:
    """The site's own examples, read once per preprocessing, label list and form of target."""

    def __init__(self, config: ClientConfig) -> None:
        self.config = config
        self._wanted: Wanted | None = None
        self._splits: Splits | None = None

    def __call__(self, job: Job) -> Splits:
        """Raises DataError, which names files and stays here."""
        data = self.config.data
        wanted = Wanted.by(job, data.labels, skip_bad=data.skip_bad, values={"": data.values})
        if self._splits is None or self._wanted != wanted:
            store = read(data.format, data.folder, wanted)
            for line in store.skipped:
                log.warning("passed over: %s", line)
            own = store.held_by({self.config.site: torch.arange(len(store.names))})
            self._splits, self._wanted = split(own), wanted
        return self._splits
