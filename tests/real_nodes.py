"""A real federation for tests: a server process, enrolled nodes with SuperNode and worker each, TLS on loopback."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from commands import port_options
from PIL import Image
from safetensors.torch import load_file

from client.config import save
from client.enroll import enroll
from client.readers.base import PARTS
from server.cli import make_invite
from server.config import ServerFolder
from server.events import read_events
from server.run_cli import submit_job
from server.runs import RunFolder
from shared_models.job import Job
from shared_models.process import Child
from simulations.compare import load_sites
from simulations.engines.inprocess import Benches
from simulations.paradigms import Result, Setting, paradigms
from simulations.partition import SitePopulation

CANARY = "canary-7f3a"
SECONDS = 240.0  # how long a run may take to end on a machine with other work, not how long it takes


def make_job(**parts: Any) -> Job:
    data: dict[str, Any] = {
        "name": "federation",
        "model": {"name": "mlp"},
        "task": {"labels": [str(c) for c in range(10)]},
        "data": {"shape": [1, 8, 8]},
        "train": {"lr": 0.1},
        "federation": {"rounds": 3, "min_sites": 3, "wait": 90},
        "simulation": {"partition": "dirichlet", "alpha": 0.3, "sites": 3},
    }
    for name, part in parts.items():
        data[name] = {**data.get(name, {}), **part} if isinstance(part, dict) else part
    return Job.resolve(data)


def fedzoo(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "fedzoo", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def eventually(truth: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not truth():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@dataclass
class Federation:
    root: Path
    sites: SitePopulation
    runs: dict[str, RunFolder] = field(default_factory=dict)
    nodes: dict[str, Child] = field(default_factory=dict)
    starts: dict[str, list[str]] = field(default_factory=dict)

    @property
    def server(self) -> ServerFolder:
        return ServerFolder(self.root / "server")

    def submit(self, job: Job) -> RunFolder:
        if job.name not in self.runs:
            self.runs[job.name] = submit_job(self.server.root, job)
        return self.runs[job.name]

    def finish(self, run: RunFolder) -> list[dict[str, Any]]:
        eventually(lambda: run.status().state in ("done", "failed", "stopped"), f"{run.id} does not end")
        return self.events(run)

    def events(self, run: RunFolder) -> list[dict[str, Any]]:
        return [event for event, _ in read_events(run.path / "events.jsonl")]

    def start(self, site: str) -> None:
        self.nodes[site] = Child(site, self.starts[site], self.root / "nodes" / f"{site}.log")

    def result(self, job: Job) -> Result:
        sites = load_sites(job, self.root)
        assert sites.partition.hash == self.sites.partition.hash
        return paradigms["federated"](Setting(job, sites, Benches(torch.device("cpu"))))

    def simulated(self, job: Job) -> dict[str, torch.Tensor]:
        return dict(self.result(job).models["model"])


@contextmanager
def running(
    root: Path,
    sites: SitePopulation,
    write: Callable[[SitePopulation, str, Path], Path],
    format: str,
    jobs: list[Job],
    devices: Mapping[str, str] | None = None,
) -> Iterator[Federation]:
    """A server, and an enrolled node for each site with the site's data in files, which approves the jobs."""
    server = root / "server"
    fedzoo("server", "init", "--dir", str(server), *port_options())
    command = [sys.executable, "-m", "fedzoo"]
    found = Federation(root, sites)
    serving = Child("server", [*command, "server", "start", "--dir", str(server)], root / "server.log")
    try:
        eventually(lambda: "ready:" in serving.tail(), serving.tail())
        approved = [w for job in jobs for w in ("--approve", job.hash)]
        for site in sites.names:
            data = write(sites, site, root / "hospitals" / CANARY / site)
            node = root / "nodes" / site
            config = enroll(make_invite(server, site, hours=1), node, data, format)
            if devices:
                save(node, config.model_copy(update={"device": devices[site]}))
            found.starts[site] = [*command, "client", "start", "--dir", str(node), *approved]
            found.start(site)
        yield found
    finally:
        for child in (*found.nodes.values(), serving):
            child.stop()


def write_hospital(sites: SitePopulation, site: str, folder: Path) -> Path:
    """The site's images with the canary in every file name; the order of names is that of the simulated site."""
    for part in PARTS:
        examples = getattr(sites.splits(site), part)
        for row, label in zip(examples.rows.tolist(), examples.y.tolist(), strict=True):
            path = folder / part / str(label) / f"{CANARY}-{Path(sites.store.names[row]).name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(sites.store.x[row, 0].numpy()).save(path)
    return folder


def write_masks(sites: SitePopulation, site: str, folder: Path) -> Path:
    """The site's images and their masks, as an annotation tool leaves them."""
    for part in PARTS:
        for row in getattr(sites.splits(site), part).rows.tolist():
            name = Path(sites.store.names[row]).name
            for kind, pixels in (("image", sites.store.x[row, 0]), ("label", sites.store.y[row])):
                path = folder / part / kind / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.numpy()).save(path)
    return folder


def same_bits(run: RunFolder, expected: dict[str, torch.Tensor]) -> bool:
    found = load_file(run.path / "model.safetensors")
    return found.keys() == expected.keys() and all(torch.equal(found[n], t) for n, t in expected.items())
