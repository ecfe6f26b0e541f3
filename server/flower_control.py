"""The one file that talks to the Control API of the running SuperLink.

It uses the client inside flwr, whose version is pinned, because a `flwr` command costs three seconds. The API listens
on loopback and asks for no credential: whoever is on this machine may use it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import HEARTBEAT_PATIENCE
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto import control_pb2 as pb
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from server.config import no_proxy
from shared_models.errors import DeploymentError

Request = TypeVar("Request")
Reply = TypeVar("Reply")
Scalar = str | int | float | bool

_APP = """\
[project]
name = "fedzoo"
version = "0.1.0"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedzoo"

[tool.flwr.app.components]
serverapp = "server.flower_app:app"
clientapp = "client.flower_app:app"

[tool.flwr.app.config]
run = ""
server-dir = ""
"""


@dataclass(frozen=True)
class FlowerNode:
    """A node as SuperLink knows it.

    Attributes:
        node_id: Flower's id.
        public_key: PEM, SubjectPublicKeyInfo.
        online: whether its heartbeats arrive; a dead node counts as online for up to a minute.
        last_seen: Unix seconds of its last heartbeat, or None.
    """

    node_id: int
    public_key: bytes
    online: bool
    last_seen: float | None


def build_fab() -> bytes:
    """The app a run is started with: names of installed modules and no code, because nodes run no code they are sent.

    Its settings are `run` (a run's folder name) and `server-dir`, to be filled in by `FlowerControl.start_run`.
    """
    fab, _ = build_fab_from_files({"pyproject.toml": _APP.encode()})
    return fab


class FlowerControl:
    """A connection to the Control API; close it, or use it in a `with` block. Its methods may be called by any thread.

    Every method raises a DeploymentError where SuperLink does not answer (`code` is `not-running`) or refuses.
    """

    def __init__(self, address: str, ca: Path) -> None:
        self.address = address
        os.environ["no_proxy"] = no_proxy(os.environ)  # the HTTP library inside flwr takes proxies from there alone
        self._client = ControlHttpClient.from_server_address(
            address,
            insecure=False,
            root_certificates=ca.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def register(self, public_key: bytes) -> int:
        """Let the node with that key (PEM) connect; returns Flower's node id."""
        return int(self._call(self._client.RegisterNode, pb.RegisterNodeRequest(public_key=public_key)).node_id)

    def unregister(self, node_id: int) -> None:
        """Refuse a node from now on. Its key can never be registered again."""
        self._call(self._client.UnregisterNode, pb.UnregisterNodeRequest(node_id=node_id))

    def nodes(self) -> list[FlowerNode]:
        """Every node that is registered now."""
        reply = self._call(self._client.ListNodes, pb.ListNodesRequest())
        return [
            FlowerNode(
                node_id=info.node_id,
                public_key=info.public_key,
                online=info.status == "online",
                last_seen=info.online_until - HEARTBEAT_PATIENCE * info.heartbeat_interval
                if info.HasField("online_until")
                else None,
            )
            for info in reply.nodes_info
            if info.status != "unregistered"
        ]

    def start_run(self, config: Mapping[str, Scalar]) -> int:
        """Start the app of `build_fab` with its settings filled in; returns Flower's run id."""
        content = build_fab()
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        request = pb.StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(config)))
        reply = self._call(self._client.StartRun, request)
        if not reply.HasField("run_id"):
            raise DeploymentError(
                "SuperLink did not start the run", hint="Its log in the server's logs/ has the reason"
            )
        return int(reply.run_id)

    def runs(self) -> dict[int, str]:
        """Flower's run id -> `pending`, `starting`, `running`, or `finished:` and how."""
        reply = self._call(self._client.ListRuns, pb.ListRunsRequest())
        return {
            run_id: f"finished:{run.status.sub_status}" if run.status.status == "finished" else run.status.status
            for run_id, run in reply.run_dict.items()
        }

    def stop_run(self, run_id: int) -> None:
        """Stop a run that is not finished."""
        self._call(self._client.StopRun, pb.StopRunRequest(run_id=run_id))

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def __enter__(self) -> FlowerControl:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: Callable[[Request], Reply], request: Request) -> Reply:
        try:
            return method(request)
        except httpx.HTTPStatusError as error:
            known = FlowerError.from_json(error.response.text)
            reason = known.message if known else f"HTTP {error.response.status_code}"
            raise DeploymentError(f"SuperLink at {self.address} refused: {reason}") from None
        except httpx.ConnectError:
            raise DeploymentError(
                f"the server is not running: nothing answers at {self.address}",
                hint="Start it: fedzoo server start",
                code="not-running",
            ) from None
        except httpx.HTTPError as error:
            raise DeploymentError(f"SuperLink at {self.address} does not answer: {type(error).__name__}") from None
