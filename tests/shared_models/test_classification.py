"""Classification: sums that merge to the pooled ones, the metrics of scikit-learn and torchmetrics, torch's loss."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, roc_auc_score
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassCalibrationError,
    MulticlassF1Score,
)

from shared_models.errors import ConfigError
from shared_models.job import Job
from shared_models.metrics.auroc import auroc, auroc_error, roc_histograms
from shared_models.metrics.histograms import bins_that_fit, score_bins
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


def labelled(make_job: MakeJob, count: int, **keys: object) -> Task:
    return make_task(make_job(task={"labels": [f"l{i}" for i in range(count)], **keys}))


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
        assert torch.equal(merged["scores"], pooled["scores"])
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
        assert all(math.isnan(values[n]) for n in (*task.metrics, "loss"))


def test_one_output_per_label(task: Task) -> None:
    assert task.outputs == 5
    assert task.headline == "accuracy"
    assert {*task.metrics, "loss", "examples"} == task.values(task.no_sums()).keys()


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0, 40.0])  # the last: many confidences are exactly 1
@pytest.mark.parametrize("classes", [2, 5, 12])
def test_sums_of_four_sites_give_torchmetrics_pooled(make_job: MakeJob, classes: int, sharpness: float) -> None:
    task = labelled(make_job, classes)
    source = torch.Generator().manual_seed(classes)
    targets = torch.randint(classes, (800,), generator=source)
    outputs = sharpness * (torch.randn(800, classes, generator=source) + F.one_hot(targets, classes))
    merged: dict[str, Tensor] = {}
    for rows in torch.arange(800).tensor_split([10, 300, 301]):
        add_sums(merged, task.sums(outputs[rows], batch(targets[rows])))
    values = task.values(merged)
    given = (outputs.softmax(1), targets)
    assert values["accuracy"] == pytest.approx(float(MulticlassAccuracy(classes, average="micro")(*given)), abs=1e-6)
    assert values["macro_f1"] == pytest.approx(float(MulticlassF1Score(classes, average="macro")(*given)), abs=1e-6)
    ece = float(MulticlassCalibrationError(classes, n_bins=15, norm="l1")(*given))
    assert values["calibration"] == pytest.approx(1 - ece, abs=1e-5)
    exact = MulticlassAUROC(classes, average=None)(*given).double()
    bound = auroc_error(merged["scores"])
    assert bool(((auroc(merged["scores"]) - exact).abs() <= bound + 1e-6).all())
    assert float(bound.max()) < (0.03 if sharpness < 10 else 0.35)  # the outer bins hold log-odds beyond 16
    assert values["auroc"] == pytest.approx(float(exact.mean()), abs=float(bound.mean()) + 1e-6)


def test_calibration_by_hand(make_job: MakeJob) -> None:
    """Confidence .8 four times, right once; 1 once, right: ECE = 4/5 |.25 - .8| + 1/5 |1 - 1| = .44."""
    logits = torch.tensor([[math.log(4.0), 0.0]] * 4 + [[99.0, 0.0]])
    task = labelled(make_job, 2)
    values = task.values(task.sums(logits, batch(torch.tensor([0, 1, 1, 1, 0]))))
    assert values["calibration"] == pytest.approx(1 - 0.44, abs=1e-6)


def test_auroc_by_hand() -> None:
    """Positives at .9 and .5, negatives at .5 and .1: of the four pairs three are right and one is a tie, 3.5 / 4."""
    p = torch.tensor([0.9, 0.5, 0.5, 0.1], dtype=torch.float64)
    histograms = roc_histograms(torch.stack([1 - p, p], dim=1), torch.tensor([1, 1, 0, 0]), 512)
    assert auroc(histograms).tolist() == [3.5 / 4, 3.5 / 4]
    assert auroc_error(histograms).tolist() == [0.5 / 4, 0.5 / 4]
    assert histograms.sum(-1).tolist() == [[2, 2], [2, 2]]


def test_score_bins_are_equal_in_log_odds() -> None:
    odds = torch.tensor([-40.0, -16.01, -15.99, -14.01, -13.99, -0.01, 0.0, 13.99, 14.01, 40.0], dtype=torch.float64)
    assert score_bins(odds.sigmoid(), 16).tolist() == [0, 0, 0, 0, 1, 7, 8, 14, 15, 15]
    assert score_bins(torch.tensor([0.0, 1.0, float("nan")]), 16).tolist() == [0, 15, 0]


@pytest.mark.parametrize("seed", range(20))
def test_auroc_is_exact_where_only_equal_scores_share_a_bin(seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    scores = torch.randint(-8, 8, (60,), generator=source).double().add(0.5).sigmoid()  # middles of bins
    truth = torch.randint(2, (60,), generator=source)
    found = auroc(roc_histograms(torch.stack([1 - scores, scores], dim=1), truth, 32))
    assert float(found[1]) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)


@pytest.mark.parametrize("bins", [1, 2, 16, 64])
@pytest.mark.parametrize("seed", range(10))
def test_the_bound_on_auroc_holds(seed: int, bins: int) -> None:
    source = torch.Generator().manual_seed(seed)
    truth = torch.randint(2, (50,), generator=source)
    scores = (0.3 * torch.randn(50, generator=source, dtype=torch.float64) + seed % 3 * (truth - 0.5)).sigmoid()
    histograms = roc_histograms(torch.stack([1 - scores, scores], dim=1), truth, bins)
    off = abs(float(auroc(histograms)[1]) - roc_auc_score(truth, scores))
    assert off <= float(auroc_error(histograms)[1]) + 1e-12


@pytest.mark.parametrize("right", [True, False])
def test_the_bound_on_auroc_is_reached(right: bool) -> None:
    """All scores in one bin, ranked perfectly or the other way round: exact 1 or 0, found 1/2, bound 1/2."""
    truth = torch.tensor([0, 0, 0, 1, 1])
    scores = torch.linspace(0.500, 0.501, 5, dtype=torch.float64)
    scores = scores if right else scores.flip(0)
    histograms = roc_histograms(torch.stack([1 - scores, scores], dim=1), truth, 16)
    assert roc_auc_score(truth, scores) == float(right)
    assert float(auroc(histograms)[1]) == 0.5
    assert float(auroc_error(histograms)[1]) == 0.5


def test_auroc_is_over_the_classes_that_have_two_sides(task: Task) -> None:
    outputs, targets = predictions(100, seed=7, classes=(1, 3))
    values = task.values(task.sums(outputs, batch(targets)))
    p = outputs.double().softmax(1)
    exact = [roc_auc_score(targets == c, p[:, c]) for c in (1, 3)]
    assert values["auroc"] == pytest.approx(sum(exact) / 2, abs=0.01)
    outputs, targets = predictions(100, seed=7, classes=(2,))
    assert math.isnan(task.values(task.sums(outputs, batch(targets)))["auroc"])


def test_of_two_labels_auroc_is_the_seconds(make_job: MakeJob) -> None:
    task = labelled(make_job, 2)
    sums = {**task.zeros, "scores": torch.stack([torch.full((2, 512), 7), torch.eye(512, dtype=torch.int64)[:2]])}
    assert task.values(sums)["auroc"] == 1.0  # a negative in bin 0, a positive in bin 1


def test_histograms_stay_small(make_job: MakeJob) -> None:
    assert labelled(make_job, 10).zeros["scores"].shape == (10, 2, 512)
    assert labelled(make_job, 128).zeros["scores"].shape == (128, 2, 512)
    many = labelled(make_job, 300).zeros["scores"]
    assert many.shape == (300, 2, 128)
    assert many.nbytes <= 2**20
    assert bins_that_fit(10**9, 512, 2**20) == 16


def test_outputs_that_are_no_numbers_are_counted_too(task: Task) -> None:
    sums = task.sums(torch.full((3, 5), float("nan")), batch(torch.tensor([0, 1, 2])))
    assert int(sums["confusion"].sum()) == 3
    assert int(sums["scores"].sum()) == 15
    assert math.isnan(float(sums["loss"]))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [(), (1.0, 2.0, 0.5, 3.0, 1.0)])
def test_weights_and_smoothing(make_job: MakeJob, smoothing: float, weights: tuple[float, ...]) -> None:
    """Smoothed: the target is 1 - s + s/C for the truth and s/C for the rest, each times the weight of its label."""
    task = make_task(
        make_job(task={"labels": list("abcde"), "label_smoothing": smoothing, "class_weights": list(weights)})
    )
    outputs, targets = predictions(20, seed=8)
    wanted = (1 - smoothing) * F.one_hot(targets, 5).double() + smoothing / 5
    wanted = wanted * torch.tensor(weights or (1.0,) * 5).double()
    expected = -(wanted * outputs.double().log_softmax(1)).sum(1)
    torch.testing.assert_close(task.loss(outputs, batch(targets)).double(), expected, rtol=1e-5, atol=1e-6)
    assert float(task.sums(outputs, batch(targets))["loss"]) == pytest.approx(float(expected.sum()), rel=1e-6)
    each = vmap(grad(lambda o, y: task.loss(o[None], Batch(o[None], y[None])).sum()))(outputs, targets)
    together = grad(lambda o: task.loss(o, batch(targets)).sum())(outputs)
    torch.testing.assert_close(each, together, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"labels": ["a"]}, "[task]: 'labels': there is nothing to choose with one label alone, 'a'"),
        ({"labels": ["a", "b"], "class_weights": [1.0]}, "[task]: 1 class_weights for 2 labels"),
        ({"labels": ["a", "b"], "class_weights": [1.0, 0.0]}, "'class_weights.1'"),
        ({"labels": ["a", "b"], "label_smoothing": 1.0}, "'label_smoothing'"),
        ({"labels": ["a", "b"], "headline": "dice"}, "task 'classification' has no metric 'dice'"),
    ],
)
def test_settings_that_cannot_be(make_job: MakeJob, keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_job(task=keys)
    assert message in str(error.value)


@pytest.mark.parametrize("shape", [(3, 8, 8), (13,)])
def test_a_drawn_batch_fits_loss_and_model(task: Task, shape: tuple[int, ...]) -> None:
    drawn = task.draw(shape, 64, torch.Generator().manual_seed(0))
    assert drawn.x.shape == (64, *shape)
    assert sorted(set(drawn.y.tolist())) == [0, 1, 2, 3, 4]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 5))
    outputs = task.forward(model, drawn)
    assert task.loss(outputs, drawn).shape == (64,)
    assert task.values(task.sums(outputs.detach(), drawn))["examples"] == 64
    again = task.draw(shape, 64, torch.Generator().manual_seed(0))
    assert torch.equal(again.x, drawn.x)
    assert torch.equal(again.y, drawn.y)
