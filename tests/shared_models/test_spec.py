"""What each entry of a state dict is, what a job's `[share]` makes of it, and what the fingerprint notices."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared_models.errors import ConfigError, FingerprintError
from shared_models.job import Job
from shared_models.models import models
from shared_models.spec import build_model, describe, digest, first_difference, frozen_modules, require_same

MakeJob = Callable[..., Job]


class Everything(nn.Module):
    """One entry of every nature: parameters, running statistics, a counter, a constant, a tied weight."""

    grid: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 3, bias=False)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 3)
        self.head.weight = self.embed.weight
        self.register_buffer("grid", torch.arange(4.0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def test_natures_and_what_follows_from_them(make_job: MakeJob) -> None:
    spec = describe(Everything(), make_job())
    assert {e.key: e.nature for e in spec.entries} == {
        "grid": "constant",
        "embed.weight": "parameter",
        "norm.weight": "parameter",
        "norm.bias": "parameter",
        "norm.running_mean": "running-stat",
        "norm.running_var": "running-stat",
        "norm.num_batches_tracked": "counter",
        "head.weight": "alias",
        "head.bias": "parameter",
    }
    assert spec.sent == (
        "embed.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "head.bias",
    )  # fmt: skip
    assert spec.trained == ("embed.weight", "norm.weight", "norm.bias", "head.bias")
    assert spec.personal == ()
    facts = {e.key: e.facts() for e in spec.entries}
    assert facts["head.weight"]["alias_of"] == "embed.weight"
    assert facts["norm.weight"] == {"shape": [3], "dtype": "float32", "nature": "parameter", "share": "averaged"}
    assert facts["grid"]["digest"] == hashlib.sha256(struct.pack("<4f", 0, 1, 2, 3)).hexdigest()


def test_a_norm_layer_at_the_top_has_running_statistics_too(make_job: MakeJob) -> None:
    natures = {e.key: e.nature for e in describe(nn.BatchNorm1d(2), make_job()).entries}
    assert natures["running_mean"] == "running-stat"
    assert natures["num_batches_tracked"] == "counter"


def test_personal_entries_stay_and_are_covered_by_name_only(make_job: MakeJob) -> None:
    job = make_job(share={"personal": ["norm.*"]})
    spec = describe(Everything(), job)
    assert spec.sent == ("embed.weight", "head.bias")
    assert spec.personal == ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
    assert "norm.weight" in spec.trained
    assert spec.document["entries"]["norm.weight"] == {"share": "personal"}
    wider = Everything()
    wider.norm = nn.BatchNorm1d(5)  # a site's own part may have another shape
    assert describe(wider, job).fingerprint == spec.fingerprint
    assert describe(wider, make_job()).fingerprint != describe(Everything(), make_job()).fingerprint


def test_base_entries_are_frozen_and_covered_by_digest(make_job: MakeJob) -> None:
    model = Everything()
    spec = describe(model, make_job(share={"base": ["norm.*"]}))
    assert spec.sent == ("embed.weight", "head.bias")
    assert spec.trained == ("embed.weight", "head.bias")
    assert spec.personal == ()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"norm.weight", "norm.bias"}
    for name in ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.get_parameter(name).view(-1)[0].add_(1e-6) if name in frozen else changed.get_buffer(name)[0].add_(
                1
            )
        other = describe(changed, make_job(share={"base": ["norm.*"]}))
        assert other.fingerprint != spec.fingerprint, name


def test_averaged_values_are_not_part_of_the_fingerprint(make_job: MakeJob) -> None:
    model = Everything()
    before = describe(model, make_job()).fingerprint
    with torch.no_grad():
        model.embed.weight.add_(1)
    assert describe(model, make_job()).fingerprint == before
    model.grid[0] = 7  # a constant is
    assert describe(model, make_job()).fingerprint != before


def test_a_pattern_that_matches_nothing_is_an_error(make_job: MakeJob) -> None:
    for share in ("personal", "base"):
        with pytest.raises(ConfigError) as error:
            describe(Everything(), make_job(share={share: ["head.*", "classifier.*"]}))
        assert "[share] pattern 'classifier.*' matches no entry of model 'mlp'" in str(error.value)
        assert "Its entries are grid, embed.weight, norm.weight" in str(error.value)


@pytest.mark.parametrize("pattern", ["head.*", "embed.*"])
@pytest.mark.parametrize("share", ["personal", "base"])
def test_a_pattern_that_takes_half_of_a_tie_is_an_error(make_job: MakeJob, share: str, pattern: str) -> None:
    """`head.weight` declared personal must not leave the node under its other name."""
    with pytest.raises(ConfigError, match=r"'head\.weight' .*'embed\.weight'"):
        describe(Everything(), make_job(share={share: [pattern]}))
    both = describe(Everything(), make_job(share={share: ["head.*", "embed.*"]}))
    assert both.sent == ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")


def test_head_stands_for_the_models_head(make_job: MakeJob) -> None:
    _, spec = build_model(make_job(share={"personal": ["@head"]}))
    assert spec.personal == ("head.weight", "head.bias")
    assert spec.sent == ("hidden1.weight", "hidden1.bias")
    model, spec = build_model(make_job(share={"base": ["!@head"]}))
    assert spec.trained == spec.sent == ("head.weight", "head.bias")
    assert {e.key for e in spec.entries if e.digest} == {"hidden1.weight", "hidden1.bias"}
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    assert spec.fingerprint == build_model(make_job(share={"base": ["hidden*"]}))[1].fingerprint


def test_a_head_of_several_patterns(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    two = replace(models["mlp"], heads=("head.weight", "norm.*"))
    monkeypatch.setitem(models._things, "mlp", two)
    untied = Everything()
    untied.head = nn.Linear(3, 3)
    parts = {"head.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"}
    assert set(describe(untied, make_job(share={"personal": ["@head"]})).personal) == parts
    assert set(describe(untied, make_job(share={"personal": ["!@head"]})).sent) == parts


@pytest.mark.parametrize(
    ("pattern", "heads", "named", "hint"),
    [
        ("@head", ("cls.*", "box.*"), "@head", "; @head is cls.*, box.*"),
        ("!@head", ("cls.*",), "@head", "; @head is cls.*"),
        ("@head", (), "@head", "; @head is nothing: the model has no head"),
        ("@heads", ("head.*",), "@heads", "; @head is head.*"),
        ("!cls.*", ("head.*",), "cls.*", ""),
        ("!*", ("head.*",), "!*", ""),
    ],
)
def test_a_pattern_behind_a_sign_that_matches_nothing_is_an_error(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, pattern: str, heads: tuple[str, ...], named: str, hint: str
) -> None:
    monkeypatch.setitem(models._things, "mlp", replace(models["mlp"], heads=heads))
    with pytest.raises(ConfigError) as error:
        build_model(make_job(share={"base": [pattern]}))
    assert str(error.value) == (
        f"[share] pattern '{named}' matches no entry of model 'mlp'. "
        f"Its entries are hidden1.weight, hidden1.bias, head.weight, head.bias, ...{hint}"
    )


def test_a_tied_head_cannot_be_taken_alone(make_job: MakeJob) -> None:
    for share, kinds in ({"base": ["!@head"]}, "averaged base"), ({"personal": ["@head"]}, "personal averaged"):
        head, body = kinds.split()
        with pytest.raises(ConfigError) as error:
            describe(Everything(), make_job(share=share))
        assert f"'head.weight' {head} and 'embed.weight' {body}, but they are one tensor" in str(error.value)


@pytest.mark.parametrize(
    ("patterns", "frozen"), [((), False), (("norm.running_*",), True), (("norm.*",), True), (("norm.weight",), False)]
)
def test_base_statistics_do_not_move_in_training(make_job: MakeJob, patterns: tuple[str, ...], frozen: bool) -> None:
    model = Everything()
    spec = describe(model, make_job(share={"base": patterns}))
    assert frozen_modules(model, spec) == ([model.norm] if frozen else [])
    model.train()
    for module in frozen_modules(model, spec):
        module.eval()
    before = copy.deepcopy(model.norm.state_dict())
    model.head(model.norm(model.embed(torch.randn(8, 3)))).sum().backward()
    moved = {name for name, value in model.norm.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == (set() if frozen else {"running_mean", "running_var", "num_batches_tracked"})
    assert (model.norm.weight.grad is None) == ("norm.weight" in patterns or "norm.*" in patterns)


def test_a_norm_layer_at_the_top_or_of_two_names_is_frozen_once(make_job: MakeJob) -> None:
    top = nn.BatchNorm1d(2)
    assert frozen_modules(top, describe(top, make_job(share={"base": ["running_*"]}))) == [top]
    twice = nn.ModuleDict({"a": top, "b": top, "head": nn.Linear(2, 2)})
    assert frozen_modules(twice, describe(twice, make_job(share={"base": ["[ab].*"]}))) == [top]
    assert frozen_modules(twice, describe(twice, make_job(share={"personal": ["[ab].*"]}))) == []


@pytest.fixture
def weights(make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`[weights]` of a file in $FEDZOO_WEIGHTS that holds an mlp of another seed."""
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setenv("FEDZOO_WEIGHTS", str(folder))
    torch.save(build_model(make_job(seed=7))[0].state_dict(), folder / "mlp.pth")
    return {"file": "mlp.pth"}


