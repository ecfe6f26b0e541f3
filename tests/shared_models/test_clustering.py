"""Clustering: sklearn's scores from added tables, and Lloyd's algorithm over sites: sklearn's on pooled data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor

from client.readers.base import Examples, Splits, Store
from client.workbench import Benches
from server.coordinator import Coordinator
from server.outcome import Outcome
from shared_models.job import Job
from shared_models.keys import keyed_global
from shared_models.messages import Contribution
from shared_models.methods.base import make_method
from shared_models.methods.lloyd import Lloyd, LloydSettings, told_of
from shared_models.metrics.clusters import adjusted_rand_index, contingency, normalized_mutual_information
from shared_models.sums import Groups
from shared_models.tasks.base import Batch, Task, tasks
from shared_models.wire import decode_contribution, encode_contribution
from shared_models.zoo import kmeans
from simulations.engines.inprocess import InProcess

MakeJob = Callable[..., Job]
CLUSTERS: dict[str, Any] = {"model": {"name": "kmeans"}, "task": {"name": "clustering"}}
EXACT: dict[str, Any] = {**CLUSTERS, "method": {"name": "lloyd", "first": "model", "fewest": 1}}


@pytest.fixture(scope="module")
def sites() -> dict[str, Splits]:
    """Digits at three sites of different sizes: low ones, all, and high ones; the last 150 of each to measure."""
    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x * 15, dtype=torch.uint8).reshape(-1, 1, 8, 8)
    classes = torch.tensor(y)
    store = Store(images, classes, [f"{i:04d}" for i in range(len(y))], Job.resolve(_plain()).data)
    low, high = torch.nonzero(classes < 5)[:, 0], torch.nonzero(classes >= 5)[:, 0]
    rows = {"a": low[:700], "b": torch.cat([low[700:], high[:300]]), "c": high[300:]}
    cut = {name: (held[:-150], held[-150:-75], held[-75:]) for name, held in rows.items()}
    return {name: Splits(*(Examples(store, part) for part in parts)) for name, parts in cut.items()}


def _plain() -> dict[str, Any]:
    return {"name": "t", "model": {"name": "mlp"}, "task": {"labels": ["a", "b"]}, "data": {"shape": [1, 8, 8]}}


def pooled(sites: dict[str, Splits]) -> Tensor:
    """All training examples, normalised and flat."""
    every = (s.train.batch(torch.arange(len(s.train))).x.flatten(1) for s in sites.values())
    return torch.cat(list(every))


def run(job: Job, sites: dict[str, Splits], start: Tensor | None = None) -> Outcome:
    engine = InProcess(list(sites), sites.__getitem__, Benches(torch.device("cpu")))
    coordinator = Coordinator(job, engine, "run")
    if start is not None:
        coordinator.state = coordinator.method.init({"centroids": start}, ["centroids"])
    return coordinator.run()


def centroids(outcome: Outcome) -> Tensor:
    return outcome.model["centroids"]


def make(**keys: Any) -> Task:
    declared = tasks["clustering"]
    return declared(declared.Settings(labels=("a", "b", "c"), **keys))


# ---- scores ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(6))
def test_scores_of_added_tables_are_sklearns(seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    truth = torch.randint(4, (90,), generator=source)
    found = torch.where(torch.rand(90, generator=source) < 0.2 * seed, truth, torch.randint(6, (90,), generator=source))
    table = sum(contingency(found[r], truth[r], 6, 4) for r in torch.arange(90).split(40))
    assert isinstance(table, Tensor)
    assert normalized_mutual_information(table) == pytest.approx(normalized_mutual_info_score(truth, found), abs=1e-12)
    assert adjusted_rand_index(table) == pytest.approx(adjusted_rand_score(truth, found), abs=1e-12)


@pytest.mark.parametrize(
    ("truth", "found"),
    [([0, 0, 0], [1, 1, 1]), ([0, 1, 2], [2, 0, 1]), ([0, 0, 0], [0, 1, 2]), ([0, 1, 1], [0, 0, 0]), ([1], [2])],
)
def test_scores_where_one_side_says_nothing(truth: list[int], found: list[int]) -> None:
    table = contingency(torch.tensor(found), torch.tensor(truth), 3, 3)
    assert normalized_mutual_information(table) == pytest.approx(normalized_mutual_info_score(truth, found), abs=1e-12)
    assert adjusted_rand_index(table) == pytest.approx(adjusted_rand_score(truth, found), abs=1e-12)


# ---- the task and the model ------------------------------------------------------------------------------------------
def test_task_by_hand() -> None:
    """Centroids 0 and 10, examples 1, 2, 9 of classes a, a, b: distances 1, 4, 1, and clusters that are classes."""
    net = kmeans.KMeans(2, 1, 1.0)
    net.load_state_dict({"centroids": torch.tensor([[0.0], [10.0]])})
    task = make(clusters=2)
    batch = Batch(torch.tensor([[1.0], [2.0], [9.0]]), torch.tensor([0, 0, 1]))
    outputs = net(batch.x)
    torch.testing.assert_close(outputs, torch.tensor([[1.0, 81.0], [4.0, 64.0], [81.0, 1.0]]))
    assert task.loss(outputs, batch).tolist() == [1, 4, 1]
    assert task.predict(outputs, batch).tolist() == [0, 0, 1]
    sums = task.sums(outputs.detach(), batch)
    assert sums["table"].tolist() == [[2, 0, 0], [0, 1, 0]]
    assert task.values(sums) == pytest.approx({"nmi": 1, "ari": 1, "inertia": 2, "loss": 2, "examples": 3})
    task.loss(outputs, batch).sum().backward()
    assert net.centroids.grad is not None
    assert net.centroids.grad.tolist() == [[-6.0], [2.0]]  # 2 (c - x), added over the examples of each
    assert (task.outputs, make().outputs) == (2, 3)
    assert [task.measure(m).larger for m in task.metrics] == [True, True, False]


def test_the_sums_of_nothing() -> None:
    task = make()
    form = {
        n: (v.shape, v.dtype) for n, v in task.sums(torch.rand(4, 3), task.draw((2,), 4, torch.Generator())).items()
    }
    assert {n: (v.shape, v.dtype) for n, v in task.zeros.items()} == form
    for nothing in ({}, task.zeros):
        values = task.values(nothing)
        assert values["examples"] == 0
        assert all(math.isnan(values[n]) for n in (*task.metrics, "loss"))


# ---- lloyd -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rounds", [1, 3, 40])
def test_lloyd_over_three_sites_is_sklearns_on_their_pooled_data(
    make_job: MakeJob, sites: dict[str, Splits], rounds: int
) -> None:
    x = pooled(sites)
    start = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:10]]
    theirs = KMeans(10, init=start.numpy(), n_init=1, algorithm="lloyd", max_iter=rounds, tol=0).fit(x.numpy())
    ours = run(make_job(**EXACT, federation={"rounds": rounds}), sites, start)
    torch.testing.assert_close(centroids(ours), torch.tensor(theirs.cluster_centers_), atol=1e-5, rtol=0)
    assert ours.totals.samples == rounds * len(x)
    train = {"a": Splits(sites["a"].train, sites["a"].train, sites["a"].train)}  # the same model on other examples
    values = run(make_job(**EXACT, federation={"rounds": 1}), train, centroids(ours)).curve[0]
    held = sites["a"].train
    flat = held.batch(torch.arange(len(held)))
    label = theirs.predict(flat.x.flatten(1).numpy())
    assert values["nmi"] == pytest.approx(normalized_mutual_info_score(flat.y, label), abs=1e-6)
    assert values["ari"] == pytest.approx(adjusted_rand_score(flat.y, label), abs=1e-6)
    assert values["inertia"] == pytest.approx(-theirs.score(flat.x.flatten(1).numpy()) / len(held), rel=1e-5)


def test_the_first_round_draws_clusters_at_random_and_the_rest_is_lloyds(
    make_job: MakeJob, sites: dict[str, Splits]
) -> None:
    """After one round all centroids are near the mean of all, none is an example, and each job seed draws others."""
    job = make_job(**CLUSTERS, method={"name": "lloyd"}, federation={"rounds": 1})
    x, first = pooled(sites), centroids(run(job, sites))
    torch.testing.assert_close(first.mean(0), x.mean(0), atol=0.1, rtol=0)
    assert float((first - x.mean(0)).norm(dim=1).max()) < 0.25 * float((x - x.mean(0)).norm(dim=1).mean())
    assert float((first[:, None] - x).norm(dim=2).min()) > 1
    assert torch.equal(first, centroids(run(job, sites)))
    assert not torch.equal(first, centroids(run(job.replace(seed=1), sites)))
    longer = run(job.replace(federation={"rounds": 4}, method={"name": "lloyd", "fewest": 1}), sites)
    again = run(make_job(**EXACT, federation={"rounds": 3}), sites, first)
    torch.testing.assert_close(centroids(longer), centroids(again), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ([10, 5, 4], [True, True, True]),
        ([10, 1, 4], [True, False, False]),  # 15 less 10 less 4 would be the one
        ([10, 1, 2], [True, False, False]),
        ([2, 0, 0], [False, False, False]),
        ([9, 0, 4], [True, False, True]),
        ([10, 1, 1], [False, False, False]),
    ],
)
def test_what_is_held_back_holds_as_many_or_none(members: list[int], told: list[bool]) -> None:
    found = told_of(torch.tensor(members, dtype=torch.float64), 3)
    assert found.tolist() == told


def answer(fewest: int, down: Groups, x: list[float], cluster_count: int = 2) -> Groups:
    """What a site with these examples, one number each, sends."""
    net = kmeans.KMeans(cluster_count, 1, 1.0)
    net.load_state_dict(dict(down["model"]))
    batches = [Batch(torch.tensor(x[i : i + 2])[:, None], torch.zeros(len(x[i : i + 2]))) for i in range(0, len(x), 2)]
    return Lloyd(LloydSettings(fewest=fewest, first="model")).answer(net, make(clusters=cluster_count), batches, down)


def test_lloyd_by_hand() -> None:
    """Centroids 0 and 10. Site a: 1, 2, 8; site b: 12. Their means: 1.5 and 10; a cluster nobody has stays."""
    method = Lloyd(LloydSettings(fewest=1, first="model"))
    down = method.down(method.init({"centroids": torch.tensor([[0.0], [10.0]])}, ["centroids"]))
    a, b = answer(1, down, [1.0, 2.0, 8.0]), answer(1, down, [12.0])
    torch.testing.assert_close(a["sums"]["moves"], torch.tensor([[1.0], [-2 / 3]]))
    torch.testing.assert_close(a["sums"]["shares"], torch.tensor([2 / 3, 1 / 3]))
    mean = {"sums": {n: (3 * a["sums"][n] + b["sums"][n]) / 4 for n in a["sums"]}}
    torch.testing.assert_close(method.finish(down, mean, 2, 2)["model"]["centroids"], torch.tensor([[1.5], [10.0]]))
    alone = method.finish(down, b, 1, 1)["model"]["centroids"]
    assert alone.tolist() == [[0.0], [12.0]]


def test_a_cluster_of_few_examples_says_nothing() -> None:
    method = Lloyd(LloydSettings())
    down = method.down(method.init({"centroids": torch.tensor([[0.0], [10.0], [20.0]])}, ["centroids"]))
    down = {**down, "partition": {"first": torch.tensor(0.0)}}
    told = answer(3, down, [1.0, 2.0, 3.0, 8.0, 9.0, 21.0], 3)["sums"]
    torch.testing.assert_close(told["moves"], torch.tensor([[1.0], [0.0], [0.0]]))
    torch.testing.assert_close(told["shares"], torch.tensor([3 / 6, 0.0, 0.0]))
    assert method.finish(down, {"sums": told}, 1, 1)["model"]["centroids"].tolist() == [[2.0], [10.0], [20.0]]
    told = answer(3, down, [1.0, 2.0, 3.0, 8.0, 9.0], 3)["sums"]  # the two alone would follow from the rest
    assert not told["moves"].any()
    assert not told["shares"].any()


def test_what_a_site_sends(make_job: MakeJob, sites: dict[str, Splits]) -> None:
    """In the form of what it was sent, by every example once, over the wire, and the same when asked again."""
    job = make_job(**CLUSTERS, method={"name": "lloyd"})
    coordinator = Coordinator(job, InProcess(list(sites), sites.__getitem__, Benches(torch.device("cpu"))), "run")
    down = make_method(job).down(coordinator.state)
    base = replace(coordinator._instruction("train", groups=down), site="a")
    replies: list[Contribution] = []
    for _ in range(2):
        engine = InProcess(list(sites), sites.__getitem__, Benches(torch.device("cpu")))
        handler = engine.handler("a")
        handler.check = True
        replies.append(handler.handle(base))
    reply = replies[0]
    assert (reply.code, reply.steps, reply.samples) == ("ok", 1, len(sites["a"].train))
    there = decode_contribution(*encode_contribution(reply)).groups
    for group, tensors in down.items():
        assert {n: (t.shape, t.dtype) for n, t in there[group].items()} == {
            n: (t.shape, t.dtype) for n, t in tensors.items()
        }
        assert all(torch.equal(there[group][n], replies[1].groups[group][n]) for n in tensors)
    assert float(there["sums"]["shares"].sum()) == pytest.approx(1, abs=1e-6)


def test_kmeans_measures_distances_in_full_precision() -> None:
    """Far from 0 they are small differences of large numbers."""
    source = torch.Generator().manual_seed(0)
    net, x = kmeans.KMeans(4, 6, 0.1), 100 + torch.randn(5, 6, generator=source)
    with torch.no_grad():
        net.centroids.copy_(x[:4] + 0.1)
        exact = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = net(x)
    assert torch.equal(found, exact)


def test_kmeans_learns_by_steps_too() -> None:
    """Three heaps about 0, trained by stochastic steps: each centroid stands in one of them."""
    source = torch.Generator().manual_seed(0)
    heaps = torch.tensor([[2.0, 0.0], [-1.0, 1.8], [-1.0, -1.8]])
    truth = torch.arange(300) % 3
    x = heaps[truth] + 0.2 * torch.randn(300, 2, generator=source)
    with keyed_global(5):
        net, task = kmeans.KMeans(3, 2, 0.1), make()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for step in range(200):
        rows = (torch.arange(30) + 30 * step) % 300
        optimizer.zero_grad()
        task.loss(net(x[rows]), Batch(x[rows], truth[rows])).mean().backward()
        optimizer.step()
    with torch.no_grad():
        values = task.values(task.sums(net(x), Batch(x, truth)))
    assert values["nmi"] == 1
    assert values["inertia"] == pytest.approx(2 * 0.2**2, rel=0.2)
