"""The report of a realistic comparison: complete, escaped, self-contained, well formed, and readable."""

import html
import random
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from shared_models.errors import RunError
from simulations import charts
from simulations.report import write
from simulations.results import parse
from simulations.tables import as_markdown, for_terminal, headers, metric_table, row, stream_table

SITES = ["North General", "Riverside Clinic", "St. Anne's"]
LABELS = [str(digit) for digit in range(10)]
VOID = {"meta", "wbr"}


def example(seeds=(0, 1, 2), sites=tuple(SITES), failed=True, tasks=5):
    """A comparison as three hospitals and five tasks would give it: 5 paradigms, one of them failed."""
    rng = random.Random(20)

    def near(value, spread=0.012):
        return min(1.0, max(0.0, value + rng.gauss(0, spread)))

    def curve(end, rounds):
        return [
            {"round": r, "accuracy": near(end * (1 - 0.85 * 0.74**r)), "loss": 2.3 * (1 - end * (1 - 0.8**r)) + 0.05}
            for r in range(1, rounds + 1)
        ]

    def matrix(best):
        return [[near(best) if i == t else near(0.06, 0.04) if i < t else 0.0 for i in range(tasks)]
                for t in range(tasks)]  # fmt: skip

    expected = {
        ("centralized", "offline"): (0.955, 0.955), ("federated", "offline"): (0.914, 0.921),
        ("isolated", "offline"): (0.577, 0.938), ("federated", "continual"): (0.198, 0.231),
        ("isolated", "continual"): (0.171, 0.402),
    }  # fmt: skip
    cells = []
    for (place, time), (everywhere, own) in expected.items():
        per_site = {s: [near(own, 0.02) for _ in seeds] for s in sites}
        steps = {"centralized": 3 * 1440, "federated": 1440, "isolated": 1440}[place]
        moved = 20 * 3 * 400_000 if place == "federated" else 0
        cells.append({
            "place": place, "time": time, "error": None,
            "all_sites": [near(everywhere) for _ in seeds], "own_site": [near(own) for _ in seeds],
            "per_site": per_site, "per_site_all": {s: [near(everywhere, 0.02) for _ in seeds] for s in sites},
            "curves": [curve(everywhere, 20) for _ in seeds],
            "matrix": [matrix(0.95) for _ in seeds] if time == "continual" else None,
            "budget": {"rounds": 20, "samples": 57_600, "sequential_steps": steps,
                       "optimizer_resets": 0 if place == "centralized" else 60, "bytes_up": moved, "bytes_down": moved},
            "seconds": [9.4 + rng.gauss(0, 0.4) for _ in seeds], "rejections": 0,
        })  # fmt: skip
    if failed:
        cells.append({"place": "centralized", "time": "continual", "error": "the loss became NaN in round 7 (seed 1)"})
    counts = {
        site: {part: {label: max(0, round(size * rng.gammavariate(0.3, 1))) for label in LABELS}
               for part, size in (("train", 120), ("validation", 18), ("test", 30))} for site in sites
    }  # fmt: skip
    return {
        "title": "Handwritten digits at three hospitals", "created": "2026-03-04T09:30:00+00:00", "version": "0.1.0",
        "command": "fedzoo compare examples/digits.toml --place centralized,isolated,federated "
                   "--time offline,continual --seeds 0,1,2",
        "job": {"name": "digits", "model": {"name": "vit", "width": 64, "depth": 4, "norm": None},
                "federation": {"method": "fedavg", "rounds": 20, "local_epochs": 1},
                "optimizer": {"name": "adamw", "lr": 0.001}, "simulation": {"alpha": 0.3, "sites": list(sites)}},
        "job_hash": "3fd1c0a94e7b", "fingerprint": "9a" * 32, "demo": True,
        "partition": {"kind": "dirichlet(0.3) by class", "hash": "77b0" * 16, "sites": counts},
        "environment": {"torch": "2.11.0", "python": "3.12.4", "device": "cpu", "cpu": "2 cores"},
        "seeds": list(seeds), "metric": "accuracy", "sites": list(sites), "labels": LABELS, "cells": cells,
    }  # fmt: skip


