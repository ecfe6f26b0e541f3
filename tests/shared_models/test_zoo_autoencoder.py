"""Autoencoder and VAE: sizes, torch's KL divergence, noise in training alone, and digits drawn again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.func import functional_call, grad, vmap

from shared_models.errors import ConfigError
from shared_models.models import configure, models
from shared_models.tasks.base import Batch
from shared_models.tasks.reconstruction import Reconstruction, ReconstructionSettings
from shared_models.zoo.vae import divergence

NAMES = ("autoencoder", "vae")


def build(name: str, shape: tuple[int, ...], seed: int = 0, **keys: Any) -> nn.Module:
    torch.manual_seed(seed)
    chosen, settings = configure(name, keys)
    return chosen.build(settings, shape, 1)


def again(net: nn.Module, x: Tensor) -> Tensor:
    found = net(x)
    return found if isinstance(found, Tensor) else found[0]


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("autoencoder", "tiny", 16_289),
        ("autoencoder", "medium", 1_840_099),
        ("vae", "tiny", 15_265),
        ("vae", "medium", 2_364_515),
    ],
)
def test_parameter_counts(name: str, size: str, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build(name, models[name].usual[size], size=size).parameters()) == count


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 12), (1, 1, 1), (5,)])
def test_what_comes_out_has_the_shape_of_what_goes_in(name: str, shape: tuple[int, ...]) -> None:
    net, x = build(name, shape), torch.randn(3, *shape)
    assert again(net, x).shape == x.shape
    code = models[name].settings.model_validate({**models[name].sizes["tiny"]}).model_dump()["code"]
    assert net.encoder(x).shape == (3, code * (2 if name == "vae" else 1))  # type: ignore[operator, union-attr]


def test_divergence_is_torchs() -> None:
    mean, log_variance = torch.randn(2, 5, 4)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(divergence(mean, log_variance), expected)


def test_the_vae_draws_its_code_in_training_alone() -> None:
    net, x = build("vae", (1, 8, 8)), torch.randn(2, 1, 8, 8)
    torch.manual_seed(1)
    first, second = again(net, x), again(net, x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(again(net, x), first), "from torch's global generator"
    net.eval()
    mean, _ = net.encoder(x).chunk(2, dim=1)  # type: ignore[operator, union-attr]
    assert torch.equal(again(net, x), net.decoder(mean))  # type: ignore[operator]


def test_the_codes_noise_has_the_deviation_it_says() -> None:
    net = build("vae", (4,), widths=[8], code=1)
    x = torch.randn(1, 4).expand(20_000, 4)
    net.decoder = nn.Identity()  # the code itself comes out
    with torch.no_grad():
        mean, log_variance = net.encoder(x[:1]).chunk(2, dim=1)  # type: ignore[operator, union-attr]
        code = again(net, x)
    assert float(code.mean()) == pytest.approx(float(mean), abs=0.03)
    assert float(code.std()) == pytest.approx(float((log_variance / 2).exp()), rel=0.03)


def test_beta_weighs_the_divergence() -> None:
    x = torch.randn(3, 1, 8, 8)
    task = Reconstruction(ReconstructionSettings())
    batch = Batch(x, torch.zeros(3, dtype=torch.int64))
    losses = [task.loss(build("vae", (1, 8, 8), beta=beta).eval()(x), batch) for beta in (0.0, 1.0, 2.0)]
    net = build("vae", (1, 8, 8)).eval()
    mean, log_variance = net.encoder(x).chunk(2, dim=1)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(losses[0], (again(net, x) - x).square().flatten(1).mean(1))
    torch.testing.assert_close(losses[1] - losses[0], divergence(mean, log_variance) / 64)
    torch.testing.assert_close(losses[2] - losses[0], 2 * divergence(mean, log_variance) / 64)
    with pytest.raises(ConfigError, match="'beta'"):
        build("vae", (1, 8, 8), beta=-1.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 6, 8), (5,)])
def test_per_sample_gradients_equal_a_loop(name: str, shape: tuple[int, ...]) -> None:
    net = build(name, shape).double().eval()  # in training the noise of a sample is its own in each way
    x = torch.randn(3, *shape, dtype=torch.float64)
    weights = {k: v.detach() for k, v in net.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        found = functional_call(net, weights, (x[None],))
        drawn, term = found if isinstance(found, tuple) else (found, torch.zeros(1))
        return (drawn - x[None]).square().mean() + term.sum()

    stacked = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    for i in range(3):
        alone = grad(loss)(weights, x[i])
        for key in weights:
            torch.testing.assert_close(stacked[key][i], alone[key], atol=1e-8, rtol=1e-6, msg=key)


@pytest.mark.parametrize(("name", "least"), [("autoencoder", 0.7), ("vae", 0.6)])
def test_digits_are_drawn_again(name: str, least: float) -> None:
    from sklearn.datasets import load_digits

    x = torch.tensor(load_digits().images, dtype=torch.float32)[:, None]
    x = (x - x.mean()) / x.std()
    train, test = x[:1200], x[1200:]
    net = build(name, (1, 8, 8), **({"beta": 0.1} if name == "vae" else {}))
    task = Reconstruction(ReconstructionSettings())
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for step in range(150):
        rows = (torch.arange(64) + 64 * step) % len(train)
        batch = Batch(train[rows], torch.zeros(64, dtype=torch.int64))
        optimizer.zero_grad()
        task.loss(task.forward(net, batch), batch).mean().backward()
        optimizer.step()
    net.eval()
    given = Batch(test, torch.zeros(len(test), dtype=torch.int64))
    with torch.no_grad():
        assert task.values(task.sums(net(test), given))["r2"] > least
