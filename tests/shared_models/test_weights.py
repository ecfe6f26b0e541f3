"""Weights from files as they lie about, into models of ours: what fits, what does not, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from shared_models.errors import ConfigError
from shared_models.job_parts import WeightsPart
from shared_models.validation import validate
from shared_models.weights import Difference, Match, _read, find_weights, load_weights

State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$FEDZOO_WEIGHTS, empty; the current directory is another one."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("FEDZOO_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "weights"


class Small(nn.Module):
    """A body with running statistics and a head."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, classes)


KEYS = tuple(key for key in Small().state_dict() if key != "norm.num_batches_tracked")


def values(seed: int = 1, classes: int = 2) -> State:
    """The state dict of a Small that was trained elsewhere."""
    source = torch.Generator().manual_seed(seed)
    state = Small(classes).state_dict().items()
    return {k: torch.randn(v.shape, generator=source) if v.is_floating_point() else v + 9 for k, v in state}


def load(file: str, model: nn.Module | None = None, renames: Any = (), **part: Any) -> tuple[State, Match]:
    model = model or Small()
    match = load_weights(model, WeightsPart(file=file, **part), renames)
    return model.state_dict(), match


def same(ours: State, theirs: State, keys: tuple[str, ...] = KEYS) -> bool:
    return all(torch.equal(ours[k], theirs[k]) for k in keys)


# ---- sources ---------------------------------------------------------------------------------------------------------
def shards(folder: Path, write: Callable[[State, Path], None], suffix: str) -> None:
    folder.mkdir()
    state = values()
    parts = {f"part-2.{suffix}": KEYS[:3], f"part-1.{suffix}": KEYS[3:]}
    for name, keys in parts.items():
        write({k: state[k] for k in keys}, folder / name)
    index = {"weight_map": {k: name for name, keys in parts.items() for k in keys}}
    name = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    (folder / f"{name}.index.json").write_text(json.dumps(index))


def whole(folder: Path, name: str) -> None:
    folder.mkdir()
    save_file(values(), folder / name) if name.endswith("safetensors") else torch.save(values(), folder / name)


SOURCES: dict[str, Callable[[Path], object]] = {
    "a.safetensors": lambda path: save_file(values(), path),
    "a.pth": lambda path: torch.save(values(), path),
    "a.pt": lambda path: torch.save({"state_dict": values(), "epoch": 3, "optimizer": {"lr": torch.ones(1)}}, path),
    "a.bin": lambda path: torch.save({"model": values()}, path),
    "a.pth.tar": lambda path: torch.save({"model": {"module": values()}}, path, _use_new_zipfile_serialization=False),
    "hub": lambda path: whole(path, "model.safetensors"),
    "hub-torch": lambda path: whole(path, "pytorch_model.bin"),
    "sharded": lambda path: shards(path, save_file, "safetensors"),
    "sharded-torch": lambda path: shards(path, torch.save, "bin"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_values(folder: Path, name: str) -> None:
    SOURCES[name](folder / name)
    state, match = load(name)
    assert same(state, values())
    assert match == Match(name, match.sha256, KEYS)
    assert str(match) == f"weights {name}: 8 of 8 entries loaded"
    assert state["norm.num_batches_tracked"] == 0  # a counter is of no use to anyone


@pytest.mark.parametrize(
    ("name", "files"), [("a.pth", "a.pth"), ("hub", "hub/model.safetensors"), ("sharded", "sharded/*.safetensors")]
)
def test_the_hash_is_of_the_weights_file_or_of_all_shards(folder: Path, name: str, files: str) -> None:
    SOURCES[name](folder / name)
    sha256 = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob(files)))).hexdigest()
    assert load(name, sha256=sha256)[1].sha256 == sha256
    with pytest.raises(ConfigError, match=rf"{name} are not those of the job: their SHA-256 is {sha256[:16]}…, "):
        load(name, sha256="0" * 64)


