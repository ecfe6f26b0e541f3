"""The card of a model: what is declared, and measurements that are what they say they are."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedzoo
from shared_models import card as cards
from shared_models.card import default_job, draw, make_card, measure
from shared_models.detection import Detector
from shared_models.errors import CompatibilityError, ConfigError, UnknownNameError
from shared_models.job import Job
from shared_models.models import Model, ModelSettings, Shape, models
from shared_models.spec import build_model
from shared_models.tasks.base import Batch, make_task
from shared_models.tasks.classification import Classification


class Settings(ModelSettings):
    width: int
    norm: str = "group"


class Pixels(nn.Module):
    """A linear map of all pixels, through `width` numbers."""

    def __init__(self, width: int, shape: Shape, outputs: int) -> None:
        super().__init__()
        self.body = nn.Linear(math.prod(shape), width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *shape) -> (B, outputs)."""
        scores: Tensor = self.head(self.body(x.flatten(1)))
        return scores


class Regions(Detector):
    """Notes the proposals it was given; finds the same place everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor, y: Tensor, proposals: Tensor | None = None) -> dict[str, Tensor]:
        """Mean brightness as loss."""
        assert proposals is not None
        self.seen.append(tuple(proposals.shape))
        given = {"loss": self.scale * x.flatten(1).mean(dim=1)}
        return given if self.training else {**given, "found": torch.zeros(len(x), 1, 6)}


def build_pixels(settings: Settings, shape: Shape, outputs: int) -> nn.Module:
    if shape[-1] > 8:
        raise ConfigError(f"no more than 8 pixels, not {shape[-1]}")
    return Pixels(settings.width, shape, outputs)


TOYS = {
    "pixels": Model(
        name="pixels", builder=build_pixels, settings=Settings, paper="A. Author 1999, Pixels",
        sizes={"tiny": {"width": 2}, "wide": {"width": 50, "norm": "batch"}}, tasks=("classification",),
        family="toys", notes="Fast.", per_sample_gradients=(), heads=("head.*", "body.bias"),
        usual={"tiny": (1, 4, 4), "wide": (3, 4, 8)},
    ),
    "pixels-2": Model(
        name="pixels-2", builder=build_pixels, settings=Settings, paper="B. Author 2000, Wide Pixels",
        sizes={"tiny": {"width": 40}}, tasks=("classification",), family="toys", notes="Slow.",
        usual={"tiny": (3, 8, 8)},
    ),
    "regions": Model(
        name="regions", builder=lambda settings, shape, outputs: Regions(), settings=ModelSettings,
        paper="C. Author 2001, Regions", sizes={"tiny": {}}, tasks=("detection",), family="toys", proposals=True,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Three models in the zoo, quick measurements on the CPU with one thread, an empty folder to be in."""
    assert "mlp" in models  # the zoo is loaded before the toys come
    for name, toy in TOYS.items():
        monkeypatch.setitem(models._things, name, toy)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cards, "REPEATS", 2)
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def job(name: str, shape: Shape = (1, 4, 4), classes: int = 3, task: str = "classification") -> Job:
    return default_job(name, size="tiny", task=task, shape=shape, classes=classes)


# ---- what is declared ------------------------------------------------------------------------------------------------
def test_the_card_says_what_the_model_declares() -> None:
    card = make_card("pixels", size="wide", classes=3, batch=4)
    assert {k: card[k] for k in ("model", "paper", "notes", "tasks", "heads", "privacy", "stackable")} == {
        "model": "pixels",
        "paper": "A. Author 1999, Pixels",
        "notes": "Fast.",
        "tasks": ["classification"],
        "heads": ["head.*", "body.bias"],
        "privacy": ["client"],
        "stackable": True,
    }
    assert card["settings"] == {"width": 50, "norm": "batch"}
    assert card["unit"] == "batch"
    assert make_card("pixels", batch=4)["unit"] == "sample"
    assert card["sizes"] == [
        {"size": "tiny", "shape": [1, 4, 4], "parameters": 16 * 2 + 2 + 2 * 3 + 3},
        {"size": "wide", "shape": [3, 4, 8], "parameters": 96 * 50 + 50 + 50 * 3 + 3},
    ]
    json.dumps(card, allow_nan=False)


def test_sizes_are_counted_without_memory_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def build(settings: Settings, shape: Shape, outputs: int) -> nn.Module:
        model = build_pixels(settings, shape, outputs)
        built.append(next(model.parameters()).device.type)
        return model

    monkeypatch.setattr(cards, "_family", lambda *_: {})
    monkeypatch.setitem(models._things, "pixels", replace(TOYS["pixels"], builder=build))
    make_card("pixels", batch=4)
    assert built == ["cpu", "meta", "meta"]


