"""Three ways to per-sample gradients against autograd one by one, and faults that the node's comparison must see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from client.per_sample import IMPOSSIBLE, TOLERANCE, PerSample, choose, require_agreement
from client.private import Plan, PrivateSteps, require_unmixed
from client.readers.base import Splits
from client.workbench import Workbench
from shared_models.errors import PrivacyError
from shared_models.job import Job
from shared_models.methods.base import Method
from shared_models.privacy import Spend
from shared_models.tasks.base import Batch

CPU = torch.device("cpu")
MakeJob = Callable[..., Job]
MakeSplits = Callable[..., Splits]


def a_bench(make_job: MakeJob, model: str = "cnn", **parts: object) -> Workbench:
    privacy = {"mode": "sample", "noise": 1.0, **parts.pop("privacy", {})}  # type: ignore[dict-item]
    bench = Workbench(make_job(model={"name": model}, privacy=privacy, **parts), CPU)
    bench.to_training()
    return bench


def a_batch(count: int = 3) -> Batch:
    source = torch.Generator().manual_seed(3)
    return Batch(torch.randn(count, 1, 8, 8, generator=source), torch.arange(count) % 10)


def by_hand(bench: Workbench, batch: Batch) -> list[dict[str, torch.Tensor]]:
    """Plain autograd on one example after another, with nothing of ours but the model."""
    found = []
    for x, y in zip(batch.x, batch.y, strict=True):
        bench.model.zero_grad()
        nn.functional.cross_entropy(bench.model(x[None]), y[None]).backward()
        found.append({n: p.grad.clone() for n, p in bench.trained.items() if p.grad is not None})
    bench.model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("way", ["vmap", "hooks", "loop"])
@pytest.mark.parametrize("model", ["mlp", "cnn", "vit"])
def test_each_way_equals_autograd_one_by_one(make_job: MakeJob, model: str, way: str) -> None:
    bench, batch = a_bench(make_job, model), a_batch()
    found, expected = PerSample(bench, (), way)(batch), by_hand(bench, batch)
    for i, one in enumerate(expected):
        for name, value in one.items():
            torch.testing.assert_close(found[name][i], value, atol=1e-6, rtol=1e-4)
    assert all(len(g) == 3 for g in found.values())
    assert all(g.shape == (0, *bench.trained[n].shape) for n, g in PerSample(bench, (), way)(a_batch(0)).items())


def test_hooks_leave_nothing_on_the_model(make_job: MakeJob) -> None:
    bench = a_bench(make_job)
    for _ in range(2):
        PerSample(bench, (), "hooks")(a_batch())
    assert not any(m._forward_hooks or m._backward_hooks for m in bench.model.modules())
    assert all(p.grad is None and getattr(p, "grad_sample", None) is None for p in bench.trained.values())


class Pull(Method):
    """Adds half the square of the bias to each example's loss."""

    name = "pull"

    def loss(self, values, params, batch, outputs, round_state):  # type: ignore[no-untyped-def]
        return values + 0.5 * params["head.bias"].square().sum().expand(len(batch)) * round_state["pull"]["strength"]


@pytest.mark.parametrize("way", ["vmap", "hooks", "loop"])
def test_a_method_s_term_is_part_of_each_example_s_gradient(make_job: MakeJob, way: str) -> None:
    bench, batch = a_bench(make_job, "mlp"), a_batch()
    pieces = [(Pull(None), {"pull": {"strength": torch.tensor(3.0)}})]
    plain, pulled = (PerSample(bench, p, "loop" if p == () else way)(batch) for p in ((), pieces))
    expected = plain["head.bias"] + 3.0 * bench.trained["head.bias"].detach()
    if way == "hooks":  # Opacus sees layers' inputs, not a parameter that is used by itself: the comparison refuses it
        with pytest.raises(PrivacyError):
            require_agreement(PerSample(bench, pieces, way), batch, 0)
        return
    torch.testing.assert_close(pulled["head.bias"], expected)
    assert torch.allclose(pulled["head.weight"], plain["head.weight"], atol=1e-6)