def test_where_a_file_is_looked_for(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here" / "a.pth"
    here.touch()
    assert find_weights("a.pth") is None  # where a folder is named, that folder alone
    (folder / "a.pth").touch()
    assert find_weights("a.pth") == folder / "a.pth"
    monkeypatch.delenv("FEDZOO_WEIGHTS")
    assert find_weights("a.pth") == here
    here.unlink()
    with pytest.raises(ConfigError) as error:
        load("a.pth")
    assert str(error.value) == (
        f"there is no weights file 'a.pth' in {here.parent}. Put it there, or name its folder in the environment "
        "variable FEDZOO_WEIGHTS; nothing is ever downloaded"
    )


@pytest.mark.parametrize("file", ["/etc/hostname", "../secret.pth", "a/../../secret.pth", "a/.."])
def test_a_job_names_no_file_outside_the_folder(file: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(WeightsPart, {"file": file}, "[weights]")
    assert str(error.value) == (
        f"[weights]: 'file': '{file}' should be a name below the folder of weights, without a leading '/' and '..'; "
        "the environment variable FEDZOO_WEIGHTS says which folder that is"
    )


@pytest.mark.parametrize(
    "link",
    ["a.pth", "hub", "hub/model.safetensors", "sharded/part-1.safetensors", "sharded/model.safetensors.index.json"],
)
def test_a_link_does_not_lead_out_of_the_folder(folder: Path, tmp_path: Path, link: str) -> None:
    for name in ("a.pth", "hub", "sharded"):
        SOURCES[name](folder / name)
    (folder / link).rename(tmp_path / "outside")
    (folder / link).symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigError) as error:
        load(Path(link).parts[0])
    assert str(error.value) == (
        f"weights {folder / link} lead to {tmp_path / 'outside'}, which is not in {folder}. "
        "Copy what is meant into that folder, or name the folder that holds both in FEDZOO_WEIGHTS"
    )


def test_a_link_within_the_folder_is_followed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a Hugging Face cache has it: `snapshots` link to `blobs`. The folder itself may be a link."""
    SOURCES["hub"](folder / "hub")
    (folder / "hub" / "model.safetensors").rename(folder / "blob")
    (folder / "hub" / "model.safetensors").symlink_to("../blob")
    (tmp_path / "there").symlink_to(folder)
    monkeypatch.setenv("FEDZOO_WEIGHTS", str(tmp_path / "there"))
    assert same(load("hub")[0], values())


def test_a_file_is_read_once_until_it_changes(folder: Path) -> None:
    torch.save(values(1), folder / "a.pth")
    _read.cache_clear()
    first, _ = load("a.pth")
    for name in KEYS:  # training moves the model, not what was read
        first[name].add_(1)
    again, _ = load("a.pth")
    assert same(again, values(1))
    assert (_read.cache_info().misses, _read.cache_info().hits) == (1, 1)
    torch.save(values(2), folder / "a.pth")
    os.utime(folder / "a.pth", (1, 1))
    assert same(load("a.pth")[0], values(2))


# ---- keys ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prefix", ["module.", "model.", "backbone.", "_orig_mod.", "module._orig_mod.model."])
def test_a_wrappers_prefix_comes_off(folder: Path, prefix: str) -> None:
    torch.save({prefix + k: v for k, v in values().items()}, folder / "a.pth")
    assert same(load("a.pth")[0], values())


def test_a_prefix_of_our_own_stays(folder: Path) -> None:
    ours = nn.ModuleDict({"backbone": Small(), "fc": nn.Linear(1, 1)})
    torch.save({f"backbone.{k}": v for k, v in values().items()}, folder / "a.pth")
    state, match = load("a.pth", ours)
    assert same(state, {f"backbone.{k}": v for k, v in values().items()}, tuple(f"backbone.{k}" for k in KEYS))
    assert match.missing == ("fc.weight", "fc.bias")
    torch.save(values(2), folder / "b.pth")  # a plain classifier as the body of something larger
    state, match = load("b.pth", ours, rename=[("^", "backbone.")])
    assert torch.equal(state["backbone.body.weight"], values(2)["body.weight"])
    assert match.loaded == tuple(f"backbone.{k}" for k in KEYS)


def test_the_models_renames_come_first_then_the_jobs(folder: Path) -> None:
    theirs = {k.replace("body", "stem").replace("head", "classifier.1"): v for k, v in values().items()}
    torch.save(theirs, folder / "a.pth")
    ours, jobs = (("^stem", "trunk"),), [("trunk", "body"), (r"classifier\.(\d)", "head")]
    state, match = load("a.pth", renames=ours, rename=jobs)
    assert same(state, values())
    _, match = load("a.pth", renames=(), rename=jobs)
    assert match.unused == ("stem.weight", "stem.bias")
    assert match.missing == ("body.weight", "body.bias")


@pytest.mark.parametrize("pattern", ["^stem", r"^module\.stem", "stem"])
def test_anchored_patterns_meet_keys_with_and_without_the_prefix(folder: Path, pattern: str) -> None:
    torch.save({f"module.{k.replace('body', 'stem')}": v for k, v in values().items()}, folder / "a.pth")
    assert same(load("a.pth", renames=((pattern, "body"),))[0], values())


def test_of_two_keys_for_one_place_the_first_is_used(folder: Path) -> None:
    twice = {f"{name}.{k}": v for name, seed in (("online", 1), ("target", 2)) for k, v in values(seed).items()}
    torch.save(twice, folder / "a.pth")
    state, match = load("a.pth", rename=[(r"^(online|target)\.", "")])
    assert same(state, values(1))
    assert set(match.unused) == {f"target.{k}" for k in values()}
    torch.save({**values(1), **{f"module.{k}": v for k, v in values(2).items()}}, folder / "b.pth")
    assert same(load("b.pth")[0], values(1))  # a key that fits as it is needs nothing stripped


def test_a_tied_tensor_is_loaded_under_any_of_its_names(folder: Path) -> None:
    def tied() -> nn.ModuleDict:
        model = nn.ModuleDict({"embed": nn.Linear(3, 3, bias=False), "head": nn.Linear(3, 3)})
        model["head"].weight = model["embed"].weight
        return model

    for name in ("embed.weight", "head.weight"):
        torch.save({name: torch.eye(3), "head.bias": torch.ones(3)}, folder / f"{name}.pth")
        state, match = load(f"{name}.pth", tied())
        assert torch.equal(state["embed.weight"], torch.eye(3))
        assert (match.loaded, match.missing) == (("embed.weight", "head.weight", "head.bias"), ())
    torch.save(tied().state_dict(), folder / "both.pth")
    assert load("both.pth", tied())[1].unused == ()


# ---- shapes and dtypes -----------------------------------------------------------------------------------------------
def test_what_does_not_fit_is_left_as_initialised_and_said(folder: Path) -> None:
    theirs = values(classes=5)
    del theirs["norm.bias"]
    torch.save({**theirs, "extra": torch.zeros(2)}, folder / "a.pth")
    model = Small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state, match = load("a.pth", model)
    kept = ("head.weight", "head.bias", "norm.bias")
    assert same(state, before, kept)
    assert same(state, theirs, tuple(k for k in KEYS if k not in kept))
    assert match.mismatched == (Difference("head.weight", (5, 4), (2, 4)), Difference("head.bias", (5,), (2,)))
    assert match.missing == ("norm.bias",)
    assert match.unused == ("extra",)
    assert str(match) == (
        "weights a.pth: 5 of 8 entries loaded; left as initialised: head.weight ((5, 4) there, (2, 4) here), "
        "head.bias ((5,) there, (2,) here), norm.bias (not there); not used: extra"
    )
    long = Match("a.pth", "", ("w",), unused=tuple("abcdefg"))
    assert str(long) == "weights a.pth: 1 of 1 entries loaded; not used: a, b, c, d, ... (7 in all)"


def test_a_leading_one_is_dropped_where_that_alone_makes_it_fit(folder: Path) -> None:
    theirs = values()
    theirs["body.weight"] = theirs["body.weight"][None]
    theirs["body.bias"] = theirs["body.bias"][:, None]  # (4, 1): a last one is another thing
    theirs["norm.weight"] = theirs["norm.weight"][None, None]  # (1, 1, 4): two are too many
    torch.save(theirs, folder / "a.pth")
    state, match = load("a.pth")
    assert torch.equal(state["body.weight"], values()["body.weight"])
    assert match.reshaped == (Difference("body.weight", (1, 4, 3), (4, 3)),)
    assert [d.key for d in match.mismatched] == ["body.bias", "norm.weight"]


@pytest.mark.parametrize("theirs", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ours", [torch.float32, torch.float64])
def test_values_take_our_dtype(folder: Path, theirs: torch.dtype, ours: torch.dtype) -> None:
    save_file({k: v.to(theirs) for k, v in values().items()}, folder / "a.safetensors")
    state, _ = load("a.safetensors", Small().to(ours))
    assert state["body.weight"].dtype == ours
    assert torch.equal(state["body.weight"], values()["body.weight"].to(theirs).to(ours))


# ---- refusals --------------------------------------------------------------------------------------------------------
class Trap:
    """Unpickling it makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trapped",)


def test_a_file_with_code_is_refused_and_not_run(folder: Path) -> None:
    torch.save({"model": values(), "args": Trap()}, folder / "a.pth")
    with pytest.raises(ConfigError) as error:
        load("a.pth")
    assert str(error.value) == (
        f"weights {folder / 'a.pth'} hold more than tensors (posix.mkdir), and to load that would run code. "
        "Where you trust it, save its state dict alone: torch.save(model.state_dict(), ...)"
    )
    assert not Path("trapped").exists()


def cut(path: Path, keep: int) -> None:
    SOURCES[path.name](path)
    path.write_bytes(path.read_bytes()[:keep])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty.pth": (Path.touch, "cannot read weights"),
    "text.pth": (lambda path: path.write_text("hello, world"), "cannot read weights"),
    "plain.pkl": (lambda path: path.write_bytes(b"\x80\x04}."), "cannot read weights"),
    "a.pth": (lambda path: cut(path, 900), "cannot read weights"),
    "a.safetensors": (lambda path: cut(path, 700), "cannot read weights"),
    "list.pth": (lambda path: torch.save([torch.ones(1)], path), "hold no tensors by name"),
    "none.pth": (lambda path: torch.save({"model": {"a": 1}}, path), "hold no tensors by name"),
    "folder": (Path.mkdir, "holds no weights. It needs one of model.safetensors, "),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line(folder: Path, name: str) -> None:
    make, message = BROKEN[name]
    make(folder / name)
    with pytest.raises(ConfigError) as error:
        load(name)
    text = str(error.value)
    assert message in text
    assert str(folder / name) in text
    assert "\n" not in text
    assert len(text) < 400


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not an index of weights (JSONDecodeError: "),
        ("[]", "is not an index of weights (TypeError: "),
        ('{"metadata": {}}', "is not an index of weights (KeyError: 'weight_map')"),
        ('{"weight_map": {"a": "part-3.safetensors"}}', "names 'part-3.safetensors', which is not there"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "names '../a.safetensors', which is not there"),
        ('{"weight_map": {"a": 3}}', "names '3', which is not there"),
    ],
)
def test_a_broken_index_is_one_line(folder: Path, index: str, message: str) -> None:
    save_file(values(), folder / "a.safetensors")
    (folder / "hub").mkdir()
    (folder / "hub" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConfigError) as error:
        load("hub")
    assert message in str(error.value)