# ---- what is measured ------------------------------------------------------------------------------------------------
def test_what_is_counted() -> None:
    a_job = job("pixels")
    cost, (_, spec) = measure(a_job, 8), build_model(a_job)
    assert cost.parameters == 16 * 2 + 2 + 2 * 3 + 3
    assert cost.payload_bytes == 4 * cost.parameters
    assert cost.fingerprint == spec.fingerprint
    assert cost.match is None
    statistics = measure(
        Job.resolve({**job("resnet18").model_dump(), "model": {"name": "resnet18", "norm": "batch"}}), 2
    )
    assert statistics.payload_bytes > 4 * statistics.parameters  # running statistics are sent too


class Squares(Classification):
    """Loss of a sample: the squares of its scores."""

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """(B,)."""
        return (outputs * outputs).sum(dim=1)


@pytest.mark.parametrize("batch", [1, 32])
def test_memory_of_a_step_is_what_one_can_add_up(batch: int) -> None:
    """Of a linear map and squares autograd keeps x and the scores, which are squared with themselves, once each."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    model.register_buffer("constant", torch.zeros(5))
    task = Squares(make_task(job("pixels")).settings)
    found, how = cards._memory(model, task, Batch(torch.randn(batch, 3, 2, 2), torch.zeros(batch)))
    assert found == 4 * batch * (12 + 10) + 2 * 4 * (12 * 10 + 10) + 4 * 5
    assert how == "counted: values kept for the backward pass, parameters, buffers and gradients; without temporaries"


def test_a_time_is_the_median_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five repetitions, or fewer where they are long; the first, which is not counted, may be as slow as it likes."""

    def timed(*seconds: float) -> tuple[float, int]:
        now, calls = [0.0], [0]

        def work() -> None:
            now[0] += (1000.0, *seconds)[calls[0]]
            calls[0] += 1

        monkeypatch.setattr(cards.time, "perf_counter", lambda: now[0])
        return cards._seconds(work, torch.device("cpu")), calls[0]

    monkeypatch.setattr(cards, "REPEATS", 5)
    assert timed(0.25, 0.5, 0.125, 0.75, 0.375) == (0.375, 6)
    assert timed(1.0, 2.0, 3.0) == (2.0, 4)
    assert timed(60.0) == (60.0, 2)


