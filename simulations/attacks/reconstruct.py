"""From a gradient back to the images it was made of.

**A linear layer gives its input away** (Phong et al. 2018; Geiping et al. 2020, proposition 3.1). With z = W x + b,

    dL/dW = (dL/dz) x^T,    dL/db = dL/dz,    hence    x = (dL/dW)^T (dL/db) / ||dL/db||^2

for one image, exactly; the quotient is the least-squares solution over all rows, which is what noise leaves of it.

**By optimisation** (Zhu et al. 2019, "Deep Leakage from Gradients"; Geiping et al. 2020, "Inverting Gradients",
equation 4): the images whose gradient points where the given one does,

    x* = argmin_x  1 - <dL(x)/dw, g> / (||dL(x)/dw|| ||g||)  +  alpha TV(x)

by Adam on the sign of the gradient, within the range of pixels, the best of several starts by the same objective.
Labels count as known, as there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from client.workbench import Workbench
from shared_models.tasks.base import Batch

DECAY = (3 / 8, 5 / 8, 7 / 8)  # of the steps, where the rate falls to a tenth (Geiping et al. 2020)


@dataclass(frozen=True)
class Search:
    """How the optimiser looks.

    Attributes:
        steps: of each start.
        starts: how many.
        rate: of Adam, in units of normalised pixels.
        smooth: alpha, the weight of the total variation.
    """

    steps: int = 500
    starts: int = 2
    rate: float = 0.1
    smooth: float = 0.01


def from_linear(weight: Tensor, bias: Tensor) -> Tensor:
    """(O, F) and (O,) gradients of a linear layer -> its input (F,); zeros where the bias has no gradient."""
    norm = bias @ bias
    return weight.T @ bias / norm if norm > 0 else torch.zeros(weight.shape[1])


def entrance(model: nn.Module) -> str | None:
    """The name of a linear layer with a bias that sees the image itself; None where there is none."""
    if not isinstance(model, nn.Sequential):
        return None
    for name, layer in model.named_children():
        if not isinstance(layer, nn.Flatten):
            return name if isinstance(layer, nn.Linear) and layer.bias is not None else None
    return None


def by_optimisation(
    bench: Workbench, gradient: Mapping[str, Tensor], y: Tensor, box: tuple[Tensor, Tensor], search: Search, seed: int
) -> tuple[Tensor, float]:
    """The images, and the cosine of their gradient and the given one.

    Args:
        bench: with the model as the server sent it.
        gradient: of the mean loss.
        y: (B,) labels.
        box: smallest and largest normalised pixel, each (C, 1, 1) or less.
        search: how.
        seed: of the starts.

    Returns:
        (B, C, H, W) normalised, and a number from -1 to 1.
    """
    low, high = (end.to(bench.device) for end in box)
    given = [gradient[name].to(bench.device) for name in gradient]
    params = [bench.trained[name] for name in gradient]
    labels, source = y.to(bench.device), torch.Generator().manual_seed(seed)
    bench.to_training()
    best, least, near = torch.zeros(0), float("inf"), 0.0
    for _ in range(search.starts):
        x = torch.randn((len(y), *bench.job.data.shape), generator=source).to(bench.device).requires_grad_()
        optimizer = torch.optim.Adam([x], lr=search.rate)
        marks = [round(search.steps * part) for part in DECAY]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, marks)
        for _ in range(search.steps):
            objective, _ = _objective(bench, params, given, x, labels, search.smooth)
            (x.grad,) = torch.autograd.grad(objective, [x])
            x.grad.sign_()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                x.copy_(torch.minimum(torch.maximum(x, low), high))
        objective, cosine = _objective(bench, params, given, x, labels, search.smooth)
        if objective.item() < least:
            best, least, near = x.detach().cpu().clone(), objective.item(), cosine.item()
    return best, near


def _objective(
    bench: Workbench, params: Sequence[Tensor], given: Sequence[Tensor], x: Tensor, y: Tensor, smooth: float
) -> tuple[Tensor, Tensor]:
    batch = Batch(x, y)
    loss = bench.task.loss(bench.task.forward(bench.model, batch), batch).mean()
    found = torch.autograd.grad(loss, params, create_graph=True)
    inner = torch.stack([(f * g).sum() for f, g in zip(found, given, strict=True)]).sum()
    lengths = [torch.stack([(t * t).sum() for t in side]).sum().sqrt() for side in (found, given)]
    cosine = inner / (lengths[0] * lengths[1]).clamp(min=1e-12)
    return 1 - cosine + smooth * total_variation(x), cosine.detach()


def total_variation(x: Tensor) -> Tensor:
    """Mean difference of neighbouring pixels, (B, C, H, W) -> ()."""
    return x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()


# ---- how near --------------------------------------------------------------------------------------------------------
def paired(found: Tensor, truth: Tensor) -> Tensor:
    """The found images in the order of the true ones that fits best: a gradient does not know their order."""
    apart = ((found[:, None] - truth[None]) ** 2).flatten(2).mean(dim=2)  # (found, truth)
    rows, columns = linear_sum_assignment(apart.numpy())
    return found[torch.from_numpy(rows[np.argsort(columns)])]


def mse(a: Tensor, b: Tensor) -> float:
    """Mean squared error of two images of pixels from 0 to 1."""
    return float(((a - b) ** 2).mean())


def psnr(error: float) -> float:
    """`10 log10(1 / mse)` in dB; 100 where the images are the same to that."""
    return float(-10 * np.log10(max(error, 1e-10)))


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of two (C, H, W) images, in windows of 7 pixels where they fit."""
    window = min(7, (min(a.shape[1:]) - 1) // 2 * 2 + 1)
    settings = {"win_size": window, "data_range": 1.0, "channel_axis": 0}
    return float(structural_similarity(a.numpy(), b.numpy(), **settings))  # type: ignore[no-untyped-call]
