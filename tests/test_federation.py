"""A real federation: a server process, three enrolled nodes with SuperNode and worker each, TLS on loopback.

The same job must give the same bits here and in process; what was not approved does not run; what goes wrong at a node
stays there; a killed ServerApp costs nothing; a revoked site is out within a round.
"""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from opacus.accountants import RDPAccountant
from PIL import Image
from real_nodes import CANARY, Federation, eventually, fedzoo, make_job, running, same_bits, write_hospital, write_masks
from safetensors.torch import load_file

from shared_models.job import Job
from simulations.compare import load_sites
from simulations.engines.inprocess import Benches
from simulations.paradigms import Setting, paradigms

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(400)]
FEDAVG = make_job(name="fedavg")
SCAFFOLD = make_job(name="scaffold", method={"name": "scaffold"})
KILLED = make_job(name="killed", method={"name": "scaffold"}, federation={"rounds": 6})
FAILING = make_job(name="failing", task={"labels": [str(c) for c in range(9)]}, federation={"wait": 4})
STAGED = make_job(
    name="staged", model={"name": "cnn"}, federation={"rounds": 2}, time="continual", stream={"tasks": 2},
    continual={"name": "er", "buffer": 20},
    stages=[
        {"name": "pretext", "task": {"name": "rotation", "labels": [str(c) for c in range(10)]}},
        {"name": "probe", "share": {"base": ["!@head"]}, "train": {"lr": 0.2}, "stream": {"tasks": 1}},
    ],
)  # fmt: skip
NOISY = make_job(name="noisy", privacy={"mode": "sample", "noise": 2.0, "delta": 1e-3}, federation={"rounds": 8})
WITHDRAWN = make_job(name="withdrawn", federation={"rounds": 20, "min_sites": 2})
UNAPPROVED = make_job(name="unapproved", federation={"wait": 4})
REVOKED = make_job(name="revoked", federation={"rounds": 12, "min_sites": 1})


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    root = tmp_path_factory.mktemp("federation")
    approved = [FEDAVG, SCAFFOLD, STAGED, KILLED, NOISY, FAILING, REVOKED]
    with running(root, load_sites(FEDAVG, root), write_hospital, "imagefolder", approved) as found:
        for job in (
            FEDAVG,
            SCAFFOLD,
            STAGED,
            UNAPPROVED,
            FAILING,
        ):  # side by side: most of a small run is starting and waiting
            found.submit(job)
        yield found


@pytest.mark.parametrize(
    "job", [pytest.param(FEDAVG, id="fedavg"), pytest.param(SCAFFOLD, id="scaffold", marks=pytest.mark.slow)]
)
def test_real_nodes_give_the_bits_of_the_simulator(federation: Federation, job: Job) -> None:
    run = federation.submit(job)
    events = federation.finish(run)
    assert run.status().state == "done", run.status()
    assert [e["sites"] for e in events if e["event"] == "round"] == [list(federation.sites.names)] * 3
    assert same_bits(run, federation.simulated(job))
    assert not same_bits(run, federation.simulated(job.replace(seed=1)))


@pytest.mark.slow
def test_real_nodes_carry_out_stages(federation: Federation) -> None:
    """A pretext task on a stream, with replay, then a probe, whose frozen part reaches the nodes as it was left."""
    run = federation.submit(STAGED)
    events = federation.finish(run)
    assert run.status().state == "done", run.status()
    assert [(e["round"], e["task"]) for e in events if e["event"] == "round"] == [(0, 0), (1, 1), (0, 0), (1, 0)]
    expected = federation.simulated(STAGED)
    assert {"head.weight", "conv1.weight"} <= expected.keys()
    assert same_bits(run, expected)


@pytest.mark.slow
def test_real_nodes_segment_as_the_simulator_does(tmp_path: Path) -> None:
    """A U-Net on masks, images changed at random on the way, normalised by what the sites measured."""
    source = torch.Generator().manual_seed(2)
    for i in range(40):
        x, y = torch.randint(2, 8, (2,), generator=source).tolist()
        image = torch.randint(0, 120, (16, 16), generator=source, dtype=torch.uint8)
        mask = torch.zeros(16, 16, dtype=torch.uint8)
        image[y : y + 6, x : x + 6] += 100
        mask[y : y + 6, x : x + 6] = 1
        for kind, pixels in (("image", image), ("label", mask)):
            path = tmp_path / "pool" / kind / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(path)
    job = make_job(
        name="segmentation", model={"name": "unet"}, task={"name": "segmentation", "labels": ["tissue", "lesion"]},
        data={"shape": [1, 16, 16], "normalise_by": "sites", "parts": "blocks"}, augment={"flip": True, "crop": 2},
        train={"optimizer": "adamw", "lr": 0.002, "batch_size": 4}, federation={"rounds": 2, "min_sites": 2},
        simulation={"reader": "masks", "root": "pool", "partition": "blocks", "sites": 2},
    )  # fmt: skip
    job = job.replace(simulation={"root": str(tmp_path / "pool")})
    sites = load_sites(job, tmp_path)
    with running(tmp_path, sites, write_masks, "masks", [job]) as found:
        run = found.submit(job)
        events = found.finish(run)
        assert run.status().state == "done", run.status()
        measured = next(e for e in events if e["event"] == "statistics")
        assert measured["sites"] == list(sites.names)
        simulated = paradigms["federated"](Setting(job, sites, Benches(torch.device("cpu"))))
        assert same_bits(run, dict(simulated.models["model"]))
        assert simulated.statistics["model"] == {"mean": measured["mean"], "std": measured["std"]}


