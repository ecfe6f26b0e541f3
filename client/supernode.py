"""`python -m client.supernode OPTIONS`: Flower's own `flower-supernode`, quicker, one fault mended, no app opened.

Flower's main loop sleeps 3 s whenever no message waits, 0.5 s while the worker is busy, and 1 s when it meets a message
before its objects. The numbers are literals and default arguments inside flwr, whose version is pinned. Here the
pauses follow the traffic: an idle node asks again after 0.2 s plus 2 % of the time it has already waited, at most 3 s,
so that a round of seconds is not made of sleep and a fleet at rest costs its server what it would without this file.

The fault: when a run is stopped while its message is being received, Flower's main loop forgets the message but not
the task it has made for it. The worker would take that task and wait for its objects for ever.

The app: Flower unzips what the server sent as the app (the FAB) to read its configuration, before anybody was asked.
The worker runs what is installed and reads none, so it stays closed.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from flwr.supercore.run import RunNotRunningException
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


def drop_tasks_of_stopped_runs() -> None:
    """Let a run that stops while its message is received be an ordinary failure, after which Flower ends the task."""
    receive = main_loop._pull_and_store_message

    def as_failure(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except RunNotRunningException:  # a BaseException, which passes Flower's own clean-up by
                raise ConnectionAbortedError("the run was stopped") from None

        return call

    def receive_or_drop(**connection: Any) -> int | None:
        for name in ("pull_object", "confirm_message_received"):
            connection[name] = as_failure(connection[name])
        return receive(**connection)

    vars(main_loop)["_pull_and_store_message"] = receive_or_drop


def leave_apps_closed() -> None:
    """Take an app's configuration to be empty, without looking into what the server sent."""
    vars(main_loop)["get_fused_config_from_fab"] = lambda content, run: {}


def main() -> None:
    """Run Flower's entry point, and end when it ends: an error in its main loop leaves its local API serving alone."""
    shorten_pauses()
    drop_tasks_of_stopped_runs()
    leave_apps_closed()
    try:
        flower_supernode()
    except Exception:
        log.exception("the SuperNode failed")
    os._exit(1)


if __name__ == "__main__":
    main()