def test_a_step_trains_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[nn.Module, dict[str, Tensor]]] = []
    modes: list[tuple[bool, bool]] = []

    def build(a_job: Job) -> Any:
        model, spec = build_model(a_job)
        kept.append((model, {k: v.clone() for k, v in model.state_dict().items()}))
        model.register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_grad_enabled())))
        return model, spec

    monkeypatch.setattr(cards, "build_model", build)
    state = torch.get_rng_state()
    cost = measure(job("pixels"), 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert cost.step_seconds > 0
    assert cost.inference_seconds > 0
    assert modes == [(True, True)] * 4 + [(False, False)] * 3  # memory, a warm-up and two steps; then inference
    (model, before), = kept  # fmt: skip
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_model_that_needs_regions_gets_some() -> None:
    batch = draw(make_task(job("pixels")), job("regions", task="detection"), 5)  # of a task that draws none
    assert batch.proposals is not None
    assert batch.proposals.shape == (5, 64, 4)
    assert (batch.proposals[..., :2] < batch.proposals[..., 2:]).all()
    assert batch.proposals.min() >= 0
    assert batch.proposals.max() <= 1
    assert draw(make_task(job("pixels")), job("pixels"), 5).proposals is None
    again = draw(make_task(job("pixels")), job("pixels"), 5)
    assert torch.equal(again.x, draw(make_task(job("pixels")), job("pixels"), 5).x)
    assert measure(job("regions", (3, 8, 8), task="detection"), 2).inference_seconds > 0


def test_the_family_stands_side_by_side_on_the_same_examples() -> None:
    family = make_card("pixels", size="wide", classes=3, batch=4)["family"]
    assert family["name"] == "toys"
    assert family["shape"] == [1, 4, 4]  # the usual one at tiny, where all are measured
    first, second = family["members"]  # a detector of that family serves another task
    assert (first["model"], first["parameters"], first["notes"]) == ("pixels", 43, "Fast.")
    assert (second["model"], second["parameters"], second["notes"]) == ("pixels-2", 16 * 40 + 40 + 40 * 3 + 3, "Slow.")
    assert all(row["step_seconds"] > 0 and row["inference_seconds"] > 0 for row in (first, second))
    assert make_card("mlp", batch=2)["family"] == {"name": "", "shape": [3, 32, 32], "members": []}


def test_a_member_that_cannot_take_the_shape_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    anything = replace(TOYS["pixels"], name="any", builder=lambda settings, shape, k: Pixels(1, shape, k))
    monkeypatch.setitem(models._things, "any", anything)
    rows = make_card("any", shape=(1, 4, 16), batch=2)["family"]["members"]
    assert [(row["model"], row["refused"]) for row in rows] == [
        ("any", ""), ("pixels", "no more than 8 pixels, not 16"), ("pixels-2", "no more than 8 pixels, not 16"),
    ]  # fmt: skip


def test_weights_are_loaded_and_said(tmp_path: Path) -> None:
    torch.save({"body.weight": torch.zeros(2, 16), "head.weight": torch.zeros(9, 2)}, tmp_path / "a.pth")
    measured = make_card("pixels", classes=3, batch=2, weights="a.pth")["measured"]
    assert measured["weights"] == (
        "weights a.pth: 1 of 4 entries loaded; left as initialised: head.weight ((9, 2) there, (3, 2) here), "
        "body.bias (not there), head.bias (not there)"
    )
    assert measured["match"]["loaded"] == ("body.weight",)


# ---- what cannot be --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "keys", "kind", "message"),
    [
        ("pixel", {}, UnknownNameError, "unknown model 'pixel'. did you mean 'pixels'"),
        ("pixels", {"size": "wid"}, UnknownNameError, "model 'pixels' has no size 'wid'. known: tiny, wide"),
        ("pixels", {"task": "clasification"}, UnknownNameError, "'clasification'. did you mean 'classification'"),
        ("pixels", {"task": "detection"}, ConfigError, "does not serve the task 'detection'. known: classification"),
        ("pixels", {"shape": (1, 4, 9)}, ConfigError, "no more than 8 pixels, not 9"),
        ("pixels", {"shape": (5,)}, ConfigError, "model 'pixels' cannot take an example of shape (5,)"),
        (
            "pixels",
            {"shape": (1, 4)},
            ConfigError,
            "model 'pixels' cannot take an example of shape (1, 4)",
        ),
        ("pixels", {"weights": "none.pth"}, ConfigError, "there is no weights file 'none.pth'"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(name: str, keys: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(kind) as error:
        make_card(name, **keys)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not isinstance(error.value, CompatibilityError)  # a card is no job of the user's


# ---- the command -----------------------------------------------------------------------------------------------------
def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        fedzoo.main(["models", *words])
    out, err = capsys.readouterr()
    assert end.value.code == 0, err
    return out


def test_the_list_is_by_task(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys).splitlines()
    headings = [line for line in lines if not line.startswith(" ")]
    assert headings == sorted({task for name in models for task in models[name].tasks})
    at = next(i for i, line in enumerate(lines) if line.split() == ["pixels", "tiny,", "wide"])
    assert lines[at + 1].strip() == "A. Author 1999, Pixels"
    assert (
        lines.index("classification")
        < at
        < lines.index("detection")
        < lines.index(next(line for line in lines if line.split() == ["regions", "tiny"]))
    )


def test_the_list_of_one_task_for_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["model"]: row for row in json.loads(run(capsys, "--task", "detection", "--json"))}
    assert "pixels" not in rows
    assert rows["regions"]["sizes"] == ["tiny"]
    assert rows["regions"]["proposals"] is True
    everything = {row["model"]: row for row in json.loads(run(capsys, "--json"))}
    assert set(everything) == set(models)
    assert everything["pixels"]["settings"] == ["width", "norm"]
    assert everything["pixels"]["privacy"] == ["client"]


def test_a_card_for_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "show", "pixels", "--size", "wide", "--classes", "3", "--batch", "4")
    for line in (
        "pixels: A. Author 1999, Pixels",
        "  Fast.",
        "  privacy    client (per-sample gradients: none)",
        "  @head      head.*, body.bias",
        "  tiny             43  1x4x4",
        "  wide          5,003  3x4x8",
        "  sent              0.02 MB each way, per site and round",
        "family 'toys' side by side: tiny, classification, 1x4x4, 3 classes, batches of 4",
    ):
        assert line in text.splitlines(), line
    (row,) = (line for line in text.splitlines() if line.startswith("  pixels-2  "))
    assert row.split()[1] == "803"
    assert row.endswith("  Slow.")


def test_a_card_for_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("show", "regions", "--task", "detection", "--shape", "3,8,8", "--batch", "2", "--classes", "2", "--json")
    card = json.loads(run(capsys, *words))
    cost = card["measured"]
    assert (cost["task"], cost["shape"], cost["batch"], cost["parameters"]) == ("detection", [3, 8, 8], 2, 1)
    assert cost["fingerprint"] == build_model(job("regions", (3, 8, 8), 2, "detection"))[1].fingerprint
    assert cost["threads"] == 1
    assert cost["device"] == "CPU"


def test_features_are_shown_as_features(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "show", "logistic", "--shape", "13", "--batch", "2")
    assert "classification, 13 features, 10 classes" in text
    assert "settings of" not in text  # it has none


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("show", "pixels", "--shape", "3x4"), "--shape '3x4' is not of the form C,H,W or F."),
        (("--json", "show", "pixels"), "put options behind 'show'"),
        (("shwo", "pixels"), "No such command 'shwo'"),
        (("show", "pixels", "--batch", "0"), "0 is not in the range"),
    ],
)
def test_words_that_cannot_be(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit) as end:
        fedzoo.main(["models", *words])
    assert end.value.code not in (0, None)
    assert message in capsys.readouterr().err
