"""The node's end of Flower: a message in, a message out, through the same handler as in the simulator."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from flwr.app import Context, Message

from client.config import ClientConfig, NodeFolder, load
from client.handler import Handler
from client.ledger import open_ledger
from client.policy import Policy
from client.protection import Protection
from client.readers import read
from client.readers.base import Splits, Wanted
from client.readers.parts import split
from client.state import DiskState
from client.workbench import Benches, make_device
from shared_models.errors import FedzooError, PrivacyError
from shared_models.flower import from_record, to_record
from shared_models.job import Job
from shared_models.messages import Contribution
from shared_models.secret import load_secret
from shared_models.wire import decode_instruction, encode_contribution

log = logging.getLogger("fedzoo.client")


def client_app(
    node_dir: Path, approve: Sequence[str] = (), approve_all: bool = False
) -> Callable[[Message, Context], Message]:
    """What the resident worker runs for each message of one node.

    Args:
        node_dir: an enrolled node's folder.
        approve: job hashes approved on the command line, besides those in `client.toml`.
        approve_all: approve every job.

    Raises:
        ConfigError: `client.toml` or an approved hash cannot be, or this machine has not that device.
    """
    config, folder = load(node_dir), NodeFolder(node_dir)
    policy = Policy(
        (*config.policy.approve, *approve),
        approve_all=approve_all or config.policy.approve_all,
        requests=folder.requests,
        as_written=True,
        later=lambda: load(node_dir).policy.approve,
        statistics=config.policy.statistics,
        privacy=config.privacy.require,
    )
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

    def answer(message: Message, context: Context) -> Message:
        try:
            instruction = decode_instruction(*from_record(message.content), policy.approves)
        except FedzooError as error:  # another version of the server, most likely
            log.error("an instruction cannot be understood: %s", error)
            reply = Contribution("probe", "unknown", config.site, code=error.code)
        else:
            reply = handler.handle(instruction)
        return Message(to_record(*encode_contribution(reply)), reply_to=message)

    return answer


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
