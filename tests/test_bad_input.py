"""Every mistake of a newcomer ends in one line that says what, where and what to do, in a failure code, and in no loss.

`refused` runs the real command and holds all of that at once; each test adds which words the line must have.
"""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import JOB, PORTS, files, has, process
from PIL import Image

import client.config
import fedzoo
import simulations.compare
from server.cli import make_invite
from server.nodes import Roster
from shared_models.errors import UnknownNameError
from shared_models.invite import Invite, decode, encode
from shared_models.process import free_port, free_ports


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scratch folder with one sound job, as the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "job.toml").write_text(JOB)
    return tmp_path


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str]):
    """Runs `fedzoo WORDS`, which must fail with one line, print no result and change no file; returns the line."""

    def run(*words: str) -> str:
        before = files(here)
        with pytest.raises(SystemExit) as end:
            fedzoo.main(list(words))
        out, err = capsys.readouterr()
        if isinstance(end.value.code, str):  # the interpreter prints it and ends with 1
            err += end.value.code
        assert end.value.code not in (0, None)
        assert out == ""
        assert err.startswith(("error: ", "internal error: ")), err
        assert len(err.splitlines()) == 1, err
        assert "Traceback" not in err
        assert files(here) == before
        return err

    return run


@pytest.fixture
def server(here: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, int]:
    """A server in ./fedzoo-server that does not run; its ports by name."""
    ports = dict(zip(PORTS, free_ports(4), strict=True))
    with pytest.raises(SystemExit) as end:
        fedzoo.main(["server", "init", *(w for n, p in ports.items() for w in (f"--{n}-port", str(p)))])
    assert end.value.code == 0
    capsys.readouterr()
    return ports


@pytest.fixture
def node(here: Path) -> Path:
    """An enrolled node in ./fedzoo-node whose server is gone."""
    folder = here / "fedzoo-node"
    folder.mkdir()
    addresses = dict.fromkeys(("fleet", "enrollment", "membership"), f"localhost:{free_port()}")
    data = {"folder": str(here / "data"), "format": "imagefolder"}
    config = {"site": "a", "server": addresses, "data": data}
    client.config.save(folder, client.config.ClientConfig.model_validate(config))
    return folder


