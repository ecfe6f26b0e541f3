"""Federated methods: identities, Flower as oracle, and a quadratic worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedProx
from flwr.supercore.task_identity import TaskIdentity

from client.readers.base import Splits
from client.workbench import Benches
from server.coordinator import Coordinator
from server.outcome import Outcome
from shared_models.job import Job
from shared_models.methods.base import Method, MethodSettings, Progress, make_method, methods, overrides
from shared_models.sums import Groups, PairwiseMean
from simulations.engines.inprocess import InProcess

SITES = ("a", "b", "c")


def run(job: Job, sites: dict[str, Splits]) -> Outcome:
    return Coordinator(job, InProcess(list(sites), sites.__getitem__, Benches()), "run").run()


def flower_mean(strategy: type[FedAvg], updates: list[dict[str, np.ndarray]], examples: list[int]) -> list[np.ndarray]:
    """What Flower's strategy makes of the same updates."""
    replies = []
    for arrays, count in zip(updates, examples, strict=True):
        content = RecordDict(
            {"arrays": ArrayRecord(list(arrays.values())), "metrics": MetricRecord({"num-examples": count})}
        )
        replies.append(Message(content, dst_node_id=1, message_type="train"))
    extra = {"proximal_mu": 0.0} if strategy is FedProx else {}
    arrays, _ = strategy(**extra).aggregate_train(1, replies)
    assert arrays is not None
    return arrays.to_numpy_ndarrays()


@pytest.fixture(autouse=True)
def flower_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower lets a message be made only inside one of its tasks."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.mark.parametrize(("name", "strategy"), [("fedavg", FedAvg), ("fedprox", FedProx)])
def test_aggregation_equals_flowers(make_job: Callable[..., Job], name: str, strategy: type[FedAvg]) -> None:
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 3), "b": (4,), "scale": ()}
    updates = [{n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()} for _ in range(5)]
    examples = [3, 10, 1, 7, 40]
    method = make_method(make_job(method={"name": name}))
    mean = PairwiseMean(5)
    for slot, (update, count) in enumerate(zip(updates, examples, strict=True)):
        mean.add(slot, {"model": {n: torch.tensor(v) for n, v in update.items()}}, {"model": float(count)})
    means = mean.result()
    assert means is not None
    state = method.finish({"model": {n: torch.zeros(s) for n, s in shapes.items()}}, means, 5, 5)
    for ours, theirs in zip(state["model"].values(), flower_mean(strategy, updates, examples), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-6, atol=1e-7)


def test_fedprox_with_mu_0_is_fedavg(make_job: Callable[..., Job], make_splits: Callable[..., Splits]) -> None:
    sites = {s: make_splits(i) for i, s in enumerate(SITES)}
    average = run(make_job(), sites).model
    proximal = run(make_job(method={"name": "fedprox", "mu": 0.0}), sites).model
    held = run(make_job(method={"name": "fedprox", "mu": 1.0}), sites).model
    assert all(torch.equal(average[n], proximal[n]) for n in average)
    assert any(not torch.equal(average[n], held[n]) for n in average)


def test_one_client_fedavg_is_local_training(make_job: Callable[..., Job], make_splits: Callable[..., Splits]) -> None:
    """The mean of one client is that client's model, bit for bit: rounds only reset the optimizer."""
    from client.trainer import train
    from client.workbench import Workbench, determinism
    from shared_models.messages import Budget, Instruction

    job, splits = make_job(), make_splits(0)
    federated = run(job, {"a": splits}).model
    bench = Workbench(job, torch.device("cpu"))
    for round in range(2):
        instruction = Instruction("train", "r", "a", job, "", round=round, rounds=2, budget=Budget(epochs=1.0))
        with determinism(True):
            train(bench, splits.train, instruction, [{}, {}])
        bench.optimizer.state.clear()
    assert all(torch.equal(federated[n], v) for n, v in bench.sent().items())


# ---- a quadratic of two clients ------------------------------------------------------------------
# f_i(w) = h_i/2 (w - m_i)^2 with h = (1, 3), m = (0, 4): the optimum of the mean is
# (h_1 m_1 + h_2 m_2) / (h_1 + h_2) = 3.
# K local steps of size eta shrink w - m_i by s_i = (1 - eta h_i)^K, so FedAvg's fixed point is
# w = sum (1 - s_i) m_i / sum (1 - s_i).
H, M, ETA, K = (1.0, 3.0), (0.0, 4.0), 0.1, 10
OPTIMUM = 3.0


def quadratic(method: Method, rounds: int, share: float = 1.0) -> float:
    """Run a method's two halves on the quadratic, exactly as handler and coordinator call them."""
    state = method.init({"w": torch.tensor([10.0])}, ["w"])
    kept: list[dict] = [{}, {}]
    for round in range(rounds):
        down = method.down(state)
        present = [0, 1] if share == 1.0 else [round % 2]
        mean = PairwiseMean(len(present))
        for slot, client in enumerate(present):
            round_state = method.begin_round(down, kept[client])
            params = {"w": down["model"]["w"].clone()}
            for _ in range(K):
                grads = method.grad({"w": H[client] * (params["w"] - M[client])}, params, round_state)
                params = {"w": params["w"] - ETA * grads["w"]}
            up, kept[client] = method.end_round(params, down, kept[client], round_state, Progress(K, K, K * ETA))
            mean.add(slot, up, dict.fromkeys(up, 1.0))
        means = mean.result()
        assert means is not None
        state = method.finish(state, means, len(present), 2)
    return float(state["model"]["w"])


def make(name: str, **settings: object) -> Method:
    declared = methods[name]
    return declared(declared.Settings(**settings))


