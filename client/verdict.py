"""What the output and the end of Flower's SuperNode mean for a person: online, to be waited for, or refused.

SuperNode ends with exit code 1 for every error; which one stands only in its log, as `Exit Code: 305` and a text. The
texts are those of the pinned version of flwr.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from client.status import State

WORKER_READY, WORKER_SENDING = "worker ready", "sending a reply"  # what our worker prints
LOCKOUT_SECONDS = 75.0  # Flower counts a node that vanished as online for at most 60 s
REFUSED_PAUSE = 20.0
LOCKED_OUT_PAUSE = 5.0


@dataclass(frozen=True)
class Verdict:
    """What to tell and what to do.

    Attributes:
        state: of the SuperNode.
        reason: one line, empty when online.
        pause: seconds before it is started again, or None for the usual growing pause.
        ask: whether only the server's membership service knows if this node was revoked.
    """

    state: State
    reason: str = ""
    pause: float | None = None
    ask: bool = False


STILL_ONLINE = Verdict(
    "waiting", "the server still counts this node as online; trying again", pause=LOCKED_OUT_PAUSE, ask=True
)
REVOKED = Verdict(
    "refused",
    "the server does not accept this node's key: it was revoked, has expired or was never registered; "
    "ask the server's operator",
    pause=REFUSED_PAUSE,
)
UNREACHABLE = Verdict("waiting", "the server does not answer; trying again")
ENDED = (
    "the server ended the session (a revoked key, or clocks that differ) or someone here stopped the SuperNode; "
    "starting it again"
)
_RUNNING = (
    (re.compile(r"SuperNode ID: \d+|Connection successful after"), Verdict("online")),
    (re.compile(r"Connection attempt failed, retrying in"), UNREACHABLE),
)
_CERTIFICATE = re.compile(r"CERTIFICATE_VERIFY_FAILED: ([^:\n]+)|(Peer name \S+ is not in peer certificate)")


def of_line(line: str) -> Verdict | None:
    """What one line of a running SuperNode's log says, or None where it says nothing of the kind."""
    return next((verdict for pattern, verdict in _RUNNING if pattern.search(line)), None)


def of_exit(code: int, log_tail: str, log_name: str, refused_for: float = 0.0) -> Verdict:
    """Why a SuperNode that nobody stopped has ended.

    Args:
        code: its exit code; negative is a signal's number.
        log_tail: the end of what it wrote.
        log_name: where the whole log is, for the message.
        refused_for: seconds for which the server has kept refusing this node.
    """
    if found := _CERTIFICATE.search(log_tail):
        detail = (found[1] or found[2]).strip()
        return Verdict(
            "refused",
            f"the server's certificate is not trusted ({detail}): it is another server, its certificate is out of "
            "date, or this machine's clock is wrong",
            pause=REFUSED_PAUSE,
        )
    if "[code: 2004]" in log_tail:
        return STILL_ONLINE if refused_for < LOCKOUT_SECONDS else REVOKED
    if code == 0:
        return Verdict("waiting", ENDED, ask=True)
    if "Exit Code: 305" in log_tail:
        return Verdict("waiting", f"the server did not let this node connect; trying again. See {log_name}")
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return Verdict("waiting", f"the SuperNode {how}; starting it again. See {log_name}")
