"""What a site remembers: whole or not at all, the same bytes for the same instruction, nothing outside its folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import files
from torch import Tensor
from typer.testing import CliRunner

import client.state
from client.cli import app
from client.config import ClientConfig, NodeFolder, load, save
from client.ledger import open_ledger
from client.state import DiskState, MemoryState, State
from shared_models.errors import ConfigError, DataError, Rejected
from shared_models.job import Job
from shared_models.messages import Contribution, Instruction
from shared_models.privacy import Spend
from shared_models.sums import Groups
from shared_models.wire import encode_contribution

WRITES = 4  # kept, the answer's manifest and blob, and the pointer to them


@pytest.fixture
def ask(make_job: Callable[..., Job]) -> Callable[..., Instruction]:
    job = make_job()
    return lambda round=0, kind="train", run="run-1", **more: Instruction(kind, run, "a", job, "", round=round, **more)


def kept_after(value: float) -> dict[str, Groups]:
    return {
        "scaffold": {"control": {"w": torch.full((2, 3), value), "0.b/c:d": torch.full((1,), value)}},
        "personal": {"model": {"head": torch.full((4,), value, dtype=torch.bfloat16)}},
        "er": {"buffer": {"x": torch.full((2, 1, 2, 2), int(value), dtype=torch.uint8), "seen": torch.tensor(7)}},
    }


def answer_to(instruction: Instruction, value: float) -> Contribution:
    half = torch.full((3,), value, dtype=torch.bfloat16)
    return Contribution(
        instruction.kind, instruction.run, "a", instruction.task, instruction.round, examples=5, samples=9, steps=2,
        metrics={"validation/0/loss": torch.tensor(value, dtype=torch.float64)},
        groups={"model": {"w": torch.full((2, 3), value), "half": half}},
    )  # fmt: skip


def same(ours: dict[str, Groups], theirs: dict[str, Groups]) -> bool:
    def plain(kept: dict[str, Groups]) -> dict[tuple[str, str, str], Tensor]:
        return {(o, g, n): t for o, groups in kept.items() for g, ts in groups.items() for n, t in ts.items()}

    a, b = plain(ours), plain(theirs)
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def both(tmp_path: Path) -> list[State]:
    return [MemoryState(), DiskState(tmp_path, "a")]


def test_nothing_before_the_first_round(tmp_path: Path, ask: Callable[..., Instruction]) -> None:
    for state in both(tmp_path):
        assert state.load("run-1") == {}
        assert state.replay(ask()) is None


def test_what_is_saved_comes_back(tmp_path: Path, ask: Callable[..., Instruction]) -> None:
    for state in both(tmp_path):
        for round in range(4):
            state.save(ask(round), kept_after(round), answer_to(ask(round), round))
            assert same(state.load("run-1"), kept_after(round))
        assert state.load("run-2") == {}
    assert same(DiskState(tmp_path, "a").load("run-1"), kept_after(3))  # another process
    assert DiskState(tmp_path, "b").load("run-1") == {}


def test_saved_values_do_not_follow_the_live_model(tmp_path: Path, ask: Callable[..., Instruction]) -> None:
    for state in both(tmp_path):
        live = torch.ones(3)
        state.save(ask(), {"personal": {"model": {"head": live}}}, answer_to(ask(), 0))
        live.fill_(9)
        assert state.load("run-1")["personal"]["model"]["head"].tolist() == [1, 1, 1]


def test_two_owners_may_keep_the_same_tensor(tmp_path: Path, ask: Callable[..., Instruction]) -> None:
    """Also a part of one, and one that is not contiguous."""
    weights = torch.arange(6.0).reshape(2, 3)
    kept = {"ewc": {"anchor": {"w": weights}}, "personal": {"model": {"w": weights, "row": weights[1], "t": weights.T}}}
    for state in both(tmp_path):
        state.save(ask(), kept, answer_to(ask(), 0))
        assert same(state.load("run-1"), kept)


def test_a_method_may_forget(tmp_path: Path, ask: Callable[..., Instruction]) -> None:
    for state in both(tmp_path):
        state.save(ask(0), kept_after(1), answer_to(ask(0), 1))
        state.save(ask(1), {"er": {"buffer": {}}, "personal": {"model": {}}}, answer_to(ask(1), 1))
        assert same(state.load("run-1"), {})


def test_the_same_instruction_gets_the_same_bytes(tmp_path: Path, ask: Callable[..., Instruction]) -> None:
    instruction = ask(3)
    answer = answer_to(instruction, 0.3)
    DiskState(tmp_path, "a").save(instruction, kept_after(1), answer)
    again = DiskState(tmp_path, "a").replay(instruction)
    assert again is not None
    assert encode_contribution(again) == encode_contribution(answer)


def test_another_instruction_is_not_answered_from_memory(tmp_path: Path, make_job: Callable[..., Job], ask) -> None:
    state = DiskState(tmp_path, "a")
    state.save(ask(3), kept_after(1), answer_to(ask(3), 1))
    other_job = replace(ask(3), job=make_job(train={"lr": 0.2}))
    for other in (ask(4), ask(2), ask(3, "end_task"), ask(3, "evaluate"), ask(3, task=1), ask(3, run="r"), other_job):
        assert state.replay(other) is None
    assert state.replay(ask(3)) is not None


def test_a_round_and_the_end_of_its_task_are_both_repeated(tmp_path: Path, ask: Callable[..., Instruction]) -> None:
    """A server that dies between the two and its checkpoint asks for both again."""
    state = DiskState(tmp_path, "a")
    asked = [ask(0), ask(1), ask(1, "end_task"), ask(2), ask(3), ask(3, "end_task")]
    for value, instruction in enumerate(asked):
        state.save(instruction, kept_after(value), answer_to(instruction, value))
        for before in range(max(0, value - 1), value + 1):
            again = state.replay(asked[before])
            assert again is not None
            assert encode_contribution(again) == encode_contribution(answer_to(asked[before], before))
        for forgotten in asked[: max(0, value - 1)]:  # its slot answers another instruction by now, or will next
            assert state.replay(forgotten) is None
        assert same(state.load("run-1"), kept_after(value))


@pytest.mark.parametrize("before", [0, 1, 2, 3])
@pytest.mark.parametrize("failing", range(WRITES))
def test_a_crash_at_any_write_leaves_before_or_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[..., Instruction], before: int, failing: int
) -> None:
    """After `before` whole rounds the next save dies at one of its writes, before or after the rename."""
    whole = client.state.write_whole
    for after_rename in (False, True):
        root = tmp_path / str(after_rename)
        monkeypatch.setattr(client.state, "write_whole", whole)
        for round in range(before):
            DiskState(root, "a").save(ask(round), kept_after(round), answer_to(ask(round), round))
        calls: list[Path] = []

        def dying(path: Path, data: bytes, calls: list[Path] = calls, after_rename: bool = after_rename) -> None:
            calls.append(path)
            if len(calls) <= failing or after_rename:
                whole(path, data)
            if len(calls) > failing:
                raise KeyboardInterrupt

        monkeypatch.setattr(client.state, "write_whole", dying)
        with pytest.raises(KeyboardInterrupt):
            DiskState(root, "a").save(ask(before), kept_after(before), answer_to(ask(before), before))
        assert len(calls) == failing + 1
        state = DiskState(root, "a")
        done = after_rename and failing == WRITES - 1
        rounds = before + done
        assert same(state.load("run-1"), kept_after(rounds - 1) if rounds else {})
        assert (state.replay(ask(before)) is not None) == done
        for round in range(max(0, rounds - 2), rounds):
            again = state.replay(ask(round))
            assert again is not None
            assert encode_contribution(again) == encode_contribution(answer_to(ask(round), round))


def test_a_save_makes_as_many_writes_as_the_crash_test_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[..., Instruction]
) -> None:
    written: list[Path] = []
    monkeypatch.setattr(client.state, "write_whole", lambda path, data: written.append(path))
    DiskState(tmp_path, "a").save(ask(), kept_after(0), answer_to(ask(), 0))
    assert len(written) == WRITES
    assert written[-1].name == "current"


def test_files_are_private_and_named_by_run_and_site_alone(tmp_path: Path, ask: Callable[..., Instruction]) -> None:
    state = DiskState(tmp_path, "hospital-a")
    for round in range(5):
        state.save(ask(round), kept_after(round), answer_to(ask(round), round))
    assert [p.name for p in tmp_path.iterdir()] == ["hospital-a"]
    assert [p.name for p in (tmp_path / "hospital-a").iterdir()] == ["run-1"]
    folder = tmp_path / "hospital-a" / "run-1"
    files = {p.name for p in folder.iterdir()}
    assert files == {"current"} | {f"{s}.{kind}" for s in "abc" for kind in ("kept", "answer.json", "answer.bin")}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(p.stat().st_mode & 0o777 == 0o600 for p in folder.iterdir())


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


@pytest.mark.parametrize(
    "damage", [_cut, lambda f: f.write_bytes(b""), lambda f: f.write_bytes(b"\xff{]"), Path.unlink]
)
@pytest.mark.parametrize("name", ["a.kept", "a.answer.json", "a.answer.bin", "current"])
def test_damage_is_a_data_error_that_names_the_file(
    tmp_path: Path, ask: Callable[..., Instruction], name: str, damage: Callable[[Path], object]
) -> None:
    state = DiskState(tmp_path, "a")
    state.save(ask(), kept_after(1), answer_to(ask(), 1))
    file = tmp_path / "a" / "run-1" / name
    damage(file)
    if name == "current" and not file.exists():
        assert state.load("run-1") == {}  # as before the first round
        return
    acts = [] if "answer" in name else [lambda: state.load("run-1")]
    acts += [] if "kept" in name else [lambda: state.replay(ask())]
    for act in acts:
        with pytest.raises(DataError, match=str(file.parent)):
            act()


@pytest.mark.parametrize("content", ["[]", "null", "3", "{}", '{"slot": "a"}', '{"slot": "../x", "answers": {}}'])
def test_a_pointer_of_another_form_is_damage(tmp_path: Path, ask: Callable[..., Instruction], content: str) -> None:
    state = DiskState(tmp_path, "a")
    state.save(ask(), kept_after(1), answer_to(ask(), 1))
    (tmp_path / "a" / "run-1" / "current").write_text(content)
    for act in (lambda: state.load("run-1"), lambda: state.replay(ask()),
                lambda: state.save(ask(1), kept_after(1), answer_to(ask(1), 1))):  # fmt: skip
        with pytest.raises(DataError, match="current"):
            act()


def forget(node: Path, run: str) -> str:
    result = CliRunner().invoke(app, ["forget", run, "--dir", str(node)])
    if result.exception:
        raise result.exception
    return result.output


@pytest.fixture
def node(tmp_path: Path, ask: Callable[..., Instruction]) -> Path:
    """Site `a` with what it keeps of two runs, and a ledger with an entry of the first."""
    addresses = dict.fromkeys(("fleet", "enrollment", "membership"), "localhost:1")
    data = {"folder": "/data/chest", "format": "imagefolder"}
    save(tmp_path, ClientConfig.model_validate({"site": "a", "server": addresses, "data": data}))
    state = DiskState(NodeFolder(tmp_path).state, "a")
    for run in ("run-1", "run-2"):
        state.save(ask(run=run), kept_after(1), answer_to(ask(run=run), 1))
        state.keep_start(run, 1, {"w": torch.ones(3)})
    spent = {"spend": Spend(1.0, 0.02, 10), "delta": 1e-6, "unit": "sample", "digest": "x", "job": "demo"}
    ledger = open_ledger(tmp_path, load(tmp_path))
    ledger.reserve(run="run-1", task=0, round=0, dataset="/data/chest", **spent)
    return tmp_path


def test_what_is_kept_of_a_run_is_forgotten_and_nothing_else(node: Path, ask: Callable[..., Instruction]) -> None:
    state = DiskState(NodeFolder(node).state, "a")
    size = sum(path.stat().st_size for path in (node / "state" / "a" / "run-1").iterdir())
    before = files(node)
    assert forget(node, "run-1") == (
        f"removed what site 'a' kept of run run-1: 5 files, {size / 1e6:.2f} MB in {node}/state/a/run-1; "
        "what was spent of the data stays in the ledger\n"
    )
    gone = {path for path in before if "/state/a/run-1" in path}
    assert files(node) == {path: content for path, content in before.items() if path not in gone}
    assert (node / "state" / "ledger.json").exists()
    assert state.replay(ask(run="run-1")) is None
    assert same(state.load("run-2"), kept_after(1))
    assert [entry.run for entry in open_ledger(node, load(node)).entries()] == ["run-1"]


@pytest.mark.parametrize("run", ["run-3", "..", ".", "", "../a/run-1", "/etc", "a/b"])
def test_a_run_that_is_not_kept_cannot_be_forgotten(node: Path, run: str) -> None:
    before = files(node)
    with pytest.raises(ConfigError) as error:
        forget(node, run)
    assert str(error.value) == f"site 'a' keeps nothing of a run '{run}'. It keeps run-1, run-2"
    assert files(node) == before


def test_forgetting_that_was_cut_off_leaves_the_run_as_before_its_first_round(
    node: Path, ask: Callable[..., Instruction], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(client.state, "rmtree", full)
        with pytest.raises(DataError, match=r"cannot remove .*run-1: Permission denied"):
            forget(node, "run-1")
    state = DiskState(NodeFolder(node).state, "a")
    assert (state.load("run-1"), state.replay(ask(run="run-1"))) == ({}, None)
    forget(node, "run-1")
    assert not (node / "state" / "a" / "run-1").exists()


@pytest.mark.parametrize("run", ["../b", "..", ".", "", "/etc", "a/b", "x/../../b", ".hidden", "a\n", "a\0", "a" * 300])
def test_a_run_that_looks_like_a_path_never_leaves_the_folder(
    tmp_path: Path, ask: Callable[..., Instruction], run: str
) -> None:
    root = tmp_path / "state"
    DiskState(root, "b").save(ask(), kept_after(1), answer_to(ask(), 1))
    before = sorted(tmp_path.rglob("*"))
    state = DiskState(root, "a")
    for act in (lambda: state.load(run), lambda: state.replay(ask(run=run)),
                lambda: state.save(ask(run=run), kept_after(2), answer_to(ask(), 2))):  # fmt: skip
        with pytest.raises(Rejected) as caught:
            act()
        assert caught.value.code == "malformed"
    assert sorted(tmp_path.rglob("*")) == before


def test_the_pointer_is_plain_json(tmp_path: Path, ask: Callable[..., Instruction]) -> None:
    DiskState(tmp_path, "a").save(ask(2), kept_after(1), answer_to(ask(2), 1))
    found = json.loads((tmp_path / "a" / "run-1" / "current").read_text())
    assert found == {"slot": "a", "answers": {f"{ask().job.hash} train 0 2": "a"}}