class Mixing(nn.Linear):
    """A layer that shows the batch's mean to every sample, as a fault."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + (x.mean(dim=0, keepdim=True) if len(x) > 1 else 0))


@pytest.mark.parametrize("way", ["vmap", "hooks"])
def test_the_comparison_sees_a_wrong_gradient(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    bench, batch = a_bench(make_job), a_batch(2)
    assert require_agreement(PerSample(bench, (), way), batch, 0) < 1e-5
    right = PerSample._vmap if way == "vmap" else PerSample._hooks

    def wrong(self: PerSample, *given: object) -> dict[str, torch.Tensor]:
        found = right(self, *given)  # type: ignore[arg-type]
        return {n: g * (1 + 2 * TOLERANCE * (n == "conv1.weight")) for n, g in found.items()}

    monkeypatch.setattr(PerSample, f"_{way}", wrong)
    assert 0 < require_agreement(PerSample(bench, (), way), batch, 0) < TOLERANCE, "one entry, below the bound"
    monkeypatch.setattr(
        PerSample, f"_{way}", lambda self, *given: {n: 1.01 * g for n, g in right(self, *given).items()}
    )
    with pytest.raises(PrivacyError, match=f"by '{way}' differ from those of a one-sample loop") as error:
        require_agreement(PerSample(bench, (), way), batch, 0)
    assert error.value.code == "per-sample-gradients"


def test_the_comparison_sees_samples_that_mix(make_job: MakeJob) -> None:
    bench = a_bench(make_job, "mlp")
    head = bench.model.get_submodule("head")
    head.__class__ = Mixing
    with pytest.raises(PrivacyError, match="by 'hooks' differ"):
        require_agreement(PerSample(bench, (), "hooks"), a_batch(2), 0)


def test_a_way_that_cannot_compute_is_passed_over_or_refused(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impossible(self: PerSample, *given: object) -> dict[str, torch.Tensor]:
        raise RuntimeError("vmap: we do not support this\nand more")

    bench, batch = a_bench(make_job), a_batch(2)
    assert choose(bench, (), batch) == "vmap"
    monkeypatch.setattr(PerSample, "_vmap", impossible)
    assert choose(bench, (), batch) == "hooks"
    asked = a_bench(make_job, privacy={"gradients": "vmap"})
    with pytest.raises(PrivacyError, match="by 'vmap' cannot be computed here: vmap: we do not support this") as error:
        choose(asked, (), batch)
    assert error.value.code == IMPOSSIBLE


def test_batch_norm_in_training_is_refused_and_frozen_is_not(make_job: MakeJob) -> None:
    parts = {"data": {"shape": [1, 32, 32]}, "share": {"base": ["!@head"]}}
    bench = Workbench(make_job(model={"name": "resnet18", "norm": "batch"}, **parts), CPU)
    bench.to_training()
    require_unmixed(bench)
    for module in bench.model.modules():
        module.train()
    with pytest.raises(PrivacyError, match="normalises over the batch"):
        require_unmixed(bench)


@pytest.mark.parametrize(
    "parts",
    [
        {"model": {"name": "vit"}, "lora": {"rank": 2}},
        {"model": {"name": "vit"}, "lora": {"rank": 2, "train": "both"}},
        {"model": {"name": "resnet18", "norm": "batch"}, "share": {"base": ["!@head"]}},
        {"model": {"name": "cnn"}, "share": {"personal": ["@head"]}},
    ],
    ids=["lora", "both-factors", "head-only", "personal-head"],
)
@pytest.mark.parametrize("way", ["vmap", "hooks"])
def test_what_is_offered_instead_can_be_protected(make_job: MakeJob, parts: dict[str, object], way: str) -> None:
    job = make_job(**parts, privacy={"mode": "sample", "noise": 1.0, "gradients": way})
    bench = Workbench(job, CPU)
    bench.to_training()
    require_unmixed(bench)
    assert choose(bench, (), a_batch(2)) == way
    found = PerSample(bench, (), way)(a_batch(2))
    assert found.keys() == bench.trained.keys()
    assert any(g.any() for g in found.values())


def test_a_term_that_is_silent_at_first_is_compared_again(make_job: MakeJob, make_splits: MakeSplits) -> None:
    """A pull to where the round began has no gradient there; hooks do not see it, and must not be kept for later."""

    class Pull(Method):
        name = "pull"

        def loss(self, values: Any, params: Any, batch: Any, outputs: Any, round_state: Any) -> torch.Tensor:
            return values + torch.stack([((params[n] - t) ** 2).sum() for n, t in round_state["model"].items()]).sum()

    data = make_splits(1, count=8).train
    bench = Workbench(make_job(privacy={"mode": "sample", "noise": 1.0, "gradients": "hooks"}), CPU)
    bench.to_training()
    here = {n: p.detach().clone() for n, p in bench.trained.items()}
    away = {n: t + 0.1 for n, t in here.items()}
    pull = Pull(None)  # type: ignore[arg-type]
    PrivateSteps(bench, data, Plan(Spend(1.0, 0.5, 1), b"k" * 32), [(pull, {"model": here})])
    with pytest.raises(PrivacyError, match="per-sample gradients by 'hooks' differ from those of a one-sample loop"):
        PrivateSteps(bench, data, Plan(Spend(1.0, 0.5, 1), b"k" * 32), [(pull, {"model": away})])
