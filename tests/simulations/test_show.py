"""`fedzoo partition show`: figures worked out by hand, what the terminal, a program and the page are told."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import fedzoo
from client.readers.base import Store
from shared_models.job import Job
from shared_models.job_parts import DataPart
from simulations import charts
from simulations.compare import make_sites
from simulations.heterogeneity import measure
from simulations.partition import SitePopulation, make_partition
from simulations.pictures import COLOURS
from simulations.show import Shown

JOB = """
name = "digits"
[model]
name = "logistic"
[task]
labels = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "<9>"]
aliases = { "9" = "<9>" }
[data]
shape = [1, 8, 8]
[simulation]
partition = "labels"
sites = 5
"""


@pytest.fixture
def show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs `fedzoo partition show` on a job of five sites of two labels each; exit code, stdout and stderr."""
    (tmp_path / "job.toml").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words: str, width: int = 100) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", str(width))
        with pytest.raises(SystemExit) as end:
            fedzoo.main(["partition", "show", "job.toml", *words])
        out, err = capsys.readouterr()
        code = end.value.code
        if isinstance(code, str):
            code, err = 1, err + code
        return int(code or 0), out, err

    return run


# ---- figures ---------------------------------------------------------------------------------------------------------
def test_sites_that_share_no_label() -> None:
    """p = (1/2, 1/2), p_1 = (1, 0): TV = 1/2; JS = 1/2 [log2(4/3) + 1/2 log2(2/3) + 1/2 log2(2)] = 0.3113 bits."""
    found = measure(np.array([[10, 0], [0, 10]]), np.array([10, 10]))
    assert found.total_variation == pytest.approx(0.5)
    assert found.jensen_shannon == pytest.approx(0.5 * (np.log2(4 / 3) + 0.5 * np.log2(2 / 3) + 0.5))
    assert (found.labels_per_site, found.gini, found.largest_to_smallest) == (1.0, 0.0, 1.0)


def test_sites_that_differ_in_size_alone() -> None:
    """Sizes 1, 2, 6: mean 3, sum of all absolute differences 2 (1 + 5 + 4) = 20, Gini 20 / (2 * 3 * 9) = 0.370."""
    found = measure(np.array([[1, 1], [2, 2], [6, 6]]), np.array([1, 2, 6]))
    assert found.total_variation == pytest.approx(0)
    assert found.jensen_shannon == pytest.approx(0)
    assert found.gini == pytest.approx(20 / 54)
    assert found.largest_to_smallest == 6


def test_no_labels_and_a_site_without_a_single_one() -> None:
    assert measure(np.zeros((3, 0)), np.array([2, 2, 2])).total_variation is None
    assert measure(np.array([[4], [4]]), np.array([4, 4])).jensen_shannon is None
    assert measure(np.array([[3, 3], [0, 0]]), np.array([6, 6])).total_variation == 0  # nothing there to compare


def test_jensen_shannon_is_scipys() -> None:
    from scipy.spatial.distance import jensenshannon

    counts = np.random.default_rng(0).integers(0, 9, (6, 4)) + np.eye(6, 4, dtype=int)
    pool = counts.sum(axis=0)
    wanted = np.mean([jensenshannon(row, pool, base=2) ** 2 for row in counts])
    assert measure(counts, counts.sum(axis=1)).jensen_shannon == pytest.approx(wanted)


# ---- what is told ----------------------------------------------------------------------------------------------------
def test_the_terminal_is_told_labels_sizes_and_figures(show) -> None:
    code, out, err = show()
    assert (code, err) == (0, "")
    assert "digits: labels(classes=2) · 5 sites · 1,797 examples" in out
    rows = [line for line in out.splitlines() if "site-" in line]
    assert len(rows) == 5
    for i, line in enumerate(rows):
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        held = [label for label, text in enumerate(cells[1:11]) if text != "·"]
        assert held == [i, i + 5]
        assert sum(int(cells[1 + label]) for label in held) == int(cells[11])
    assert "total variation from the pool 0.80" in out.replace("\n", " ")
    assert re.search(r"^hash [0-9a-f]{64}$", out, re.M)


def test_a_narrow_terminal_gets_two_tables_and_many_labels_their_number(show) -> None:
    _, out, _ = show(width=70)
    assert len([line for line in out.splitlines() if "site-1" in line]) == 2
    _, out, _ = show(width=50)
    assert "most frequent" in out
    assert max(len(line) for line in out.splitlines() if not line.startswith("hash ")) <= 50


def test_a_program_is_told_everything(show) -> None:
    code, out, _ = show("--json", "--set", "simulation.features.noise=0.5")
    found = json.loads(out)
    assert code == 0
    assert found["partition"]["kind"] == "labels(classes=2), features(noise=0.5)"
    assert found["heterogeneity"]["labels_per_site"] == 2
    assert [site["noise"] for site in found["features"].values()] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    sizes, sites = found["partition"]["sizes"], found["partition"]["sites"]
    assert sum(sum(parts.values()) for parts in sizes.values()) == 1797
    assert all(sum(sites[s][part].values()) == sizes[s][part] for s in sites for part in sizes[s])
    assert found["settings"]["features"]["noise"] == 0.5


