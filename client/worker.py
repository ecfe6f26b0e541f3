"""The resident worker: takes tasks from the SuperNode on this machine and runs the app that is installed here.

Flower would start a process for each message and run in it whatever code the server sent (the FAB). Here no code
from the network is ever run: the FAB is neither run nor unpacked, and one process keeps model, data and GPU warm. What
is read of an instruction before the site's approval is asked stands in `client/policy.py`. An exception
of the app stays in this process's log; the server gets a fixed text and code.

This is the one file of `client/` that follows the inside of flwr's client process
(`flwr/supernode/runtime/run_clientapp.py`); a test pins the version and the names.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

from client.config import NodeFolder
from client.pace import Pace
from client.verdict import WORKER_READY, WORKER_SENDING
from shared_models.errors import FedzooError

App = Callable[[Message, Context], Message]
FAILURE = "the app of this node failed; its log has the reason"
HEARTBEAT_SECONDS = 10.0  # SuperNode gives a task up after 60 s of silence
OBJECT_BACKOFF_SECONDS = 0.05
OBJECT_SECONDS = 900.0  # a large model over a slow line; what takes longer is given up
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
log = logging.getLogger("fedzoo.client.worker")


def serve(
    address: str,
    app: App,
    stop: threading.Event,
    on_event: Callable[[str], None] = log.info,
    *,
    secret: bytes | None = None,
) -> None:
    """Answer messages with `app`, one at a time, until `stop` is set; a SuperNode that is away is waited for.

    Args:
        address: `host:port` of the SuperNode's local API.
        app: message and context -> reply, as a Flower `ClientApp`.
        stop: ends the loop within half a second when no message is being worked on.
        on_event: called with one line for each thing worth knowing.
        secret: shared with the SuperNode, where it was started with `--superexec-auth-secret-file`.
    """
    idle, away = Pace(0.1, 0.5, growth=1.02), Pace(0.5, 5.0)
    reachable = True
    on_event(WORKER_READY)
    with closing(_acquirer(address, secret)) as supernode:
        while not stop.is_set():
            try:
                found = supernode.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP.value]))
            except (httpx.HTTPError, ValueError) as error:
                if reachable:
                    on_event(f"the SuperNode at {address} does not answer ({type(error).__name__}); trying again")
                reachable = False
                stop.wait(away.next())
                continue
            if not reachable:
                on_event(f"the SuperNode at {address} answers again")
            reachable = True
            away.reset()
            if not found.token:
                stop.wait(idle.next())
                continue
            idle.reset()
            with closing(_task_client(address, found.token)) as task:
                _perform(task, app, on_event)


def _perform(task: RuntimeHttpClient, app: App, on_event: Callable[[str], None]) -> None:
    """Pull one message, answer it, push the reply.

    When the message or the reply cannot be moved, the task is left without a word: SuperNode answers the server by
    itself (code 8) once the heartbeats have stopped, whereas a task reported as failed without a reply would make it
    wait for that reply for ever.
    """
    began = time.monotonic()
    with _Heartbeat(task) as heartbeat:
        try:
            message, context = _pull(task)
        except Exception:
            log.exception("a message could not be received")
            return
        reply, status, text = _answer(app, message, context)
        if heartbeat.refused.is_set():
            on_event("the SuperNode has given this task up; its reply is dropped")
            return
        on_event(WORKER_SENDING)
        try:
            push_message(task, reply, context)
            push_task_output(task, context, status, text)
        except Exception:
            log.exception("a reply could not be sent")
            return
    on_event(f"{status} after {time.monotonic() - began:.2f} s")


def _answer(app: App, message: Message, context: Context) -> tuple[Message, str, str]:
    """The app's reply or an error reply, the task's final status, and a text without any data in it."""
    try:
        reply = app(message, context)
        if not isinstance(reply, Message):
            raise TypeError(f"the app returned {type(reply).__name__}, not a Message")
        return reply, SubStatus.COMPLETED, ""
    except Exception:
        log.exception("the app failed")
        error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, FAILURE)
        return Message(error, reply_to=message), SubStatus.FAILED, FAILURE


def _pull(task: RuntimeHttpClient) -> tuple[Message, Context]:
    """The task's message and context; what else comes with them (the FAB) is not looked at."""
    context = context_from_proto(task.PullTaskInput(PullTaskInputRequest()).context)
    pulled = task.PullMessages(PullAppMessagesRequest())
    if not pulled.messages_list:
        raise LookupError("the task has no message")
    tree, node = pulled.message_object_trees[0], Node(node_id=context.node_id)
    message = pull_and_inflate_object_from_tree(
        tree,
        make_pull_object_fn_protobuf(task.PullObject, node, context.run_id),
        make_confirm_message_received_fn_protobuf(task.ConfirmMessageReceived, node, context.run_id),
        return_type=Message,
        initial_backoff=OBJECT_BACKOFF_SECONDS,
        max_time=OBJECT_SECONDS,
    )
    message.metadata.__dict__["_message_id"] = tree.object_id
    return message, context


class _Heartbeat:
    """Tells the SuperNode every 10 s that a task is alive, until the block ends or the task is `refused`."""

    def __init__(self, task: RuntimeHttpClient) -> None:
        self.refused = threading.Event()
        self._task = task
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> _Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS):
            try:
                alive = self._task.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success
            except httpx.HTTPStatusError as error:
                alive = error.response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR
            except (httpx.TransportError, ValueError):
                alive = True  # not refused, only unheard: the next one may arrive
            if not alive:
                self.refused.set()
                return


def _acquirer(address: str, secret: bytes | None) -> RuntimeHttpClient:
    """A client that may ask for tasks. It does not retry: `serve` does, and sees `stop` in between."""
    version = RuntimeVersionHttpInterceptor(component_name="SuperExec")
    if secret is None:
        return RuntimeHttpClient.from_server_address(address, True, None, [version])
    proof = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=[_ACQUIRE])
    return RuntimeHttpClient.from_server_address(address, True, None, [version, proof])


def _task_client(address: str, token: str) -> RuntimeHttpClient:
    """A client for one task. It bridges a hiccup of some seconds; Flower's own would end the process when refused."""
    return RuntimeHttpClient.from_server_address(
        address,
        True,
        None,
        [RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), RuntimeTokenHttpInterceptor(token=token)],
        retry_invoker=RetryInvoker(lambda: exponential(max_delay=2), httpx.TransportError, max_tries=5, max_time=30),
    )


def main(arguments: list[str] | None = None) -> None:
    """`python -m client.worker`: serve this node's app; a FedzooError ends it with one line and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m client.worker", description="The resident worker of a node.")
    parser.add_argument("--node", type=Path, required=True, help="the node's folder")
    parser.add_argument("--supernode", required=True, help="host:port of the SuperNode's local API")
    parser.add_argument("--secret", type=Path, help="file with the secret shared with the SuperNode")
    parser.add_argument("--approve", action="append", default=[], metavar="HASH", help="a job this site agrees to")
    parser.add_argument("--approve-all", action="store_true", help="agree to every job")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # what a job names is never looked for in the folder where somebody happened to start the node
    os.environ["FEDZOO_WEIGHTS"] = os.environ.get("FEDZOO_WEIGHTS") or str(NodeFolder(options.node).weights.resolve())
    from client.flower_app import client_app

    try:
        app = client_app(options.node, approve=tuple(options.approve), approve_all=options.approve_all)
    except FedzooError as error:
        log.error("error: %s", error)
        raise SystemExit(1) from None
    secret = options.secret.read_bytes() if options.secret else None
    serve(options.supernode, app, threading.Event(), secret=secret)


if __name__ == "__main__":
    main()
