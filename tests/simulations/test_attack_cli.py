"""`fedzoo attack`: figures, page and messages."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import fedzoo
from simulations.attacks.drawing import Mark, Trace, auc_chart, roc_chart
from simulations.attacks.report import says, table, write
from simulations.attacks.results import Inversion, Membership

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "digits-attack.toml"
SHORT = ["--set", "federation.rounds=1", "--set", "data.train_share=0.2"]
FEW = {"membership": ["--shadows", "4", "--targets", "2"], "inversion": ["--images", "2", "--steps", "5"]}


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        fedzoo.main(["attack", *words])
    return int(end.value.code or 0) if not isinstance(end.value.code, str) else 1


class Page(HTMLParser):
    """Open elements, ids, references, pictures and visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.sources: list[str] = []
        self.alts: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given: dict[str, Any] = dict(attrs)
        if tag not in ("meta", "wbr", "img"):
            self.open.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.references += given.get("aria-labelledby", "").split()
        self.sources += [v for k, v in given.items() if k in ("src", "href")]
        if tag == "img":
            self.alts.append(given["alt"])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A drawing's path."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module", params=["membership", "inversion"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("attack") / "out"
    words = [request.param, str(EXAMPLE), "--epsilons", "none,8", *SHORT, *FEW[request.param], "--out", str(folder)]
    assert run(*words, "--json") == 0
    return request.param, folder


def test_the_page_is_whole_and_needs_nothing_else(made: tuple[str, Path]) -> None:
    name, folder = made
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert not page.open
    assert len(page.ids) == len(set(page.ids))
    assert set(page.references) <= set(page.ids)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "neighbours: one training example added or removed" in page.text or name == "inversion"
    assert "protects nobody" in page.text
    assert "epsilon 8" in page.text
    assert "no privacy" in page.text
    if name == "inversion":
        assert len(page.alts) == 2 + 1 + 2 * 2 * 2
        assert page.alts[0].startswith("truth: image 1, label ")
        assert "epsilon 8, optimisation: image 2, label " in " ".join(page.alts)
    else:
        assert {"roc-t", "roc-d", "auc-t", "auc-d"} <= set(page.ids)
        assert re.search(r"no privacy: AUC 0\.\d{3}", page.text)


def test_the_result_loads_again_and_its_table_is_the_page_s(made: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = made
    kind = {"membership": Membership, "inversion": Inversion}[name]
    found = kind.model_validate(json.loads((folder / f"{name}.json").read_text()))
    again = write(found, tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert again == (folder / "report.html").read_text(encoding="utf-8")
    head, rows = table(found)
    assert all(len(row) == len(head) for row in rows)
    if name == "membership":
        assert "epsilon (± one sample, delta 0.0001)" in head
        assert "epsilon proved (delta 0.0001)" in head
    assert len(rows) == {"membership": 2, "inversion": 5}[name]
    assert says(found)[0].startswith("no privacy: ")


def test_without_json_there_is_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["inversion", str(EXAMPLE), "--epsilons", "none", *SHORT, *FEW["inversion"], "--out", str(tmp_path / "o")]
    assert run(*words) == 0
    out = capsys.readouterr().out
    assert "first layer" in out
    assert "PSNR" in out
    assert f"report {tmp_path / 'o' / 'report.html'}" in out.replace("\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["membership", "--epsilons", "none,much"], "--epsilons: 'much' is neither 'none' nor a number above 0"),
        (["membership", "--epsilons", "-1"], "--epsilons: '-1' is neither"),
        (["membership", "--epsilons", "inf"], "--epsilons: 'inf' is neither"),
        (["inversion", "--epsilons", ","], "--epsilons names no level"),
        (["membership", "--shadows", "5"], "--shadows 5: each candidate is in half of them"),
        (["membership", "--shadows", "2"], "--shadows 2: each candidate is in half of them"),
        (["membership", "--targets", "1"], "--targets 1: an interval needs two target models"),
        (
            ["membership", "--set", "place=isolated"],
            "has place = 'isolated', and the membership attack is on one model",
        ),
        (["inversion", "--set", "place=isolated"], "has place = 'isolated', and the inversion attack is on one model"),
        (["membership", "--set", "time=continual"], "has time = 'continual'"),
        (
            ["membership", "--set", "data.train_share=0.01"],
            "training examples, and a model on half of them says nothing",
        ),
        (["inversion", "--images", "3", "--batch", "2"], "--images 3 are not whole answers of --batch 2 images"),
        (["inversion", "--images", "5000"], "--images 5000, but site 'site-1' has "),
        (["inversion", "--set", "train.optimizer=adamw"], "train.optimizer = 'adamw' does not go along it"),
    ],
)
def test_bad_input_is_one_clear_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        fedzoo.main(["attack", words[0], str(EXAMPLE), *words[1:], "--out", str(tmp_path / "o")])
    assert message in str(end.value.code)
    assert "\n" not in str(end.value.code)
    assert not (tmp_path / "o" / "report.html").exists()


def test_an_epsilon_needs_a_unit(tmp_path: Path) -> None:
    from shared_models.job import Job
    from shared_models.job_parts import PrivacyPart

    plain = Job.load(EXAMPLE).replace(privacy=PrivacyPart().model_dump())
    (tmp_path / "plain.toml").write_text(plain.to_toml())
    with pytest.raises(SystemExit) as end:
        fedzoo.main(["attack", "membership", str(tmp_path / "plain.toml"), "--epsilons", "none,8"])
    assert "has no [privacy], which says whose presence epsilon hides" in str(end.value.code)


def test_another_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        fedzoo.main(["attack", "inversion", str(EXAMPLE.parent / "em-membranes.toml"), "--out", str(tmp_path / "o")])
    assert "is made for classification" in str(end.value.code)


def test_where_curves_and_bounds_lie() -> None:
    trace = Trace("level-0", [(0.0, 0.05), (0.01, 0.1), (1.0, 1.0)], [(0.01, 0.01), (1.0, 1.0)], "none: AUC 0.6")
    drawn = str(roc_chart("k", "ROC", [trace], 2))
    # two decades over x = 58..376 and y = 306..30: FPR 1 % is the left end, TPR 10 % the middle
    assert 'class="line level-0" d="M58.0 168.0L376.0 30.0"' in drawn
    assert 'class="allowed level-0" d="M58.0 306.0L376.0 30.0"' in drawn
    assert '<desc id="k-d">none: AUC 0.6.</desc>' in drawn
    aucs = str(
        auc_chart(
            "a", "AUC", [Mark("no <privacy>", "level-0", 0.7, 0.6, 0.8, None), Mark("e", "level-1", 0.5, 0.4, 0.6, 1.0)]
        )
    )
    assert 'cy="150.0"' in aucs, "0.7 is the middle of 0.4 to 1"
    assert "no &lt;privacy&gt;" in aucs
    assert aucs.count('class="most') == 1