def test_the_page_is_self_contained_escaped_and_says_what_it_draws(show, tmp_path: Path) -> None:
    code, out, _ = show("--html", "pages/split.html", "--set", "simulation.features.rotation=20")
    assert code == 0
    assert "page pages/split.html" in out
    page = (tmp_path / "pages" / "split.html").read_text(encoding="utf-8")
    assert "<9>" not in page
    assert "&lt;9&gt;" in page
    assert not re.search(r"(src|href)=|@import|url\(", page)
    drawings = [ET.fromstring(svg) for svg in re.findall(r"<svg class=\"chart\".*?</svg>", page, re.S)]
    assert len(drawings) == 2
    for drawing in drawings:
        names = drawing.attrib["aria-labelledby"].split()
        told = {child.attrib["id"]: child.text for child in drawing if "id" in child.attrib}
        assert drawing.attrib["role"] == "img"
        assert all(told[name] for name in names)
    counts, shares = (d.findall("rect") for d in drawings)
    assert len(counts) == 10  # five sites of two labels
    assert len(shares) == 20  # and all sites together, of ten
    assert "site-1, 0: " in (counts[0].find("title").text or "")  # type: ignore[union-attr]
    assert "rotation, °" in page
    assert "hash" in page


def test_nothing_is_trained_and_no_model_is_built(show, monkeypatch: pytest.MonkeyPatch) -> None:
    import shared_models.spec
    import simulations.compare

    def broken(*_: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(shared_models.spec, "build_model", broken)
    monkeypatch.setattr(simulations.compare, "build_model", broken)
    assert show()[0] == 0


def test_a_split_that_leaves_a_site_without_a_part_is_one_line(show) -> None:
    code, out, err = show("--set", "simulation.partition=iid", "--set", "simulation.sites=400")
    assert (code, out) == (1, "")
    assert "error: site 'site-" in err
    assert "no example for the" in err
    assert len(err.strip().splitlines()) == 1


def test_a_page_that_cannot_be_written_is_one_line(show, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, out, err = show("--html", "file/page.html")
    assert (code, out) == (1, "")
    assert "the page cannot be written to file/page.html" in err


# ---- the drawing -----------------------------------------------------------------------------------------------------
def test_segments_lie_end_to_end_and_are_as_long_as_their_values() -> None:
    rows = [charts.Stack("a", [1, 3, 0], "4"), charts.Stack("b", [0, 2, 6], "8")]
    drawing = ET.fromstring(str(charts.stacks("k", "t", rows, ["x", "y", "z"], COLOURS[:3])))
    found = [(float(r.attrib["x"]), float(r.attrib["width"])) for r in drawing.findall("rect")]
    unit = found[0][1]
    assert [width / unit for _, width in found] == pytest.approx([1, 3, 2, 6], abs=0.01)
    assert found[1][0] == pytest.approx(found[0][0] + found[0][1], abs=0.02)
    assert found[3][0] == pytest.approx(found[2][0] + found[2][1], abs=0.02)
    assert sum(found[3]) <= charts.WIDTH


def test_more_labels_than_colours_stay_apart() -> None:
    found = charts.shades(COLOURS, 40)
    assert found[:8] == list(COLOURS)
    assert len(set(found)) == 40


# ---- real data -------------------------------------------------------------------------------------------------------
@pytest.mark.data
def test_mnist_in_two_shards(real_data: Path) -> None:
    """The paper's split: 100 sites, each of 700 of the 70,000 examples, most of two labels."""
    with np.load(real_data / "mnist" / "mnist.npz") as given:
        x, y = (np.concatenate([given[f"{name}_train"], given[f"{name}_test"]]) for name in "xy")
    names = [f"{i:05d}" for i in range(len(y))]
    store = Store(torch.from_numpy(x[:, None]), torch.from_numpy(y).long(), names, DataPart(shape=(1, 28, 28)))
    job = Job.resolve({
        "name": "mnist", "model": {"name": "logistic"}, "task": {"labels": [str(i) for i in range(10)]},
        "data": {"shape": [1, 28, 28]}, "simulation": {"partition": "shards", "sites": 100},
    })  # fmt: skip
    sites = SitePopulation(store, make_partition(store, job.simulation))
    shown = Shown.of(job, sites)
    assert {sum(found.values()) for found in shown.partition.sizes.values()} == {700}
    every = [np.unique(y[rows]).size for rows in sites.partition.rows.values()]
    assert max(every) <= 4
    assert np.mean(every) < 2.3
    assert shown.figures.total_variation is not None
    assert shown.figures.total_variation > 0.75


@pytest.mark.data
def test_shakespeare_by_speaker(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDZOO_DATA", str(real_data))
    path = Path(__file__).resolve().parents[2] / "examples" / "shakespeare.toml"
    job = Job.load(path)
    shown = Shown.of(job, make_sites(job, path.parent))
    assert {"ROMEO", "JULIET"} <= shown.partition.sizes.keys()
    assert shown.partition.kind == "column"
    assert shown.figures.total_variation is None
    assert min(sum(found.values()) for found in shown.partition.sizes.values()) >= 300
