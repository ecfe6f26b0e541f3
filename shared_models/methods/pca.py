"""Principal components of all sites' examples together, from merged sums: one round, exact.

About the mean m that the server sends, a site gives of its n examples

    p = the share that counts,    a = 1/n sum (x - m),    A = 1/n sum (x - m)(x - m)^T

over those that count (of the task `anomaly` the normal ones). The server's means, weighted by n, are those of all
sites' examples together; the mean moves to m + a/p, and the components are the eigenvectors of the covariance
A/p - (a/p)(a/p)^T with the largest eigenvalues, in float64, each turned so that its largest entry is positive. A second
round repeats this about the right mean, so that large means cost no digits. With D numbers per example A takes 4 D^2
bytes each way, 64 MiB at most (see `shared_models.compat`).

The sums say nothing about a single example, but A has a number for each pair of pixels, and of fewer examples than
pixels it tells which images they could be mixed from. A site with less than `fewest` examples sends none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from shared_models.errors import DataError
from shared_models.methods.base import Method, MethodSettings, Tensors, method
from shared_models.normalisation import FEWEST
from shared_models.sums import Groups
from shared_models.tasks.base import Batch, Task
from shared_models.tasks.reconstruction import Reconstruction


class PCASettings(MethodSettings):
    """`fewest`: examples that a site needs to take part."""

    fewest: PositiveInt = FEWEST


@method("pca")
class PrincipalComponents(Method):
    """The model is `pca`; what travels are first and second moments."""

    Settings = PCASettings

    def init(self, template: Tensors, trained: Sequence[str]) -> Groups:
        """Mean and components, and the form of the sums."""
        mean = template["mean"]
        sums = {"share": torch.zeros(()), "first": torch.zeros_like(mean), "second": torch.zeros(2 * mean.shape)}
        return {"model": template, "sums": sums}

    def down(self, state: Groups) -> Groups:
        """All of it."""
        return state

    @torch.no_grad()
    def answer(self, model: nn.Module, task: Task, batches: Iterable[Batch], down: Groups) -> Groups:
        """p (), a (D,) and A (D, D).

        Raises:
            DataError: too few examples.
        """
        assert isinstance(task, Reconstruction)
        mean = down["model"]["mean"].double()
        first, second, counted, examples = torch.zeros_like(mean), mean.new_zeros(2 * mean.shape), 0, 0
        for batch in batches:
            x = batch.x[task.counted(batch)].flatten(1).double() - mean  # (b, D)
            first, second = first + x.sum(dim=0), second + x.T @ x
            counted, examples = counted + len(x), examples + len(batch)
        if counted < self.settings.fewest:
            raise DataError(
                f"{counted} training examples are too few to give sums of them ({self.settings.fewest} at least)",
                code="too-few-examples",
            )
        sums = {"share": mean.new_tensor(counted), "first": first, "second": second}
        return {**down, "sums": {name: (value / examples).float() for name, value in sums.items()}}

    def finish(self, state: Groups, mean: Groups, cohort: int, population: int) -> Groups:
        """The eigenvectors of the covariance."""
        share, first, second = (mean["sums"][name].double() for name in ("share", "first", "second"))
        shift = first / share
        components = principal(second / share - torch.outer(shift, shift), len(state["model"]["components"]))
        moved = state["model"]["mean"].double() + shift
        return {**state, "model": {"mean": moved.float(), "components": components.float()}}


def principal(covariance: Tensor, count: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues, (D, D) float64 -> (count, D), the largest entry of each positive."""
    _, vectors = torch.linalg.eigh(covariance)  # ascending, in columns
    components = vectors.T.flip(0)[:count]
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    turned: Tensor = components * largest.sign()
    return turned
