"""Classification: sums that merge to the pooled ones, scikit-learn's metrics, torch's loss, samples that do not mix."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from torch import Tensor
from torch.func import jacrev

from shared_models.job import Job
from shared_models.tasks.base import Batch, Task, add_sums, make_task

MakeJob = Callable[..., Job]


@pytest.fixture
def task(make_job: MakeJob) -> Task:
    return make_task(make_job(task={"labels": list("abcde")}))


def predictions(count: int, seed: int, classes: tuple[int, ...] = (0, 1, 2, 3, 4)) -> tuple[Tensor, Tensor]:
    """Logits (N, 5) over all classes and targets (N,) among some."""
    source = torch.Generator().manual_seed(seed)
    targets = torch.tensor(classes)[torch.randint(0, len(classes), (count,), generator=source)]
    return torch.randn(count, 5, generator=source) + F.one_hot(targets, 5), targets


def batch(targets: Tensor) -> Batch:
    return Batch(torch.zeros(len(targets), 1), targets)


def test_by_hand(task: Task) -> None:
    """Truth 0 0 1 2, predicted 0 1 1 1: accuracy 2/4; F1 of 0: 2/3, of 1: 2/4, of 2: 0; 3 and 4 do not occur."""
    outputs = torch.tensor([[9.0, 0, 0, 0, 0], [0, 9.0, 0, 0, 0], [0, 9.0, 0, 0, 0], [0, 9.0, 0, 0, 0]])
    targets = torch.tensor([0, 0, 1, 2])
    sums = task.sums(outputs, batch(targets))
    assert sums["confusion"].tolist() == [[1, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0] * 5, [0] * 5]
    values = task.values(sums)
    assert values["accuracy"] == 0.5
    assert values["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert values["examples"] == 4
    hit, miss = math.log(1 + 4 * math.exp(-9)), math.log(1 + 4 * math.exp(-9)) + 9
    assert values["loss"] == pytest.approx((2 * hit + 2 * miss) / 4, rel=1e-6)


@pytest.mark.parametrize("classes", [(0, 1, 2, 3, 4), (1, 3), (2,)])
def test_metrics_equal_scikit_learn_on_pooled_predictions(task: Task, classes: tuple[int, ...]) -> None:
    outputs, targets = predictions(200, seed=1, classes=classes)
    guesses = outputs.argmax(1)
    sums = task.sums(outputs, batch(targets))
    values = task.values(sums)
    assert sums["confusion"].tolist() == confusion_matrix(targets, guesses, labels=range(5)).tolist()
    assert values["accuracy"] == pytest.approx(accuracy_score(targets, guesses), abs=1e-12)
    assert values["macro_f1"] == pytest.approx(f1_score(targets, guesses, average="macro"), abs=1e-12)
    assert values["loss"] == pytest.approx(float(F.cross_entropy(outputs.double(), targets)), rel=1e-6)


def test_sums_over_any_split_equal_the_pooled_ones(task: Task) -> None:
    outputs, targets = predictions(157, seed=2)
    pooled = task.sums(outputs, batch(targets))
    for seed in range(10):
        source = torch.Generator().manual_seed(seed)
        order = torch.randperm(157, generator=source)
        cuts = sorted(torch.randint(0, 158, (6,), generator=source).tolist())  # some parts are empty
        merged: dict[str, Tensor] = {}
        for rows in order.tensor_split(cuts):
            add_sums(merged, task.sums(outputs[rows], batch(targets[rows])))
        assert torch.equal(merged["confusion"], pooled["confusion"])
        assert float(merged["loss"]) == pytest.approx(float(pooled["loss"]), rel=1e-12)
        assert task.values(merged) == pytest.approx(task.values(pooled), rel=1e-12)


def test_adding_leaves_the_given_sums_as_they_are(task: Task) -> None:
    outputs, targets = predictions(9, seed=3)
    sums = task.sums(outputs, batch(targets))
    before = {n: v.clone() for n, v in sums.items()}
    total: dict[str, Tensor] = {}
    add_sums(total, sums)
    add_sums(total, sums)
    assert all(torch.equal(sums[n], before[n]) for n in sums)
    assert float(total["loss"]) == pytest.approx(2 * float(before["loss"]))


def test_loss_is_torchs_one_value_per_sample(task: Task) -> None:
    outputs, targets = predictions(20, seed=4)
    loss = task.loss(outputs, batch(targets))
    assert loss.shape == (20,)
    expected = -outputs.double().log_softmax(1)[torch.arange(20), targets]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.mean(), F.cross_entropy(outputs, targets))


def test_samples_do_not_mix(task: Task) -> None:
    outputs, targets = predictions(12, seed=5)
    jacobian = jacrev(lambda o: task.loss(o, batch(targets)))(outputs)  # (12, 12, 5)
    size = jacobian.abs().sum(2)
    assert bool((size.diag() > 0).all())
    assert float((size - size.diag().diag()).abs().max()) == 0.0
    for i in range(12):
        alone = task.loss(outputs[i : i + 1], batch(targets[i : i + 1]))
        torch.testing.assert_close(alone[0], task.loss(outputs, batch(targets))[i])
    assert task.unit == "sample"


def test_the_sums_of_nothing_have_the_form_of_all_sums(task: Task) -> None:
    outputs, targets = predictions(9, seed=6)
    nothing, something = task.no_sums(), task.sums(outputs, batch(targets))
    form = {n: (v.shape, v.dtype, v.device) for n, v in something.items()}
    assert {n: (v.shape, v.dtype, v.device) for n, v in nothing.items()} == form
    assert all(not v.any() for v in nothing.values())


def test_no_examples_have_no_value(task: Task) -> None:
    for sums in ({}, task.no_sums()):
        values = task.values(sums)
        assert values["examples"] == 0
        assert all(math.isnan(values[n]) for n in ("accuracy", "macro_f1", "loss"))


def test_one_output_per_label(task: Task) -> None:
    assert task.outputs == 5
    assert task.headline in task.values(task.no_sums())
