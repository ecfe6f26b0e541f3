"""Forecasting: errors by hand and by scikit-learn, sums that merge, and the naive forecast, which has no skill."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error, mean_squared_error
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

from client.readers.base import Store
from shared_models.errors import CompatibilityError, ConfigError
from shared_models.job import Job
from shared_models.job_parts import DataPart
from shared_models.spec import build_model
from shared_models.tasks.base import Batch, Task, add_sums, make_task, tasks
from shared_models.validation import validate

NAMES = ("load", "wind", "sun")


def forecasting(length: int = 10, channels: int = 3, **keys: Any) -> Task:
    declared = tasks["forecasting"]
    data = DataPart(shape=(length, channels), features=NAMES[:channels])
    return declared(validate(declared.Settings, keys, "[task]"), data)


def batch(x: Tensor) -> Batch:
    return Batch(x, torch.zeros(len(x), dtype=torch.int64))


def scene(count: int, seed: int, **keys: Any) -> tuple[Task, Tensor, Batch]:
    """A task, forecasts that are a little off, and random walks."""
    task, source = forecasting(**keys), torch.Generator().manual_seed(seed)
    given = task.draw((10, 3), count, source)
    outputs = task.truth(given.x) + 0.3 * torch.randn(count, task.outputs, generator=source)
    return task, outputs, given


def test_by_hand() -> None:
    """Two channels over five steps, two of them to be said after (3, 30): truth (4, 40), (5, 50)."""
    task = forecasting(5, 2, horizon=2)
    x = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0], [5.0, 50.0]]])
    assert (task.outputs, task.shape((5, 2))) == (4, (3, 2))
    assert task.truth(x).tolist() == [[4, 40, 5, 50]]
    assert task.naive(x).tolist() == [[3, 30, 3, 30]]
    outputs = torch.tensor([[4.0, 44.0, 3.0, 50.0]])
    assert task.predict(outputs, batch(x)).tolist() == [[[4, 44], [3, 50]]]
    values = task.values(task.sums(outputs, batch(x)))
    naive = (1 + 100 + 4 + 400) / 4
    assert values == {
        "skill": pytest.approx(1 - 5 / naive), "mse": (16 + 4) / 4, "mae": (4 + 2) / 4, "loss": 5.0, "examples": 1.0,
    }  # fmt: skip
    assert forecasting(5, 2, horizon=2, loss="mae").loss(outputs, batch(x)).tolist() == [1.5]


def test_the_model_sees_what_comes_before_and_nothing_else() -> None:
    task, seen = forecasting(horizon=4), []
    _, _, given = scene(2, seed=0)

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return torch.zeros(len(x), task.outputs)

    task.forward(Spy(), given)
    assert torch.equal(seen[0], given.x[:, :6])


def test_some_channels_are_said_and_all_are_seen() -> None:
    task = forecasting(horizon=2, targets=["sun", "load"])
    _, _, given = scene(4, seed=1)
    assert (task.outputs, task.shape((10, 3))) == (4, (8, 3))
    assert torch.equal(task.truth(given.x), given.x[:, 8:, [2, 0]].flatten(1))
    assert torch.equal(task.naive(given.x).unflatten(1, (2, 2))[:, 1], given.x[:, 7, [2, 0]])


@pytest.mark.parametrize("keys", [{"horizon": 3}, {"horizon": 9, "loss": "mae"}, {"horizon": 2, "targets": ["wind"]}])
def test_sums_of_sites_give_scikit_learns_errors_pooled(keys: dict[str, Any]) -> None:
    task, outputs, given = scene(60, seed=2, **keys)
    truth, naive = task.truth(given.x).numpy(), task.naive(given.x).numpy()
    mse, mae = mean_squared_error(truth, outputs), mean_absolute_error(truth, outputs)
    for seed in range(5):
        source = torch.Generator().manual_seed(seed)
        cuts = sorted(torch.randint(0, 61, (4,), generator=source).tolist())  # some parts may be empty
        merged = dict(task.zeros)
        for rows in torch.randperm(60, generator=source).tensor_split(cuts):
            add_sums(merged, task.sums(outputs[rows], batch(given.x[rows])))
        values = task.values(merged)
        assert values["mse"] == pytest.approx(mse, rel=1e-6)
        assert values["mae"] == pytest.approx(mae, rel=1e-6)
        assert values["skill"] == pytest.approx(1 - mse / mean_squared_error(truth, naive), rel=1e-6)
        assert values["loss"] == pytest.approx(mae if keys.get("loss") == "mae" else mse, rel=1e-6)
        assert values["examples"] == 60


def test_the_naive_forecast_has_no_skill_the_truth_all_and_a_worse_one_less_than_none() -> None:
    task, _, given = scene(30, seed=3, horizon=3)

    def skill(outputs: Tensor) -> float:
        return task.values(task.sums(outputs, given))["skill"]

    assert skill(task.naive(given.x)) == 0
    assert skill(task.truth(given.x)) == 1
    assert skill(task.naive(given.x) + 10) < -1
    still = batch(torch.ones(4, 10, 3))
    assert math.isnan(task.values(task.sums(torch.zeros(4, task.outputs), still))["skill"])


def test_skill_is_of_sums_and_not_a_mean_of_skills() -> None:
    """A site whose series hardly move cannot drown the others."""
    task = forecasting(3, 1, horizon=1)
    wild, calm = (batch(torch.tensor([[[0.0], [0.0], [size]]])) for size in (10.0, 0.1))
    half, none = task.sums(torch.tensor([[5.0]]), wild), task.sums(torch.tensor([[0.3]]), calm)
    assert task.values(none)["skill"] == pytest.approx(-3)
    add_sums(half, none)
    assert task.values(half)["skill"] == pytest.approx(1 - (25 + 0.04) / (100 + 0.01), rel=1e-5)


def test_measures_say_what_is_better() -> None:
    task = forecasting()
    assert task.headline == "skill"
    assert (task.measure("skill").unit, task.measure("skill").larger) == ("%", True)
    for name in ("mse", "mae"):
        assert (task.measure(name).factor, task.measure(name).larger) == (1.0, False)


def test_samples_do_not_mix() -> None:
    task, outputs, given = scene(6, seed=4, horizon=3)
    size = jacrev(lambda o: task.loss(o, given))(outputs).abs().sum(dim=2)  # (6, 6)
    assert bool((size.diag() > 0).all())
    assert not (size - size.diag().diag()).any()
    each = vmap(grad(lambda o, x: task.loss(o[None], Batch(x[None], x[None])).sum()))(outputs, given.x)
    torch.testing.assert_close(each, grad(lambda o: task.loss(o, given).sum())(outputs))


def test_the_sums_of_nothing() -> None:
    task, outputs, given = scene(3, seed=5)
    form = {n: (v.shape, v.dtype, v.device) for n, v in task.sums(outputs, given).items()}
    assert {n: (v.shape, v.dtype, v.device) for n, v in task.zeros.items()} == form
    assert not any(v.any() for v in task.zeros.values())
    for nothing in ({}, task.zeros):
        values = task.values(nothing)
        assert values["examples"] == 0
        assert all(math.isnan(values[n]) for n in (*task.metrics, "loss"))


def test_a_missing_number_is_the_mean_in_the_truth_too() -> None:
    data = DataPart(shape=(3, 1), mean=(5.0,), std=(2.0,), missing="mean")
    x = torch.tensor([[[5.0], [7.0], [math.nan]]])
    store = Store(x, torch.zeros(1, dtype=torch.int64), ["a"], data)
    assert store.inputs is not None
    task = forecasting(3, 1, horizon=1)
    assert (task.truth(store.inputs).tolist(), task.naive(store.inputs).tolist()) == ([[0]], [[1]])


def a_job(**parts: Any) -> Job:
    given = {
        "model": {"name": "series-lstm"}, "task": {"name": "forecasting", "horizon": 4},
        "data": {"shape": [10, 3], "features": NAMES}, **parts,
    }  # fmt: skip
    return Job.resolve({"name": "job", **given})


@pytest.mark.parametrize("model", ["series-lstm", "series-transformer"])
def test_a_job_needs_no_labels_and_its_model_gives_the_horizon(model: str) -> None:
    job = a_job(model={"name": model})
    net, spec = build_model(job)
    task = make_task(job)
    drawn = task.draw(job.data.shape, 5, torch.Generator().manual_seed(0))
    outputs = task.forward(net, drawn)
    assert outputs.shape == (5, 4 * 3)
    task.loss(outputs, drawn).mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert spec.document["task"]["horizon"] == 4
    assert Job.resolve(job.model_dump()).hash == job.hash


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"task": {"name": "forecasting", "horizon": 0}}, "'horizon' should be greater than 0"),
        ({"task": {"name": "forecasting", "loss": "rmse"}}, "'loss' should be 'mse' or 'mae', not 'rmse'"),
        (
            {"task": {"name": "forecasting", "horizon": 10}},
            "task.horizon = 10 leaves no step to see of data.shape = [10",
        ),
        (
            {"task": {"name": "forecasting", "targets": ["wing"]}},
            "task.targets names 'wing', which is not in data.feat",
        ),
        ({"model": {"name": "mlp"}}, "model 'mlp' cannot serve the task 'forecasting'"),
        ({"data": {"shape": [3], "features": NAMES}}, "model 'series-lstm' cannot take what [data] describes"),
        ({"time": "continual"}, "the task 'forecasting' has none; list them in task.labels"),
        ({"simulation": {"partition": "dirichlet"}}, "shares out each class"),
    ],
)
def test_jobs_that_cannot_be(parts: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, CompatibilityError)) as error:
        make_task(a_job(**parts))
    assert message in str(error.value)


def test_a_linear_model_learns_what_no_repetition_can_say() -> None:
    """x_t = 1.6 x_(t-1) - 0.9 x_(t-2) + noise of 0.1: an oscillation, whose best forecast is known."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(4000)
    series = np.zeros(4000)
    for t in range(2, 4000):
        series[t] = 1.6 * series[t - 1] - 0.9 * series[t - 2] + noise[t]
    windows = batch(torch.tensor(series[: 4000 // 10 * 10].reshape(-1, 10, 1), dtype=torch.float32))
    task = forecasting(10, 1, horizon=1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        task.loss(task.forward(net, windows), windows).mean().backward()
        optimizer.step()
    values = task.values(task.sums(task.forward(net, windows).detach(), windows))
    assert 0.008 < values["mse"] < 0.012  # that of the noise is 0.01
    assert values["skill"] > 0.75
