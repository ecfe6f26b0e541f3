"""The real server process with a real SuperLink: enroll, connect, run, revoke, survive a kill, stop."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import port_options
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

import server
from client.config import NodeFolder
from client.enroll import enroll, renew, whoami
from server import flower_control
from server.cli import app
from server.config import ServerFolder, load
from server.flower_control import FlowerControl
from server.process import serve
from shared_models.errors import DeploymentError
from shared_models.process import Child, flower_environment, free_port, program

pytestmark = pytest.mark.deploy
PACKAGES = Path(server.__file__).parents[1]
STAND_IN = """
import json, pathlib
from flwr.serverapp import ServerApp
import server.config
app = ServerApp()

@app.main()
def main(grid, context):
    folder = pathlib.Path(str(context.run_config["server-dir"]))
    run = str(context.run_config["run"])
    if run == "endless":
        import time
        (folder / "started").touch()
        time.sleep(600)
    (folder / "seen.json").write_text(json.dumps({"run": run, "nodes": len(list(grid.get_node_ids()))}))
"""


def eventually(truth: Callable[[], object], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not truth():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def fedzoo(*words: str) -> str:
    """The output of `fedzoo server ...`."""
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def init(folder: Path, *more: str) -> ServerFolder:
    fedzoo("init", "--dir", str(folder), *port_options(), *more)
    return ServerFolder(folder)


def start(folder: Path, extra_path: Path) -> Child:
    """`fedzoo server start` as a process, ready."""
    path = os.pathsep.join([str(PACKAGES), str(extra_path)])
    command = [sys.executable, "-c", "from server.cli import app; app()", "start", "--dir", str(folder)]
    child = Child("server", command, folder / "start.log", {**os.environ, "PYTHONPATH": path})
    assert eventually(lambda: "ready" in child.tail() or child.exit_code() is not None)
    assert "ready" in child.tail(), child.tail(40)
    return child


def processes(*words: str) -> list[int]:
    """Ids of processes with all those words in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if all(word in line for word in words):
            found.append(int(entry.name))
    return found


def running(folder: ServerFolder) -> bool:
    return bool(json.loads(fedzoo("status", "--dir", str(folder.root), "--json"))["running"])


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFolder]:
    scratch = tmp_path_factory.mktemp("deployed")
    (scratch / "stand_in.py").write_text(STAND_IN)
    folder = init(scratch / "server")
    child = start(folder.root, scratch)
    yield folder
    child.stop(20)
    assert processes(str(folder.root)) == []


@pytest.fixture
def control(deployed: ServerFolder) -> Iterator[FlowerControl]:
    with FlowerControl(load(deployed.root).control, deployed.pki / "ca.crt") as connection:
        yield connection


def supernode(deployed: ServerFolder, key: Path, scratch: Path) -> Child:
    config = load(deployed.root)
    command = [
        program("flower-supernode"),
        *("--superlink", f"localhost:{config.ports.fleet}"),
        *("--root-certificates", str(deployed.pki / "ca.crt")),
        *("--auth-supernode-private-key", str(key)),
        *("--isolation", "process", "--host", "127.0.0.1", "--port", str(free_port())),
    ]
    return Child("supernode", command, scratch / "supernode.log", flower_environment(scratch / "flower"))


def sites(deployed: ServerFolder) -> dict[str, str]:
    rows = json.loads(fedzoo("nodes", "--dir", str(deployed.root), "--json"))
    return {row["site"]: row["state"] for row in rows}


