"""A learning method is one file with two halves: what the server does with a cohort, what a client does in a round.

Server half (pure; states and means are groups of named float tensors):

    state = init(template, trained)          before round 0
    down(state)                              the groups every site of the cohort receives
    finish(state, mean, cohort, population)  the next state from the means of what came up
    refine(state, model, job, round)         the next state from the model itself, with no data

Client half (pure functions of tensors, also under `torch.func.vmap`):

    round_state = begin_round(down, kept)
    outputs = see(outputs, batch, round_state)                   what the task's loss sees of the model's outputs
    values = loss(values, params, batch, outputs, round_state)   (B,) -> (B,), from the task's loss, per sample
    grads = grad(grads, params, round_state)                     acts on parameters, after any per-sample clip
    round_state = after_step(grads, before, params, round_state)
    up, kept = end_round(model, down, kept, round_state, progress)
    kept = end_task(model, task, batches, kept)                  when a stream moves on

A method with a closed form overrides `answer` instead of these: there is no training, the site sends sums over its
examples, and `finish` solves for the model.

    up = answer(model, task, batches, down)

`kept` is the method's own state of one site; it stays on the node. A continual method overrides only the client half
and crosses with any server half: the client runs both, the federated method's pieces first.

What a method remembers of examples is the client's business (`client.replay`): it declares `draws`, and finds what was
drawn behind the batch's own examples, told apart by `Batch.past`. `former` names weights of an earlier model, whose
outputs for the batch then stand there too. One that `herds` has its exemplars chosen by `client.exemplars`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor, nn

from shared_models.job import Job
from shared_models.registry import Registry
from shared_models.sums import Groups
from shared_models.tasks.base import Batch, Task

Tensors = Mapping[str, Tensor]
Weighting = Literal["examples", "uniform"]
NEVER = -1e4  # a logit whose probability is 0 in float32 and in bfloat16


class MethodSettings(BaseModel):
    """Base of a method's own settings: the keys beside `name` in `[method]` or `[continual]`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ReplaySettings(MethodSettings):
    """What a site keeps of the past.

    Attributes:
        buffer: examples that each site keeps. Where one client stands for all sites (`centralized`) it keeps as many as
            they do together.
        replay: how many of them are drawn in a step; as many as `train.batch_size` by default.
    """

    buffer: PositiveInt = 200
    replay: PositiveInt | None = None


@dataclass(frozen=True)
class Progress:
    """What one client did in one round.

    Attributes:
        steps: optimizer steps K.
        samples: examples processed, counting repeats.
        lr_sum: the sum of the K learning rates.
        halvings: how often its batches were halved because memory ran out.
    """

    steps: int
    samples: int
    lr_sum: float
    halvings: int = 0


