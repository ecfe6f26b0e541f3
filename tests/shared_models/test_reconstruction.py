"""Reconstruction and anomaly: numbers by hand, sklearn's AUROC within the bound, anomalies that teach nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sklearn.metrics import r2_score, roc_auc_score
from torch import Tensor, nn
from torch.func import jacrev

from shared_models.errors import ConfigError
from shared_models.metrics.auroc import auroc_error
from shared_models.tasks.base import Batch, Task, add_sums, tasks
from shared_models.validation import validate

LABELS = ["cat", "dog", "mouse"]


def make(name: str, **keys: Any) -> Task:
    declared = tasks[name]
    return declared(
        validate(declared.Settings, {**({"labels": LABELS} if name == "anomaly" else {}), **keys}, "[task]")
    )


def scene(count: int, seed: int) -> tuple[Tensor, Batch]:
    """Answers whose error is larger where the class is 2, and the examples."""
    source = torch.Generator().manual_seed(seed)
    x = 0.3 + torch.randn(count, 2, 3, 4, generator=source)
    y = torch.randint(3, (count,), generator=source)
    noise = torch.randn(x.shape, generator=source) * torch.rand(count, 1, 1, 1, generator=source)
    return x + (0.2 + 0.2 * (y == 2)[:, None, None, None]) * noise, Batch(x, y)


def merged(task: Task, outputs: Tensor, batch: Batch, seed: int) -> dict[str, Tensor]:
    """The sums of five parts, some of which may be empty, added."""
    source = torch.Generator().manual_seed(seed)
    cuts = sorted(torch.randint(0, len(batch) + 1, (4,), generator=source).tolist())
    sums = dict(task.zeros)
    for rows in torch.randperm(len(batch), generator=source).tensor_split(cuts):
        add_sums(sums, task.sums(outputs[rows], Batch(batch.x[rows], batch.y[rows])))
    return sums


def test_reconstruction_by_hand() -> None:
    """x = (0, 2), (4, 2), answers (1, 2), (4, 0): errors 1/2 and 2, variance of 0, 2, 4, 2 about 2 is 2."""
    task = make("reconstruction")
    batch = Batch(torch.tensor([[0.0, 2.0], [4.0, 2.0]]), torch.zeros(2, dtype=torch.int64))
    again = torch.tensor([[1.0, 2.0], [4.0, 0.0]])
    assert task.loss(again, batch).tolist() == [0.5, 2.0]
    values = task.values(task.sums(again, batch))
    assert values == pytest.approx({"mse": 1.25, "r2": 1 - 1.25 / 2, "loss": 1.25, "examples": 2})
    term = torch.tensor([3.0, 5.0])  # a model's own, part of the loss and not of the error
    assert task.loss((again, term), batch).tolist() == [3.5, 7.0]
    assert task.values(task.sums((again, term), batch)) == pytest.approx({**values, "loss": 5.25})
    assert not task.measure("mse").larger
    assert task.measure("r2").larger


def test_reconstruction_of_sites_is_sklearns_pooled() -> None:
    task = make("reconstruction")
    again, batch = scene(60, seed=1)
    for seed in range(4):
        values = task.values(merged(task, again, batch, seed))
        assert values["mse"] == pytest.approx(float((again - batch.x).square().mean()), rel=1e-6)
        assert values["r2"] == pytest.approx(r2_score(batch.x.flatten(), again.flatten()), abs=1e-6)
        assert values["examples"] == 60
    perfect = task.values(task.sums(batch.x, batch))
    assert (perfect["mse"], perfect["r2"]) == (0, 1)


def test_anomaly_by_hand() -> None:
    """Errors of normal examples 1 and 4, of the anomalies 2 and 9: three of four pairs are ranked rightly."""
    task = make("anomaly")
    batch = Batch(torch.tensor([[1.0], [2.0], [2.0**0.5], [3.0]]), torch.tensor([0, 1, 2, 2]))
    again = torch.zeros(4, 1)
    values = task.values(task.sums(again, batch))
    assert values == pytest.approx({"auroc": 0.75, "loss": 2.5, "examples": 4})
    torch.testing.assert_close(task.loss(again, batch), torch.tensor([1.0, 4.0, 0.0, 0.0]))
    torch.testing.assert_close(task.predict(again, batch), torch.tensor([1.0, 4.0, 2.0, 9.0]))
    other = make("anomaly", anomalous=["cat", "mouse"])
    assert other.counted(batch).tolist() == [False, True, False, False]  # type: ignore[attr-defined]


@pytest.mark.parametrize("with_term", [False, True])
def test_auroc_of_sites_is_sklearns_within_the_bound(with_term: bool) -> None:
    task = make("anomaly")
    again, batch = scene(400, seed=2)
    outputs: Any = (again, 0.02 * torch.rand(400, generator=torch.Generator().manual_seed(3))) if with_term else again
    score = task.predict(outputs, batch)
    exact = roc_auc_score((batch.y == 2).numpy(), score.double().numpy())
    sums = task.sums(outputs, batch)
    bound = float(auroc_error(sums["scores"]))
    assert 0 < bound < 0.01
    assert abs(task.values(sums)["auroc"] - exact) <= bound
    assert 0.55 < exact < 0.95
    parts = dict(task.zeros)
    for rows in (slice(0, 130), slice(130, 131), slice(131, 400)):
        part = (again[rows], outputs[1][rows]) if with_term else again[rows]
        add_sums(parts, task.sums(part, batch[rows]))
    assert torch.equal(parts["scores"], sums["scores"])
    assert task.values(parts)["loss"] == pytest.approx(float(score[batch.y != 2].double().mean()), rel=1e-6)


def test_scores_of_every_size_are_ranked() -> None:
    """From 1e-6 to 1e6, and what has overflown is the most unusual of all."""
    task = make("anomaly")
    sizes = torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6, math.inf])
    for i in range(len(sizes) - 1):
        batch = Batch(torch.zeros(2, 1), torch.tensor([0, 2]))
        assert task.values(task.sums((batch.x, sizes[i : i + 2]), batch))["auroc"] == 1.0


def test_what_an_anomaly_teaches() -> None:
    """Nothing, and its place in the batch stays empty: the step is a share of that on the normal ones alone."""
    task = make("anomaly")
    _, batch = scene(30, seed=4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(24, 24), nn.Unflatten(1, (2, 3, 4)))
    normal = batch.y != 2

    def gradient(rows: Tensor) -> Tensor:
        part = Batch(batch.x[rows], batch.y[rows])
        model.zero_grad()
        task.loss(task.forward(model, part), part).mean().backward()
        return model[1].weight.grad.clone()  # type: ignore[union-attr, operator]

    everything = torch.ones_like(normal)
    torch.testing.assert_close(gradient(everything), gradient(normal) * normal.float().mean())
    assert not gradient(~normal).any()


@pytest.mark.parametrize("name", ["reconstruction", "anomaly"])
def test_samples_do_not_mix(name: str) -> None:
    task = make(name)
    again, batch = scene(6, seed=5)
    size = jacrev(lambda o: task.loss(o, batch))(again).abs().flatten(2).sum(dim=2)  # (6, 6)
    assert torch.equal(size.diag() > 0, task.counted(batch))  # type: ignore[attr-defined]
    assert not (size - size.diag().diag()).any()


@pytest.mark.parametrize("name", ["reconstruction", "anomaly"])
def test_the_sums_of_nothing(name: str) -> None:
    task = make(name)
    form = {n: (v.shape, v.dtype, v.device) for n, v in task.sums(*scene(3, seed=6)).items()}
    assert {n: (v.shape, v.dtype, v.device) for n, v in task.zeros.items()} == form
    assert not any(v.any() for v in task.zeros.values())
    for nothing in ({}, task.zeros):
        values = task.values(nothing)
        assert values["examples"] == 0
        assert all(math.isnan(values[n]) for n in (*task.metrics, "loss"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"anomalous": ["lion"]}, "'lion' in anomalous is not a label"),
        ({"anomalous": LABELS}, "at least one label should be normal and one anomalous"),
        ({"labels": ["cat"]}, "at least one label should be normal and one anomalous"),
    ],
)
def test_settings_that_cannot_be(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make("anomaly", **keys)
    assert message in str(error.value)
