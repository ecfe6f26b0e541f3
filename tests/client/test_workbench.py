"""The one model that serves every site in turn: nothing of a site or a round may be left in it for the next."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from client.workbench import Benches, Workbench, determinism, make_device
from shared_models.errors import ConfigError, FingerprintError
from shared_models.job import Job

CPU = torch.device("cpu")


@pytest.fixture
def bench(make_job: Callable[..., Job]) -> Workbench:
    """A network of `hidden1` (base), `hidden2` (averaged) and `head` (personal)."""
    model = {"name": "mlp", "hidden": [5, 4]}
    return Workbench(make_job(model=model, share={"personal": ["head.*"], "base": ["hidden1.*"]}), CPU)


def received(bench: Workbench, value: float = 2.0) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(bench.entries[name], value) for name in bench.spec.sent}


def test_who_gives_which_entry(bench: Workbench) -> None:
    initial = {name: value.clone() for name, value in bench.entries.items()}
    assert set(bench.sent()) == {"hidden2.weight", "hidden2.bias"}
    assert set(bench.personal()["model"]) == {"head.weight", "head.bias"}
    assert set(bench.trained) == {"hidden2.weight", "hidden2.bias", "head.weight", "head.bias"}
    with torch.no_grad():
        for value in bench.entries.values():
            value.fill_(77)
    bench.load(received(bench), {"model": {"head.weight": torch.full((10, 4), 3.0)}})
    for name, value in bench.model.state_dict().items():
        if name.startswith("hidden2"):
            assert (value == 2).all()
        elif name == "head.weight":
            assert (value == 3).all()
        else:  # base, and what the node has not kept yet
            assert torch.equal(value, initial[name])


def test_loading_keeps_the_memory_and_forgets_the_optimizer(make_job: Callable[..., Job]) -> None:
    bench = Workbench(make_job(train={"optimizer": "adamw"}), CPU)
    places = {name: p.data_ptr() for name, p in bench.model.named_parameters()}
    bench.model(torch.ones(2, 1, 8, 8)).sum().backward()
    bench.optimizer.step()
    assert bench.optimizer.state
    bench.load(received(bench), {})
    assert {name: p.data_ptr() for name, p in bench.model.named_parameters()} == places
    assert not bench.optimizer.state
    assert all(p.grad is None for p in bench.model.parameters())


def test_counters_begin_anew_and_running_statistics_come_from_the_server(make_job: Callable[..., Job]) -> None:
    bench = Workbench(make_job(model={"name": "resnet18", "norm": "batch"}), CPU)
    counters = [name for name in bench.entries if name.endswith("num_batches_tracked")]
    statistics = [name for name in bench.spec.sent if name.endswith("running_mean")]
    assert counters
    assert statistics
    bench.model(torch.rand(2, 1, 8, 8))
    assert all(bench.entries[name] == 1 for name in counters)
    bench.load(received(bench, 0.25), {})
    assert all(bench.entries[name] == 0 for name in counters)
    assert all((bench.entries[name] == 0.25).all() for name in statistics)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.pop("hidden2.bias"), "hidden2.bias"),
        (lambda m: m.update({"head.weight": torch.zeros(10, 4)}), "head.weight"),
        (lambda m: m.update({"hidden1.bias": torch.zeros(5)}), "hidden1.bias"),
        (lambda m: m.update({"unheard-of": torch.zeros(5)}), "unheard-of"),
        (lambda m: m.update({"hidden2.bias": torch.zeros(1)}), "hidden2.bias"),
        (lambda m: m.update({"hidden2.bias": torch.zeros(4, dtype=torch.float64)}), "hidden2.bias"),
    ],
    ids=["missing", "personal", "base", "unknown", "shape that would broadcast", "dtype"],
)
def test_only_the_sent_entries_are_taken_from_the_server(
    bench: Workbench, change: Callable[[dict[str, torch.Tensor]], object], named: str
) -> None:
    before = {name: value.clone() for name, value in bench.entries.items()}
    model = received(bench)
    change(model)
    with pytest.raises(FingerprintError, match=named):
        bench.load(model, {})
    assert all(torch.equal(value, before[name]) for name, value in bench.entries.items())


def test_the_same_job_finds_its_bench_warm(make_job: Callable[..., Job]) -> None:
    benches = Benches(CPU)
    first = benches(make_job())
    assert benches(make_job()) is first
    assert benches(make_job(simulation={"sites": 9})) is first
    assert benches(make_job(train={"lr": 0.2})) is not first


def test_determinism_is_undone() -> None:
    threads = torch.get_num_threads()
    with determinism(False):
        assert torch.get_num_threads() == threads
    inside: list[object] = []

    def fail() -> None:
        with determinism(True):
            inside.extend((torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [1, True]
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


def test_determinism_lets_cublas_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this variable torch refuses every deterministic matrix product on CUDA; the owner's own value stays."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with determinism(True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with determinism(True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize(("count", "found"), [(0, "none that torch can use"), (2, "only 2")])
def test_a_device_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, count: int, found: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert make_device("cpu") == CPU
    assert make_device("auto") == torch.device("cuda" if count else "cpu")
    if count:
        assert make_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match=f"device 'cuda:2' is asked for, and this machine has {found}"):
        make_device("cuda:2")
