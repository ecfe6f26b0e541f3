"""One built model that serves every site of this process in turn: weights are copied in place, never reallocated."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from client.augment import Augment
from shared_models.determinism import determinism as determinism
from shared_models.errors import ConfigError, FingerprintError
from shared_models.job import Job
from shared_models.job_parts import TrainPart
from shared_models.methods.base import make_pieces
from shared_models.models import models
from shared_models.nearest_mean import find_head, inputs_of
from shared_models.spec import build_model, frozen_modules
from shared_models.sums import Groups
from shared_models.tasks.base import Batch, make_task


class Workbench:
    """What one job needs on this device: model, spec, task, method pieces, optimizer, augmentation.

    Args:
        job: the resolved job.
        device: `cuda` where there is one, else `cpu`, unless given.
        start: what an earlier stage of the job left, of the entries that stay at the node.

    Attributes:
        halvings: how often a batch had to be halved so far because memory ran out; it stays for the next rounds.
        per_sample: the way to per-sample gradients that was compared with a one-sample loop; empty before.
    """

    def __init__(self, job: Job, device: torch.device | None = None, start: Mapping[str, Tensor] | None = None) -> None:
        self.job = job
        self.start = start or {}
        self.device = device or make_device()
        self.model, self.spec = build_model(job, receives=True, start=self.start)
        self.model.to(self.device)
        self.task = make_task(job)
        self.pieces = make_pieces(job)
        self.augment = Augment(job.augment, self.task.target, job.data.shape) if job.augment.active else None
        self._former: nn.Module | None = None
        self.halvings = 0
        self.per_sample = ""
        self.entries: dict[str, Tensor] = {k: v.detach() for k, v in self.model.state_dict(keep_vars=True).items()}
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(job.train, list(self.trained.values()))
        self._sent = frozenset(self.spec.sent)
        local = [e.key for e in self.spec.entries if e.key not in self._sent and e.nature != "alias"]
        self._initial = {k: self.entries[k].clone() for k in local}
        self._frozen = frozen_modules(self.model, self.spec)
        for module in self._frozen:  # a model is built in training mode
            module.eval()

    def to_training(self) -> None:
        """Put the model into training mode, but for normalisation layers whose statistics are not trained."""
        if not self.model.training:
            self.model.train()
            for module in self._frozen:
                module.eval()

    def autocast(self) -> AbstractContextManager[object]:
        """The job's precision for a forward pass."""
        if self.job.train.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def former(self, entries: Mapping[str, Tensor]) -> nn.Module:
        """A second model with these entries, in evaluation mode; built once."""
        if self._former is None:
            self._former = copy.deepcopy(self.model).eval().requires_grad_(False)
        self._former.load_state_dict(dict(entries))
        return self._former

    @cached_property
    def head(self) -> nn.Linear:
        """The layer whose input are an example's features; raises ConfigError where the model has none."""
        return find_head(self.model, models[self.job.model.name].heads)

    def features(self, batch: Batch) -> Tensor:
        """(B, D) float32, of length 1: what the head is given for each example."""
        with inputs_of(self.head) as seen, self.autocast():
            self.task.forward(self.model, batch)
        return F.normalize(seen[0].float(), dim=1)

    def free(self) -> None:
        """Give back the GPU memory that torch keeps for itself."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def load(self, model: Mapping[str, Tensor], personal: Groups) -> None:
        """Begin a round: sent entries from the server, personal ones from the node, all others as initialised.

        Raises:
            FingerprintError: the server's are not exactly the sent entries, with their shapes and dtypes.
        """
        self._require_sent(model)
        received = {**self._initial, **personal.get("model", {}), **model}
        torch._foreach_copy_([self.entries[k] for k in received], list(received.values()))
        self.optimizer.state.clear()
        self.optimizer.zero_grad(set_to_none=True)

    def sent(self) -> dict[str, Tensor]:
        """The entries that go up: views of the live model, valid until the next `load`."""
        return {k: self.entries[k] for k in self.spec.sent}

    def personal(self) -> Groups:
        """The entries that stay on the node."""
        return {"model": {k: self.entries[k] for k in self.spec.personal}}

    def _require_sent(self, model: Mapping[str, Tensor]) -> None:
        for name in {**model, **dict.fromkeys(self.spec.sent)}:
            if name not in model or name not in self._sent:
                what = "is missing" if name not in model else "is not for the server to give"
                raise FingerprintError(f"the server's model is not this node's: '{name[:80]}' {what}")
            given, ours = model[name], self.entries[name]
            if given.shape != ours.shape or given.dtype != ours.dtype:
                raise FingerprintError(
                    f"the server's '{name}' is {given.dtype} {tuple(given.shape)}, "
                    f"this node's is {ours.dtype} {tuple(ours.shape)}"
                )


class Benches:
    """Keeps the last job's workbench: the next round of the same job with the same start finds it warm."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self._bench: Workbench | None = None

    def __call__(self, job: Job, start: Mapping[str, Tensor] | None = None) -> Workbench:
        """The warm one where it is the same job, else a new one."""
        bench, start = self._bench, start or {}
        if bench is None or (bench.job is not job and bench.job.hash != job.hash) or not _same(bench.start, start):
            self._bench = bench = Workbench(job, self.device, start)
        return bench


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a is b or (a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a))


def make_device(name: str = "auto") -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU.

    Raises:
        ConfigError: this machine has no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        found = f"only {count}" if count else "none that torch can use"
        raise ConfigError(
            f"device '{name}' is asked for, and this machine has {found}",
            hint="Name another as `device` in client.toml; `fedzoo doctor` tells what torch sees",
        )
    return device


def make_optimizer(part: TrainPart, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """torch's own optimizers, with the job's settings."""
    if part.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=part.lr, weight_decay=part.weight_decay)
    return torch.optim.SGD(parameters, lr=part.lr, momentum=part.momentum, weight_decay=part.weight_decay)
