"""A run is ours: a folder with its own id. A Flower run is a lease on it, replaced when it is lost.

runs/<id>/  job.toml  status.json  events.jsonl  checkpoint/  model.safetensors  result.json  secret
"""

from __future__ import annotations

import fcntl
import itertools
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from server.flower_control import FlowerControl
from shared_models.errors import CompatibilityError, ConfigError, RunError
from shared_models.files import PRIVATE_FOLDER, write_whole
from shared_models.job import Job
from shared_models.registry import nearest

ACTIVE = ("submitted", "running")
MAX_LEASES = 5
LEASING_SECONDS = 60.0  # in which a Flower run has started or its starter is gone


@dataclass(frozen=True)
class Status:
    """Where a run stands.

    Attributes:
        state: created (no lease yet), submitted, running, done, failed or stopped.
        reason: why it failed, in one line.
        lease: id of the Flower run that carries it now, 0 while one is being started; nothing is named by it.
        leases: how many there were since the checkpoint last advanced.
        reached: the checkpointed round at the last lease.
        updated: Unix seconds.
    """

    state: str
    reason: str = ""
    lease: int = 0
    leases: int = 0
    reached: int = 0
    updated: float = 0.0


class RunFolder:
    """One run below a server's `runs/`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def id(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def secret(self) -> Path:
        """What the server's noise is drawn from, where it hides a site; see `shared_models.secret`."""
        return self.path / "secret"

    def checkpointed(self) -> int:
        """The rounds that are done by the checkpoint, or by those of all stages."""
        found = [self.path / "checkpoint", *(self.path / "stages").glob("*/checkpoint")]
        states = [path / "state.json" for path in found if (path / "state.json").exists()]
        return sum(int(json.loads(path.read_text())["progress"]["round"]) for path in states)

    def job(self) -> Job:
        """The resolved job."""
        return Job.load(self.path / "job.toml")

    def status(self) -> Status:
        """The last one written."""
        return Status(**json.loads((self.path / "status.json").read_text()))

    @contextmanager
    def carried(self) -> Iterator[None]:
        """Hold the run while carrying it; waits for the one that does so now. The kernel frees it with the process."""
        with (self.path / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def is_carried(self) -> bool:
        """Whether a process carries the run at this moment."""
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    def write(self, only_from: tuple[str, ...] = (), **changes: object) -> Status:
        """Change fields of the status, atomically among all processes; not at all from a state outside `only_from`."""
        with (self.path / "status.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            before = asdict(self.status()) if (self.path / "status.json").exists() else {"state": "created"}
            if only_from and before["state"] not in only_from:
                return Status(**before)
            status = Status(**{**before, **changes, "updated": time.time()})
            write_whole(self.path / "status.json", json.dumps(asdict(status)))
            return status


def create_run(runs: Path, job: Job) -> RunFolder:
    """A new folder `<job name>-<time>` with the job in it.

    Raises:
        CompatibilityError: the job's place is one that only a simulation has, or its stream differs from site to site
            and does not say who is who.
    """
    if job.place != "federated":
        raise CompatibilityError(
            f"job '{job.name}' has place = '{job.place}', which only a simulation can do",
            hint="Use `fedzoo simulate`, or submit it with --set place=federated",
        )
    if job.time == "continual" and job.stream.by_site:
        _require_names(job)
    stamp = f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        path = runs / (stamp if number == 1 else f"{stamp}-{number}")
        with suppress(FileExistsError):
            path.mkdir(mode=PRIVATE_FOLDER)
            break
    folder = RunFolder(path)
    write_whole(path / "job.toml", job.to_toml())
    folder.write(state="created")
    return folder


def _require_names(job: Job) -> None:
    """Every site that trains at a time of its own has to be named, and there: all of them measure after each task."""
    part, need = job.stream, len(job.stream.groups)
    if not part.sites:
        raise CompatibilityError(
            f"job '{job.name}' does not say which site trains when, and a server knows only those that are enrolled",
            hint="Name them in stream.sites, a list of groups, e.g. sites = [['north'], ['south', 'west']]",
        )
    if job.federation.min_sites != need:
        raise CompatibilityError(
            f"job '{job.name}' names {need} sites in stream.sites, all of which measure after each task, and "
            f"federation.min_sites = {job.federation.min_sites}",
            hint=f"Set federation.min_sites = {need}",
        )


def find_run(runs: Path, run: str) -> RunFolder:
    """The folder of a run; `last` means the newest.

    Raises:
        ConfigError: there is none of that name (lists the nearest).
    """
    known = [folder.id for folder in list_runs(runs)]
    if run == "last" and known:
        return RunFolder(runs / known[-1])
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run) or run not in known:
        raise ConfigError(f"there is no run '{run}' in {runs}", hint=nearest(run, known) if known else "None was made")
    return RunFolder(runs / run)


def list_runs(runs: Path) -> list[RunFolder]:
    """All runs, the oldest first."""
    found = [RunFolder(p.parent) for p in runs.glob("*/status.json")]
    return sorted(found, key=lambda folder: ((folder.path / "job.toml").stat().st_mtime, folder.id))


def lease(folder: RunFolder, control: FlowerControl, server_dir: Path) -> Status:
    """Start a Flower run that carries on from the run's checkpoint; where that fails, the status is as before."""
    before, reached = folder.status(), folder.checkpointed()
    leases = 1 if reached > before.reached else before.leases + 1
    folder.write(state="submitted", lease=0, leases=leases, reached=reached)
    try:
        flower_run = control.start_run({"run": folder.id, "server-dir": str(server_dir.resolve())})
    except BaseException:
        folder.write(only_from=("submitted",), state=before.state, lease=before.lease, leases=before.leases)
        raise
    return folder.write(lease=flower_run)


def renew_leases(runs: Path, control: FlowerControl, server_dir: Path) -> list[str]:
    """Give a new lease to every unfinished run whose process is gone; returns what was done, a line each.

    A running run is lost when nobody holds its lock: Flower would need minutes to notice a killed ServerApp. One that
    was submitted is lost when its Flower run has ended. A run that loses five leases without a new checkpointed round
    is failed.
    """
    done = []
    active = [folder for folder in list_runs(runs) if folder.status().state in ACTIVE]
    flower = control.runs() if active else {}
    for folder in active:
        status = folder.status()
        ended = flower.get(status.lease, "finished:gone").startswith("finished")
        if status.state == "running":
            lost = not folder.is_carried()
        elif status.lease:
            lost = ended
        else:  # somebody is taking out a lease just now, unless he was killed while he did
            lost = time.time() - status.updated > LEASING_SECONDS
        if not lost or folder.status() != status:  # it may have ended while we looked
            continue
        if not ended:
            control.stop_run(status.lease)
        if status.leases >= MAX_LEASES:
            folder.write(state="failed", reason=f"its process ended {MAX_LEASES} times; see the server's logs/")
            done.append(f"run {folder.id} failed: its process ended {MAX_LEASES} times")
        else:
            lease(folder, control, server_dir)
            done.append(f"run {folder.id} goes on from its checkpoint")
    return done


def stop_run(folder: RunFolder, control: FlowerControl) -> None:
    """Stop a run; its checkpoint stays.

    Raises:
        RunError: it has ended already.
    """
    status = folder.status()
    if status.state not in (*ACTIVE, "created"):
        raise RunError(f"run {folder.id} is {status.state} already")
    folder.write(state="stopped")
    if not control.runs().get(status.lease, "finished").startswith("finished"):
        control.stop_run(status.lease)