def test_a_site_enrolls_connects_is_revoked_and_renewed(
    deployed: ServerFolder, control: FlowerControl, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    invite = fedzoo("invite", "hospital-a", "--dir", str(deployed.root)).strip()
    assert "\n" not in invite
    enroll(invite, node := tmp_path / "node", tmp_path / "data", "imagefolder")
    assert sites(deployed) == {"hospital-a": "offline"}
    child = supernode(deployed, NodeFolder(node).key, tmp_path)
    try:
        assert eventually(lambda: sites(deployed) == {"hospital-a": "online"}), child.tail(40)
        (known,) = control.nodes()
        assert known.last_seen == pytest.approx(time.time(), abs=40)
        state = json.loads(fedzoo("status", "--dir", str(deployed.root), "--json"))
        assert (state["running"], state["enrolled"], state["online"], state["revoked"]) == (True, 1, 1, 0)

        assert fedzoo("revoke", "hospital-a", "--dir", str(deployed.root)) == "revoked hospital-a\n"
        assert control.nodes() == []
        assert sites(deployed) == {"hospital-a": "revoked"}
        assert whoami(node).status == "revoked"
        assert eventually(lambda: child.exit_code() is not None), child.tail(40)

        renew(fedzoo("invite", "hospital-a", "--dir", str(deployed.root)).strip(), node)
        child.stop()
        child = supernode(deployed, NodeFolder(node).key, tmp_path)
        assert eventually(lambda: sites(deployed) == {"hospital-a": "online"}), child.tail(40)
        assert whoami(node).status == "active"
    finally:
        child.stop()


def test_a_key_that_never_enrolled_is_refused(deployed: ServerFolder, control: FlowerControl, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    path = tmp_path / "stranger"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    )
    before = control.nodes()
    child = supernode(deployed, path, tmp_path)
    try:
        assert eventually(lambda: child.exit_code() is not None)
        assert child.exit_code() != 0
        assert "Failed to activate SuperNode" in child.tail(40)
        assert control.nodes() == before
    finally:
        child.stop()


def test_a_run_finds_our_packages_and_its_settings(
    deployed: ServerFolder, control: FlowerControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower_control, "_APP", flower_control._APP.replace("server.flower_app:app", "stand_in:app"))
    run = control.start_run({"run": "digits-1", "server-dir": str(tmp_path)})
    assert eventually(lambda: control.runs()[run].startswith("finished")), control.runs()
    assert control.runs()[run] == "finished:completed", (deployed.logs / "superlink.log").read_text()[-3000:]
    assert json.loads((tmp_path / "seen.json").read_text())["run"] == "digits-1"

    endless = control.start_run({"run": "endless", "server-dir": str(tmp_path)})
    assert eventually((tmp_path / "started").exists)
    assert control.runs()[endless] == "running"
    control.stop_run(endless)
    assert eventually(lambda: control.runs()[endless] == "finished:stopped"), control.runs()


def test_superlink_comes_back_after_a_kill_and_the_server_stops_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("https_proxy", "http_proxy", "all_proxy", "grpc_proxy"):  # a dead proxy must not matter on loopback
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    folder = init(tmp_path / "server")
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    child = start(folder.root, tmp_path)
    try:
        (tmp_path / "data").mkdir()
        enroll(fedzoo("invite", "a", "--dir", str(folder.root)).strip(), tmp_path / "node", tmp_path / "data", "digits")
        run = folder.runs / "interrupted"
        run.mkdir()
        (run / "job.toml").write_text("name = ")  # so the ServerApp of its next lease fails it at once
        (run / "status.json").write_text('{"state": "running", "lease": 5, "leases": 1}')
        (superlink,) = processes("flower-superlink", str(folder.flower))
        os.kill(superlink, signal.SIGKILL)
        assert eventually(lambda: not running(folder), 10)
        assert eventually(lambda: running(folder))
        assert sites(folder) == {"a": "offline"}
        assert eventually(lambda: json.loads((run / "status.json").read_text())["state"] == "failed")
        status = json.loads((run / "status.json").read_text())
        assert status["leases"] == 2
        assert "not valid TOML" in status["reason"]
        assert "SuperLink ended with code -9" in (folder.logs / "server.log").read_text()
        with pytest.raises(DeploymentError, match="is running already"):
            serve(folder.root)
    finally:
        os.kill(child.pid, signal.SIGTERM)
        assert eventually(lambda: child.exit_code() is not None, 20)
    assert child.exit_code() == 0
    assert "stopped" in child.tail()
    assert processes(str(folder.root)) == []
    assert fedzoo("revoke", "a", "--dir", str(folder.root)).startswith("revoked a; the server is not running")


def test_a_killed_server_leaves_nothing_that_the_next_start_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ServerApp in the middle of its work survives a kill -9 of the server; it must not go on beside a new one."""
    folder = init(tmp_path / "server")
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    child = start(folder.root, tmp_path)
    monkeypatch.setattr(flower_control, "_APP", flower_control._APP.replace("server.flower_app:app", "stand_in:app"))
    try:
        with FlowerControl(load(folder.root).control, folder.pki / "ca.crt") as control:
            run = control.start_run({"run": "endless", "server-dir": str(tmp_path)})
            assert eventually((tmp_path / "started").exists)
        (app,) = processes("flwr-serverapp", str(folder.root))
        os.kill(child.pid, signal.SIGKILL)
        assert eventually(lambda: child.exit_code() is not None, 10)
        child = start(folder.root, tmp_path)
        assert app not in processes("flwr-serverapp", str(folder.root))
        with FlowerControl(load(folder.root).control, folder.pki / "ca.crt") as control:
            assert control.runs()[run] == "finished:stopped"
    finally:
        child.stop(20)
    assert processes(str(folder.root)) == []