class Method:
    """Both halves with their defaults, which together are: send the model down, average it by examples, add nothing.

    Attributes:
        continual: whether it belongs into `[continual]` (client half only) or into `[method]`.
        draws: how often a step draws from the examples that the site keeps of the past; 0: it keeps none.
        keeps_outputs: whether the model's outputs are kept with them.
        reference: whether what is drawn gives a gradient of its own (`round_state["reference"]`, for `grad`) instead of
            joining the batch.
        whole: whether a task is trained on with all tasks before it, as if no data ever went away.
        herds: whether what is kept is chosen by herding at the end of each task, and the model then measured by the
            nearest mean of what all sites keep.
    """

    Settings: ClassVar[type[MethodSettings]] = MethodSettings
    continual: ClassVar[bool] = False
    draws: ClassVar[int] = 0
    keeps_outputs: ClassVar[bool] = False
    reference: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    herds: ClassVar[bool] = False
    name: ClassVar[str]

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    # ---- server half -------------------------------------------------------------------------------------------------
    def init(self, template: Tensors, trained: Sequence[str]) -> Groups:
        """State before round 0. `template` holds every entry that is sent, `trained` names those an optimizer moves."""
        return {"model": template}

    def down(self, state: Groups) -> Groups:
        """What each selected site receives; a training answer has the same groups, names, shapes and dtypes."""
        return {"model": state["model"]}

    @property
    def weighting(self) -> Weighting:
        """A site's weight in every mean: its number of training examples, or 1."""
        return getattr(self.settings, "weighting", "examples")

    def finish(self, state: Groups, mean: Groups, cohort: int, population: int) -> Groups:
        """The next state. `mean`: weighted means over the `cohort` accepted sites of `population` known ones."""
        return {**state, "model": mean["model"]}

    def refine(self, state: Groups, model: nn.Module, job: Job, round: int) -> Groups:
        """The state after a round that is aggregated, where the server trains by itself.

        All it keeps has to be in the state, and all it draws keyed (`shared_models.keys`): a run that is resumed makes
        it again. `model` is built for the job, and what it holds beside entries that are sent are its start values.
        """
        return state

    # ---- client half -------------------------------------------------------------------------------------------------
    def begin_round(self, down: Groups, kept: Groups) -> Groups:
        """Constants of this round.

        In a stream `kept` has a group `stream` besides: `before` and `now`, (C,) bool, the classes that earlier tasks
        bring and those of this one.
        """
        return {}

    def former(self, round_state: Groups) -> Tensors:
        """All entries of an earlier model that is asked beside the one in training; empty: there is none yet."""
        return {}

    def see(self, outputs: Tensor, batch: Batch, round_state: Groups) -> Tensor:
        """What the task's loss is given for the model's outputs."""
        return outputs

    def loss(self, values: Tensor, params: Tensors, batch: Batch, outputs: Tensor, round_state: Groups) -> Tensor:
        """What is trained on, (B,), from the task's loss `values`, (B,); `outputs` are as the model gave them."""
        return values

    def grad(self, grads: Tensors, params: Tensors, round_state: Groups) -> Tensors:
        """Gradients of the mean loss -> the gradients the optimizer sees."""
        return grads

    def after_step(self, grads: Tensors, before: Tensors, params: Tensors, round_state: Groups) -> Groups:
        """The round's state after a step that moved the parameters from `before`; `grads` are those of the loss."""
        return round_state

    def end_round(
        self, model: Tensors, down: Groups, kept: Groups, round_state: Groups, progress: Progress
    ) -> tuple[Groups, Groups]:
        """(groups that go up, what is kept). `model`: the sent entries after training."""
        return {"model": model}, kept

    def answer(self, model: nn.Module, task: Task, batches: Iterable[Batch], down: Groups) -> Groups:
        """What goes up in place of a trained model: groups of the form of `down`, from the site's examples in order.

        Asked only of a method that overrides it. What it draws comes from torch's global generator, which is keyed by
        site and round.
        """
        return down

    def end_task(self, model: nn.Module, task: Task, batches: Iterable[Batch], kept: Groups) -> Groups:
        """What is kept when task's data are about to disappear."""
        return kept


methods: Registry[type[Method]] = Registry("method", "shared_models.methods")


def method(name: str) -> Callable[[type[Method]], type[Method]]:
    """Decorator that registers a Method class under a name."""

    def add(declared: type[Method]) -> type[Method]:
        declared.name = name
        return methods.register(name)(declared)

    return add


def make_method(job: Job) -> Method:
    """The job's federated method."""
    declared = methods[job.method.name]
    return declared(declared.Settings(**job.method.keys))


def make_pieces(job: Job) -> tuple[Method, ...]:
    """The methods whose client halves run at a site, in order: the federated one, then the continual one."""
    declared = methods[job.continual.name]
    return (make_method(job), declared(declared.Settings(**job.continual.keys)))


Pieces = Sequence[tuple[Method, Groups]]


def objective(task: Task, outputs: Any, batch: Batch, params: Tensors, pieces: Pieces) -> Tensor:
    """What is trained on, (B,): the task's loss, as each method with its round state sees and changes it."""
    seen = outputs
    for piece, state in pieces:
        seen = piece.see(seen, batch, state)
    values = task.loss(seen, batch)
    for piece, state in pieces:
        values = piece.loss(values, params, batch, outputs, state)
    return values


def overrides(piece: Method, hook: str) -> bool:
    """Whether a method does anything in a hook, so that an untouched one costs nothing."""
    return getattr(type(piece), hook) is not getattr(Method, hook)
