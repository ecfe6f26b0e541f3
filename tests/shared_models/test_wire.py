"""Messages as bytes: every tensor comes back to the bit, and a malformed message is refused and does nothing else."""

from __future__ import annotations

import hashlib
import json
import random
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from shared_models.errors import ConfigError, Rejected
from shared_models.job import Job
from shared_models.messages import Budget, Contribution, Instruction
from shared_models.sums import Groups
from shared_models.wire import (
    DTYPES,
    decode_contribution,
    decode_instruction,
    encode_contribution,
    encode_instruction,
    flatten,
    unflatten,
)

MakeJob = Callable[..., Job]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def raw(dtype: torch.dtype, count: int, seed: int) -> Tensor:
    """Random bit patterns of a type, among them infinities and NaNs with every payload."""
    source = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, (count,), generator=source).bool()
    return torch.randint(0, 256, (count * dtype.itemsize,), generator=source, dtype=torch.uint8).view(dtype)


def contribution(groups: Groups, **fields: Any) -> Contribution:
    return Contribution("train", "run-1", "hospital-a", groups=groups, **fields)


def there_and_back(groups: Groups) -> Groups:
    return decode_contribution(*encode_contribution(contribution(groups))).groups


def same(a: Groups, b: Groups) -> bool:
    return {g: list(t) for g, t in a.items()} == {g: list(t) for g, t in b.items()} and all(
        (a[g][n].dtype, a[g][n].shape, bits(a[g][n])) == (b[g][n].dtype, b[g][n].shape, bits(b[g][n]))
        for g in a
        for n in a[g]
    )


