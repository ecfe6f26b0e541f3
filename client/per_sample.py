"""Gradients of single examples, three ways that must agree.

| way     | how                                               | goes with                                       |
|---------|---------------------------------------------------|-------------------------------------------------|
| `vmap`  | `torch.func.vmap(grad(loss))` over the batch      | everything whose shapes do not depend on values |
| `hooks` | Opacus: from each layer's inputs and output grads | layers that Opacus knows, batch first           |
| `loop`  | one example after another                         | everything; the reference                       |

Hooks can be silently wrong (Opacus 1.6: convolutions of inputs that are not contiguous), so a node compares before it
trains (`require_agreement`).
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from client.workbench import Workbench
from shared_models.errors import PrivacyError
from shared_models.keys import keyed_global
from shared_models.methods.base import Pieces, objective
from shared_models.models import models
from shared_models.tasks.base import Batch, Task

Gradients = dict[str, Tensor]  # name -> (B, *shape)
TOLERANCE = 1e-3  # relative, of all entries of one example's gradient together
ALIKE = "model."
IMPOSSIBLE = "no-gradients"

log = logging.getLogger("fedzoo.client")


class LossOf(nn.Module):
    """A batch's losses as one module: the task's, and what methods add to it; all of it lies inside the clip."""

    def __init__(self, model: nn.Module, task: Task, pieces: Pieces = ()) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.pieces = pieces

    def forward(self, x: Tensor, y: Tensor, proposals: Tensor | None) -> Tensor:
        """(B,)."""
        batch = Batch(x, y, proposals)
        outputs = self.task.forward(self.model, batch)
        params = {n: p for n, p in self.model.named_parameters() if isinstance(p, Tensor)} if self.pieces else {}
        return objective(self.task, outputs, batch, params, self.pieces)


class PerSample:
    """Gradients of the examples of a batch, by one of the three ways.

    Args:
        bench: model, task and trained parameters.
        pieces: methods that add a term to the loss.
        way: `vmap`, `hooks` or `loop`.
    """

    def __init__(self, bench: Workbench, pieces: Pieces, way: str) -> None:
        self.loss = LossOf(bench.model, bench.task, pieces)
        self.trained: Mapping[str, nn.Parameter] = bench.trained
        self.autocast = bench.autocast
        self.way = way

    def __call__(self, batch: Batch, randomness: str = "different") -> Gradients:
        """name -> (B, *shape), on the model's device. What the task draws is drawn anew for each example."""
        if len(batch) == 0:
            return {n: p.new_zeros((0, *p.shape)) for n, p in self.trained.items()}
        ways: dict[str, Callable[[], Gradients]] = {
            "vmap": lambda: self._vmap(batch, randomness),
            "hooks": lambda: self._hooks(batch),
            "loop": lambda: self._loop(batch),
        }
        return ways[self.way]()

    def _vmap(self, batch: Batch, randomness: str) -> Gradients:
        def one(params: Mapping[str, Tensor], x: Tensor, y: Tensor, proposals: Tensor | None) -> Tensor:
            regions = None if proposals is None else proposals[None]
            with self.autocast():
                losses: Tensor = functional_call(self.loss, dict(params), (x[None], y[None], regions))
            return losses.sum()

        params = {ALIKE + n: p.detach() for n, p in self.trained.items()}
        over = (None, 0, 0, None if batch.proposals is None else 0)
        found = vmap(grad(one), in_dims=over, randomness=randomness)(params, batch.x, batch.y, batch.proposals)
        return {n: found[ALIKE + n] for n in self.trained}

    def _loop(self, batch: Batch) -> Gradients:
        rows = [self._one(batch[i : i + 1]) for i in range(len(batch))]
        return {n: torch.stack([row[n] for row in rows]) for n in self.trained}

    def _one(self, single: Batch) -> Gradients:
        with self.autocast():
            loss = self.loss(single.x, single.y, single.proposals).sum()
        found = torch.autograd.grad(loss, list(self.trained.values()), allow_unused=True)
        pairs = zip(self.trained.items(), found, strict=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}

    def _hooks(self, batch: Batch) -> Gradients:
        from opacus.grad_sample import GradSampleModule

        hooked = GradSampleModule(self.loss, batch_first=True, loss_reduction="sum")
        try:
            with self.autocast():
                loss = hooked(batch.x.contiguous(), batch.y, batch.proposals)
            with warnings.catch_warnings():  # torch tells that the inputs need no gradient, as is meant
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                loss.sum().backward()
            return {n: self._sample(p, len(batch)) for n, p in self.trained.items()}
        finally:
            hooked.to_standard_module()  # the model is as before: nothing of Opacus stays on it
            for parameter in self.trained.values():
                parameter.grad = None

    @staticmethod
    def _sample(parameter: nn.Parameter, count: int) -> Tensor:
        found = getattr(parameter, "grad_sample", None)
        if found is None:
            return parameter.new_zeros((count, *parameter.shape))
        parts: list[Tensor] = found if isinstance(found, list) else [found]  # a layer that was used several times
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total.detach()