def without_the_file(tmp_path: Path) -> None:
    (tmp_path / "weights" / "mlp.pth").unlink()


def test_a_model_starts_from_its_weights(make_job: MakeJob, weights: dict[str, Any]) -> None:
    expected = build_model(make_job(seed=7))[0].state_dict()
    model, spec = build_model(make_job(weights=weights))
    assert all(torch.equal(v, expected[n]) for n, v in model.state_dict().items())
    assert spec.match is not None
    assert spec.match.loaded == tuple(expected)
    plain = build_model(make_job())[1]
    assert plain.match is None
    assert spec == plain  # what was loaded is no part of it: every entry is sent
    assert spec.fingerprint == plain.fingerprint


def test_whoever_receives_every_entry_needs_no_file(make_job: MakeJob, weights: dict[str, Any], tmp_path: Path) -> None:
    job = make_job(weights=weights)
    ours = build_model(job)[1]
    assert build_model(job, receives=True)[1].match == ours.match  # where it is there, it is looked at
    without_the_file(tmp_path)
    there = build_model(job, receives=True)[1]
    assert there.match is None
    assert there.fingerprint == ours.fingerprint
    with pytest.raises(ConfigError, match=r"there is no weights file 'mlp\.pth'"):
        build_model(job)


@pytest.mark.parametrize("share", [{"base": ["!@head"]}, {"personal": ["@head"]}])
def test_whoever_keeps_entries_needs_the_very_file(
    make_job: MakeJob, weights: dict[str, Any], tmp_path: Path, share: dict[str, Any]
) -> None:
    job = make_job(weights=weights, share=share)
    ours = build_model(job, receives=True)[1]
    content = (tmp_path / "weights" / "mlp.pth").read_bytes()
    assert ours.document["weights"] == hashlib.sha256(content).hexdigest()
    torch.save(build_model(make_job(seed=8))[0].state_dict(), tmp_path / "weights" / "mlp.pth")
    other = build_model(job, receives=True)[1]
    found = first_difference(ours.document, other.document)
    assert found is not None
    assert found[0] == "weights"
    if "base" in share:
        assert (
            ours.document["entries"]["hidden1.weight"]["digest"]
            != (other.document["entries"]["hidden1.weight"]["digest"])
        )
    without_the_file(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no weights file 'mlp\.pth'"):
        build_model(job, receives=True)


@pytest.mark.parametrize("share", [{"personal": ["*"]}, {"base": ["*"]}, {"personal": ["head.*"], "base": ["hidden*"]}])
def test_shares_that_leave_nothing_to_learn_together_are_an_error(make_job: MakeJob, share: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"\[share\] leaves no entry"):
        build_model(make_job(share=share))


def test_two_builds_are_the_same_to_the_bit_and_leave_the_global_generator(make_job: MakeJob) -> None:
    state = torch.get_rng_state()
    job = make_job(model={"name": "vit"})
    (first, a), (second, b) = build_model(job), build_model(make_job(model={"name": "vit"}))
    assert a.fingerprint == b.fingerprint
    assert len(a.fingerprint) == 64
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert torch.equal(torch.get_rng_state(), state)
    other, c = build_model(job.replace(seed=1))
    assert c.fingerprint == a.fingerprint  # the values are averaged, so the seed is the server's affair
    assert any(not torch.equal(v, other.state_dict()[n]) for n, v in first.state_dict().items())


@pytest.mark.parametrize(
    ("parts", "place"),
    [
        ({"task": {"labels": [str(c) for c in reversed(range(10))]}}, "task.labels[0]"),
        ({"task": {"labels": [*map(str, range(9)), "nine"]}}, "task.labels[9]"),
        ({"task": {"labels": [*map(str, range(11))]}}, "task.labels"),
        ({"data": {"resize": "pad"}}, "preprocessing.resize"),
        ({"data": {"mean": [0.25]}}, "preprocessing.mean[0]"),
        ({"model": {"hidden": [65]}}, "model.hidden[0]"),
        ({"model": {"name": "logistic"}}, "model.name"),
        ({"share": {"personal": ["head.*"]}}, "entries.head.weight.shape"),
    ],
)
def test_what_changes_the_fingerprint_and_what_is_named(make_job: MakeJob, parts: dict[str, Any], place: str) -> None:
    _, ours = build_model(make_job())
    _, theirs = build_model(make_job(**parts))
    assert ours.fingerprint != theirs.fingerprint
    document = json.loads(json.dumps(theirs.document))  # as it crosses the network
    found = first_difference(ours.document, document)
    assert found is not None
    assert found[0] == place
    assert found[1] != found[2]
    with pytest.raises(FingerprintError) as error:
        require_same(ours, document, "the server")
    assert f"the server would train another model: '{place}' is {found[1]} here and {found[2]} there" in str(
        error.value
    )
    require_same(theirs, document, "the server")


def test_what_does_not_change_the_fingerprint(make_job: MakeJob) -> None:
    _, ours = build_model(make_job())
    _, same = build_model(make_job(train={"lr": 0.9}, federation={"rounds": 99}, method={"name": "fedprox"}, name="x"))
    assert ours.fingerprint == same.fingerprint


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ({"a": 1, "b": {"c": 2}}, {"b": {"c": 2}, "a": 1}, None),
        ({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 9, "c": 8}, ("b", "2", "9")),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": "1"}}}, ("a.b.c", "1", "'1'")),
        ({"a": 1}, {}, ("a", "present", "absent")),
        ({}, {"a": {"b": 1}}, ("a", "absent", "present")),
        ({"a": [1, 2, 3]}, {"a": [1, 5, 3]}, ("a[1]", "2", "5")),
        ({"a": [1, 2]}, {"a": [1, 2, 3]}, ("a", "2 items", "3 items")),
        ({"a": [{"b": 1}]}, {"a": [{"b": 2}]}, ("a[0].b", "1", "2")),
        ({"a": [1]}, {"a": {"b": 1}}, ("a", "[1]", "{'b': 1}")),
        ({"a": "x" * 200}, {"a": 1}, ("a", "'" + "x" * 79, "1")),
    ],
)
def test_first_difference(ours: Any, theirs: Any, expected: tuple[str, str, str] | None) -> None:
    assert first_difference(ours, theirs) == expected


def test_digest_reads_every_bit_whatever_the_layout() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert digest(x.t().contiguous().t()) == digest(x)
    assert digest(-torch.zeros(1)) != digest(torch.zeros(1))
    for dtype in (torch.bfloat16, torch.bool, torch.int64):
        assert len(digest(torch.ones((), dtype=dtype))) == 64