def forged(manifest: bytes, blob: bytes, **changes: Any) -> tuple[bytes, bytes]:
    """A manifest with other fields, and the true size and digest of its blob."""
    head = json.loads(manifest) | changes
    head["blob"] = {"size": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
    return json.dumps(head).encode(), blob


def refused(manifest: bytes, blob: bytes) -> str:
    with pytest.raises(Rejected) as error:
        decode_contribution(manifest, blob)
    return error.value.code


# ---- what is sent is what arrives ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_keeps_every_bit_in_every_layout(name: str) -> None:
    values = raw(DTYPES[name], 60, seed=3)
    groups = {
        "model": {
            "flat": values,
            "grid": values.reshape(3, 4, 5),
            "strided": values.reshape(6, 10).t(),
            "sliced": values[1::7],
            "expanded": values[:3].reshape(3, 1).expand(3, 4),
            "scalar": values[7].reshape(()),
            "empty": values[:0].reshape(0, 5),
        }
    }
    assert same(there_and_back(groups), groups)


def test_tensors_of_all_widths_at_odd_offsets() -> None:
    shuffle = random.Random(0)
    for case in range(50):
        kinds = [shuffle.choice(list(DTYPES.values())) for _ in range(12)]
        tensors = {f"t{i}": raw(d, shuffle.randrange(4), seed=99 * case + i) for i, d in enumerate(kinds)}
        groups = {"model": tensors, "control": {"t0": raw(torch.int8, 3, case), "t1": raw(torch.float64, 2, case)}}
        got = there_and_back(groups)
        assert same(got, groups)
        assert all(t.data_ptr() % t.element_size() == 0 for ts in got.values() for t in ts.values())


def test_names_of_any_script_and_tensors_that_require_grad() -> None:
    groups = {"модель": {"a/b.c": torch.ones(2, requires_grad=True).detach(), 'q"\\': torch.zeros(1)}}
    assert same(there_and_back(groups), groups)
    assert not there_and_back({"m": {"w": torch.ones(2, requires_grad=True)}})["m"]["w"].requires_grad


@pytest.mark.parametrize("name", ["", "a\x1b[2J", "line\nbreak", "x" * 201, "\x9b31m"])
def test_a_name_that_a_terminal_would_obey_is_malformed(name: str) -> None:
    with pytest.raises((Rejected, ValueError)):
        there_and_back({"model": {name: torch.ones(1)}})


def test_an_answer_comes_back_whole_and_its_tensors_are_ours_to_change() -> None:
    sent = contribution(
        {"model": {"w": torch.randn(3)}, "control": {"w": torch.randn(3)}},
        task=2,
        round=7,
        code="no-data",
        examples=11,
        samples=22,
        steps=3,
        metrics={
            "test/0/confusion": torch.arange(4).reshape(2, 2),
            "test/0/loss": torch.tensor(0.1, dtype=torch.float64),
        },
        document={"entries": {"w": {"shape": [3]}}, "list": [1, "a", None]},
    )
    got = decode_contribution(*encode_contribution(sent))
    assert same({"metrics": got.metrics, **got.groups}, {"metrics": sent.metrics, **sent.groups})
    assert replace(got, groups={}, metrics={}) == replace(sent, groups={}, metrics={})
    before = sent.groups["model"]["w"].clone()
    got.groups["model"]["w"].zero_()
    assert torch.equal(sent.groups["model"]["w"], before)


def test_an_instruction_comes_back_whole_with_the_same_job_hash(make_job: MakeJob) -> None:
    job = make_job(method={"name": "fedprox", "mu": 0.3}, simulation={"root": "/private/place"})
    sent = Instruction(
        "train",
        "run-1",
        "hospital-a",
        job,
        fingerprint="ab" * 32,
        task=1,
        round=3,
        rounds=9,
        budget=Budget(epochs=2.5),
        evaluate=(("validation", 0), ("test", 1)),
        groups={"model": {"w": torch.randn(2, 3).bfloat16()}},
        document={"a": [1]},
    )
    manifest, blob = encode_instruction(sent)
    got = decode_instruction(manifest, blob)
    assert got.job.hash == job.hash
    assert same(got.groups, sent.groups)
    assert replace(got, groups={}, job=job) == replace(sent, groups={})
    assert b"/private/place" not in manifest
    steps = replace(sent, budget=Budget(steps=4))
    assert decode_instruction(*encode_instruction(steps)).budget == Budget(steps=4)


def test_flatten_and_back() -> None:
    groups = {"model": {"a/b": torch.ones(1), "c": torch.zeros(2)}, "control": {"c": torch.ones(())}}
    assert list(flatten(groups)) == ["model/a/b", "model/c", "control/c"]
    assert same(unflatten(flatten(groups)), groups)


# ---- what is forged is refused ---------------------------------------------------------------------------------------
GOOD = encode_contribution(contribution({"model": {"a": torch.arange(3.0), "b": torch.arange(4)}}, examples=5))


def tensors(*changes: dict[str, Any]) -> tuple[bytes, bytes]:
    """GOOD with changed entries in its tensor list."""
    listed = json.loads(GOOD[0])["tensors"]
    for entry, change in zip(listed, changes, strict=False):
        entry.update(change)
    return forged(*GOOD, tensors=listed)


def test_the_forging_itself_is_accepted() -> None:
    assert decode_contribution(*forged(*GOOD)).examples == 5
    assert decode_contribution(*tensors()).examples == 5


@pytest.mark.parametrize(
    "change",
    [
        {"offset": -1},
        {"offset": 8},  # off by some bytes: into the next tensor
        {"offset": 2**70},
        {"shape": [4]},
        {"shape": [2]},  # leaves bytes between two tensors
        {"shape": [-3]},
        {"shape": [-1, -3]},
        {"shape": [2**31, 2**31]},
        {"shape": [2**63]},
        {"shape": [2**100]},
        {"shape": [1] * 100 + [3]},
        {"shape": [1.5]},
        {"shape": None},
        {"dtype": "float128"},
        {"dtype": "complex64"},
        {"dtype": "__class__"},
        {"name": "b"},  # twice
        {"name": None},
        {"extra": 1},
    ],
)
def test_a_forged_tensor_entry_is_refused_without_memory(change: dict[str, Any]) -> None:
    message = tensors(change)
    tracemalloc.start()
    try:
        assert refused(*message) == "malformed"
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shape", [[0, 2**52, 2**52], [2**52, 2**52, 0], [0, 2**100], [0] * 65])
def test_an_empty_tensor_that_torch_could_not_hold_is_refused(shape: list[int]) -> None:
    entry = {"group": "model", "name": "a", "dtype": "float32", "offset": 0}
    small = decode_contribution(*forged(GOOD[0], b"", tensors=[{**entry, "shape": [0, 3]}]))
    assert small.groups["model"]["a"].shape == (0, 3)
    assert refused(*forged(GOOD[0], b"", tensors=[{**entry, "shape": shape}])) == "malformed"


def test_bytes_that_belong_to_no_tensor_are_refused() -> None:
    manifest, blob = GOOD
    assert refused(*forged(manifest, blob + b"\0")) == "malformed"
    assert refused(*forged(manifest, b"hidden", tensors=[])) == "malformed"


def test_many_entries_over_the_same_bytes_cannot_multiply_memory() -> None:
    """10,000 entries that each claim the whole blob of 1 MB would be copies of 10 GB where offsets are odd."""
    entry = {"group": "model", "dtype": "float32", "shape": [250_000], "offset": 1}
    manifest, _ = GOOD
    listed = [{**entry, "name": f"n{i}"} for i in range(10_000)]
    assert refused(*forged(manifest, bytes(1_000_001), tensors=listed)) == "malformed"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"version": 1}, "wire-version"),
        ({"version": "x"}, "malformed"),
        ({"kind": "shutdown"}, "malformed"),
        ({"run": "../../etc"}, "malformed"),
        ({"run": ".."}, "malformed"),
        ({"run": "/etc/passwd"}, "malformed"),
        ({"run": ".hidden"}, "malformed"),
        ({"run": "a\\b"}, "malformed"),
        ({"run": "a\n"}, "malformed"),
        ({"run": "a\u0000"}, "malformed"),
        ({"run": ""}, "malformed"),
        ({"run": "a" * 101}, "malformed"),
        ({"site": "a/b"}, "malformed"),
        ({"site": "-rf"}, "malformed"),
        ({"task": -1}, "malformed"),
        ({"round": -1}, "malformed"),
        ({"round": 10**400}, "malformed"),
        ({"examples": -1}, "malformed"),
        ({"examples": 10**400}, "malformed"),  # would overflow the weight
        ({"examples": 1e300}, "malformed"),
        ({"samples": -1}, "malformed"),
        ({"steps": -1}, "malformed"),
        ({"code": "Patient X"}, "malformed"),
        ({"code": "a" * 41}, "malformed"),
        ({"code": ""}, "malformed"),
        ({"document": [1]}, "malformed"),
        ({"tensors": {}}, "malformed"),
        ({"surprise": 1}, "malformed"),
    ],
)
def test_a_forged_head_is_refused(change: dict[str, Any], code: str) -> None:
    assert refused(*forged(*GOOD, **change)) == code


