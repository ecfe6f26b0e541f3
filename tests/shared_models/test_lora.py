"""Adapters: what is trained and sent, and that a federation averages the product and not its factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from client.readers.base import Examples, Splits, Store
from client.workbench import Benches
from server.coordinator import Coordinator
from shared_models.errors import ConfigError
from shared_models.job import Job
from shared_models.job_parts import DataPart
from shared_models.lora import Adapted, ProductMean, adapt
from shared_models.spec import build_model
from simulations.engines.inprocess import InProcess

DATA = DataPart(shape=(1, 8, 8))


def a_job(**parts: Any) -> Job:
    base: dict[str, Any] = {
        "name": "lora",
        "model": {"name": "vit", "layers": 1},
        "task": {"labels": ["a", "b", "c"]},
        "data": {"shape": [1, 8, 8]},
        "lora": {"rank": 2, "alpha": 4.0},
        "train": {"lr": 0.1, "batch_size": 8},
        "federation": {"rounds": 2, "min_sites": 2},
    }
    return Job.resolve({**base, **parts})


def a_site(seed: int, count: int) -> Splits:
    source = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=source)
    y = torch.randint(0, 3, (count,), generator=source)
    store = Store(x, y, [str(i) for i in range(count)], DATA)
    return Splits(*(Examples(store, torch.arange(count)) for _ in range(3)))


def one_round(job: Job) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The models of a federation of two unequal sites, 12 and 36 examples, and of each of them alone."""
    sites = {"a": a_site(1, 12), "b": a_site(2, 36)}

    def trained(*names: str) -> dict[str, Tensor]:
        engine = InProcess(names, sites.__getitem__, Benches(torch.device("cpu")))
        return {n: t.clone() for n, t in Coordinator(job, engine, "run").run().model.items()}

    return trained(*sites), {name: trained(name) for name in sites}


def product(model: dict[str, Tensor], layer: str, job: Job) -> Tensor:
    """What the adapter of a layer adds to its weight."""
    adapted = build_model(job)[0].get_submodule(layer)
    assert isinstance(adapted, Adapted)
    return adapted.factor * model[f"{layer}.lora_b.weight"] @ adapted.lora_a.weight.detach()


def test_at_the_start_nothing_is_added() -> None:
    plain, _ = build_model(a_job(lora={"rank": 0}))
    adapted, _ = build_model(a_job())
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(plain(x), adapted(x))
    assert plain.state_dict().keys() < adapted.state_dict().keys()
    assert all(torch.equal(v, adapted.state_dict()[k]) for k, v in plain.state_dict().items())


def test_only_the_second_factor_and_the_head_cross_the_network() -> None:
    _, spec = build_model(a_job())
    assert set(spec.sent) == set(spec.trained)
    assert {name.rpartition("lora_b")[1] or name for name in spec.sent} == {"lora_b", "head.weight", "head.bias"}
    fixed = {e.key: e for e in spec.entries if e.share == "base"}
    assert all(fixed[name].digest for name in fixed)
    assert any(name.endswith("lora_a.weight") for name in fixed)


def test_the_mean_of_the_sites_is_the_mean_of_their_products() -> None:
    """Both sites together against each alone (hand-weighted)."""
    job = a_job(federation={"rounds": 1, "min_sites": 1})
    both, alone = one_round(job)
    for layer in ("blocks.0.attention.qkv", "blocks.0.hidden"):
        exact = 0.25 * product(alone["a"], layer, job) + 0.75 * product(alone["b"], layer, job)
        assert exact.abs().max() > 1e-4
        assert torch.allclose(product(both, layer, job), exact, atol=1e-7)


def test_where_both_factors_are_trained_the_product_is_averaged_and_fitted_to_the_rank() -> None:
    """The server's product is, of the exact mean of products, what lies in the rows of the mean A.

    Both sites together against each alone (hand-weighted).
    """
    train = {"optimizer": "adamw", "lr": 0.02, "batch_size": 4, "epochs": 3}
    job = a_job(federation={"rounds": 1, "min_sites": 1}, lora={"rank": 2, "alpha": 4.0, "train": "both"}, train=train)
    mean, alone = one_round(job)
    for layer in ("blocks.0.attention.qkv", "blocks.0.hidden"):
        a, b = f"{layer}.lora_a.weight", f"{layer}.lora_b.weight"
        exact = 0.25 * alone["a"][b] @ alone["a"][a] + 0.75 * alone["b"][b] @ alone["b"][a]  # (out, in)
        middle, factors = 0.25 * alone["a"][a] + 0.75 * alone["b"][a], 0.25 * alone["a"][b] + 0.75 * alone["b"][b]
        assert not torch.allclose(alone["a"][a], alone["b"][a], atol=1e-3)
        assert torch.allclose(mean[a], middle, atol=1e-6)
        found = mean[b] @ mean[a]
        rows = torch.linalg.qr(middle.T).Q  # an orthonormal basis of the rows of A
        assert torch.allclose(found, exact @ rows @ rows.T, atol=1e-6)
        assert (found - exact).norm() < 0.999 * (factors @ middle - exact).norm()


