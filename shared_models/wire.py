"""Instructions and contributions as bytes: a JSON manifest and one blob of raw tensor bytes. No pickle, ever.

The manifest names every tensor with group, name, dtype, shape and place in the blob, and the blob by its SHA-256, so a
blob may later travel apart from its manifest. Tensors fill the blob in the order of the manifest, without gap or
overlap, so decoding never takes more memory than the blob. float16, bfloat16, every integer, bool and zero-dimensional
tensors keep their type; a group without tensors does not travel. Whatever is malformed raises `Rejected("malformed")`
and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from shared_models.errors import Rejected
from shared_models.job import Job
from shared_models.messages import Budget, Contribution, Instruction, Kind, Part
from shared_models.sums import Groups
from shared_models.validation import validate

VERSION = 3
DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"  # runs and sites name folders on a node: no separator, no leading dot
LIMIT = 2**53  # numbers below it are exact in float64 and in every JSON reader
MAX_DIMS = 64  # of a tensor, torch's own limit
KEY = r"^[^\x00-\x1f\x7f-\x9f]{1,200}$"  # names of tensors reach a terminal: no control characters
_METRICS, _STATISTICS = "metrics", "statistics"  # they travel as one more group, which no method may use as a name

Count = Annotated[int, Field(ge=0, lt=LIMIT)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class _Tensor(_Strict):
    group: str = Field(pattern=KEY)
    name: str = Field(pattern=KEY)
    dtype: str
    shape: Annotated[tuple[Count, ...], Field(max_length=MAX_DIMS)]
    offset: Count


class _Blob(_Strict):
    size: Count
    sha256: str


class _Head(_Strict):
    version: int
    kind: Kind
    run: str = Field(pattern=NAME)
    site: str = Field(pattern=NAME)
    task: Count
    round: Count
    tensors: tuple[_Tensor, ...]
    blob: _Blob
    document: dict[str, Any]


class _Down(_Head):
    job: dict[str, Any]
    stage: Count
    fingerprint: str
    rounds: Annotated[Count, Field(gt=0)]
    epochs: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    steps: Count | None
    evaluate: tuple[tuple[Part, Count], ...]


class _Up(_Head):
    code: str = Field(pattern=r"^[a-z0-9-]{1,40}$")
    examples: Count
    samples: Count
    steps: Count
    halvings: Count
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)]


_H = TypeVar("_H", bound=_Head)


def encode_instruction(instruction: Instruction) -> tuple[bytes, bytes]:
    """(manifest, blob)."""
    tensors, blob = _pack(_with(instruction.groups, _STATISTICS, instruction.statistics))
    head = _Down(
        **_common(instruction),
        tensors=tensors,
        blob=_describe(blob),
        job=json.loads(instruction.job.whole.canonical),
        stage=instruction.job.stage,
        fingerprint=instruction.fingerprint,
        rounds=instruction.rounds,
        epochs=instruction.budget.epochs,
        steps=instruction.budget.steps,
        evaluate=instruction.evaluate,
    )
    return head.model_dump_json().encode(), blob


def digest(instruction: Instruction) -> str:
    """SHA-256 of all that an instruction says, its tensors too: equal only for one that asks for the very same.

    The order of tensors says nothing: a server that resumes from its checkpoint may send them in another.
    """
    groups = {group: dict(sorted(tensors.items())) for group, tensors in sorted(instruction.groups.items())}
    ordered = replace(instruction, groups=groups, statistics=dict(sorted(instruction.statistics.items())))
    return hashlib.sha256(encode_instruction(ordered)[0]).hexdigest()


def _job(written: dict[str, Any], stage: int, approves: Callable[[Job], bool]) -> Job:
    job = validate(Job, written, "the server's job")
    if not approves(job):
        job.__dict__["stage"] = stage
        return job
    job = Job.resolve(written, where="the server's job")
    if stage >= len(job.steps):
        raise Rejected(f"stage {stage} of a job that has {len(job.steps)}", code="malformed")
    return job.steps[stage]


def decode_instruction(manifest: bytes, blob: bytes, approves: Callable[[Job], bool] = lambda job: True) -> Instruction:
    """The inverse; raises Rejected("malformed"), or the job's own error where it is of another version.

    Args:
        manifest: what `encode_instruction` gave first.
        blob: what it gave second.
        approves: asked with the job as it is written, whose hash is that of the resolved one. A job that is not
            approved stays as it is written: nothing of it, of its tokenizer say, is built, and it is to be refused.
    """
    head = _parse(_Down, manifest, blob)
    groups = _unpack(head, blob)
    statistics = groups.pop(_STATISTICS, {})
    return Instruction(
        kind=head.kind,
        run=head.run,
        site=head.site,
        job=_job(head.job, head.stage, approves),
        fingerprint=head.fingerprint,
        task=head.task,
        round=head.round,
        rounds=head.rounds,
        budget=Budget(head.epochs, head.steps),
        evaluate=head.evaluate,
        groups=groups,
        document=head.document,
        statistics=statistics,
    )


def encode_contribution(contribution: Contribution) -> tuple[bytes, bytes]:
    """(manifest, blob)."""
    tensors, blob = _pack(_with(contribution.groups, _METRICS, contribution.metrics))
    head = _Up(
        **_common(contribution),
        tensors=tensors,
        blob=_describe(blob),
        code=contribution.code,
        examples=contribution.examples,
        samples=contribution.samples,
        steps=contribution.steps,
        halvings=contribution.halvings,
        noise=contribution.noise,
    )
    return head.model_dump_json().encode(), blob


def decode_contribution(manifest: bytes, blob: bytes) -> Contribution:
    """The inverse; raises Rejected("malformed")."""
    head = _parse(_Up, manifest, blob)
    groups = _unpack(head, blob)
    metrics = groups.pop(_METRICS, {})
    return Contribution(
        kind=head.kind,
        run=head.run,
        site=head.site,
        task=head.task,
        round=head.round,
        code=head.code,
        examples=head.examples,
        samples=head.samples,
        steps=head.steps,
        halvings=head.halvings,
        noise=head.noise,
        metrics=metrics,
        groups=groups,
        document=head.document,
    )


def _with(groups: Groups, name: str, more: Mapping[str, Tensor]) -> Groups:
    return {**groups, name: more} if more else groups


def _common(message: Instruction | Contribution) -> dict[str, Any]:
    return {
        "version": VERSION,
        "kind": message.kind,
        "run": message.run,
        "site": message.site,
        "task": message.task,
        "round": message.round,
        "document": dict(message.document),
    }


def _describe(blob: bytes) -> _Blob:
    return _Blob(size=len(blob), sha256=hashlib.sha256(blob).hexdigest())


def _pack(groups: Groups) -> tuple[tuple[_Tensor, ...], bytes]:
    heads: list[_Tensor] = []
    parts: list[bytes] = []
    offset = 0
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            heads.append(_Tensor(group=group, name=name, dtype=dtype, shape=tuple(tensor.shape), offset=offset))
            parts.append(raw)
            offset += len(raw)
    return tuple(heads), b"".join(parts)


def _parse(head: type[_H], manifest: bytes, blob: bytes) -> _H:
    try:
        parsed = head.model_validate_json(manifest)
    except ValueError:
        raise Rejected("a message's manifest is malformed", code="malformed") from None
    if parsed.version != VERSION:
        raise Rejected(f"wire version {parsed.version}, this side speaks {VERSION}", code="wire-version")
    if parsed.blob != _describe(blob):
        raise Rejected("a message's blob does not match its size or SHA-256", code="malformed")
    return parsed


def _unpack(head: _Head, blob: bytes) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    buffer = bytearray(blob)  # torch wants writable memory; one copy for all tensors
    end = 0
    for t in head.tensors:
        dtype = DTYPES.get(t.dtype)
        # the strides of an empty tensor count its other dimensions, and torch must be able to
        if dtype is None or math.prod(n or 1 for n in t.shape) >= LIMIT or t.name in groups.get(t.group, {}):
            raise Rejected(f"tensor '{t.name[:80]}' has no valid dtype, shape or name", code="malformed")
        count = math.prod(t.shape)
        start, end = end, end + count * dtype.itemsize
        if t.offset != start or end > len(buffer):
            raise Rejected(f"tensor '{t.name[:80]}' does not lie where the one before it ends", code="malformed")
        groups.setdefault(t.group, {})[t.name] = _tensor(buffer, dtype, count, start).reshape(t.shape)
    if end != len(buffer):
        raise Rejected(f"{len(buffer) - end} bytes of the blob belong to no tensor", code="malformed")
    return groups


def _tensor(buffer: bytearray, dtype: torch.dtype, count: int, offset: int) -> Tensor:
    if count == 0:
        return torch.empty(0, dtype=dtype)
    if offset % dtype.itemsize:  # after tensors of another width
        raw = torch.frombuffer(buffer, dtype=torch.uint8, count=count * dtype.itemsize, offset=offset)
        return raw.clone().view(dtype)
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset)


def flatten(groups: Groups) -> dict[str, Tensor]:
    """`{"group/name": tensor}`, as checkpoints and state files hold it."""
    return {f"{group}/{name}": t for group, tensors in groups.items() for name, t in tensors.items()}


def unflatten(flat: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The inverse of `flatten`; a group's name has no slash."""
    groups: dict[str, dict[str, Tensor]] = {}
    for path, tensor in flat.items():
        group, _, name = path.partition("/")
        groups.setdefault(group, {})[name] = tensor
    return groups
