"""Data-free knowledge distillation at the server (dfkd), against forgetting in federated class-incremental learning.

When a task ends, the server has two models: the former one, as it was when the task before ended, and the averaged one.
Let K be the classes that a model knows: those of all earlier tasks, or those of this one. Together they say of x

    a_c(x) = z_c(x) - 1/|K| sum_{k in K} z_k(x)        z of the model that knows c; the mean of both where both do

(deep model consolidation: Zhang et al. 2020, "Class-incremental Learning via Deep Model Consolidation", double
distillation). The server has no x. It makes images as DeepInversion does (Yin et al. 2020), without its priors: from
noise, by steps of Adam that lower the cross-entropy of a(x) towards each of the known classes alike. From the former
model on, the new one is then trained on the noise and on the images made of it to say what both said:

    min_w  E_x mean_c (z_c(x; w) - 1/|S| sum_{s in S} z_s(x; w) - a_c(x))^2        S: all classes so far

Where sites train on earlier tasks' examples again (replay), the averaged model knows all classes so far, and the new
one goes on from it.

Both models together make the images of old and of new classes, or these would be told apart by how they were made. The
rounds of a task are FedAvg's, and nothing but the model travels. TARGET (Zhang et al. 2023) and MFCL (Babakniya et al.
2023) have the same aim, and send images or a generator to the sites.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from shared_models.job import Job
from shared_models.job_parts import DataPart
from shared_models.keys import generator
from shared_models.methods.base import Method, Tensors, make_pieces, method
from shared_models.methods.fedavg import FedAvgSettings
from shared_models.schedule import task_of
from shared_models.sums import Groups

Answer = Callable[[Tensor], Tensor]  # (B, *shape) -> (B, classes known)


class DFKDSettings(FedAvgSettings):
    """What the server does at the end of each task but the first.

    Attributes:
        images: made for each class that is known by then; as many examples of noise are taken besides.
        image_steps: of Adam, that make an image of noise; many make all images of a class alike.
        image_lr: their rate, in units of noise with deviation 1.
        steps: of Adam, that train the model.
        server_lr: their rate.
        batch_size: of both.
    """

    images: PositiveInt = 100
    image_steps: PositiveInt = 50
    image_lr: Annotated[float, Field(gt=0)] = 0.05
    steps: PositiveInt = 400
    server_lr: Annotated[float, Field(gt=0)] = 3e-3
    batch_size: PositiveInt = 64


@method("dfkd")
class DataFreeDistillation(Method):
    """FedAvg, and at the end of a task one model that says what the former one and the averaged one say."""

    Settings = DFKDSettings

    def refine(self, state: Groups, model: nn.Module, job: Job, round: int) -> Groups:
        """After the last round of a task the averaged model gives way to the distilled one, which is then the former.

        The state keeps the former model's sent entries as `former`.
        """
        task = task_of(job, round)
        if task_of(job, round + 1) == task or len(job.tasks) == 1:
            return state
        averaged = state["model"]
        if task:
            averaged = self._distilled(model.eval(), state["former"], averaged, job, task)
        return {**state, "model": averaged, "former": {name: value.clone() for name, value in averaged.items()}}

    def _distilled(self, model: nn.Module, former: Tensors, averaged: Tensors, job: Job, task: int) -> Tensors:
        old = sorted({c for classes in job.tasks[:task] for c in classes})
        known, source = sorted({*old, *job.tasks[task]}), generator(job.seed, "dfkd", task=task)
        again = trains_again(job)
        new = known if again else list(job.tasks[task])
        both = together([(_with(model, former), old), (_with(model, averaged), new)], known)
        noise = torch.randn(self.settings.images * len(known), *job.data.shape, generator=source)
        wanted = torch.arange(len(known)).repeat(self.settings.images)
        shown = pixels(job.data)
        x = torch.cat([shown(noise), shown(self._moved(noise, wanted, both, shown))])
        with torch.no_grad():
            said = torch.cat([both(part) for part in x.split(self.settings.batch_size)])
        _put(model, averaged if again else former)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=self.settings.server_lr)
        for _ in range(self.settings.steps):
            rows = torch.randint(len(x), (self.settings.batch_size,), generator=source)
            optimizer.zero_grad()
            distance(model(x[rows])[:, known], said[rows]).backward()
            optimizer.step()
        optimizer.zero_grad()
        entries = model.state_dict()
        return {name: entries[name].detach().clone() for name in averaged}

    def _moved(self, noise: Tensor, wanted: Tensor, both: Answer, shown: Answer) -> Tensor:
        """The noise, moved until `both` sees in it the `wanted` classes, (N,) int64."""
        made = []
        for part, classes in zip(
            noise.split(self.settings.batch_size), wanted.split(self.settings.batch_size), strict=True
        ):
            moving = part.clone().requires_grad_()
            optimizer = torch.optim.Adam([moving], lr=self.settings.image_lr)
            for _ in range(self.settings.image_steps):
                optimizer.zero_grad()
                F.cross_entropy(both(shown(moving)), classes, reduction="sum").backward()
                optimizer.step()
            made.append(moving.detach())
        return torch.cat(made)


def trains_again(job: Job) -> bool:
    """Whether sites train on examples of earlier tasks again, so that the averaged model knows their classes too."""
    piece = make_pieces(job)[-1]
    return bool(piece.draws) or piece.whole


def together(models: Sequence[tuple[nn.Module, Sequence[int]]], known: Sequence[int]) -> Answer:
    """a(x) over the classes `known`, of models and the classes that each knows."""

    def answer(x: Tensor) -> Tensor:
        total, count = torch.zeros(len(x), max(known) + 1), torch.zeros(max(known) + 1)
        for model, classes in models:
            total[:, classes] = total[:, classes] + centred(model(x)[:, classes])
            count[classes] += 1
        return (total / count.clamp(min=1))[:, known]

    return answer


def centred(outputs: Tensor) -> Tensor:
    """Less their mean, (B, C)."""
    return outputs - outputs.mean(dim=1, keepdim=True)


def distance(outputs: Tensor, said: Tensor) -> Tensor:
    """The mean square of what the outputs, centred, are off from what was said; both (B, C)."""
    return F.mse_loss(centred(outputs), said)


def pixels(data: DataPart) -> Answer:
    """Noise -> what the model sees: of images, values within the range that pixels have after normalisation."""
    if data.form != "image":
        return lambda noise: noise
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    return lambda noise: ((1 + noise.tanh()) / 2 - mean) / std


def _with(model: nn.Module, entries: Tensors) -> nn.Module:
    """A copy with these entries, that is not trained."""
    made = copy.deepcopy(model).requires_grad_(False)
    _put(made, entries)
    return made


@torch.no_grad()
def _put(model: nn.Module, entries: Tensors) -> None:
    own = model.state_dict()
    for name, value in entries.items():
        own[name].copy_(value)
