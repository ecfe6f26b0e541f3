"""A site on another machine (network namespace) under another user enrolls with nothing but the invite string."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import server as server_package
from server.authority import Authority
from server.config import Ports, ServerConfig
from server.enrollment import start_services
from server.nodes import Roster
from shared_models.invite import Invite, encode
from shared_models.process import free_ports

pytestmark = pytest.mark.deploy
PACKAGES = Path(server_package.__file__).parents[1]
HERE, THERE = "10.213.47.1", "10.213.47.2"
SITE = """
import os, sys
from pathlib import Path
from client.enroll import enroll, whoami
home = Path(sys.argv[2])
(home / "data").mkdir()
enroll(sys.argv[1], home / "node", home / "data", "imagefolder")
print(os.getuid(), whoami(home / "node").site, whoami(home / "node").status)
"""


class Flower:
    """Accepts every key."""

    def register(self, public_key: bytes) -> int:
        return 1

    def unregister(self, node_id: int) -> None:
        raise AssertionError("nothing went wrong, so nothing is taken back")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def namespace() -> Iterator[str]:
    """The name of a network namespace whose only link leads to this one."""
    if os.getuid() != 0 or shutil.which("ip") is None or shutil.which("setpriv") is None:
        pytest.skip("needs root and the programs ip and setpriv")
    name, here, there = f"fz{os.getpid()}", f"fzh{os.getpid()}"[:15], f"fzt{os.getpid()}"[:15]
    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.decode().strip()}")
    try:
        ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
        ip("address", "add", f"{HERE}/30", "dev", here)
        ip("link", "set", here, "up")
        ip("-n", name, "address", "add", f"{THERE}/30", "dev", there)
        ip("-n", name, "link", "set", there, "up")
        yield name
    finally:
        subprocess.run(["ip", "link", "delete", here], capture_output=True, timeout=20, check=False)
        ip("netns", "delete", name)


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder that only `nobody` can read."""
    folder = Path("/var/tmp") / f"fedzoo-nobody-{os.getpid()}"
    folder.mkdir(mode=0o700)
    user = pwd.getpwnam("nobody")
    os.chown(folder, user.pw_uid, user.pw_gid)
    yield folder
    shutil.rmtree(folder)


def test_enroll_from_another_machine_as_another_user(namespace: str, home: Path, tmp_path: Path) -> None:
    user = pwd.getpwnam("nobody")
    become = ["setpriv", "--reuid", str(user.pw_uid), "--regid", str(user.pw_gid), "--clear-groups"]
    environment = {"PYTHONPATH": str(PACKAGES), "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    python = [*become, sys.executable, "-c"]
    readable = subprocess.run([*python, "import client.enroll"], env=environment, capture_output=True, check=False)
    if readable.returncode != 0:
        pytest.skip(f"the installation cannot be read by another user: {readable.stderr.decode()[-200:]}")

    ports = Ports(**dict(zip(("fleet", "control", "enrollment", "membership"), free_ports(4), strict=True)))
    config = ServerConfig(hosts=(HERE,), ports=ports)
    authority = Authority.create(tmp_path / "pki", config.hosts)
    roster = Roster(tmp_path / "nodes.db")
    services = start_services(authority, roster, Flower(), config)
    try:
        token, expires = roster.invite("hospital-a", 60)
        invite = encode(Invite(f"{HERE}:{ports.enrollment}", authority.fingerprint, token, expires, "hospital-a"))
        command = ["ip", "netns", "exec", namespace, *python, SITE, invite, str(home)]
        environment["PATH"] = os.environ["PATH"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    finally:
        for service in services:
            service.stop(0).wait()
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(user.pw_uid), "hospital-a", "active"]
    assert [node.site for node in roster.nodes()] == ["hospital-a"]
    assert (home / "node" / "pki" / "site.key").stat().st_uid == user.pw_uid