def mean_of(*sites: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(A, B) of the server from those of sites with weights 1, 2, ..."""
    total = ProductMean(len(sites))
    for slot, (a, b) in enumerate(sites):
        model = {"x.lora_a.weight": a, "x.lora_b.weight": b, "head.weight": torch.ones(3)}
        total.add(slot, {"model": model}, {"model": 1.0 + slot})
    found = total.result()
    assert found is not None
    assert found["model"].keys() == {"x.lora_a.weight", "x.lora_b.weight", "head.weight"}
    return found["model"]["x.lora_a.weight"], found["model"]["x.lora_b.weight"]


@pytest.mark.parametrize(("rank", "inputs"), [(2, 5), (8, 3)], ids=["thin", "more-than-inputs"])
def test_the_product_of_equal_first_factors_is_the_mean_of_the_second(rank: int, inputs: int) -> None:
    source = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(shape, generator=source) for shape in ((rank, inputs), (4, rank), (4, rank)))
    first, second = mean_of((a, b))
    assert torch.equal(first, a)
    assert torch.equal(second, b)  # one site's model is that site's
    first, second = mean_of((a, b), (a, c))
    assert torch.equal(first, a)
    assert torch.allclose(second, (b + 2 * c) / 3, atol=1e-5)


def test_first_factors_that_nearly_cancel_do_not_blow_up_the_second() -> None:
    source = torch.Generator().manual_seed(0)
    a, other, b, c = (torch.randn(shape, generator=source) for shape in ((2, 5), (2, 5), (4, 2), (4, 2)))
    other[0] = -a[0] / 2 + 1e-5  # the weights are 1 and 2: of the first row of the mean next to nothing is left
    first, second = mean_of((a, b), (other, c))
    factors, exact = (b + 2 * c) / 3, (b @ a + 2 * c @ other) / 3
    assert first[0].abs().max() < 1e-4
    assert second.abs().max() < 10
    assert (second @ first - exact).norm() <= (factors @ first - exact).norm() * (1 + 1e-5)


def test_adapters_of_which_the_second_factor_stays_at_the_sites() -> None:
    job = a_job(lora={"rank": 2, "train": "both"}, share={"personal": ["*.lora_b.weight"]})
    engine = InProcess(["a", "b"], lambda name: a_site(len(name), 16), Benches(torch.device("cpu")))
    model = Coordinator(job, engine, "run").run().model
    assert any("lora_a" in name for name in model)
    assert not any("lora_b" in name for name in model)
    with pytest.raises(ConfigError, match=r"averages '.*lora_b.weight' over sites that each have their own '.*lora_a"):
        build_model(a_job(lora={"rank": 2, "train": "both"}, share={"personal": ["*.lora_a.weight"]}))


def test_the_frozen_weights_do_not_move() -> None:
    job, benches = a_job(), Benches(torch.device("cpu"))
    engine = InProcess(["a", "b"], lambda name: a_site(len(name), 16), benches)
    outcome = Coordinator(job, engine, "run").run()
    start, spec = build_model(job)
    assert outcome.model.keys() == set(spec.sent)
    bench = benches(job)
    frozen = [e.key for e in spec.entries if e.share == "base"]
    assert len(frozen) > 10
    assert all(torch.equal(bench.entries[name], start.state_dict()[name]) for name in frozen)
    assert not any(torch.equal(bench.entries[name], start.state_dict()[name]) for name in spec.sent)


def test_the_same_as_peft() -> None:
    """peft's layer with the same factors gives the same outputs and gradients."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours, theirs = nn.Sequential(nn.Linear(6, 4)), nn.Sequential(nn.Linear(6, 4))
    theirs.load_state_dict(ours.state_dict())
    adapt(ours, 2, 4.0, (), ())
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=4.0, target_modules=["0"]), theirs)
    layer = theirs[0]
    layer.lora_A["default"].weight.data.copy_(ours[0].lora_a.weight)
    x = torch.randn(5, 6)
    for adapted, b in ((ours, ours[0].lora_b), (theirs, layer.lora_B["default"])):
        b.weight.data.fill_(0.3)
        adapted(x).square().sum().backward()
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert torch.allclose(ours[0].lora_b.weight.grad, layer.lora_B["default"].weight.grad, atol=1e-5)


def test_factors_without_a_rank_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora.*rank 0 has none: set rank"):
        a_job(lora={"train": "both"})


def test_targets() -> None:
    model, _ = build_model(a_job(lora={"rank": 2, "targets": ["*.qkv"]}))
    assert [n for n, m in model.named_modules() if isinstance(m, Adapted)] == ["blocks.0.attention.qkv"]
    with pytest.raises(ConfigError, match=r"lora\.targets: no linear layer is called '\*\.query'"):
        build_model(a_job(lora={"rank": 2, "targets": ["*.query"]}))
    with pytest.raises(ConfigError, match="no linear layer for an adapter"):
        build_model(a_job(model={"name": "logistic"}))
