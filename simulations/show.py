"""A partition before anything is trained on it: in figures, as a table for a terminal and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from client.readers.base import PARTS
from shared_models.job import Job
from simulations import charts, pages
from simulations.compare import partition_of, product_version
from simulations.features import Condition
from simulations.heterogeneity import Heterogeneity, measure
from simulations.partition import SitePopulation
from simulations.pictures import COLOURS
from simulations.results import Partition

SITE_LIMIT = 100  # that a table or a drawing shows
LABEL_LIMIT = 40  # in a drawing; the rest is one segment
UNITS = {
    "noise": "noise, sd",
    "rotation": "rotation, °",
    "blur": "blur, px",
    "contrast": "contrast, ×",
    "brightness": "brightness, +",
}


@dataclass(frozen=True)
class Shown:
    """A partition and all that is said of it.

    Attributes:
        job: its name.
        partition: sizes and counts by site.
        labels: in their order; empty where the task tells no labels apart.
        conditions: site -> what it does to its inputs.
        settings: of `[simulation]`.
    """

    job: str
    partition: Partition
    labels: Sequence[str]
    conditions: Mapping[str, Condition]
    settings: Mapping[str, Any]

    @staticmethod
    def of(job: Job, sites: SitePopulation) -> Shown:
        """What is to be said of the simulated sites of a job."""
        settings = job.simulation.model_dump(mode="json", exclude={"values"})
        labels = job.steps[-1].task.labels
        found = partition_of(job, sites)
        told = labels if sum(any(parts["train"].get(x) for parts in found.sites.values()) for x in labels) > 1 else ()
        return Shown(job.name, found, told, sites.partition.conditions, settings)

    @property
    def counts(self) -> np.ndarray:
        """(sites, labels) of the training data."""
        rows = [[parts["train"].get(label, 0) for label in self.labels] for parts in self.partition.sites.values()]
        return np.array(rows, dtype=np.int64).reshape(len(rows), len(self.labels))

    @cached_property
    def figures(self) -> Heterogeneity:
        """Of the training data."""
        sizes = np.array([found["train"] for found in self.partition.sizes.values()])
        return measure(self.counts, sizes)

    @property
    def summary(self) -> str:
        """Split, sites and examples in one line."""
        examples = sum(sum(found.values()) for found in self.partition.sizes.values())
        shared = self.settings["test"] == "shared"
        many = len(self.partition.sizes)
        held = "training examples" if shared else "examples"
        if shared:
            examples = sum(found["train"] for found in self.partition.sizes.values())
        return f"{self.partition.kind} · {many} {'site' if many == 1 else 'sites'} · {examples:,} {held}"

    def sentences(self) -> list[tuple[str, str]]:
        """(topic, what is to be said of it)."""
        f = self.figures
        sizes = [found["train"] for found in self.partition.sizes.values()]
        said = []
        if f.total_variation is not None:
            said.append((
                "labels",
                f"total variation from the pool {f.total_variation:.3f}, Jensen-Shannon divergence "
                f"{f.jensen_shannon:.3f} bits (0: every site like the pool), {f.labels_per_site:.1f} of "
                f"{len(self.labels)} labels a site; means over sites",
            ))  # fmt: skip
        said.append((
            "sizes",
            f"{min(sizes):,} to {max(sizes):,} training examples, largest to smallest {f.largest_to_smallest:.1f}, "
            f"Gini {f.gini:.3f} (0: equal)",
        ))  # fmt: skip
        if self.conditions:
            names = self._changes()
            said.append(("features", f"{', '.join(names)} by site, in training, validation and test"))
        return said

    def document(self) -> dict[str, Any]:
        """For a program."""
        return {
            "job": self.job,
            "partition": self.partition.model_dump(),
            "heterogeneity": asdict(self.figures),
            "features": {site: asdict(condition) for site, condition in self.conditions.items()},
            "settings": dict(self.settings),
        }

    def tables(self, width: int) -> list[Table]:
        """One row a site, in one table or, where it would be too wide, labels and sizes apart.

        Of labels that do not fit their number and the most frequent one are shown.
        """
        counted = f", {self.partition.counted}" if self.partition.counted != "examples" else ""
        rest = [
            ["site", *PARTS, *(UNITS[name] for name in self._changes())],
            *([s, *r] for s, r in self._rest().items()),
        ]
        sites = list(self.partition.sizes)
        told = [["site", *self.labels]]
        told += [[s, *(f"{n:,}" if n else "·" for n in row)] for s, row in zip(sites, self.counts, strict=True)]
        if _width(told) > width:
            told = [["site", f"labels{counted}", "most frequent"]]
            told += [[s, *self._most(row)] for s, row in zip(sites, self.counts, strict=True)]
            counted = ""
        whole = [[*a, *b[1:]] for a, b in zip(told, rest, strict=True)]
        both = [whole] if not self.labels or _width(whole) <= width else [told, rest]
        found = [_table(grid) for grid in both]
        if self.labels and counted:
            found[0].caption, found[0].caption_justify = Text(f"by label: {self.partition.counted}"), "left"
        return found

    def write(self, path: Path, command: str) -> Path:
        """Draw the page; raises a RunError where it cannot be written."""
        names, counts = self._drawn()
        rest = list(self._rest().items())[:SITE_LIMIT]
        return pages.write("partition.html.j2", {
            "title": f"{self.job}: who holds what",
            "version": product_version(),
            "summary": self.summary,
            "figures": [(pages.sentence(topic), claim) for topic, claim in self.sentences()],
            "drawings": self._drawings(names, counts),
            "legend": list(zip(names, charts.shades(COLOURS, len(names)), strict=True)) if self.labels else [],
            "columns": ["site", *(names if self.labels else ()), *PARTS, *(UNITS[name] for name in self._changes())],
            "rows": [
                (site, row.tolist() if self.labels else [], texts)
                for (site, texts), row in zip(rest, counts, strict=False)
            ],
            "most": max(1, int(counts.max())),
            "left_out": max(0, len(self.partition.sizes) - SITE_LIMIT),
            "command": command,
            "kind": self.partition.kind,
            "hash": self.partition.hash,
            "settings": pages.flat(self.settings, "simulation."),
        }, path, "the page")  # fmt: skip

    def _changes(self) -> list[str]:
        """Which of a condition's values differ anywhere from no change."""
        return [name for name in UNITS if any(name in c.chosen for c in self.conditions.values())]

    def _rest(self) -> dict[str, list[str]]:
        """Site -> what stands behind its labels."""
        return {
            site: [
                *(f"{found[part]:,}" for part in PARTS),
                *(f"{getattr(self.conditions[site], name):.3g}" for name in self._changes()),
            ]
            for site, found in self.partition.sizes.items()
        }

    def _most(self, counts: np.ndarray) -> list[str]:
        if not counts.sum():
            return ["0", ""]
        best = int(counts.argmax())
        return [str(np.count_nonzero(counts)), f"{self.labels[best]} ({counts[best] / counts.sum():.0%})"]

    def _drawn(self) -> tuple[list[str], np.ndarray]:
        """Names and counts of the segments: labels, those beyond the limit as one, or examples."""
        if not self.labels:
            sizes = [[found["train"]] for found in self.partition.sizes.values()]
            return ["examples"], np.array(sizes)
        rest = len(self.labels) - LABEL_LIMIT
        if rest <= 0:
            return list(self.labels), self.counts
        more = self.counts[:, LABEL_LIMIT:].sum(axis=1, keepdims=True)
        return [*self.labels[:LABEL_LIMIT], f"{rest} more"], np.hstack([self.counts[:, :LABEL_LIMIT], more])

    def _drawings(self, names: Sequence[str], counts: np.ndarray) -> list[tuple[str, Markup]]:
        colours = charts.shades(COLOURS, len(names))
        counted = self.partition.counted if self.labels else "examples"
        bars = [
            charts.Stack(site, row.tolist(), f"{row.sum():,}")
            for site, row in list(zip(self.partition.sizes, counts, strict=True))[:SITE_LIMIT]
        ]
        title = f"Training data by site ({counted})"
        drawn = [(title, charts.stacks("counts", title, bars, names, colours))]
        if self.labels:
            every = [*bars, charts.Stack("all sites", counts.sum(axis=0).tolist(), "")]
            shares = [
                charts.Stack(bar.label, [round(100 * v / (sum(bar.values) or 1), 1) for v in bar.values], "")
                for bar in every
            ]
            title = "Share of each label at a site, %"
            drawn.append((title, charts.stacks("shares", title, shares, names, colours)))
        return drawn


def _width(grid: Sequence[Sequence[str]]) -> int:
    """Of a table in a terminal."""
    return sum(max(map(len, column)) + 3 for column in zip(*grid, strict=True)) + 1


def _table(grid: Sequence[Sequence[str]]) -> Table:
    """Its first row is the head; sites beyond the limit are left out."""
    shown = Table()
    for i, name in enumerate(grid[0]):
        shown.add_column(Text(name), justify="right" if i else "left")
    for cells in grid[1 : SITE_LIMIT + 1]:
        shown.add_row(*map(Text, cells))
    return shown
