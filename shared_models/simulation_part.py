"""`[simulation]`: the data of a simulated federation, how they are split, and what makes the sites' inputs differ."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shared_models.job_parts import Part, Positive


class FeaturesPart(Part):
    """`[simulation.features]`: what one site's inputs have and another's have not. Every default is no change.

    What is drawn is drawn once for a site, by its name and `simulation.seed`, and changes its training, validation and
    test examples alike (`simulations.features`).

    Attributes:
        noise: Gaussian noise at site i of N has the standard deviation noise * i / N (Li et al. 2022): in images of the
            whole range of values, in features and series of the column's own standard deviation.
        rotation: degrees by which a site turns its images, at most, either way; masks and boxes move along.
        blur: standard deviation of a site's Gaussian blur in pixels, at most.
        contrast: distances from the image's mean are multiplied by a factor of 1 - contrast to 1 + contrast.
        brightness: share of the whole range that is added, at most, either way.
    """

    noise: Annotated[float, Field(ge=0, le=10)] = 0.0
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    blur: Annotated[float, Field(ge=0, le=100)] = 0.0
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.0
    brightness: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def chosen(self) -> dict[str, float]:
        """Those that change anything."""
        return {name: value for name, value in self.model_dump().items() if value}


class SimulationPart(Part):
    """`[simulation]`: the data and the split of a simulated federation; nodes never read it.

    Attributes:
        reader: a registered reader, e.g. `digits` or `imagefolder`.
        root: the reader's folder; `$NAME` is replaced by that environment variable, a relative path starts at the job.
        partition: a registered way to split (`simulations.partitions`): `iid`; skewed labels: `dirichlet` (per class,
            Hsu et al. 2019), `shards` (McMahan et al. 2017), `labels` (so many at each site, Li et al. 2022); skewed
            sizes: `quantity` (Li et al. 2022); `blocks` (contiguous in the order of names); `column` (natural: the
            speaker, writer or hospital that the reader gives).
        sites: how many (not for `column`).
        alpha: concentration of the Dirichlet distribution, of `dirichlet` and `quantity`.
        min_examples: smallest site these two may draw; they are drawn again until all have that many.
        shards: how many each site gets, of `shards`.
        classes: how many labels each site holds, of `labels`.
        smallest: sites of a column with fewer examples are left out.
        features: what makes the sites' inputs differ, with any partition.
        test: which test examples measure at each site: its `own`, or those of all sites, `shared`, where a metric needs
            more examples than one site has (recall in a gallery). Training and validation examples stay its own.
        seed: of the split alone, so that several training seeds share one split.
        values: site -> column of a table -> its own word -> the word that all sites share: what each site's
            `client.toml` says under `[data.values]`.
    """

    reader: str = "digits"
    root: str = ""
    partition: str = "iid"
    sites: Positive = 3
    alpha: Annotated[float, Field(gt=0)] = 0.5
    min_examples: Positive = 10
    shards: Positive = 2
    classes: Positive = 2
    smallest: Positive = 1
    features: FeaturesPart = FeaturesPart()
    test: Literal["own", "shared"] = "own"
    seed: int = 0
    values: dict[str, dict[str, dict[str, str]]] = {}