class Page(HTMLParser):
    """Checks that tags balance; collects ids, references, attributes and the visible text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def read(path):
    page = path.read_text(encoding="utf-8")
    return page, Page(page)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return read(write(example(), tmp_path_factory.mktemp("report") / "new" / "report.html"))


def test_every_paradigm_site_class_and_hash_appears(written):
    text = "".join(written[1].text)
    for cell in parse(example()).cells:
        assert cell.name in text
    for wanted in [*SITES, *LABELS, "77b0" * 16, "3fd1c0a94e7b", "9a" * 32, "2.11.0", "federation.rounds", "--seeds"]:
        assert wanted in text
    assert "the loss became NaN in round 7 (seed 1)" in text
    assert "pools the data of all sites" in text


def test_the_verdicts_come_before_the_figures(written):
    text = " ".join(written[1].text)
    assert text.index("federated is above isolated on all sites' tests by") < text.index("Learning curves")


def test_the_page_is_small_and_refers_to_nothing_outside(written):
    page, parsed = written
    assert len(page.encode()) < 300_000
    assert not re.search(r"https?:|//[a-z]|url\(|@import", page)
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"script", "link", "img", "iframe", "object", "embed"})
    assert {name for name, _ in parsed.attributes}.isdisjoint({"src", "href", "srcset", "action"})


def test_drawings_and_tables_are_accessible(written):
    page, parsed = written
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    drawings = [attrs for tag, attrs in parsed.tags if tag == "svg" and "chart" in attrs["class"]]
    assert len(drawings) == 2 + 2 + len(SITES) + 2  # overview, curves, sites, gains offline and continual
    for attrs in drawings:
        assert attrs["role"] == "img"
        assert set(attrs["aria-labelledby"].split()) <= set(ids)
    assert page.count("<desc") == len(drawings)
    assert all("scope" in attrs for tag, attrs in parsed.tags if tag == "th")
    scrolls = [attrs for _, attrs in parsed.tags if attrs.get("class") == "scroll"]
    assert len(scrolls) == 6  # summary, worst sites, gains, two matrices, partition
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in scrolls)


def test_the_matrix_shows_the_mean_over_seeds_and_its_figures(tmp_path):
    c = example(failed=False, tasks=2)
    c["cells"] = [cell for cell in c["cells"] if cell["time"] == "continual"][:1]
    c["cells"][0]["matrix"] = [[[0.9, 0.1], [0.3, 0.8]], [[0.7, 0.1], [0.3, 0.8]], [[0.8, 0.1], [0.3, 0.8]]]
    page, parsed = read(write(c, tmp_path / "r.html"))
    cells = re.findall(r'<td class="heat" style="--v:([\d.]+)">(\d+)</td>', page)[:4]
    assert cells == [("0.800", "80"), ("0.100", "10"), ("0.300", "30"), ("0.800", "80")]
    # forgetting 0.6, 0.4, 0.5; final average 0.55 in each seed
    assert (
        "Final average 55.0 ± 0.0 % · forgetting 50.0 ± 10.0 points · backward transfer −50.0 ± 10.0 points"
        in " ".join(parsed.text)
    )


def test_everything_a_person_typed_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>\"'&"
    c = example(sites=(evil, "b"))
    c["title"] = c["command"] = c["job"]["name"] = c["cells"][-1]["error"] = c["environment"]["cpu"] = evil
    c["partition"]["kind"] = c["job_hash"] = evil
    c["labels"] = [evil, *LABELS[1:]]
    page, parsed = read(write(c, tmp_path / "r.html"))
    assert "<script" not in page
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert evil in "".join(parsed.text)


@pytest.mark.parametrize("seeds", [(0,), (4, 5)])
def test_one_seed_and_two_seeds_render(tmp_path, seeds):
    page, parsed = read(write(example(seeds=seeds), tmp_path / "r.html"))
    one = len(seeds) == 1
    assert ("there is no interval" in " ".join(parsed.text)) is one
    assert ('class="whisker"' in page) is not one


@pytest.mark.parametrize("seeds", [(0,), (4, 5)])
@pytest.mark.parametrize("larger", [True, False])
def test_the_words_on_gains_are_those_of_the_drawing(tmp_path, seeds, larger):
    c = example(seeds=seeds)
    c["measures"] = {"accuracy": {"unit": "bits", "factor": 1.0, "digits": 2, "larger": larger}}
    page, _ = read(write(c, tmp_path / "r.html"))
    section = page.partition('<section aria-labelledby="gains">')[2].partition("</section>")[0]
    section = html.unescape(section).replace("\u00a0", " ")
    many = len(seeds) > 1
    assert ("95 % interval over seeds; to the right" in section) is many
    assert ("with one seed, without an interval; to the right" in section) is not many
    described = re.findall(r"<desc[^>]*>([^<]*)</desc>", section)
    assert len(described) == 2
    assert all(("In bits, mean and 95 % interval over seeds." in said) is many for said in described)
    assert ('class="whisker"' in section) is many
    assert ("the federated model less the site's own one" in section) is larger
    assert ("the site's own model less the federated one" in section) is not larger
    assert "the last row is their mean" in section
    assert "bootstrap" not in section


def test_a_drawing_without_whiskers_does_not_speak_of_them(written, tmp_path):
    spoken = "standard deviation over seeds. "
    page, _ = read(write(example(seeds=(0,)), tmp_path / "r.html"))
    one, many = (re.findall(r"<desc[^>]*>([^<]*)</desc>", p) for p in (page, written[0]))
    assert not any(spoken in said for said in one)
    assert sum(spoken in said for said in many) == 2 + len(SITES)


def test_a_comparison_where_everything_failed_still_renders(tmp_path):
    c = example()
    c["cells"] = [{"place": "federated", "time": "offline", "error": "no memory"}]
    c["demo"], c["partition"] = False, {"kind": "given by the sites"}
    text = " ".join(read(write(c, tmp_path / "r.html"))[1].text)
    assert "failed: no memory" in text
    assert "Learning curves" not in text
    assert "pools the data" not in text
    assert "The examples by class are not known here." in text


def test_curves_leave_out_what_is_not_finite(tmp_path):
    c = example(seeds=(0,))
    for cell in c["cells"][:-1]:
        cell["curves"] = [[{"round": 1, "loss": float("nan"), "accuracy": 0.5}, {"round": 2, "accuracy": None}]]
    page, _ = read(write(c, tmp_path / "r.html"))
    assert "Accuracy on validation data" in page
    assert "Loss on validation data" not in page
    assert "nan" not in page.lower().replace("became nan", "")


def test_many_sites_and_classes_are_cut_and_counted(tmp_path):
    c = example(sites=tuple(f"site-{i:03}" for i in range(60)))
    c["labels"] = [f"class-{i}" for i in range(100)]
    for parts in c["partition"]["sites"].values():
        parts["train"] = dict.fromkeys(c["labels"], 3)
    page, parsed = read(write(c, tmp_path / "r.html"))
    text = " ".join(parsed.text)
    assert "36 more stand in" in text
    assert "60 more" in text  # classes
    assert ">180</td>" in page  # 60 classes x 3 examples in one column
    assert len(page.encode()) < 300_000


def test_terminal_markdown_and_page_hold_the_same_figures(tmp_path):
    c = parse(example())
    console = Console(width=240, record=True, file=(tmp_path / "out").open("w"))
    for shown in for_terminal(c):
        console.print(shown)
    terminal, markdown = console.export_text(), as_markdown(c)
    page = " ".join(read(write(c, tmp_path / "r.html"))[1].text)
    for value in [v for cell in c.cells for v in row(cell) if v != "–"] + headers(c):
        assert value in terminal
        assert value in markdown
        assert value in page
    summary, weakest, gains, streams = markdown.split("\n\n")
    for table in (weakest, gains):
        for value in [v for line in table.splitlines()[2:] for v in line.strip("| ").split(" | ")]:
            assert value in page
    assert streams.startswith("| after the last task, accuracy % | task 1 |")
    lines = summary.splitlines()
    assert len(lines) == 2 + len(c.cells)
    assert {line.count("|") for line in lines} == {len(headers(c)) + 1}


def test_a_row_by_hand():
    c = example(failed=False)
    c["cells"][1] |= {"all_sites": [0.8, 0.9, 1.0], "own_site": [0.5, 0.5, 0.5], "seconds": [1.0, 2.0, 6.0]}
    c["cells"][1]["budget"] |= {"bytes_up": 1_240_000, "bytes_down": 52_000}
    assert row(parse(c).cells[1]) == [
        "federated, offline", "90.0 ± 10.0", "50.0 ± 0.0", "–", "57,600", "1,440", "60", "1.2 / 0.052", "3.0",
    ]  # fmt: skip


def test_what_is_known_after_the_last_task_by_hand():
    c = example(failed=False)
    cell = next(cell for cell in c["cells"] if cell["time"] == "continual")
    seeds = len(c["seeds"])
    cell |= {
        "matrix": [[[0.9, 0.1], [0.4, 0.8]]] * seeds, "known": [[[1.0, 0.5], [0.8, 0.9]]] * seeds,
        "untrained": [[0.1, 0.2]] * seeds, "method": "er", "buffer": 1200,
    }  # fmt: skip
    c["cells"] = [cell]
    head, (figures,) = stream_table(parse(c))
    assert dict(zip(head, figures, strict=True)) == {
        "after the last task, accuracy %": f"{cell['place']}, continual (er)", "task 1": "40.0 ± 0.0",
        "task 2": "80.0 ± 0.0", "mean": "60.0 ± 0.0", "with the task known": "85.0 ± 0.0",
        "backward transfer": "−50.0 ± 0.0", "forward transfer": "−10.0 ± 0.0", "examples kept": "1,200",
    }  # fmt: skip


def test_many_paradigms_are_rows():
    c = example(failed=False)
    one = {**c["cells"][0], "metrics": {"accuracy": c["cells"][0]["all_sites"], "macro_f1": c["cells"][0]["all_sites"]}}
    c["metrics"] = ["accuracy", "macro_f1"]
    c["cells"] = [{**one, "time": "continual", "method": f"m{i}", "matrix": None} for i in range(9)]
    head, rows = metric_table(parse(c))
    assert head == ["all sites' tests, %", "accuracy", "macro_f1"]
    assert [r[0] for r in rows] == [f"centralized, continual (m{i})" for i in range(9)]


def test_markup_in_an_error_is_shown_as_it_is(tmp_path):
    c = example()
    c["cells"][-1]["error"] = "a|b\n[red]c[/red]"
    console = Console(width=240, record=True, file=(tmp_path / "out").open("w"))
    for shown in for_terminal(c):
        console.print(shown)
    assert "[red]c[/red]" in console.export_text()
    assert "failed: a\\|b [red]c[/red] |" in as_markdown(c)


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="the report cannot be written"):
        write(example(), tmp_path / "file" / "report.html")
    with pytest.raises(RunError, match="title"):
        write({k: v for k, v in example().items() if k != "title"}, tmp_path / "r.html")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0, 2.3, [0, 0.5, 1, 1.5, 2, 2.5]),
        (1, 1, None),
        (0, 0, None),
        (0, 1e9, None),
    ],
)
def test_ticks_are_round_and_cover_the_range(low, high, expected):
    found = charts.ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 7
    assert expected is None or found == expected


def test_a_bar_has_the_length_of_its_value_on_the_axis():
    drawn = charts.bars("k", "t", [charts.Bar("x", "federated offline", v, None, str(v)) for v in (100, 50, 0)])
    full, half, none = (float(w) for w in re.findall(r'class="bar[^>]* width="([\d.]+)"', drawn))
    zero, _, hundred = (float(x) for x in re.findall(r'class="grid" d="M([\d.]+)', drawn))
    assert (full, half, none) == (pytest.approx(hundred - zero), pytest.approx((hundred - zero) / 2, abs=0.1), 0)


def test_a_whisker_ends_with_the_axis():
    drawn = charts.bars("k", "t", [charts.Bar("x", "federated offline", 98, 5, "98.0 ± 5.0")])
    _, _, hundred = re.findall(r'class="grid" d="M([\d.]+)', drawn)
    assert f"H{hundred}M" in drawn
    assert float(hundred) < charts.WIDTH


def test_a_curve_runs_between_the_ends_of_its_axes():
    points = [charts.Point(1, 0, 0, 0), charts.Point(2, 50, 40, 60), charts.Point(3, 100, 100, 100)]
    drawn = charts.lines("k", "t", [charts.Series("x", "federated offline", points)], "round", "y (%)", 100)
    axis = re.findall(r'class="grid" d="M([\d.]+) ([\d.]+)H([\d.]+)"', drawn)  # from 0 % upwards
    (left, bottom, right), (_, top, _) = axis[0], axis[-1]
    curve = re.search(r'class="line[^>]* d="M([^"]+)"', drawn)[1].split("L")
    assert (curve[0], curve[-1]) == (f"{float(left)} {bottom}", f"{float(right)} {top}")
    assert float(curve[1].split()[1]) == pytest.approx((float(top) + float(bottom)) / 2, abs=0.1)


def _luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _contrast(a, b):
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _mix(a, b, share):
    return "#" + "".join(
        f"{round(share * int(a[i : i + 2], 16) + (1 - share) * int(b[i : i + 2], 16)):02x}" for i in (1, 3, 5)
    )


def test_contrast_meets_wcag_aa_in_light_dark_and_print(written):
    themes = re.findall(r":root \{(.*?)\}", written[0], re.DOTALL)
    assert len(themes) == 3
    share = int(re.search(r"var\(--v\) \* (\d+)%", written[0])[1]) / 100
    for theme in themes:
        colour = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{3,6})", theme))
        colour = {k: v if len(v) == 7 else "#" + "".join(2 * x for x in v[1:]) for k, v in colour.items()}
        for ground in ("page", "card", "note"):
            assert _contrast(colour["text"], colour[ground]) >= 4.5
        for ground in ("page", "card"):
            assert _contrast(colour["muted"], colour[ground]) >= 4.5
        for line in ("centralized", "isolated", "federated", "accent"):
            assert _contrast(colour[line], colour["card"]) >= 3
        assert _contrast(colour["text"], _mix(colour["heat"], colour["card"], share)) >= 4.5
