"""Streams whose tasks are domains: the same classes under conditions that change (domain-incremental learning).

Each example comes with one task, which follows from the SHA-256 of its name; its image is changed by that task's share
of the whole change, t / (T - 1): the first task's images are as they are. The change belongs to the data: an offline
job has the same examples, all at once, and test images of a task are changed as its training images.

| kind       | changed by                                                                   | `amount` is in | usual |
|------------|------------------------------------------------------------------------------|----------------|-------|
| `rotation` | a turn (rotated MNIST: Lopez-Paz and Ranzato 2017)                           | degrees        | 120   |
| `blur`     | a Gaussian filter, as of a lens or a fast sequence                           | pixels (sigma) | 1.5   |
| `drift`    | less contrast around a dark grey, `x (1 - a) + 64 a`, as of an old scanner   | share a of 1   | 0.6   |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from client.readers.base import Store
from client.readers.parts import number_of
from shared_models.registry import Registry
from shared_models.stream_part import StreamPart

Change = Callable[[Tensor, float], Tensor]
changes: Registry[tuple[Change, float]] = Registry("stream", "client.streams")


def stream(name: str, usual: float) -> Callable[[Change], Change]:
    """Decorator that registers a change of images (N, C, H, W) uint8 by an amount, and the usual amount."""

    def add(change: Change) -> Change:
        changes.register(name)((change, usual))
        return change

    return add


def streamed(store: Store, part: StreamPart) -> Store:
    """The store with the task of every example, and each task's images changed; of classes or sites as it is."""
    if part.kind in ("classes", "sites"):
        return store
    change, usual = changes[part.kind]
    tasks = torch.tensor([number_of(name, "stream") % part.tasks for name in store.together])
    x = store.x.clone()
    for task in range(1, part.tasks):
        rows = tasks == task
        x[rows] = change(store.x[rows], (part.amount or usual) * task / (part.tasks - 1))
    return replace(store, x=x, tasks=tasks)


@stream("rotation", 120.0)
def rotation(x: Tensor, amount: float) -> Tensor:
    """A turn by `amount` degrees, what comes in from outside is 0."""
    turned: Tensor = tv.rotate(x, amount, interpolation=InterpolationMode.BILINEAR)
    return turned


@stream("blur", 1.5)
def blur(x: Tensor, amount: float) -> Tensor:
    """A Gaussian filter with a standard deviation of `amount` pixels."""
    side = 2 * max(1, round(2 * amount)) + 1
    blurred: Tensor = tv.gaussian_blur(x, [side, side], [amount, amount])
    return blurred


@stream("drift", 0.6)
def drift(x: Tensor, amount: float) -> Tensor:
    """x (1 - a) + 64 a: less contrast, around a quarter of the brightest."""
    return (x.float() * (1 - amount) + 64 * amount).round().clamp(0, 255).to(torch.uint8)