@pytest.fixture
def uncalled() -> Iterator[str]:
    """The address of a listener that nobody may have called when the test ends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(BlockingIOError):
            listener.accept()


def sets(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def an_invite(address: str, seconds: float = 3600) -> str:
    return encode(Invite(address, "ab" * 32, b"t" * 32, int(time.time() + seconds), "a"))


# A job that cannot be


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.name=logistik", ("[model]", "unknown model 'logistik'", "did you mean 'logistic'")),
        ("model={name='vit', size='tny'}", ("[model]", "'vit' has no size 'tny'", "known: b16")),
        ("model={name='vit', layer=2}", ("[model]", "unknown key 'layer'", "did you mean 'layers'")),
        ("method.name=fedavgg", ("[method]", "unknown method 'fedavgg'", "did you mean 'fedavg'")),
        ("continual.name=fintune", ("[continual]", "unknown method 'fintune'", "did you mean 'finetune'")),
        ("task.name=clasification", ("[task]", "unknown task 'clasification'", "did you mean 'classification'")),
        ("train.momentun=0.1", ("unknown key 'train.momentun'", "did you mean 'momentum'?")),
        ("trian.lr=0.1", ("unknown key 'trian'", "did you mean 'train'")),
        ("place=federatd", ("'place' should be 'centralized', 'isolated' or 'federated'", "not 'federatd'")),
        ("simulation.features.noize=1", ("unknown key 'simulation.features.noize'", "did you mean 'noise'?")),
        ("simulation.features.contrast=1", ("'simulation.features.contrast' should be less than 1", "not 1")),
        ("simulation.shards=0", ("'simulation.shards' should be greater than 0", "not 0")),
        ("train.lr=fast", ("'train.lr' should be a valid number", "not 'fast'")),
        ("federation.rounds=1.5", ("'federation.rounds' should be a valid integer", "not 1.5")),
        ("federation.rounds=0", ("'federation.rounds' should be greater than 0", "not 0")),
        ("train.lr=nan", ("'train.lr'", "finite", "not nan")),
        ("train=5", ("'train' should be a table of settings, not 5",)),
        ("data.shape=8", ("'data.shape' should be a list, not 8",)),
    ],
)
def test_a_setting_that_cannot_be(refused, setting: str, words: tuple[str, ...]) -> None:
    for command in (("simulate",), ("compare", "--seeds", "1"), ("run", "submit")):
        has(refused(*command, "job.toml", "--set", setting), "job.toml", *words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["method.name=scaffold"], ("scaffold", "train.momentum = 0.9", "Change one of the two")),
        (["train.optimizer=adamw"], ("train.momentum belongs to sgd", "Change one of the two")),
        (["time=continual"], ("stream.tasks = 5 is more than federation.rounds = 2", "Change one of the two")),
        (["time=continual", "stream.tasks=11"], ("stream.tasks = 11 is more than the 10 labels",)),
        (["time=continual", "federation.select=best", "stream.tasks=2"], ("federation.select = 'best'", "stream")),
        (["place=isolated", "method.name=fedprox"], ("isolated sites never aggregate", "'fedprox'")),
        (["method.name=finetune"], ("'finetune' is a continual method", "[continual], not [method]")),
        (["continual.name=fedavg"], ("'fedavg' is a federated method", "[method], not [continual]")),
    ],
)
def test_settings_that_exclude_each_other(refused, settings: list[str], words: tuple[str, ...]) -> None:
    has(refused("simulate", "job.toml", *sets(*settings)), "job 'job'", *words)


def test_an_override_of_the_wrong_form(refused) -> None:
    for wrong in ("train.lr", "=5", "train..lr=5"):
        told = refused("simulate", "job.toml", "--set", wrong)
        has(told, f"--set '{wrong}' is not of the form table.key=value", "--set train.lr=0.1")
    has(refused("simulate", "job.toml", "--set", "name.x=1"), "'name' is a value, not a table")


def test_a_job_file_that_cannot_be_read(refused, here: Path) -> None:
    has(refused("simulate", "jobb.toml"), "there is no jobb.toml")
    has(refused("compare", str(here)), f"cannot read {here}", "directory")
    (here / "broken.toml").write_text('name = "x"\n[model\nname = "mlp"\n')
    for command in ("simulate", "compare"):
        has(refused(command, "broken.toml"), "broken.toml is not valid TOML", "line 2")


def test_a_command_line_of_the_wrong_form(refused) -> None:
    has(refused("simulat"), "No such command 'simulat'", "'simulate'", "See: fedzoo --help")
    has(refused("simulate"), "Missing argument 'JOB.toml'", "See: fedzoo simulate --help")
    has(refused("compare", "job.toml", "--seed", "2"), "No such option", "--seeds", "See: fedzoo compare --help")
    has(refused("compare", "job.toml", "--seeds", "0"), "--seeds", "x>=1")
    has(refused("compare", "job.toml", "--place", "federatd"), "unknown place 'federatd'", "'federated'?")
    has(refused("compare", "job.toml", "--time", "ofline"), "unknown time 'ofline'", "'offline'?")
    has(refused("models", "--task", "clasification"), "unknown task", "did you mean 'classification'")


# Data and sites that do not fit the job


def test_data_that_cannot_be_read(refused, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(root: str) -> str:
        return refused("simulate", "job.toml", *sets("simulation.reader=imagefolder", f"simulation.root={root}"))

    monkeypatch.delenv("NOWHERE", raising=False)
    has(told("$NOWHERE/x"), "environment variable NOWHERE", "not set", "export NOWHERE=")
    has(told("nowhere"), "nowhere does not exist", "Name the folder")
    (here / "data").mkdir()
    has(told("data"), "data has no class folder", "<folder>/<class>/<image files>")
    (here / "data" / "0").mkdir()
    has(told("data"), "no image below data", ".png")
    Image.effect_noise((64, 64), 50).save(here / "data" / "0" / "good.png")
    (here / "data" / "0" / "torn.png").write_bytes((here / "data" / "0" / "good.png").read_bytes()[:2000])
    has(told("data"), "image data/0/torn.png cannot be read", "Mend or remove the file")
    (here / "data" / "zero").mkdir()
    has(told("data"), "class folder data/zero", "not a label of the job", "Rename it", "known: 0, 1")
    has(refused("simulate", "job.toml", "--set", "simulation.reader=imagefoldr"), "unknown reader", "'imagefolder'?")


@pytest.mark.parametrize("command", [["simulate"], ["compare", "--seeds", "1"]])
def test_sites_that_can_never_do_the_job(refused, command: list[str]) -> None:
    def told(*settings: str) -> str:
        return refused(*command, "job.toml", *sets(*settings))

    has(told("federation.min_sites=4"), "federation.min_sites = 4", "3 sites", "or raise simulation.sites")
    has(told("simulation.partition=dirichlet", "simulation.sites=2000"), "2000 sites", "Lower simulation.min_examples")
    has(told("simulation.partition=column"), "needs data with a site column", "'iid' or 'dirichlet'")
    has(told("simulation.partition=dirichelt"), "simulation.partition: unknown partition", "'dirichlet'?")
    has(told("simulation.partition=shards", "simulation.shards=1000"), "3000 shards", "3 x 1000", "Lower simulation.s")
    has(told("simulation.partition=labels", "simulation.classes=11"), "classes = 11", "10 labels", "Lower simulation.c")
    has(told("simulation.partition=labels"), "3 sites of 2 labels", "10 labels of the data", "Raise simulation.classes")
    has(told("simulation.partition=quantity", "simulation.sites=2000"), "quantity(0.5)", "Lower simulation.min_exampl")
    many = ("simulation.sites=250", "simulation.min_examples=1")
    has(told(*many), "no example for the", "part", "Lower simulation.sites")


@pytest.mark.parametrize("command", [["simulate"], ["compare"], ["run", "submit"]])
def test_an_image_too_small_for_the_model(refused, server: dict[str, int], command: list[str]) -> None:
    told = refused(*command, "job.toml", *sets("model.name=cnn", "data.shape=[1,1,1]"))
    has(told, "'cnn'", "1x1 pixels", "smallest is 4x4", "Enlarge the images")
    told = refused(*command, "job.toml", *sets("model.name=vit", "data.shape=[1,5,5]"))
    has(told, "'vit'", "5x5 pixels", "patches of side 2", "Set patch to one of 1, 5")


def test_a_single_place_needs_no_other_sites(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The job wants three sites a round; alone there is one, and that is no mistake."""
    with pytest.raises(SystemExit) as end:
        fedzoo.main(["simulate", "job.toml", "--set", "place=isolated", "--out", "alone", "--json"])
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out)["cells"][0]["place"] == "isolated"


