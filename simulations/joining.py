"""What joining a federation brings to each site, and what becomes of the weakest one.

The gain of a site is what the federated model reaches less what the site's own model reaches, seed by seed, on the same
test; it counts as better where it is above 0, whatever the direction of the metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from simulations.results import Cell, Comparison
from simulations.statistics import Summary, crossed, paired

Claim = Literal["gains", "loses", "open"]


@dataclass(frozen=True)
class Gain:
    """One site's.

    Attributes:
        own: on its own test.
        everywhere: on all sites' tests.
    """

    site: str
    own: Summary
    everywhere: Summary

    @property
    def claim(self) -> Claim:
        """What its own test says: it `gains` or `loses` where that may be claimed, else it is `open`."""
        return "open" if not self.own.claims else "gains" if self.own.mean > 0 else "loses"


@dataclass(frozen=True)
class Joining:
    """The gains of all sites in one time, with one continual method.

    Attributes:
        name: of the pair of paradigms, e.g. `offline` or `continual (er)`.
        alone: the isolated cell.
        joined: the federated cell.
        spread: 95 % interval of the mean gain on own tests over sites and seeds; None with one of either.
    """

    name: str
    alone: Cell
    joined: Cell
    gains: Sequence[Gain]
    spread: tuple[float, float] | None

    @property
    def mean(self) -> float:
        """Gain on own tests, mean over sites and seeds."""
        return fmean(gain.own.mean for gain in self.gains)

    def sites(self, claim: Claim) -> list[str]:
        """Those of which this is claimed."""
        return [gain.site for gain in self.gains if gain.claim == claim]


def joinings(c: Comparison) -> list[Joining]:
    """One for each time and continual method that was run both federated and isolated."""
    found = []
    for joined in (cell for cell in c.cells if cell.place == "federated" and cell.error is None):
        alone = c.cell("isolated", joined.time, joined.method)
        if alone is None or len(c.sites) < 2:
            continue
        sign = 1.0 if c.headline.larger else -1.0
        gains = [
            Gain(
                site,
                _better(joined.per_site[site], alone.per_site[site], sign),
                _better(joined.per_site_all.get(site, joined.all_sites), _everywhere(alone, site), sign),
            )
            for site in c.sites
        ]
        rows = [[sign * (a - b) for a, b in zip(joined.per_site[s], alone.per_site[s], strict=True)] for s in c.sites]
        spread = crossed(rows) if len(c.seeds) > 1 else None
        found.append(Joining(joined.name.partition(", ")[2], alone, joined, gains, spread))
    return found


def worst(cell: Cell, larger: bool = True) -> tuple[str, list[float]]:
    """The site whose own test the cell serves worst, in the mean over seeds, and its values, one a seed."""
    means: Mapping[str, float] = {site: fmean(values) for site, values in cell.per_site.items()}
    site = (min if larger else max)(sorted(means), key=means.__getitem__)
    return site, list(cell.per_site[site])


def _better(a: Sequence[float], b: Sequence[float], sign: float) -> Summary:
    return paired([sign * value for value in a], [sign * value for value in b])


def _everywhere(alone: Cell, site: str) -> Sequence[float]:
    return alone.per_site_all.get(site, alone.all_sites)