def choose(bench: Workbench, pieces: Pieces, batch: Batch) -> str:
    """The way the job asks for, or the soundest that the model declares and the task allows, once it is compared.

    Args:
        bench: model and task.
        pieces: methods that add a term to the loss.
        batch: a few examples to compare with.

    Raises:
        PrivacyError: there is none, or it differs from a one-sample loop.
    """
    name, asked = bench.job.model.name, bench.job.privacy.gradients
    known = models[name].per_sample_gradients
    ways = [way for way in known if asked in ("auto", way)]
    for way in ways:
        try:
            error = require_agreement(PerSample(bench, pieces, way), batch, seed=bench.job.seed)
        except PrivacyError as failed:
            if failed.code != IMPOSSIBLE or way == ways[-1]:
                raise
            log.info("%s", failed)
            continue
        log.info("per-sample gradients by %s, relative error %.1e against a one-sample loop", way, error)
        return way
    raise PrivacyError(
        f"model '{name}' has no per-sample gradients by '{asked}', it declares {', '.join(known) or 'none'}",
        hint="Set privacy.gradients = 'auto', or privacy.mode = 'client'",
    )


def require_agreement(found: PerSample, batch: Batch, seed: int) -> float:
    """Compare with a loop over these few examples, and return the relative error; both draw the same at random.

    Where float32 alone could explain a difference (a ReLU or a maximum near its edge), float64 decides.

    Raises:
        PrivacyError: they differ by more than a thousandth, or cannot be computed.
    """
    error = _difference(found, batch, seed)
    if error > TOLERANCE:
        error = _difference(_doubled(found), _double(batch), seed)
    if not error <= TOLERANCE:
        raise PrivacyError(
            f"per-sample gradients by '{found.way}' differ from those of a one-sample loop (relative error "
            f"{error:.2g}), so the clip would not bound what one example does",
            hint="Set privacy.gradients to another way (fedzoo models show lists them), or privacy.mode = 'client'",
            code="per-sample-gradients",
        )
    return error


def _difference(found: PerSample, batch: Batch, seed: int) -> float:
    """Largest error of one example's gradient, relative to its norm."""
    loop = PerSample.__new__(PerSample)
    loop.__dict__.update(found.__dict__)
    loop.way = "loop"

    def seeded(way: PerSample, part: Batch) -> Gradients:
        with keyed_global(seed, part.x.device):
            return way(part, randomness="same")

    def flat(gradients: Gradients) -> Tensor:
        return torch.cat([g.flatten(1).double() for g in gradients.values()], dim=1)

    singles = [batch[i : i + 1] for i in range(len(batch))]
    reference = torch.cat([flat(seeded(loop, single)) for single in singles])
    try:
        if found.way != "vmap" and _draws(found, batch, seed):  # a batch draws otherwise than its examples alone
            given = torch.cat([flat(seeded(found, single)) for single in singles])
        else:
            given = flat(seeded(found, batch))
    except (RuntimeError, ValueError) as error:
        raise PrivacyError(
            f"per-sample gradients by '{found.way}' cannot be computed here: {str(error).splitlines()[0]}",
            hint="Set privacy.gradients to another way (fedzoo models show lists them), or privacy.mode = 'client'",
            code=IMPOSSIBLE,
        ) from error
    errors = (given - reference).norm(dim=1) / reference.norm(dim=1).clamp(min=1e-12)
    return float(errors.max()) if bool(torch.isfinite(errors).all()) else float("inf")


@torch.no_grad()
def _draws(found: PerSample, batch: Batch, seed: int) -> bool:
    """Whether the loss depends on what is drawn at random."""
    said = []
    for number in (seed, seed + 1):
        with keyed_global(number, batch.x.device):
            said.append(found.loss(batch.x, batch.y, batch.proposals))
    return not torch.equal(*said)


def _doubled(found: PerSample) -> PerSample:
    made = PerSample.__new__(PerSample)
    loss = LossOf(copy.deepcopy(found.loss.model).double(), found.loss.task, found.loss.pieces)
    trained = {n: p for n, p in loss.model.named_parameters() if n in found.trained}
    made.__dict__.update(loss=loss, trained=trained, autocast=nullcontext, way=found.way)
    return made


def _double(batch: Batch) -> Batch:
    parts = (batch.x, batch.y, batch.proposals)
    return Batch(*(t.double() if t is not None and t.is_floating_point() else t for t in parts))  # type: ignore[arg-type]
