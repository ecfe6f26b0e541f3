"""Gradient inversion: the gradient is what the site computed, a linear layer gives its input away, privacy hides it."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest
import torch

from client.readers.base import Examples
from client.workbench import Workbench
from shared_models.errors import ConfigError
from shared_models.job import Job
from shared_models.messages import Budget
from shared_models.schedule import round_budget
from simulations.attacks.contribution import Answer, answer_of, single_step
from simulations.attacks.inversion import LINEAR, SEARCHED, attack, choose, pixels
from simulations.attacks.levels import levels
from simulations.attacks.reconstruct import Search, entrance, from_linear, mse, paired, psnr, ssim, total_variation
from simulations.compare import load_sites
from simulations.partition import SitePopulation
from simulations.privacy_cost import cost

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "digits-attack.toml"


def prepared(*overrides: str) -> tuple[Job, SitePopulation]:
    job = Job.load(EXAMPLE, overrides)
    return job, load_sites(job, EXAMPLE.parent)


def answered(job: Job, sites: SitePopulation, batch: int, draw: int = 1) -> tuple[Answer, torch.Tensor]:
    splits = sites.splits("site-1")
    rows = choose(splits.train, batch, 0)
    return answer_of(single_step(job, batch, len(splits.train)), "site-1", splits, rows, draw), rows


def test_a_linear_layer_gives_its_input_away_by_hand() -> None:
    x, error = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.25, -0.5])
    assert from_linear(torch.outer(error, x), error).tolist() == pytest.approx(x.tolist())
    assert from_linear(torch.zeros(2, 3), torch.zeros(2)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("model", ["logistic", "mlp"])
def test_the_input_of_a_first_linear_layer_is_recovered_exactly_from_a_real_answer(model: str) -> None:
    job, sites = prepared(f"model.name={model}")
    level = levels(job, "none")[0]
    found = attack(job, [level], sites, images=3, batch=1, search=Search(steps=1, starts=1))
    linear = found.levels[0]
    assert linear.way == LINEAR
    assert max(linear.quality.mse) < 1e-9
    assert linear.images == found.truth, "pixel for pixel"


def test_which_models_let_a_linear_layer_see_the_image() -> None:
    names = {m: entrance(Workbench(prepared(f"model.name={m}")[0]).model) for m in ("logistic", "mlp", "cnn", "vit")}
    assert names == {"logistic": "head", "mlp": "hidden1", "cnn": None, "vit": None}


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.momentum=0.9", "train.weight_decay=0.1"),
        ("train.warmup=0.5", "train.schedule=cosine"),
        ("method.name=scaffold",),
        ("method.name=fedprox",),
    ],
)
def test_the_gradient_in_the_answer_is_that_of_the_images(overrides: tuple[str, ...]) -> None:
    job, sites = prepared(*overrides)
    job = levels(job, "none")[0].job
    answer, rows = answered(job, sites, batch=3)
    bench = Workbench(answer.job)
    bench.load(dict(answer.down["model"]), {})
    batch = Examples(sites.store, rows).batch(torch.arange(3))
    bench.task.loss(bench.task.forward(bench.model, batch), batch).mean().backward()
    assert answer.gradient.keys() == bench.trained.keys()
    for name, parameter in bench.trained.items():
        assert parameter.grad is not None
        torch.testing.assert_close(answer.gradient[name], parameter.grad, atol=2e-5, rtol=1e-3)


def test_what_a_site_sends_is_clipped_and_noisy() -> None:
    job, sites = prepared("privacy.epsilon=0", "privacy.noise=0", "privacy.clip=0.01")
    answer, _ = answered(job, sites, batch=1)
    assert torch.stack([g.norm() for g in answer.gradient.values()]).norm() == pytest.approx(0.01, rel=1e-2)
    private, _ = prepared()
    first, second = (answered(private, sites, batch=1, draw=draw)[0] for draw in (1, 2))
    held = len(sites.splits("site-1").train)
    assert first.noise == cost(private, held).stages[0].each.noise, "the noise of a site with all its examples"
    deviation = torch.cat([g.flatten() for g in first.gradient.values()]).std()
    assert deviation == pytest.approx(first.noise, rel=0.05), "of one image alone, with a clip of 1"
    assert not torch.equal(first.gradient["head.bias"], second.gradient["head.bias"])


def test_a_single_step_is_the_job_with_one_step() -> None:
    job, _ = prepared("augment.flip=true")
    step = single_step(job, 2, 100)
    assert round_budget(step, 0) == Budget(steps=1)
    assert step.train.batch_size == 2
    assert not step.augment.active
    assert (step.privacy.clip, step.privacy.delta) == (job.privacy.clip, job.privacy.delta)


def test_the_optimiser_recovers_digits_without_privacy_and_not_with_it() -> None:
    job, sites = prepared()
    found = attack(
        job, levels(job, "none,8"), sites, images=2, batch=1, search=Search(steps=200, starts=1, smooth=1e-3)
    )
    plain, private = (level for level in found.levels if level.way == SEARCHED)
    assert min(plain.quality.psnr) > 25
    assert min(plain.quality.ssim) > 0.9
    assert min(plain.similarity) > 0.99
    assert max(private.quality.psnr) < 8
    assert max(private.quality.ssim) < 0.5
    blind = found.blind.quality
    assert fmean(plain.quality.mse) < fmean(blind.mse) / 100
    assert fmean(private.quality.mse) > fmean(blind.mse), "worse than the mean image, which needs no answer"
    assert private.noise > 0
    assert plain.noise == 0


@pytest.mark.slow
@pytest.mark.parametrize(("model", "batch"), [("cnn", 1), ("mlp", 4)])
def test_a_convolutional_network_and_several_images_at_once(model: str, batch: int) -> None:
    job, sites = prepared(f"model.name={model}")
    found = attack(job, levels(job, "none,8"), sites, images=4, batch=batch, search=Search(steps=1000, starts=3))
    plain, private = found.levels
    assert (plain.way, private.way) == (SEARCHED, SEARCHED)
    assert fmean(plain.quality.ssim) > 0.6
    assert fmean(private.quality.ssim) < 0.3
    assert fmean(plain.quality.mse) < fmean(private.quality.mse) / 3


def test_every_class_has_its_turn() -> None:
    _, sites = prepared()
    train = sites.splits("site-1").train
    rows = choose(train, 20, 0)
    labels = sites.store.y[rows].tolist()
    assert sorted(labels[:10]) == list(range(10))
    assert sorted(labels[10:]) == list(range(10))
    assert len(set(rows.tolist())) == 20
    assert set(rows.tolist()) <= set(train.rows.tolist())


def test_how_near_two_images_are_by_hand() -> None:
    a, b = torch.zeros(1, 8, 8), torch.full((1, 8, 8), 0.1)
    assert mse(a, b) == pytest.approx(0.01)
    assert psnr(0.01) == pytest.approx(20)
    assert psnr(0.0) == 100
    x = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert ssim(x, x) == pytest.approx(1)
    assert ssim(x, 1 - x) < 0
    # constant images: (2 m n + C1) / (m^2 + n^2 + C1) with C1 = 0.01^2
    assert ssim(a, b) == pytest.approx(1e-4 / (0.01 + 1e-4))
    assert total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 3.0]]]])).item() == pytest.approx(2 + 1)


def test_images_in_another_order_are_put_back() -> None:
    _, sites = prepared()
    truth = pixels(Examples(sites.store, torch.tensor([0, 300, 600, 900])))
    assert torch.equal(paired(truth[[2, 0, 3, 1]], truth), truth)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.optimizer=adamw",), "train.optimizer = 'adamw' does not go along it"),
        (("data.normalise_by=sites",), "normalise_by = 'sites'"),
    ],
)
def test_a_step_that_is_no_gradient_is_refused(overrides: tuple[str, ...], message: str) -> None:
    job = levels(Job.load(EXAMPLE), "none")[0].job
    for override in overrides:
        table, _, value = override.partition("=")
        part, key = table.split(".")
        job = job.replace(**{part: {key: value}})
    with pytest.raises(ConfigError, match=message):
        single_step(job, 1, 100)
