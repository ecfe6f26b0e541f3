"""`--skip-bad N`: up to N unusable files are passed over and listed, in a simulation and at a node; not one more."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import client.node
from client.cli import app as client_app
from client.config import ClientConfig, DataPart, ServerPart, load, save
from client.flower_app import NodeData
from fedzoo import build_app
from shared_models.errors import DataError
from shared_models.job import Job

JOB = """
name = "skip"
[model]
name = "logistic"
[task]
labels = ["0", "1"]
[data]
shape = [1, 4, 4]
[federation]
rounds = 1
[simulation]
reader = "imagefolder"
root = "data"
sites = 1
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """Sixty images of two classes, two of them torn."""
    for i in range(60):
        path = tmp_path / "data" / str(i % 2) / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((8, 8), 50).save(path)
    for name in ("0/10.png", "1/31.png"):
        torn = tmp_path / "data" / name
        torn.write_bytes(torn.read_bytes()[:60])
    (tmp_path / "job.toml").write_text(JOB)
    return tmp_path / "job.toml"


def test_a_simulation_lists_what_it_passed_over(job: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    done = CliRunner().invoke(build_app(), ["simulate", str(job), "--skip-bad", "2", "--out", out])
    assert done.exit_code == 0, done.output
    told = [line for line in done.stderr.splitlines() if line.startswith("passed over: ")]
    assert ["10.png" in told[0], "31.png" in told[1]] == [True, True]
    assert len(told) == 2


def test_one_more_than_that_stops_it_and_names_all(job: Path) -> None:
    with pytest.raises(DataError) as error:
        CliRunner().invoke(build_app(), ["simulate", str(job), "--skip-bad", "1"], catch_exceptions=False)
    assert "2 files or rows cannot be used and 1 may be skipped" in str(error.value)
    assert "10.png" in str(error.value)
    assert "31.png" in str(error.value)


def config(job: Path, **data: object) -> ClientConfig:
    server = ServerPart(fleet="a:1", enrollment="a:2", membership="a:3")
    return ClientConfig(
        site="a", server=server, data=DataPart(folder=job.parent / "data", format="imagefolder", **data)
    )


def test_a_node_lists_them_in_its_own_log(job: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = Job.load(job)
    with pytest.raises(DataError, match=r"10\.png"):
        NodeData(config(job))(wanted)
    with caplog.at_level(logging.WARNING, "fedzoo.client"):
        splits = NodeData(config(job, skip_bad=2))(wanted)
    assert len(splits.train.store.names) == 58
    assert sum("passed over: " in message for message in caplog.messages) == 2


def test_the_option_is_kept_in_client_toml(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = tmp_path / "node"
    node.mkdir()
    save(node, config(job))
    monkeypatch.setattr(client.node, "run", lambda *a: None)
    done = CliRunner().invoke(client_app, ["start", "--dir", str(node), "--skip-bad", "3"])
    assert done.exit_code == 0, done.output
    assert load(node).data.skip_bad == 3
    CliRunner().invoke(client_app, ["start", "--dir", str(node)])
    assert load(node).data.skip_bad == 3, "without the option the file's word stands"
