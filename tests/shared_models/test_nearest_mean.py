"""The nearest mean of exemplars: by hand, over sites, and with every model that classifies."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from client.workbench import Workbench
from shared_models.card import usual_data
from shared_models.checks import check_contribution
from shared_models.errors import ConfigError, Rejected
from shared_models.job import Job
from shared_models.messages import Contribution, Instruction
from shared_models.methods.base import NEVER
from shared_models.models import models
from shared_models.nearest_mean import SUMS, find_head, inputs_of, merge, nearness, no_sums
from shared_models.tasks.base import make_task

CLASSIFIERS = [name for name in models if "classification" in models[name].tasks]
LABELS = ["disc", "square", "cross"]


def a_job(name: str) -> Job:
    return Job.resolve({
        "name": "nearest", "model": {"name": name}, "task": {"labels": LABELS}, "time": "continual",
        "data": usual_data(models[name], models[name].usual["tiny"]), "federation": {"rounds": 2, "min_sites": 2},
        "stream": {"tasks": 2}, "continual": {"name": "icarl", "buffer": 6},
    })  # fmt: skip


def test_means_over_sites_and_the_nearest_of_them_by_hand() -> None:
    """Two sites: class a has (1, 0), (0, 1) and (1, 0), of which the mean has the direction (2, 1); b has (0, 1) alone;
    c has none. (.6, .8) is nearer to a: its product with (2, 1) / sqrt 5 is .894, with (0, 1) .8.
    """
    one = {"sum": torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)}
    two = {"sum": torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)}
    means = merge([one, two])["mean"]
    assert means.dtype == torch.float32
    torch.testing.assert_close(means, torch.tensor([[2 / 5**0.5, 1 / 5**0.5], [0.0, 1.0], [0.0, 0.0]]))
    scores = nearness(torch.tensor([[0.6, 0.8], [0.0, 1.0]]), means)
    squares = [[(0.6 - x) ** 2 + (0.8 - y) ** 2 for x, y in means[:2].tolist()]]
    assert scores[0, :2].tolist() == pytest.approx([-s for s in squares[0]], abs=1e-6)
    assert scores[1, 1].item() == pytest.approx(0.0, abs=1e-6)
    assert scores[:, 2].tolist() == [NEVER, NEVER]
    assert scores.argmax(dim=1).tolist() == [0, 1]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_has_features(name: str) -> None:
    """The head, given them, says what the model says; they come as vectors of length 1."""
    job = a_job(name)
    bench = Workbench(job, torch.device("cpu"))
    batch = make_task(job).draw(job.data.shape, 3, torch.Generator().manual_seed(1))
    bench.model.eval()
    with torch.no_grad():
        outputs = bench.task.forward(bench.model, batch)
        with inputs_of(bench.head) as seen:
            bench.task.forward(bench.model, batch)
        found = bench.features(batch)
    assert len(seen) == 1, "the block before took its hook away"
    assert torch.equal(bench.head(seen[0]), outputs)
    assert found.shape == (3, bench.head.in_features)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    assert no_sums(bench.head)[SUMS]["sum"].shape == (len(LABELS), bench.head.in_features)


def test_a_model_without_a_linear_head_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no linear layer matches the model's head \(head\.\*\)"):
        find_head(nn.Sequential(nn.Linear(2, 2)), ("head.*",))


FAULTS = {
    "missing-entries": lambda t: {},
    "extra-entries": lambda t: {SUMS: {"sum": t}, "model": {"sum": t}},
    "wrong-shape": lambda t: {SUMS: {"sum": t[:, 1:]}},
    "wrong-dtype": lambda t: {SUMS: {"sum": t.float()}},
    "not-finite": lambda t: {SUMS: {"sum": t / 0}},
    "norm": lambda t: {SUMS: {"sum": t + torch.eye(*t.shape) * 6.1}},
}


@pytest.mark.parametrize("code", FAULTS)
def test_sums_that_no_exemplars_can_have_are_rejected(code: str) -> None:
    job = a_job("mlp")
    head = Workbench(job, torch.device("cpu")).head
    form = no_sums(head)
    asked = Instruction("end_task", "run", "a", job, "", groups={"model": {}})
    good = {SUMS: {"sum": form[SUMS]["sum"] + torch.eye(*form[SUMS]["sum"].shape) * 6.0}}  # as long as 6 can make it
    for examples in (0, 4):  # a site may have none of the task's
        check_contribution(Contribution("end_task", "run", "a", examples=examples, groups=good), asked, form, torch.inf)
    bad = Contribution("end_task", "run", "a", examples=4, groups=FAULTS[code](form[SUMS]["sum"]))
    with pytest.raises(Rejected) as error:
        check_contribution(bad, asked, form, torch.inf)
    assert error.value.code == code
