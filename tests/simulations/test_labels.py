"""Labels as a dial: pretext streams and what follows them, anomalies and clusters on streams, jobs side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fedzoo
from client.readers.base import Examples, Splits
from client.workbench import Benches
from server.events import read_events
from shared_models.errors import CompatibilityError, ConfigError, RunError
from shared_models.job import Job
from shared_models.tasks.base import tasks
from simulations import compare, cube
from simulations.paradigms import Setting, paradigms
from simulations.partition import SitePopulation
from simulations.results import parse

LABELS = [str(c) for c in range(10)]
STREAM = {"time": "continual", "stream": {"tasks": 5}}
PRETEXT: dict[str, Any] = {
    "model": {"name": "cnn"},
    "federation": {"rounds": 5},
    "stages": [
        {"name": "pretext", "task": {"name": "rotation", "labels": LABELS}},
        {"name": "probe", "share": {"base": ["!@head"]}, "stream": {"tasks": 1}, "federation": {"rounds": 2}},
    ],
}
SIMULATION = {"reader": "digits", "partition": "iid", "sites": 2}


def digits(make_job: Any, **parts: Any) -> tuple[Job, SitePopulation]:
    job: Job = make_job(simulation=SIMULATION, **parts)
    return job, compare.make_sites(job, Path())


def test_what_each_task_learns_from() -> None:
    found = {kind: {name for name in tasks if tasks[name].supervision == kind} for kind in ("supervised",
             "self-supervised", "unsupervised")}  # fmt: skip
    assert found["unsupervised"] == {"anomaly", "clustering", "reconstruction"}
    images = {"rotation", "jigsaw", "colorization", "masked-autoencoding", "contrastive"}
    texts = {"language-modelling", "masked-language-modelling", "replaced-token-detection", "denoising"}
    assert images | texts <= found["self-supervised"]
    assert {"classification", "segmentation", "detection", "translation", "zero-shot"} <= found["supervised"]


def test_a_pretext_sees_one_task_at_a_time_and_the_probe_all_at_once(make_job: Any, tmp_path: Path) -> None:
    job, sites = digits(make_job, **STREAM, **PRETEXT)
    result = paradigms["federated"](Setting(job, sites, Benches(torch.device("cpu")), folder=tmp_path))
    events = [event for event, _ in read_events(tmp_path / "events.jsonl")]
    *rounds, before_last, last = [e for e in events if e["event"] == "round"]
    step = job.steps[0]
    held = [[len(sites.at(0).splits(name).train.of_tasks(step, (task,))) for name in sites.names] for task in range(5)]
    assert [(e["task"], e["examples"]) for e in rounds] == [(task, held[task]) for task in range(5)]
    assert sum(map(sum, held)) == sum(len(sites.splits(name).train) for name in sites.names)
    assert [len(e["test"]) for e in events if e["event"] == "task"] == [5] * 5
    whole = [len(sites.splits(name).train) for name in sites.names]
    assert [before_last["examples"], last["examples"]] == [whole, whole]
    assert result.matrix is None


def test_labels_tell_a_pretext_s_tasks_apart_and_nothing_more(
    make_job: Any, make_splits: Callable[..., Splits]
) -> None:
    """Labels that change places within each task leave the pretext's model as it is, bit for bit."""
    part = {"name": "rotation", "labels": LABELS}
    job: Job = make_job(**STREAM, model={"name": "cnn"}, task=part, federation={"rounds": 5})
    sites = {name: make_splits(seed) for seed, name in enumerate("ab")}

    def swapped(part: Examples) -> Examples:
        y = part.store.y
        return Examples(type(part.store)(**{**vars_of(part.store), "y": y + 1 - 2 * (y % 2)}), part.rows)

    turned = {name: Splits(*(swapped(part) for part in (s.train, s.validation, s.test))) for name, s in sites.items()}
    one, other = (train(job, found) for found in (sites, turned))
    assert all(torch.equal(one[name], other[name]) for name in one)
    other = train(job.replace(stream={"tasks": 2}), sites)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def vars_of(store: Any) -> dict[str, Any]:
    return {name: getattr(store, name) for name in store.__dataclass_fields__}


