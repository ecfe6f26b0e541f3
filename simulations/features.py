"""Feature skew: each simulated site sees through its own instrument. A view of the store with other pixels.

The labels' split decides who holds an example, this what its input looks like there, in training, validation and test:
the same change for every example of a site (`Condition`), but for the noise, which is drawn for each number. Images are
changed in this order, x in [0, 1] and every result rounded to the 256 values of a pixel once, at the end:

| setting      | what becomes of an image x                     | value at a site  | after                 |
|--------------|------------------------------------------------|------------------|-----------------------|
| `rotation`   | turned about its centre, black beyond its edge | U(-r, r) degrees | Ghosh et al. 2020     |
| `blur`       | x * Gaussian of standard deviation b pixels    | U(0, b)          | Hendrycks et al. 2019 |
| `contrast`   | c (x - mean(x)) + mean(x)                      | U(1 - c, 1 + c)  | Hendrycks et al. 2019 |
| `brightness` | x + b                                          | U(-b, b)         | Hendrycks et al. 2019 |
| `noise`      | x + N(0, (sigma i / N)^2), site i of N         | sigma i / N      | Li et al. 2022        |

NIID-Bench (Li et al. 2022) calls sigma i / N the variance in its text and uses it as the standard deviation in its
code; here it is the standard deviation. Pixels end at 0 and 255, where noise is cut off. Features and series take the
noise only, in units of the column's standard deviation over all examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from client.augment import Augment
from client.readers.base import Store
from shared_models.job_parts import AugmentPart
from shared_models.keys import key
from shared_models.simulation_part import FeaturesPart
from shared_models.tasks.base import IGNORED, Batch, Target

CHUNK = 1024  # images that are changed at once


@dataclass(frozen=True)
class Condition:
    """What one site's instrument does; the values of the table above, each the identity by default."""

    noise: float = 0.0
    rotation: float = 0.0
    blur: float = 0.0
    contrast: float = 1.0
    brightness: float = 0.0

    @property
    def chosen(self) -> dict[str, float]:
        """Those values that change anything."""
        same = Condition()
        return {name: value for name, value in asdict(self).items() if value != getattr(same, name)}


def conditions(part: FeaturesPart, names: Sequence[str], seed: int) -> dict[str, Condition]:
    """Every site's own; a value does not depend on the other settings, nor, but for the noise, on the other sites."""

    def draw(what: str, site: str, low: float, high: float) -> float:
        return float(np.random.default_rng(key(seed, f"features {what}", site=site)).uniform(low, high))

    return {
        site: Condition(
            noise=part.noise * i / len(names),
            rotation=draw("rotation", site, -part.rotation, part.rotation),
            blur=draw("blur", site, 0, part.blur),
            contrast=draw("contrast", site, 1 - part.contrast, 1 + part.contrast),
            brightness=draw("brightness", site, -part.brightness, part.brightness),
        )
        for i, site in enumerate(names, 1)
    }


def skewed(
    store: Store, rows: Mapping[str, np.ndarray], found: Mapping[str, Condition], target: Target, seed: int
) -> Store:
    """The store as the sites see it; itself where no site changes anything.

    Args:
        store: all examples.
        rows: site -> its rows.
        found: site -> what it does to them.
        target: form of the targets; those that have a place in the image are turned with it.
        seed: of the noise, which goes by the examples' names, not by their order.
    """
    if not any(condition.chosen for condition in found.values()):
        return store
    x, y = store.x.clone(), store.y.clone()
    deviation = _deviation(store.x) if store.x.dtype == torch.float32 else torch.tensor(1.0)
    for site, condition in found.items():
        noise = np.random.default_rng(key(seed, "features noise", site=site))
        held = np.array(sorted(rows[site], key=lambda row: store.names[row]), dtype=np.int64)
        for chunk in (torch.from_numpy(held[i : i + CHUNK]) for i in range(0, len(held), CHUNK)):
            if store.x.dtype == torch.float32:
                x[chunk] = _noisy(store.x[chunk], condition.noise * deviation, noise)
            else:
                x[chunk], y[chunk] = _image(store.x[chunk], store.y[chunk], condition, target, noise)
    seen = replace(store, x=x, y=y)
    if store.proposals is None:
        return seen
    from client.proposals import propose

    return replace(seen, proposals=propose(x, store.data.proposals))


def _deviation(x: Tensor) -> Tensor:
    """Per column, over all examples (and steps), of what is there."""
    flat = x.reshape(-1, x.shape[-1]).double().numpy()
    with np.errstate(invalid="ignore"):
        found = np.array([np.std(column[~np.isnan(column)]) if (~np.isnan(column)).any() else 0 for column in flat.T])
    return torch.from_numpy(found).float()


def _noisy(x: Tensor, deviation: Tensor | float, noise: np.random.Generator) -> Tensor:
    return x + torch.from_numpy(noise.standard_normal(x.shape, dtype=np.float32)) * deviation


def _image(
    x: Tensor, y: Tensor, condition: Condition, target: Target, noise: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Some images, (n, C, H, W) uint8, and their targets."""
    values = x.float() / 255
    if condition.rotation:
        values, y = _turned(values, y, condition.rotation, target)
    if condition.blur:
        values = torch.from_numpy(gaussian_filter(values.numpy(), (0, 0, condition.blur, condition.blur)))
    if condition.contrast != 1:
        mean = values.mean(dim=(1, 2, 3), keepdim=True)
        values = condition.contrast * (values - mean) + mean
    values = values + condition.brightness
    if condition.noise:
        values = _noisy(values, condition.noise, noise)
    return (255 * values).round().clamp(0, 255).to(torch.uint8), y


def _turned(x: Tensor, y: Tensor, angle: float, target: Target) -> tuple[Tensor, Tensor]:
    fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}
    turn = v2.RandomRotation((angle, angle), v2.InterpolationMode.BILINEAR, fill=fill)
    if target in ("class", "tokens", "none"):  # nothing that has a place in the image
        return turn(tv_tensors.Image(x)).as_subclass(Tensor), y
    turned = Augment(AugmentPart(), target, tuple(x.shape[1:]), turn)(Batch(x, y))
    return turned.x, turned.y