@pytest.mark.parametrize("field", sorted(json.loads(GOOD[0])))
def test_a_missing_field_is_refused(field: str) -> None:
    head = json.loads(GOOD[0])
    del head[field]
    assert refused(json.dumps(head).encode(), GOOD[1]) == "malformed"


@pytest.mark.parametrize("manifest", [b"", b"{}", b"null", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000])
def test_what_is_no_manifest_is_refused(manifest: bytes) -> None:
    assert refused(manifest, b"") == "malformed"


def test_every_truncation_and_every_flipped_bit_of_the_blob_is_refused() -> None:
    manifest, blob = GOOD
    for cut in range(len(manifest)):
        assert refused(manifest[:cut], blob) == "malformed"
    for cut in range(len(blob)):
        assert refused(manifest, blob[:cut]) == "malformed"
    assert refused(manifest, blob + b"\0") == "malformed"
    for position in range(8 * len(blob)):
        damaged = bytearray(blob)
        damaged[position // 8] ^= 1 << position % 8
        assert refused(manifest, bytes(damaged)) == "malformed"


def test_a_job_that_cannot_be_is_its_own_error(make_job: MakeJob) -> None:
    manifest, blob = encode_instruction(Instruction("probe", "r", "s", make_job(), fingerprint=""))
    head = json.loads(manifest)
    assert decode_instruction(*forged(manifest, blob)).kind == "probe"
    jobs: list[dict[str, Any]] = [{"future": 1}, {"train": {"lr": -1}}, {"model": {"name": "future"}}, {"name": "../x"}]
    for job in jobs:
        with pytest.raises(ConfigError, match=r"the server's job|unknown model"):
            decode_instruction(*forged(manifest, blob, job={**head["job"], **job}))
    heads: list[dict[str, Any]] = [
        {"evaluate": [["train", 0]]}, {"evaluate": [["test", -1]]}, {"rounds": 0}, {"steps": -1}, {"epochs": 10**400},
    ]  # fmt: skip
    for change in heads:
        with pytest.raises(Rejected):
            decode_instruction(*forged(manifest, blob, **change))


# ---- fuzz ------------------------------------------------------------------------------------------------------------
JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, 1.5, -0.0, 1e308, "", "x", "../x", "\u0000", "é", [], [[]],
    [1], [-1], [2**62, 4], {}, {"x": 1}, {"name": "vit"}, {"name": "cnn", "size": []}, "float32", "a" * 10_000,
)  # fmt: skip