def test_a_file_of_another_model_is_refused_with_keys_of_both(folder: Path) -> None:
    torch.save({"conv.weight": torch.zeros(1), "conv.bias": torch.zeros(1)}, folder / "a.pth")
    torch.save(values(classes=3), folder / "b.pth")
    with pytest.raises(ConfigError) as error:
        load("a.pth")
    assert str(error.value) == (
        f"nothing in weights {folder / 'a.pth'} has a place in this model: they have conv.weight, conv.bias, "
        "and the model has body.weight, body.bias, norm.weight, norm.bias, ... (8 in all). "
        "[weights] rename = [['pattern', 'replacement']] can turn their keys into the model's"
    )
    with pytest.raises(ConfigError, match="has a place in this model"):  # its keys have, and none of its shapes
        load("b.pth", nn.ModuleDict({"head": nn.Linear(4, 2)}))


@pytest.mark.parametrize("rename", [("(", "x"), ("body", r"\2")])
def test_a_pattern_that_is_none_is_refused(folder: Path, rename: tuple[str, str]) -> None:
    torch.save(values(), folder / "a.pth")
    with pytest.raises(ConfigError, match=r"\[weights\] rename: "):
        load("a.pth", rename=[rename])


def test_a_file_that_may_not_be_read_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(values(), folder / "a.pth")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    _read.cache_clear()
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=r"cannot read weights .*a\.pth: Permission denied"):
        load("a.pth")
