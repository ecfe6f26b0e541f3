"""What `fedzoo run watch` says of an event."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from client.readers.base import Splits
from client.workbench import Benches
from server.coordinator import Coordinator
from server.events import Events
from server.run_cli import describe
from shared_models.job import Job
from shared_models.tasks.base import Measure
from shared_models.tasks.classification import Classification
from simulations.engines.inprocess import InProcess

ROUND = {"event": "round", "round": 0, "rounds": 5, "sites": ["a", "b"], "rejected": {}}
SEEN = {"accuracy": 0.9104, "loss": 0.27, "bits": 1.5}
BITS = {"metric": "bits", "unit": "bits", "factor": 1.0, "digits": 2, "larger": False}


def test_the_headline_stands_in_its_own_unit() -> None:
    line = "round 1/5: 2 of 2 sites; before it: validation {}, loss 0.270"
    end: dict[str, Any] = {"event": "end", "test": SEEN}
    assert describe({**ROUND, "validation": SEEN}) == line.format("accuracy 91.0 %")
    assert describe(end) == "done: accuracy on all sites' tests 91.0 %"
    assert describe({**ROUND, "validation": SEEN, "headline": BITS}) == line.format("bits 1.50 bits")
    assert describe({**end, "headline": BITS}) == "done: bits on all sites' tests 1.50 bits"
    assert describe({**end, "headline": {**BITS, "unit": ""}}) == "done: bits on all sites' tests 1.50"


def test_what_was_not_measured_is_not_said() -> None:
    unmeasured = {"bits": None, "loss": 0.27}
    assert describe({**ROUND, "validation": unmeasured, "headline": BITS}).endswith("before it: validation loss 0.270")
    assert describe({**ROUND, "validation": {}, "headline": BITS}).endswith("before it: validation of nothing")
    assert describe({"event": "end", "test": {"bits": None}, "headline": BITS}) == "done"
    private = {"statement": "epsilon 2 at delta 1e-05, unit sample, neighbours: one more"}
    assert describe({"event": "end", "test": {}, "privacy": private}) == f"done; {private['statement']}"


def test_events_say_how_their_headline_is_shown(
    make_job: Callable[..., Job], make_splits: Callable[..., Splits], monkeypatch: Any
) -> None:
    monkeypatch.setattr(Classification, "measures", {"calibration": Measure("", 1.0, 2, larger=False)})
    heard: list[dict[str, Any]] = []
    splits = {"a": make_splits(0)}
    engine = InProcess(["a"], splits.__getitem__, Benches())
    job = make_job(task={"headline": "calibration"}, federation={"rounds": 1, "min_sites": 1})
    outcome = Coordinator(job, engine, "run", events=Events(listener=heard.append)).run()
    lines = [line for event in heard if (line := describe(event))]
    assert lines[0].startswith("round 1/1: 1 of 1 sites; before it: validation calibration 0.")
    assert lines[-1] == f"done: calibration on all sites' tests {outcome.all_sites['calibration']:.2f}"