@pytest.mark.gpu
def test_a_gpu_node_and_a_cpu_node_train_the_papers_vit(tmp_path: Path, record_property: Callable[..., None]) -> None:
    """ViT-B/16, two rounds; both nodes' updates are in the mean, which stays near what one CPU would have made."""
    source = torch.Generator().manual_seed(3)
    for i in range(24):
        pixels = torch.randint(0, 128, (224, 224), generator=source, dtype=torch.uint8) + 100 * (i % 2)
        path = tmp_path / "pool" / str(i % 2) / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)
    job = make_job(
        name="mixed", model={"name": "vit", "size": "b16"}, task={"labels": ["0", "1"]},
        data={"shape": [1, 224, 224]}, train={"lr": 0.01, "batch_size": 4}, federation={"rounds": 2, "min_sites": 2},
        simulation={"reader": "imagefolder", "root": str(tmp_path / "pool"), "partition": "iid", "sites": 2},
    )  # fmt: skip
    sites = load_sites(job, tmp_path)
    devices = dict(zip(sites.names, ("cuda:0", "cpu"), strict=True))
    with running(tmp_path, sites, write_hospital, "imagefolder", [job], devices) as found:
        run = found.submit(job)
        events = found.finish(run)
        assert run.status().state == "done", run.status()
        assert [e["sites"] for e in events if e["event"] == "round"] == [list(sites.names)] * 2
        logs = ["".join(p.read_text() for p in (tmp_path / "nodes" / s / "logs").iterdir()) for s in sites.names]
        assert torch.cuda.get_device_name(0) in logs[0]
        assert "models train on the CPU" in logs[1]
        expected = paradigms["federated"](Setting(job, sites, Benches(torch.device("cpu")))).models["model"]
    trained = load_file(run.path / "model.safetensors")
    far = max(float((trained[name] - value).abs().max()) for name, value in expected.items())
    record_property("largest difference from a simulation on the CPU", far)
    assert far < 1e-3


def test_what_is_not_approved_does_not_run(federation: Federation) -> None:
    run = federation.submit(UNAPPROVED)
    events = federation.finish(run)
    assert run.status().state == "failed"
    assert "site-1: not-approved, site-2: not-approved, site-3: not-approved" in run.status().reason
    assert {(e["site"], e["code"]) for e in events if e["event"] == "refused"} == {
        (site, "not-approved") for site in federation.sites.names
    }
    for site in federation.sites.names:
        request = federation.root / "nodes" / site / "requests" / f"{UNAPPROVED.hash}.toml"
        assert Job.load(request).hash == UNAPPROVED.hash


def test_a_site_may_approve_and_withdraw_while_its_node_runs(federation: Federation) -> None:
    """It is out with the next round, the others go on, and its own record has each round and the withdrawal."""
    nodes = {site: str(federation.root / "nodes" / site) for site in federation.sites.names}
    run = federation.submit(WITHDRAWN)
    eventually(lambda: len([e for e in federation.events(run) if e["event"] == "refused"]) == 3, "not refused")
    for node in nodes.values():
        assert WITHDRAWN.hash in fedzoo("client", "status", "--dir", node)
        fedzoo("client", "approve", WITHDRAWN.hash, "--dir", node)
        assert WITHDRAWN.hash not in fedzoo("client", "status", "--dir", node)
    eventually(lambda: any(e["event"] == "round" for e in federation.events(run)), "no round")
    fedzoo("client", "withdraw", WITHDRAWN.hash, "--dir", nodes["site-3"])
    known = len([e for e in federation.events(run) if e["event"] == "round"])
    events = federation.finish(run)
    assert run.status().state == "done", run.status()
    rounds = [e["sites"] for e in events if e["event"] == "round"]
    assert rounds[0] == ["site-1", "site-2", "site-3"]
    assert all(sites == ["site-1", "site-2"] for sites in rounds[known + 1 :])
    assert len(rounds[known + 1 :]) >= 2, "the withdrawal came too late to be seen"
    lines = json.loads(fedzoo("client", "audit", "--last", "1000", "--json", "--dir", nodes["site-3"]))
    lines = [line for line in lines if line.get("job") == WITHDRAWN.hash]
    at = [line["event"] for line in lines].index("withdraw")
    agreed = [line["event"] for line in lines].index("approve")
    assert {line["code"] for line in lines[:agreed]} == {"not-approved"}
    trained = [line["round"] for line in lines if line.get("kind") == "train" and line["code"] == "ok"]
    assert trained == [round for round, sites in enumerate(rounds) if "site-3" in sites]
    late = [line["code"] for line in lines[at + 1 :] if line["code"] == "ok"]
    assert len(late) <= 1, "only what ran when it was withdrawn"
    assert lines[-1]["code"] == "not-approved"