def test_an_output_folder_that_cannot_be_used(refused, here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "thesis.txt").write_text("years of work")
    (here / "file").write_text("mine")
    for command in ("simulate", "compare"):
        has(refused(command, "job.toml", "--out", "out"), "folder out is not empty", "--out")
        has(refused(command, "job.toml", "--out", "file"), "folder file cannot be made", "--out")
    for path in ("out", "file"):
        has(refused("demo", "--dir", path), f"{path} is not empty and not a demo's", "--dir")


def test_a_report_of_what_is_no_run(refused, here: Path) -> None:
    for path in ("nowhere", ".", "job.toml"):
        has(refused("report", path), f"{path} holds neither a comparison nor a finished run", "fedzoo run list")
    (here / "comparison.json").write_text('{"title": "half"}')
    has(refused("report", "."), "comparison.json cannot be used", "created")


# The server


def test_a_server_that_cannot_be_made(refused, here: Path) -> None:
    (here / "full").mkdir()
    (here / "full" / "ca.key").write_text("another server's")
    has(refused("server", "init", "--dir", "full"), "full exists and is not empty", "--dir")
    has(refused("server", "init", "--host", "https://fl.example.org"), "'https://fl.example.org'", "no https://")
    has(refused("server", "init", "--host", ""), "neither a host name nor an IP address")
    has(refused("server", "init", "--fleet-port", "99999"), "'ports.fleet'", "65535", "99999")
    has(refused("server", "init", "--fleet-port", "9093"), "the four ports must differ")


ON_A_SERVER = [f"server {words}" for words in ("start", "nodes", "status", "invite a", "revoke a")]
ON_A_SERVER += [f"run {words}" for words in ("list", "watch", "stop last", "resume last", "submit job.toml")]


@pytest.mark.parametrize("command", ON_A_SERVER)
def test_no_server_here(refused, command: str) -> None:
    has(refused(*command.split()), "there is no fedzoo-server/server.toml", "fedzoo server init --dir fedzoo-server")


def test_a_server_that_does_not_run(refused, server: dict[str, int]) -> None:
    has(refused("run", "submit", "job.toml"), f"127.0.0.1:{server['control']}", "fedzoo server start")
    has(refused("run", "watch"), "there is no run 'last' in fedzoo-server/runs")
    has(refused("run", "watch", "../job"), "there is no run '../job'")


def test_an_invite_that_cannot_be_given(refused, server: dict[str, int]) -> None:
    has(refused("server", "invite", "Hospital A"), "'Hospital A' cannot be a site's name", "a-z, 0-9")
    for hours in ("0", "-1", "nan"):
        has(refused("server", "invite", "a", f"--hours={hours}"), "longer than 0 hours")
    has(refused("server", "invite", "a", "--hours", "inf"), "--hours", "8760")
    has(refused("server", "revoke", "a"), "no enrolled site is called 'a'", "fedzoo server nodes")


def test_a_port_in_use_stops_the_start_and_nothing_else(server: dict[str, int], here: Path) -> None:
    with socket.create_server(("127.0.0.1", server["enroll"])):
        done = process("server", "start").communicate(timeout=60)
    assert done[0].splitlines() == ["starting the server in fedzoo-server ..."]
    (line,) = done[1].splitlines()
    has(line, f"error: port {server['enroll']} on 127.0.0.1", "enrollment", "in use", "choose another port")
    assert not list((here / "fedzoo-server" / "flower").iterdir())  # SuperLink was not started


