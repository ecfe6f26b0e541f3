"""The example on real images: brain MRI slices of mixed sizes and formats, three sites."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared_models.job import Job
from simulations.compare import compare, load_sites
from simulations.plan import OFFLINE

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "brain-mri.toml"


@pytest.mark.data
def test_brain_mri_runs_in_every_place(real_data: Path, tmp_path: Path) -> None:
    job = Job.load(EXAMPLE, ["federation.rounds=2", "data.shape=[1, 32, 32]"])
    sites = load_sites(job, EXAMPLE.parent)
    assert len(sites.names) == 3
    held = [
        sum(len(getattr(sites.splits(name), part)) for part in ("train", "validation", "test")) for name in sites.names
    ]
    assert sum(held) == len(sites.store.y) == 253
    assert sites.store.y.bincount().tolist() == [98, 155]
    comparison = compare(job, sites, paradigms=OFFLINE, seeds=(0,), folder=tmp_path)
    assert [cell.error for cell in comparison.cells] == [None] * 3
    assert {cell.budget.samples for cell in comparison.cells} == {comparison.cells[1].budget.samples}