def test_what_fails_at_a_node_stays_there(federation: Federation) -> None:
    """The job knows nine labels, so the tenth class folder, whose path holds the canary, is an error."""
    run = federation.submit(FAILING)
    federation.finish(run)
    assert run.status().state == "failed"
    assert "site-2: data, site-3: data" in run.status().reason, "site-1 holds no 9 and has nothing to complain of"
    node_logs = b"".join(p.read_bytes() for p in (federation.root / "nodes").rglob("*.log"))
    assert CANARY.encode() in node_logs, "the node's own log must name the folder"
    files = [p for p in federation.server.root.rglob("*") if p.is_file()] + [federation.root / "server.log"]
    assert len(files) > 20
    for path in files:
        assert CANARY.encode() not in path.read_bytes(), path


def test_a_killed_server_app_costs_nothing(federation: Federation) -> None:
    run = federation.submit(KILLED)
    eventually(lambda: any(e["event"] == "round" for e in federation.events(run)), "no round")
    pid = holder(run.path / "lock")
    os.kill(pid, signal.SIGKILL)
    events = federation.finish(run)
    assert run.status().state == "done", run.status()
    assert run.status().reached >= 1, "the second lease began from a checkpointed round"
    assert [e["event"] for e in events].count("resumed") == 1
    assert same_bits(run, federation.simulated(KILLED))


def test_each_site_books_every_round_once_though_workers_are_killed(federation: Federation) -> None:
    """And what the ledger says is the epsilon of the whole run."""
    run = federation.submit(NOISY)
    nodes = federation.root / "nodes"

    def rounds() -> int:
        return [e["event"] for e in federation.events(run)].count("round")

    for known in (1, 4):
        eventually(lambda known=known: rounds() >= known, "no round")  # type: ignore[misc]
        os.kill(process("client.worker", str(nodes / "site-1")), signal.SIGKILL)
    federation.finish(run)
    assert run.status().state == "done", run.status()
    for site in federation.sites.names:
        (chest,) = json.loads(fedzoo("client", "ledger", "show", "--json", "--dir", str(nodes / site)))["datasets"]
        (booked,) = chest["runs"]
        assert (booked["job"], booked["unit"], booked["unanswered"]) == ("noisy", "sample", 0)
        assert booked["rounds"] == list(range(8))
        held = len(federation.sites.splits(site).train)
        steps = math.ceil(held / NOISY.train.batch_size)
        (mechanism,) = booked["mechanisms"]
        assert mechanism == {"noise": 2.0, "rate": pytest.approx(1 / steps), "steps": 8 * steps}
        whole = RDPAccountant()
        whole.history = [(2.0, mechanism["rate"], 8 * steps)]
        assert chest["epsilon"] == booked["epsilon"] == pytest.approx(whole.get_epsilon(1e-5), rel=1e-9)
        secret = (nodes / site / "secret").read_bytes()
        assert len(secret) == 32
        for path in federation.server.root.rglob("*"):
            assert not path.is_file() or secret not in path.read_bytes()


def test_a_revoked_site_is_out_within_a_round(federation: Federation) -> None:
    run = federation.submit(REVOKED)
    eventually(lambda: any(e["event"] == "round" for e in federation.events(run)), "no round")
    fedzoo("server", "revoke", "site-3", "--dir", str(federation.server.root))
    known = len([e for e in federation.events(run) if e["event"] == "round"])
    events = federation.finish(run)
    assert run.status().state == "done", run.status()
    rounds = [e["sites"] for e in events if e["event"] == "round"]
    assert rounds[0] == ["site-1", "site-2", "site-3"]
    assert all(sites == ["site-1", "site-2"] for sites in rounds[known + 1 :])
    assert len(rounds[known + 1 :]) >= 2, "the revocation came too late to be seen"
    eventually(
        lambda: "revoked" in fedzoo("client", "status", "--dir", str(federation.root / "nodes" / "site-3")), "said"
    )


def process(*words: str) -> int:
    """The process with all of these words on its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if set(words) <= set(path.read_text().split("\0")):
                return int(path.parent.name)
    raise AssertionError(f"no process with {words}")


def holder(lock: Path) -> int:
    """The process that has the file open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.resolve() == lock.resolve() and "serverapp" in (link.parents[1] / "cmdline").read_text():
                return int(link.parents[1].name)
        except OSError:
            continue
    raise AssertionError(f"nobody holds {lock}")