def train(job: Job, sites: dict[str, Splits]) -> dict[str, torch.Tensor]:
    from server.coordinator import Coordinator
    from simulations.engines.inprocess import InProcess

    loop = Coordinator(job, InProcess(list(sites), sites.__getitem__, Benches(torch.device("cpu"))), "run")
    return dict(loop.run().model)


@pytest.mark.parametrize("place", ["centralized", "isolated", "federated"])
def test_anomalies_and_clusters_come_in_streams(make_job: Any, place: str) -> None:
    """Each task's normal digits are told from all anomalies, which come with every task's test."""
    anomaly = {"name": "anomaly", "labels": LABELS, "anomalous": ["0"]}
    parts: dict[str, Any] = {"train": {"optimizer": "adamw", "lr": 0.003}, "federation": {"rounds": 5}}
    job, sites = digits(make_job, **STREAM, **parts, model={"name": "autoencoder"}, task={**anomaly})
    clusters, _ = digits(make_job, **STREAM, **parts, model={"name": "kmeans"}, task={"name": "clustering"})
    for one in (job, clusters):
        (found,) = compare.compare(one, sites, paradigms=[(place, "continual")], seeds=(0,)).cells  # type: ignore[list-item]
        assert found.error is None
        assert [len(row) for row in (found.matrix or [[]])[0]] == [5] * 5


def test_a_pretext_is_replayed_where_no_choice_is_repeated(make_job: Any) -> None:
    job, sites = digits(make_job, **STREAM, **PRETEXT, continual={"name": "er", "buffer": 20})
    plain, _ = digits(make_job, **STREAM, **PRETEXT)
    one, other = (paradigms["federated"](Setting(j, sites, Benches(torch.device("cpu")))) for j in (job, plain))
    weights = [dict(result.models["model"])["conv1.weight"] for result in (one, other)]
    assert not torch.equal(*weights)
    with pytest.raises(ConfigError, match=r"stage 'pretext': .*'der' repeats choices among labels"):
        make_job(**STREAM, **PRETEXT, continual={"name": "der", "buffer": 20})


def test_one_task_is_no_stream(make_job: Any) -> None:
    """What a replaying method keeps would be the very examples at hand."""
    whole = make_job(time="continual", stream={"tasks": 1}, continual={"name": "er", "buffer": 20})
    sites = compare.make_sites(whole.replace(simulation=SIMULATION), Path())
    models = [
        dict(paradigms["federated"](Setting(job, sites, Benches(torch.device("cpu")))).models["model"])
        for job in (whole, make_job())
    ]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    with pytest.raises(CompatibilityError, match="solves for the data at hand"):
        make_job(
            time="continual",
            stream={"tasks": 2},
            model={"name": "kmeans"},
            task={"name": "clustering"},
            method={"name": "lloyd"},
        )
    make_job(time="continual", stream={"tasks": 1}, model={"name": "kmeans"}, task={"name": "clustering"},
             method={"name": "lloyd"})  # fmt: skip


def command(*words: str) -> None:
    """Of the command line, without an error."""
    with pytest.raises(SystemExit) as end:
        fedzoo.main(list(words))
    assert not end.value.code, end.value.code


# ---- several jobs --------------------------------------------------------------------------------------------------
def found(name: str, values: list[float], metric: str = "accuracy", sites: tuple[str, ...] = ("a",)) -> Any:
    cells = [
        {"place": place, "time": "offline", "all_sites": values, "own_site": values, "budget": {"samples": 1200},
         "per_site": dict.fromkeys(sites, values)}
        for place in ("centralized", "federated")
    ]  # fmt: skip
    cells.append({"place": "isolated", "time": "offline", "error": "no memory"})
    return parse({
        "title": "t", "created": "2026-01-02T03:04:05Z", "version": "0.1.0", "command": "fedzoo compare a.toml b.toml",
        "job": {"name": name}, "job_hash": "j", "fingerprint": "f", "partition": {"kind": "iid", "hash": "p"},
        "environment": {}, "seeds": list(range(len(values))), "sites": list(sites), "labels": ["x"], "cells": cells,
        "metric": metric,
    })  # fmt: skip


