"""Lloyd's k-means over several sites (Lloyd 1982, Least Squares Quantization in PCM): exact, one pass a round.

Of its n examples a site sends, for each cluster k with the centroid c_k, the share of its examples in it and their sum:

    p_k = n_k / n,    s_k = 1/n sum_{x in k} (x - c_k)

The server's means, weighted by n, are those of all sites' examples together, and

    c_k <- c_k + mean(s_k) / mean(p_k)

is Lloyd's step on the pooled data. A cluster without examples keeps its centroid.

No example leaves a site as a centroid. The first round therefore puts each example into a cluster at random (Hamerly &
Elkan 2002, "random partition"), which needs sums alone, where k-means++ would choose examples. What sums do give away:
a cluster with few examples at a site says much about each, so clusters that hold less than `fewest` of them, also
together, say nothing (and the step is exact only with `fewest = 1`); and the sums of two rounds differ by the examples
that went from one cluster to another. Against a server that would look at that, `fewest` is no protection.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from shared_models.methods.base import Method, MethodSettings, Tensors, method
from shared_models.sums import Groups
from shared_models.tasks.base import Batch, Task


class LloydSettings(MethodSettings):
    """Settings of lloyd.

    Attributes:
        first: what the first round does: put examples into clusters at random (`partition`), or go from the model's
            start values (`model`), which are random or those of a file.
        fewest: examples of a site in a cluster below which the site leaves them out; 1 is exact.
    """

    first: Literal["partition", "model"] = "partition"
    fewest: PositiveInt = 3


@method("lloyd")
class Lloyd(Method):
    """The model is `kmeans`; what travels are sums of examples."""

    Settings = LloydSettings

    def init(self, template: Tensors, trained: Sequence[str]) -> Groups:
        """The centroids, the form of the sums, and whether the next round is the first."""
        centroids = template["centroids"]
        first = float(self.settings.first == "partition")
        return {
            "model": template,
            "sums": {"moves": torch.zeros_like(centroids), "shares": torch.zeros(len(centroids))},
            "partition": {"first": torch.tensor(first)},
        }

    def down(self, state: Groups) -> Groups:
        """All of it."""
        return state

    @torch.no_grad()
    def answer(self, model: nn.Module, task: Task, batches: Iterable[Batch], down: Groups) -> Groups:
        """s (K, D) and p (K,)."""
        centroids = down["model"]["centroids"].double()
        at_random = bool(down["partition"]["first"])
        moves, members, examples = torch.zeros_like(centroids), torch.zeros_like(centroids[:, 0]), 0
        for batch in batches:
            if at_random:
                cluster = torch.randint(len(centroids), (len(batch),)).to(centroids.device)
            else:
                cluster = task.predict(task.forward(model, batch), batch)
            inside = F.one_hot(cluster, len(centroids)).double()  # (B, K)
            moves = moves + inside.T @ (batch.x.flatten(1).double() - centroids[cluster])
            members = members + inside.sum(dim=0)
            examples += len(batch)
        told = told_of(members, self.settings.fewest) / examples  # (K,): 1 / n, or 0
        return {**down, "sums": {"moves": (told[:, None] * moves).float(), "shares": (told * members).float()}}

    def finish(self, state: Groups, mean: Groups, cohort: int, population: int) -> Groups:
        """Lloyd's step."""
        centroids, shares = state["model"]["centroids"], mean["sums"]["shares"][:, None]
        moved: Tensor = torch.where(shares > 0, centroids + mean["sums"]["moves"] / shares, centroids)
        return {**state, "model": {"centroids": moved}, "partition": {"first": torch.tensor(0.0)}}


def told_of(members: Tensor, fewest: int) -> Tensor:
    """(K,) bool: which clusters' sums are told.

    Those with fewer members are held back, and with them the next larger ones until together they have as many or none:
    else the site's total, known from the round in which all are told, less what is told would be the sum of too few.
    """
    told = members >= fewest
    for k in members.argsort().tolist():
        if not 0 < float(members[~told].sum()) < fewest:
            break
        told[k] = False
    return told
