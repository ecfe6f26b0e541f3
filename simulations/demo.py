"""`fedzoo demo`: the whole promise in small, with real processes on loopback.

A server with its own certificate authority, three hospitals that enroll with invites and keep their images, one job
that each of them approved, watched to its end; then the same budget centralized, isolated and continual, simulated.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from types import FrameType

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from client.enroll import enroll
from client.readers.base import PARTS
from server.cli import init, make_invite
from server.run_cli import describe, follow, submit_job
from server.runs import RunFolder
from shared_models.errors import ConfigError, DeploymentError
from shared_models.job import Job
from shared_models.process import Child, free_ports
from simulations import report, results, tables
from simulations.compare import compare, load_sites
from simulations.partition import SitePopulation
from simulations.plan import OFFLINE, count_rounds, plan
from simulations.progress import progress
from simulations.results import Place, Time
from simulations.verdicts import verdicts

MARK = ".fedzoo-demo"
SEEDS = (0, 1, 2)
PARADIGMS: tuple[tuple[Place, Time], ...] = (*OFFLINE, ("centralized", "continual"), ("federated", "continual"))
START_SECONDS = 90.0
PORTS = ("fleet", "control", "enroll", "member")


def run(folder: Path) -> None:
    """Run the whole demonstration below `folder`, which is made anew.

    Raises:
        ConfigError: the folder holds something else.
        FedzooError: a step failed; every process is stopped.
    """
    console = Console()
    _make_folder(folder)
    job = Job.resolve(_job_settings(), where="the demo's job")
    (folder / "job.toml").write_text(job.to_toml(), encoding="utf-8")
    sites = load_sites(job, folder)
    started = time.monotonic()
    with contextlib.ExitStack() as children, _interruptible():
        console.rule("1  A federation of three hospitals, real processes, TLS")
        for site, rows in write_hospitals(sites, folder / "hospitals").items():
            console.print(f"{site}: {rows} images below {folder / 'hospitals' / site}, which only its own node reads")
        server = _start_server(folder, children)
        console.print(f"server up: own certificate authority, TLS, node authentication ({folder / 'server'})")
        _start_nodes(folder, sites.names, job, children)
        console.print(f"{len(sites.names)} nodes enrolled by invite; each approved the one job {job.hash[:16]}…")
        run_folder = submit_job(server, job)
        _watch(run_folder, job, console)
    console.print(f"every process is stopped; {time.monotonic() - started:.0f} s so far")
    console.rule("2  The same budget in the simulator: who holds the data, and when")
    console.print(
        "A centralized baseline exists only because this is a demo: here one machine holds all three folders."
    )
    with progress(count_rounds(sites, plan(job, len(sites.names), PARADIGMS, SEEDS))) as listen:
        comparison = compare(
            job,
            sites,
            paradigms=PARADIGMS,
            seeds=SEEDS,
            folder=folder / "comparison",
            command="fedzoo demo",
            title="Three hospitals, handwritten digits, a tiny ViT",
            demo=True,
            listen=listen,
        )
    results.save(comparison, folder / "comparison.json")
    page = report.write(comparison, folder / "report.html")
    for table in tables.for_terminal(comparison, console.width):
        console.print(table)
    for line in verdicts(comparison):
        console.print(f"- {line}")
    real = _sha256(run_folder.path / "model.safetensors")
    simulated = _sha256(folder / "comparison" / f"federated-offline-{job.seed}" / "model.safetensors")
    same = "the same bits as" if real == simulated else "NOT the bits of"
    console.print(f"The model of the real federation is {same} the simulated one with seed {job.seed}: {real[:16]}…")
    console.print(f"report {page}  ({time.monotonic() - started:.0f} s in all)")


def _job_settings() -> dict[str, object]:
    """The demo's own job, as it lies in the package."""
    import tomllib

    return tomllib.loads((files("simulations") / "demo.toml").read_text(encoding="utf-8"))


def write_hospitals(sites: SitePopulation, root: Path) -> dict[str, int]:
    """Write each site's examples as `<site>/<part>/<class>/<name>.png`; returns site -> number of images."""
    counts = {}
    for site in sites.names:
        splits = sites.splits(site)
        for part in PARTS:
            examples = getattr(splits, part)
            for row, label in zip(examples.rows.tolist(), examples.y.tolist(), strict=True):
                path = root / site / part / str(label) / sites.store.names[row]
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(sites.store.x[row, 0].numpy()).save(path)
        counts[site] = sum(len(getattr(splits, part)) for part in PARTS)
    return counts


def _make_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (folder / MARK).exists():
            raise ConfigError(f"{folder} is not empty and not a demo's", hint="Name another folder with --dir")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def _start_server(folder: Path, children: contextlib.ExitStack) -> Path:
    server = folder / "server"
    ports = zip(PORTS, free_ports(len(PORTS)), strict=True)
    init(server, host=None, **{f"{name}_port": port for name, port in ports})
    child = Child("server", _command("server", "start", "--dir", str(server)), folder / "server.log")
    children.callback(child.stop)
    _wait(child, lambda: "ready:" in child.tail(), "the server did not start")
    return server


def _start_nodes(folder: Path, names: Sequence[str], job: Job, children: contextlib.ExitStack) -> None:
    server = folder / "server"
    for site in names:
        node, data = folder / "nodes" / site, folder / "hospitals" / site
        enroll(make_invite(server, site, hours=1), node, data, "imagefolder")
        command = _command("client", "start", "--dir", str(node), "--approve", job.hash)
        children.callback(Child(site, command, folder / "nodes" / f"{site}.log").stop)


def _watch(run_folder: RunFolder, job: Job, console: Console) -> None:
    """Follow the run with a bar; raises RunError where it fails."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("federated training", total=job.federation.rounds)
        for event in follow(run_folder):
            if event["event"] == "round":
                bar.update(task, completed=event["round"] + 1)
            if line := describe(event):
                bar.console.print(line)


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "fedzoo", *words]


def _wait(child: Child, ready: object, what: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready():  # type: ignore[operator]
        if child.exit_code() is not None or time.monotonic() > deadline:
            raise DeploymentError(f"{what}: {child.tail()}", hint=f"Its log is {child.log}")
        time.sleep(0.1)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt, again every second until it leaves this context.

    Once is not enough: Python prints and drops what is raised within a destructor or a callback from C, gRPC's too.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