def made(*entries: tuple[str, str, Any]) -> cube.Cube:
    return cube.Cube(
        title="3 jobs", created="2026-01-02T03:04:05Z", version="0.1.0", command="fedzoo compare a.toml b.toml",
        entries=[cube.Entry(name=n, labels=labels, comparison=c) for n, labels, c in entries],
    )  # type: ignore[arg-type]  # fmt: skip


def test_jobs_with_one_measure_are_held_against_the_first_of_them(tmp_path: Path) -> None:
    three = made(
        ("given", "supervised", found("given", [0.50, 0.52])),
        ("errors", "unsupervised", found("errors", [0.9, 0.9], "auroc")),
        ("turned", "self-supervised", found("turned", [0.60, 0.63])),
    )
    head, rows = cube.table(three)
    assert head == ["job", "time", "centralized", "federated", "isolated", "labels", "metric", "samples"]
    assert rows[0] == ["given", "offline", "51.0 ± 1.4", "51.0 ± 1.4", "failed", "supervised", "accuracy %", "1,200"]
    assert rows[1][6] == "auroc %"
    (said,) = cube.says(three)
    assert said == (
        "Offline, turned against given on all sites' tests, points (95 % intervals, 2 seeds): "
        "centralized 10.5 (4.1 to 16.9), federated 10.5 (4.1 to 16.9)."
    )
    assert cube.load(cube.save(three, tmp_path / "cube.json")) == three
    page = cube.write(three, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "turned against given" in page
    ids = [part.split('"')[0] for part in page.split(' id="')[1:]]
    assert len(ids) == len(set(ids))
    assert "failed" in page


def test_only_what_measures_the_same_is_held_against_it() -> None:
    """Four turns told apart are no digits told apart, whatever the labels that are listed."""
    digits, turns = found("given", [0.50, 0.52, 0.53]), found("turned", [0.60, 0.63, 0.66])
    for c, kind in ((digits, "classification"), (turns, "rotation")):
        c.job["task"] = {"name": kind, "labels": ["x"]}
    assert cube.says(made(("given", "supervised", digits), ("turned", "self-supervised", turns))) == []
    probe = {"name": "probe", "task": {"name": "classification", "labels": ["x"], "class_weights": [2.0]}}
    turns.job["stages"] = [{"name": "turned", "task": {"name": "rotation"}}, probe]
    assert len(cube.says(made(("given", "supervised", digits), ("turned", "self-supervised", turns)))) == 1


def test_each_job_s_own_continual_method_is_compared(tmp_path: Path) -> None:
    one, two = found("er", [0.5, 0.52, 0.53]), found("der", [0.6, 0.63, 0.66])
    moved = [
        c.model_copy(update={"cells": [cell.model_copy(update={"time": "continual", "method": m}) for cell in c.cells]})
        for c, m in ((one, "er"), (two, "der"))
    ]
    (said,) = cube.says(made(("a", "supervised", moved[0]), ("b", "supervised", moved[1])))
    assert said.startswith("Continual, b against a on all sites' tests")
    assert "federated (der against er) 11.3" in said


def test_jobs_on_other_sites_or_of_one_name_are_refused(make_job: Any, tmp_path: Path) -> None:
    job, sites = digits(make_job)
    other, moved = digits(make_job, name="other")
    here = Path("a")
    cube.require_same_sites({"a": (sites, here), other.name: (moved, here)})
    far = make_job(simulation={**SIMULATION, "seed": 7})
    with pytest.raises(ConfigError, match="'b' has other examples, or has them at other sites, than 'a'"):
        cube.require_same_sites({"a": (sites, here), "b": (compare.make_sites(far, Path()), here)})
    with pytest.raises(ConfigError, match="'b' has other examples"):  # of the same names, in another file
        cube.require_same_sites({"a": (sites, here), "b": (moved, Path("b"))})
    with pytest.raises(ConfigError, match=r"is called 'cube\.json', as a file of the comparison is"):
        cube.names([job, job.replace(name="cube.json")])
    with pytest.raises(ConfigError, match="two of the jobs are called 'test'"):
        cube.names([job, job])
    with pytest.raises(ValueError, match="has other sites or seeds"):
        made(("a", "supervised", found("a", [0.5])), ("b", "supervised", found("b", [0.5], sites=("z",))))
    (tmp_path / "cube.json").write_text("{}")
    with pytest.raises(RunError, match=r"cube\.json cannot be used"):
        cube.load(tmp_path / "cube.json")


@pytest.mark.slow
def test_a_stopped_cube_goes_on_and_ends_with_the_same_table(
    make_job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    small = {"simulation": SIMULATION, "model": {"name": "cnn"}, "federation": {"rounds": 5}}
    one.write_text(make_job(name="one", stream={"tasks": 5}, **small).to_toml())
    staged = {**small, **PRETEXT, "stream": {"tasks": 5}}
    two.write_text(make_job(name="two", **staged).to_toml())
    options = ["--place", "federated", "--time", "offline,continual", "--seeds", "1", "--json"]

    def run(folder: Path) -> dict[str, Any]:
        command("compare", str(one), str(two), *options, "--out", str(folder))
        said: dict[str, Any] = json.loads(capsys.readouterr().out)
        return said

    whole = run(tmp_path / "whole")
    begun = tmp_path / "begun"
    run(begun)
    (begun / "two" / "federated-continual-0" / "outcome.json").unlink()  # as if it had been killed there
    kept = (begun / "one" / "federated-offline-0" / "outcome.json").stat().st_mtime_ns
    again = run(begun)
    assert (begun / "one" / "federated-offline-0" / "outcome.json").stat().st_mtime_ns == kept
    values = [
        [
            (cell["place"], cell["time"], cell["all_sites"])
            for e in found["entries"]
            for cell in e["comparison"]["cells"]
        ]
        for found in (whole, again)
    ]
    assert values[0] == values[1]
    assert [e["labels"] for e in again["entries"]] == ["supervised", "self-supervised"]
    assert [e["at_once"] for e in again["entries"]] == [[], ["probe"]]
    command("report", str(begun))
    assert "continual; probe at once" in (begun / "report.html").read_text(encoding="utf-8")


def test_a_job_of_which_nothing_can_be_carried_out_takes_no_other_with_it(
    make_job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts: dict[str, Any] = {
        "sound": {"model": {"name": "cnn"}, "train": {"lr": 0.05}},
        "wrong": {"model": {"name": "cnn"}, "train": {"lr": 1e30}},
    }
    shared: dict[str, Any] = {"simulation": SIMULATION, "stream": {"tasks": 5}, "federation": {"rounds": 5}}
    files = []
    for name, part in parts.items():
        job = make_job(name=name, **shared, **part)
        files.append(tmp_path / f"{name}.toml")
        files[-1].write_text(job.to_toml())
    words = ["compare", *map(str, files), "--place", "federated", "--time", "continual", "--seeds", "1"]
    with pytest.raises(SystemExit) as end:
        fedzoo.main([*words, "--out", str(tmp_path / "out")])
    assert end.value.code == 1
    assert "error: job 'wrong': round 0" in capsys.readouterr().err
    assert (tmp_path / "out" / "sound" / "report.html").exists()


def test_offline_runs_are_found_when_a_stream_is_added(make_job: Any, tmp_path: Path) -> None:
    """To tell the tasks apart the labels of a pretext are read, and an offline run has none to do with."""
    job = make_job(model={"name": "cnn"}, task={"name": "rotation", "labels": LABELS}, stream={"tasks": 2},
                   simulation=SIMULATION)  # fmt: skip
    offline: Any = [("federated", "offline")]
    first = compare.compare(job, compare.make_sites(job, Path()), paradigms=offline, seeds=(0,), folder=tmp_path)
    labelled = compare.make_sites(job.replace(time="continual"), Path())
    both = compare.compare(job, labelled, paradigms=[*offline, ("federated", "continual")], seeds=(0,), folder=tmp_path)
    assert [cell.error for cell in both.cells] == [None, None]
    assert both.cells[0].seconds == first.cells[0].seconds  # found, not made again
