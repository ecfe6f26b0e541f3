"""Low-rank adapters (Hu et al. 2022, LoRA, eq. 3): a frozen linear layer learns a product of two thin matrices.

    h = W x + b + (alpha / rank) B A x,    A: rank x in, drawn at random; B: out x rank, zero at the start

In a federation the mean of products is not the product of means: mean(B_k) mean(A_k) differs from mean(B_k A_k).
There are two ways to average the product (`lora.train`):

`b`: A is drawn from the job's seed, so that it is the same at all sites, and stays as it is; only B is trained, sent
and averaged. Then mean(B_k) A = mean(B_k A) exactly, and about half as many bytes cross the network (Sun et al. 2024,
FFA-LoRA).

`both`: both factors are trained and sent, and the server averages the products, P = mean(B_k A_k), out x in. Its rank
may be that of all sites together, more than an adapter holds: the server keeps what of P lies in the rows of A,

    A = mean(A_k),    B = mean(B_k) + (P - mean(B_k) A) A^+,

which is the B for which || B A - P || (Frobenius) is smallest, and with equal A_k again the mean of the B_k. It has the
aim of FlexLoRA (Bai et al. 2024), which takes the singular vectors of P instead: nearer to P, but then A is another
after each round, turned and scaled. Directions of A weaker than `WEAK` times its strongest are left as mean(B_k) has
them, for the B that they ask for would be very large.

A layer keeps its name and the names of its own weights, so that files of weights, stages and checkpoints of the whole
model fit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_models.determinism import determinism
from shared_models.errors import ConfigError
from shared_models.registry import nearest
from shared_models.sums import Groups, PairwiseMean

A, B = ".lora_a.weight", ".lora_b.weight"
PRODUCT = ".product"  # behind the name of a B, of what is averaged beside it
WEAK = 1e-3
TRAINED = {"b": (f"*{B}",), "both": (f"*{A}", f"*{B}")}  # what `lora.train` trains


class Adapted(nn.Linear):
    """A linear layer with an adapter beside it; `plain` gives the weights."""

    def __init__(self, plain: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        device, dtype = plain.weight.device, plain.weight.dtype
        self.lora_a = nn.Linear(plain.in_features, rank, bias=False, device=device, dtype=dtype)
        self.lora_b = nn.Linear(rank, plain.out_features, bias=False, device=device, dtype=dtype)
        nn.init.kaiming_uniform_(self.lora_a.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b.weight)
        self.factor = alpha / rank

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        added: Tensor = self.lora_b(self.lora_a(input))
        return F.linear(input, self.weight, self.bias) + self.factor * added


def adapt(model: nn.Module, rank: int, alpha: float, targets: Iterable[str], heads: Iterable[str]) -> None:
    """Put adapters beside the linear layers of a model, in place; start values come from torch's global generator.

    Args:
        model: with its weights.
        rank: r.
        alpha: alpha.
        targets: patterns of the layers' names; empty: all but the head's. One that is tied to an embedding has none.
        heads: patterns of the head's entries.

    Raises:
        ConfigError: no layer matches a pattern, or there is none.
    """
    counted = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not _is_head(name, heads) and counted[id(module.weight)] == 1
    }
    wanted = list(targets)
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ConfigError(
                f"lora.targets: no linear layer is called '{pattern}'", hint=nearest(pattern, list(layers))
            )
    chosen = [name for name in layers if not wanted or any(fnmatchcase(name, p) for p in wanted)]
    if not chosen:
        raise ConfigError("this model has no linear layer for an adapter", hint="Leave [lora] out")
    for name in chosen:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Adapted(layers[name], rank, alpha))


def _is_head(name: str, heads: Iterable[str]) -> bool:
    return any(fnmatchcase(f"{name}.weight", pattern) for pattern in heads)


class ProductMean(PairwiseMean):
    """A mean of models in which the products of adapters are averaged, where both of their factors come up.

    A product is as large as the layer that it belongs to, and waits as the site's other tensors do.
    """

    def add(self, slot: int, groups: Groups, weights: Mapping[str, float]) -> None:
        """Take one client's tensors; see `PairwiseMean.add`."""
        model = groups["model"]
        with determinism(True):
            products = {b + PRODUCT: model[b].float() @ model[a].float() for a, b in pairs(model)}
        super().add(slot, {**groups, "model": {**model, **products}}, weights)

    def result(self) -> dict[str, dict[str, Tensor]] | None:
        """The means in float32, or None; see `PairwiseMean.result`."""
        found = super().result()
        if found is not None:
            model = found["model"]
            with determinism(True):
                for a, b in pairs(model):
                    missing = model.pop(b + PRODUCT) - model[b] @ model[a]  # of one site's: zero
                    model[b] = model[b] + (missing.double() @ torch.linalg.pinv(model[a].double(), rtol=WEAK)).float()
        return found


def pairs(model: Collection[str]) -> list[tuple[str, str]]:
    """Names (A, B) of the adapters that have both in a model."""
    return [(a, b) for a in model if a.endswith(A) and (b := a.removesuffix(A) + B) in model]