def test_fedavg_has_the_bias_computed_by_hand() -> None:
    shrink = [(1 - ETA * h) ** K for h in H]
    expected = sum((1 - s) * m for s, m in zip(shrink, M, strict=True)) / sum(1 - s for s in shrink)
    assert quadratic(make("fedavg"), 200) == pytest.approx(expected, abs=1e-5)
    assert abs(expected - OPTIMUM) > 0.5


def test_scaffold_reaches_the_optimum() -> None:
    assert quadratic(make("scaffold"), 400) == pytest.approx(OPTIMUM, abs=1e-4)


def test_scaffold_reaches_the_optimum_with_one_of_two_clients_a_round() -> None:
    assert quadratic(make("scaffold", server_lr=0.5), 3000, share=0.5) == pytest.approx(OPTIMUM, abs=1e-3)


def test_scaffold_control_variates_are_option_ii() -> None:
    """First round from c = c_i = 0: c_i+ = (x - y) / (K eta), and c+ is their mean."""
    method = make("scaffold")
    state = method.init({"w": torch.tensor([1.0])}, ["w"])
    down = method.down(state)
    up, kept = method.end_round({"w": torch.tensor([0.5])}, down, {}, {}, Progress(5, 5, 0.5))
    assert float(kept["control"]["w"]) == pytest.approx(1.0)
    state = method.finish(state, up, 1, 4)
    assert float(state["control"]["w"]) == pytest.approx(0.25)
    again = method.begin_round(method.down(state), kept)
    assert float(again["correction"]["w"]) == pytest.approx(0.25 - 1.0)


def test_fedprox_gradient_by_hand() -> None:
    method = make("fedprox", mu=0.5)
    state = method.begin_round({"model": {"w": torch.tensor([1.0])}}, {})
    grads = method.grad({"w": torch.tensor([2.0]), "personal": torch.tensor([7.0])}, {"w": torch.tensor([3.0])}, state)
    assert float(grads["w"]) == pytest.approx(2.0 + 0.5 * (3.0 - 1.0))
    assert float(grads["personal"]) == 7.0


@pytest.mark.parametrize(
    ("name", "second"),
    [
        ("fedadam", [0.8 * 0.01 + 0.2 * 0.25, 0.8 * (0.8 * 0.01 + 0.2 * 0.25) + 0.2 * 0.04]),
        ("fedadagrad", [0.01 + 0.25, 0.01 + 0.25 + 0.04]),
        ("fedyogi", [0.01 + 0.2 * 0.25, 0.01 + 0.2 * 0.25 - 0.2 * 0.04]),
    ],
)
def test_adaptive_methods_by_hand(name: str, second: list[float]) -> None:
    """Two rounds from w = 1 with mean updates 0.5 and -0.2: tau 0.1, eta 0.3, b1 0.5, b2 0.8."""
    method = make(name, tau=0.1, server_lr=0.3, beta1=0.5, beta2=0.8)
    state = method.init({"w": torch.tensor([1.0]), "running": torch.tensor([1.0])}, ["w"])
    w, m = 1.0, 0.0
    for change, v in zip((0.5, -0.2), second, strict=True):
        mean = {"model": {"w": torch.tensor([w + change]), "running": torch.tensor([7.0 + change])}}
        state = method.finish(state, mean, 2, 2)
        m = 0.5 * m + 0.5 * change
        w += 0.3 * m / (v**0.5 + 0.1)
        assert float(state["model"]["w"]) == pytest.approx(w, rel=1e-6)
        assert float(state["model"]["running"]) == pytest.approx(7.0 + change), "a running statistic is averaged"
        assert method.down(state).keys() == {"model"}, "the moments stay on the server"


@pytest.mark.parametrize("name", ["fedadam", "fedadagrad", "fedyogi"])
def test_a_large_tau_makes_adaptive_methods_plain_averaging(name: str) -> None:
    method, w = make(name, tau=1e4, server_lr=1e4, beta1=0.0), torch.tensor([0.3, -0.7])
    state = method.init({"w": torch.zeros(2)}, ["w"])
    if name == "fedadagrad":
        assert make(name).settings.beta1 == 0, "as in the paper"
    start = 0.99**0.5 if name == "fedadam" else 1.0  # what one round leaves of sqrt(v) / tau
    moved = method.finish(state, {"model": {"w": w}}, 1, 1)["model"]["w"]
    torch.testing.assert_close(moved, w / (start + 1), atol=1e-5, rtol=0)


def test_pieces_work_under_vmap() -> None:
    """Client halves are pure functions of tensors: two stacked clients give what each gives alone."""
    for name in ("fedprox", "scaffold"):
        method = make(name)
        down = {"model": {"w": torch.randn(3)}, "control": {"w": torch.randn(3)}}
        kept = {"control": {"w": torch.randn(3)}}
        grads, params = torch.randn(2, 3), torch.randn(2, 3)

        state = method.begin_round(down, kept)

        def piece(g: torch.Tensor, p: torch.Tensor, method: Method = method, state: Groups = state) -> torch.Tensor:
            return method.grad({"w": g}, {"w": p}, state)["w"]

        stacked = torch.func.vmap(piece)(grads, params)
        torch.testing.assert_close(stacked, torch.stack([piece(g, p) for g, p in zip(grads, params, strict=True)]))


def test_untouched_hooks_cost_nothing() -> None:
    assert not any(overrides(make("fedavg"), h) for h in ("grad", "loss", "see", "after_step", "end_task"))
    assert overrides(make("fedprox"), "grad")
    assert isinstance(make("finetune").settings, MethodSettings)
