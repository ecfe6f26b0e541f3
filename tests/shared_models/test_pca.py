"""PCA over sites: sklearn's mean and components of the pooled data, in one round; what is left out, who is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn import decomposition
from sklearn.datasets import load_digits
from torch import Tensor

from client.readers.base import Examples, Splits, Store
from client.workbench import Benches
from server.coordinator import Coordinator
from shared_models.errors import ConfigError
from shared_models.job import Job
from shared_models.messages import Contribution
from shared_models.methods.pca import PCASettings, PrincipalComponents, principal
from shared_models.models import configure
from shared_models.tasks.base import Batch, tasks
from shared_models.wire import decode_contribution, encode_contribution
from shared_models.zoo.pca import PCA
from simulations.engines.inprocess import InProcess

MakeJob = Callable[..., Job]
JOB: dict[str, Any] = {
    "model": {"name": "pca", "components": 8}, "task": {"name": "reconstruction"}, "method": {"name": "pca"},
}  # fmt: skip


def a_store(job: Job) -> Store:
    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x * 15, dtype=torch.uint8).reshape(-1, 1, 8, 8)
    return Store(images, torch.tensor(y), [f"{i:04d}" for i in range(len(y))], job.data)


def split_three(store: Store) -> dict[str, Splits]:
    """Sites that hold the digits 0 to 2, 3 to 6 and 7 to 9; half of each to measure."""
    found = {}
    for name, (low, high) in {"a": (0, 2), "b": (3, 6), "c": (7, 9)}.items():
        rows = torch.nonzero((store.y >= low) & (store.y <= high))[:, 0]
        held = [Examples(store, part) for part in (rows[::2], rows[1::4], rows[3::4])]
        found[name] = Splits(*held)
    return found


def coordinator(job: Job, sites: dict[str, Splits]) -> Coordinator:
    return Coordinator(job, InProcess(list(sites), sites.__getitem__, Benches(torch.device("cpu"))), "run")


def flat(examples: Examples) -> Tensor:
    return examples.batch(torch.arange(len(examples))).x.flatten(1)


def assert_same(model: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(model["mean"], torch.tensor(theirs.mean_).float(), atol=tolerance, rtol=0)
    turned = torch.tensor(theirs.components_).float()
    turned = turned * (turned * model["components"]).sum(dim=1, keepdim=True).sign()
    torch.testing.assert_close(model["components"], turned, atol=tolerance, rtol=0)


@pytest.mark.parametrize("rounds", [1, 2])
def test_three_sites_find_sklearns_components_of_their_pooled_data(make_job: MakeJob, rounds: int) -> None:
    job = make_job(**JOB, federation={"rounds": rounds})
    sites = split_three(a_store(job))
    outcome = coordinator(job, sites).run()
    x = torch.cat([flat(s.train) for s in sites.values()]).double()
    theirs = decomposition.PCA(8, svd_solver="full").fit(x.numpy())
    assert_same(outcome.model, theirs)
    components = outcome.model["components"]
    assert bool((components.gather(1, components.abs().argmax(dim=1, keepdim=True)) > 0).all())
    test = torch.cat([flat(s.test) for s in sites.values()]).double()
    again = torch.tensor(theirs.inverse_transform(theirs.transform(test.numpy())))
    values = outcome.all_sites
    assert values["mse"] == pytest.approx(float((again - test).square().mean()), rel=1e-5)
    assert values["r2"] > 0.7


def test_a_second_round_takes_a_large_mean_away(make_job: MakeJob) -> None:
    """Numbers about 500 with deviations about 1: in float32 the first covariance is nearly noise, the second is not."""
    job = make_job(**JOB, data={"shape": [1, 8, 8], "mean": [-250.0], "std": [0.5]}, federation={"rounds": 1})
    sites = split_three(a_store(job))
    x = torch.cat([flat(s.train) for s in sites.values()]).double()
    assert 400 < float(x.mean()) < 600
    theirs = decomposition.PCA(8, svd_solver="full").fit(x.numpy())
    errors = []
    for rounds in (1, 2):
        model = coordinator(job.replace(federation={"rounds": rounds}), sites).run().model
        cosine = (model["components"] * torch.tensor(theirs.components_)).sum(dim=1).abs()
        errors.append(float((1 - cosine).abs().max()))
    assert errors[0] > 1e-4
    assert errors[1] < 1e-6


def test_by_hand() -> None:
    """Examples (1, 0), (-1, 0), (0, 3), (0, -3) + (5, 7): variances 1/2 and 9/2, so the second axis is the first."""
    method = PrincipalComponents(PCASettings(fewest=1))
    model = PCA(1, 2)
    state = method.init({"mean": torch.zeros(2), "components": torch.tensor([[1.0, 0.0]])}, [])
    x = torch.tensor([[6.0, 7.0], [4.0, 7.0], [5.0, 10.0], [5.0, 4.0]])
    task = tasks["reconstruction"](tasks["reconstruction"].Settings(labels=()))
    given = [Batch(x[:3], torch.zeros(3)), Batch(x[3:], torch.zeros(1))]
    up = method.answer(model, task, given, method.down(state))
    torch.testing.assert_close(up["sums"]["first"], torch.tensor([5.0, 7.0]))
    torch.testing.assert_close(up["sums"]["second"], torch.tensor([[25.5, 35.0], [35.0, 53.5]]))
    found = method.finish(state, up, 1, 1)["model"]
    torch.testing.assert_close(found["mean"], torch.tensor([5.0, 7.0]))
    torch.testing.assert_close(found["components"], torch.tensor([[0.0, 1.0]]))
    model.load_state_dict(found)
    torch.testing.assert_close(model(x), torch.tensor([[5.0, 7.0], [5.0, 7.0], [5.0, 10.0], [5.0, 4.0]]))
    sent = Contribution("train", "r", "s", groups=up)
    assert torch.equal(decode_contribution(*encode_contribution(sent)).groups["sums"]["share"], torch.tensor(1.0))


def test_the_sign_does_not_depend_on_the_library() -> None:
    vectors = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    covariance = vectors @ torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]).double()) @ vectors.T
    found = principal(covariance, 3)
    for component, vector in zip(found, vectors.T, strict=False):
        assert abs(float(component @ vector)) == pytest.approx(1)
        assert float(component[component.abs().argmax()]) > 0


def test_anomalies_are_left_out(make_job: MakeJob) -> None:
    """The components are those of the digits 0 to 8, and nines are told from them by their error."""
    job = make_job(**{**JOB, "task": {"name": "anomaly", "anomalous": ["9"]}}, federation={"rounds": 1})
    sites = split_three(a_store(job))
    outcome = coordinator(job, sites).run()
    y = torch.cat([s.train.y for s in sites.values()])
    x = torch.cat([flat(s.train) for s in sites.values()]).double()
    assert_same(outcome.model, decomposition.PCA(8, svd_solver="full").fit(x[y != 9].numpy()))
    assert outcome.all_sites["auroc"] > 0.75


def test_a_site_with_few_examples_sends_nothing_and_the_others_go_on(make_job: MakeJob) -> None:
    job = make_job(**JOB, federation={"rounds": 1})
    sites = split_three(a_store(job))
    few = Splits(Examples(sites["a"].train.store, sites["a"].train.rows[:9]), sites["a"].validation, sites["a"].test)
    heard: list[dict[str, Any]] = []
    loop = coordinator(job, {**sites, "a": few})
    loop.events.listener = heard.append
    outcome = loop.run()
    assert [(e["site"], e["code"]) for e in heard if e["event"] == "rejected"] == [("a", "too-few-examples")]
    x = torch.cat([flat(sites[s].train) for s in ("b", "c")]).double()
    assert_same(outcome.model, decomposition.PCA(8, svd_solver="full").fit(x.numpy()))


def test_by_steps_it_finds_the_plane() -> None:
    """Trained as a tied linear autoencoder, it loses as little as the components do (Baldi & Hornik 1989)."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=source) * torch.tensor([3.0, 2.0, 0.3]) + torch.tensor([1.0, -1.0, 0.5])
    torch.manual_seed(0)
    net = PCA(2, 3)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        (net(x) - x).square().mean().backward()
        optimizer.step()
    theirs = decomposition.PCA(2).fit(x.numpy())
    best = float((torch.tensor(theirs.inverse_transform(theirs.transform(x.numpy()))) - x).square().mean())
    assert float((net(x).detach() - x).square().mean()) == pytest.approx(best, rel=0.02)


def test_more_components_than_numbers_are_refused() -> None:
    chosen, settings = configure("pca", {"components": 5})
    assert chosen.build(settings, (5,), 1)(torch.zeros(2, 5)).shape == (2, 5)
    with pytest.raises(ConfigError, match="cannot find 5 components in an example of 4 numbers"):
        chosen.build(settings, (4,), 1)