def mutate(value: Any, source: random.Random) -> Any:
    """One place of a JSON document, chosen at random, is replaced, deleted, doubled or renamed."""
    if isinstance(value, dict | list) and value and source.random() < 0.85:
        copy: Any = value.copy()
        place = source.choice(list(copy)) if isinstance(copy, dict) else source.randrange(len(copy))
        action = source.random()
        if action < 0.75:
            copy[place] = mutate(copy[place], source)
        elif action < 0.85:
            del copy[place]
        elif isinstance(copy, dict):
            copy[source.choice(["x", "name", "size", "offset", "labels"])] = copy[place]
        else:
            copy.append(copy[place])
        return copy
    return source.choice(JUNK)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_fuzzed_manifests_only_ever_raise_our_errors(make_job: MakeJob, direction: str) -> None:
    groups = {"model": {"a": torch.arange(3.0), "b": torch.arange(2, dtype=torch.int8)}, "c": {"a": torch.ones(())}}
    decode: Callable[[bytes, bytes], object]
    if direction == "up":
        decode = decode_contribution
        manifest, blob = encode_contribution(contribution(groups, metrics={"test/0/loss": torch.ones(1)}, examples=3))
    else:
        decode = decode_instruction
        job = make_job(model={"name": "cnn"}, method={"name": "scaffold"})
        manifest, blob = encode_instruction(Instruction("train", "r", "s", job, "f", groups=groups))
    source = random.Random(direction)
    head = json.loads(manifest)
    outcomes = {"decoded": 0, "refused": 0}
    longest = 0
    tracemalloc.start()
    for _ in range(3000):
        changed = head
        for _ in range(source.choice([1, 1, 2, 4])):
            changed = mutate(changed, source)
        data = json.dumps(changed).encode()
        if source.random() < 0.2:  # and bytes flipped in the JSON itself
            damaged = bytearray(data)
            for _ in range(source.randrange(1, 4)):
                damaged[source.randrange(len(damaged))] = source.randrange(256)
            data = bytes(damaged)
        try:
            decode(data, blob)
            outcomes["decoded"] += 1
        except (Rejected, ConfigError) as error:
            outcomes["refused"] += 1
            longest = max(longest, len(str(error)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert outcomes["refused"] > 1500
    assert outcomes["decoded"] > 50  # some changes are harmless, so the fuzz reaches the end of the decoder
    assert peak < 20_000_000
    assert longest < 2000