# The node


@pytest.mark.parametrize(
    "command", [["start"], ["check"], ["status"], ["approve", "a" * 64], ["withdraw", "a" * 64], ["audit"]]
)
def test_no_node_here(refused, here: Path, command: list[str]) -> None:
    has(refused("client", *command), "fedzoo-node", "Enroll first: fedzoo client enroll INVITE")
    (here / "empty").mkdir()
    has(refused("client", *command, "--dir", "empty"), "there is no empty/client.toml", "Enroll first")


def test_a_mistyped_hash(refused, node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("abc", "g" * 64, "a" * 63):
        has(refused("client", "start", "--approve", wrong), "--approve", "approve.0", wrong[:55])
        has(refused("client", "approve", wrong), "client approve", "approve.0", wrong[:55])
        has(refused("client", "withdraw", wrong), wrong, "is not approved in", "client.toml")
    for hash, doubt in (("a" * 64, True), ("b" * 64, False)):  # well formed: only the request tells
        (node / "requests").mkdir(exist_ok=True)
        (node / "requests" / f"{'b' * 64}.toml").touch()
        with pytest.raises(SystemExit) as end:
            fedzoo.main(["client", "approve", hash])
        assert end.value.code == 0
        assert ("has not asked for it yet" in capsys.readouterr().out) == doubt


def test_an_invite_that_is_none(refused, uncalled: str) -> None:
    good = an_invite(uncalled)
    at = len(good) // 2
    mistyped = good[:at] + ("A" if good[at] != "A" else "B") + good[at + 1 :]
    for bad in (mistyped, good[:-1], good[:60], good[:at] + good[at + 1 :]):
        has(refused("client", "enroll", bad, "--data", "."), "the invite is damaged", "Copy the whole string again")
    has(refused("client", "enroll", "hello", "--data", "."), "this is not an invite", "fedzoo1.")
    expired = an_invite(uncalled, seconds=-60)
    has(refused("client", "enroll", expired, "--data", "."), "site 'a' expired at", "Ask the server's operator")


def test_a_mistake_at_enrollment_costs_no_invite(refused, node: Path, uncalled: str) -> None:
    """The server is not even called before everything on this side is known to be right."""
    invite = an_invite(uncalled)
    has(refused("client", "enroll", invite, "--dir", "n", "--data", "nowhere"), "no data folder nowhere", "--data")
    has(refused("client", "enroll", invite, "--dir", "n", "--data", "job.toml"), "no data folder job.toml", "--data")
    wrong_format = refused("client", "enroll", invite, "--dir", "n", "--data", ".", "--format", "imagefoldr")
    has(wrong_format, "unknown reader 'imagefoldr'", "did you mean 'imagefolder'?")
    has(refused("client", "enroll", invite, "--data", "."), "fedzoo-node exists already", "--dir")
    has(refused("client", "enroll", invite), "Missing option '--data'", "fedzoo client enroll --help")


def test_an_unreachable_server_costs_no_invite(refused, server: dict[str, int]) -> None:
    invite = make_invite(Path("fedzoo-server"), "a", 1)
    told = refused("client", "enroll", invite, "--data", ".")
    has(told, f"cannot reach the server at localhost:{server['enroll']}", "Check that the server runs")
    with Roster(Path("fedzoo-server/nodes.db")).redeem(decode(invite).token) as redemption:
        assert redemption.site == "a"  # still good


# Whatever else happens


def test_debug_shows_the_traceback_instead() -> None:
    for words in (["--debug", "simulate", "job.toml"], ["simulate", "job.toml", "--debug"]):
        with pytest.raises(UnknownNameError, match="did you mean 'vit'"):
            fedzoo.main([*words, "--set", "model.name=vitt"])


def test_our_own_mistake_is_one_line_that_names_debug(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the first line\nand the second")

    monkeypatch.setattr(simulations.compare, "load_sites", broken)
    told = refused("simulate", "job.toml")
    has(told, "internal error: RuntimeError: the first line and the second", "--debug")
    with pytest.raises(RuntimeError):
        fedzoo.main(["simulate", "job.toml", "--debug"])


def test_interrupted(here: Path) -> None:
    running = process("simulate", "job.toml", "--set", "federation.rounds=1000000", "--out", "out", "--json")
    deadline = time.monotonic() + 60
    while not (here / "out" / "checkpoint" / "state.json").exists():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=30)
    assert (running.returncode, out, err) == (130, "", "interrupted\n")
    rounds = [json.loads(line) for line in (here / "out" / "events.jsonl").read_text().splitlines()]
    assert rounds[-1]["event"] == "round"  # what was done is kept, and whole
