"""`python -m client.supernode OPTIONS`: Flower's own `flower-supernode`, unchanged but for the length of its pauses.

Flower's main loop sleeps 3 s whenever no message waits, 0.5 s while the worker is busy, and 1 s when it meets a message
before its objects. The numbers are literals and default arguments inside flwr, whose version is pinned. Here the
pauses follow the traffic: an idle node asks again after 0.2 s plus 2 % of the time it has already waited, at most 3 s,
so that a round of seconds is not made of sleep and a fleet at rest costs its server what it would without this file.
"""

from __future__ import annotations

import logging
import os
import time
from types import SimpleNamespace

from flwr.supernode import start_client_internal as main_loop
from flwr.supernode.cli import flower_supernode

from client.pace import Pace
from shared_models.flower import shorten_object_backoff

FLOWER_IDLE_SECONDS = 3.0
IDLE = {"first": 0.2, "longest": FLOWER_IDLE_SECONDS, "growth": 1.02}
BUSY_SECONDS = 0.1
log = logging.getLogger("flwr")


def shorten_pauses() -> None:
    """Give Flower's main loop a clock with our pauses, and its object transfer our first back-off."""
    idle = Pace(**IDLE)

    def sleep(seconds: float) -> None:
        if seconds >= FLOWER_IDLE_SECONDS:
            time.sleep(idle.next())
        else:  # a message is being worked on, so another may follow soon
            idle.reset()
            time.sleep(min(seconds, BUSY_SECONDS))

    vars(main_loop)["time"] = SimpleNamespace(sleep=sleep)
    shorten_object_backoff()


def main() -> None:
    """Run Flower's entry point, and end when it ends: an error in its main loop leaves its local API serving alone."""
    shorten_pauses()
    try:
        flower_supernode()
    except Exception:
        log.exception("the SuperNode failed")
    os._exit(1)


if __name__ == "__main__":
    main()
