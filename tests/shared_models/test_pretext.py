"""What all pretext tasks promise on every backbone, and that what they teach carries over to a probe."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from client.readers.base import Examples, Store, Wanted, readers
from client.readers.parts import split
from client.trainer import evaluate, train
from client.workbench import Workbench
from shared_models.backbone import Backbone, backbone, crowned, map_shape
from shared_models.errors import ConfigError
from shared_models.job import Job
from shared_models.keys import keyed_global
from shared_models.messages import Budget, Instruction
from shared_models.models import configure, models
from shared_models.spec import build_model, carried
from shared_models.tasks.base import Batch, add_sums, make_task

CPU = torch.device("cpu")
TASKS = ("rotation", "jigsaw", "colorization", "masked-autoencoding")
BACKBONES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "cnn": ({}, (3, 12, 12)),
    "resnet18": ({"width": 8}, (3, 16, 16)),
    "resnet50": ({}, (3, 16, 16)),
    "vit": ({"width": 16, "mlp": 16, "patch": 4}, (3, 12, 12)),
    "mae": ({"width": 16, "mlp": 16, "patch": 4}, (3, 12, 12)),
}
PAIRS = [(name, task) for name in list(BACKBONES)[:4] for task in TASKS] + [("mae", "masked-autoencoding")]


def a_job(name: str, task: str, **parts: Any) -> Job:
    keys, shape = BACKBONES[name]
    return Job.resolve({
        "name": "pretext", "model": {"name": name, **keys}, "task": {"name": task}, "data": {"shape": shape},
        "train": {"batch_size": 4}, **parts,
    })  # fmt: skip


def a_batch(job: Job, count: int = 4, seed: int = 1) -> Batch:
    return make_task(job).draw(job.data.shape, count, torch.Generator().manual_seed(seed))


def losses(job: Job, model: nn.Module, batch: Batch, key: int = 11) -> Tensor:
    with keyed_global(key):
        return make_task(job).loss(make_task(job).forward(model, batch), batch)


@pytest.mark.parametrize(("name", "task"), PAIRS)
@pytest.mark.parametrize("training", [True, False])
def test_the_first_sample_does_not_see_the_others(name: str, task: str, training: bool) -> None:
    job = a_job(name, task)
    model = build_model(job)[0].train(training)
    batch, other = a_batch(job), a_batch(job, seed=2)
    mixed = Batch(torch.cat([batch.x[:1], 3 * other.x[1:]]), batch.y)
    with torch.no_grad():
        first, again = losses(job, model, batch), losses(job, model, mixed)
    assert first.shape == (4,)
    torch.testing.assert_close(first[0], again[0], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(first[1:], again[1:])


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_training_draws_anew_at_each_step_and_measuring_repeats(name: str, task: str) -> None:
    job = a_job(name, task)
    made, bench, batch = make_task(job), Workbench(job, CPU), a_batch(job, 8)
    with keyed_global(5), torch.no_grad():
        steps = [made.loss(made.forward(bench.model.train(), batch), batch) for _ in range(2)]
    assert torch.equal(*steps) != made.draws
    images = (batch.x * 40 + 128).clamp(0, 255).to(torch.uint8)
    data = Examples(Store(images, batch.y, [str(i) for i in range(8)], job.data), torch.arange(8))
    first, again, elsewhere = (evaluate(bench, data, site) for site in ("a", "a", "b"))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert torch.equal(first["loss"], elsewhere["loss"]) != made.draws


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_the_backbone_keeps_its_names_and_the_decoder_is_its_head(name: str, task: str) -> None:
    job = a_job(name, task)
    target = "vit" if name == "mae" else name
    after = Job.resolve({
        "name": "probe", "model": {"name": target, **BACKBONES[target][0]}, "data": {"shape": job.data.shape},
        "task": {"labels": ["a", "b", "c"]},
    })  # fmt: skip
    model, spec = build_model(job)
    theirs = {e.key: e.shape for e in build_model(after)[1].entries}
    head = {key for key in model.state_dict() if any(fnmatchcase(key, p) for p in models[name].heads)}
    rest = {e.key: e.shape for e in spec.entries if e.key not in head}
    assert head
    assert rest.items() <= theirs.items()
    left = {key.partition(".")[0] for key in theirs.keys() - rest.keys()}
    assert left <= {"head", "fc", *(("hidden1",) if task in TASKS[2:] else ())}
    assert carried(job, after, model.state_dict()).keys() == rest.keys()


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_every_parameter_learns(name: str, task: str) -> None:
    job = a_job(name, task)
    model, _ = build_model(job)
    losses(job, model.train(), a_batch(job)).mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def rows(outputs: Any, chosen: Tensor) -> Any:
    """Some samples of the outputs, whatever they are."""
    if isinstance(outputs, Tensor):
        return outputs[chosen]
    assert is_dataclass(outputs)
    assert not isinstance(outputs, type)
    tensors = {f.name: getattr(outputs, f.name) for f in fields(outputs)}
    return replace(outputs, **{n: t[chosen] for n, t in tensors.items() if isinstance(t, Tensor)})


@pytest.mark.parametrize("task", TASKS)
def test_sums_of_sites_are_those_of_all_images(task: str) -> None:
    job = a_job("cnn", task)
    made, batch = make_task(job), a_batch(job, 12)
    with torch.no_grad(), keyed_global(3):
        outputs = made.forward(build_model(job)[0].eval(), batch)
    pooled = made.sums(outputs, batch)
    merged = dict(made.zeros)
    for chosen in torch.randperm(12, generator=torch.Generator().manual_seed(0)).tensor_split([3, 3, 10]):
        add_sums(merged, made.sums(rows(outputs, chosen), Batch(batch.x[chosen], batch.y[chosen])))
    form = {n: (v.shape, v.dtype, v.device) for n, v in pooled.items()}
    assert {n: (v.shape, v.dtype, v.device) for n, v in made.zeros.items()} == form
    assert not any(v.any() for v in made.zeros.values())
    for n, value in pooled.items():
        torch.testing.assert_close(merged[n], value, rtol=1e-6, atol=1e-6)
    values = made.values(merged)
    assert values["loss"] == pytest.approx(float(made.loss(outputs, batch).mean()), rel=1e-5)
    assert values["examples"] == 12
    for nothing in ({}, made.zeros):
        assert all(torch.isnan(torch.tensor(made.values(nothing)[n])) for n in (*made.metrics, "loss"))
    assert values.keys() == {*made.metrics, "loss", "examples"}


@pytest.mark.parametrize(("name", "task"), [(n, t) for n in ("cnn", "vit") for t in ("rotation", "colorization")])
def test_gradients_of_each_sample_under_vmap_are_those_of_a_loop(name: str, task: str) -> None:
    job = a_job(name, task)
    made, batch = make_task(job), a_batch(job, 3)
    model, _ = build_model(job)
    weights = {k: v.detach() for k, v in model.named_parameters()}

    class Asked(nn.Module):
        """What functional_call calls: the loss of one sample."""

        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            one = Batch(x[None], torch.zeros(1, dtype=torch.int64))
            return made.loss(made.forward(self.net, one), one).sum()

    asked = Asked()

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        value: Tensor = functional_call(asked, {f"net.{k}": v for k, v in weights.items()}, (x,))
        return value

    stacked = vmap(grad(loss), in_dims=(None, 0))(weights, batch.x)
    for i, x in enumerate(batch.x):
        for key, value in grad(loss)(weights, x).items():
            torch.testing.assert_close(stacked[key][i], value, atol=1e-5, rtol=1e-3, msg=key)


@pytest.mark.parametrize("task", TASKS)
def test_bfloat16_is_near(task: str) -> None:
    job = a_job("vit", task)
    model, batch = build_model(job)[0].eval(), a_batch(job)
    with torch.no_grad():
        exact = losses(job, model, batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            near = losses(job, model, batch)
    torch.testing.assert_close(near.float(), exact, rtol=0.05, atol=0.05)


# ---- feature maps ----------------------------------------------------------------------------------------------------
def test_maps_are_what_the_head_sees() -> None:
    x = torch.randn(2, 3, 16, 16)

    def build(name: str, **keys: Any) -> Any:
        chosen, settings = configure(name, keys)
        return chosen.build(settings, (3, 16, 16), 5).eval()

    with torch.no_grad():
        cnn = build("cnn")
        assert cnn.maps(x).shape == (2, 32, 4, 4)
        torch.testing.assert_close(nn.Sequential(*list(cnn)[6:])(cnn.maps(x)), cnn(x))
        resnet = build("resnet18", width=8)
        assert resnet.maps(x).shape == (2, 64, 2, 2)
        torch.testing.assert_close(resnet.fc(resnet.maps(x).mean((2, 3))), resnet(x))
        vit = build("vit", patch=4)
        maps, tokens = vit.maps(x), vit.norm(vit.tokens(x))
        assert maps.shape == (2, 64, 4, 4)
        torch.testing.assert_close(maps[:, :, 2, 3], tokens[:, 1 + 2 * 4 + 3])


def test_looking_at_the_maps_leaves_the_model_as_it_is() -> None:
    chosen, settings = configure("resnet18", {"width": 8, "norm": "batch"})
    model = chosen.build(settings, (3, 16, 16), 5).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert isinstance(model, Backbone)
    drawn = torch.random.get_rng_state()
    assert map_shape(model, (3, 16, 16)) == (64, 2, 2)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("task", TASKS[2:])
def test_a_model_without_maps_is_refused_by_those_that_have_them(task: str) -> None:
    job = a_job("cnn", task)
    with pytest.raises(ConfigError, match="does not show") as error:
        make_task(job).attach(nn.Linear(1, 1), job.data.sample)
    assert "cnn, " in str(error.value)
    assert "vit" in str(error.value)
    with pytest.raises(ConfigError, match=f"model 'mlp' cannot serve the task '{task}'"):
        job.replace(model={"name": "mlp"})


def test_only_the_decoder_stands_on_the_maps() -> None:
    model, _ = build_model(a_job("cnn", "colorization"))
    assert list(dict(model.named_children())) == ["conv1", "relu1", "pool1", "conv2", "relu2", "pool2", "head"]
    assert crowned(backbone(model, "colorization")) is model.get_submodule("head")


# ---- a linear probe --------------------------------------------------------------------------------------------------
def digits(job: Job) -> Any:
    return split(readers["digits"]().read(None, Wanted.by(job)))  # type: ignore[arg-type]


def trained(job: Job, start: dict[str, Tensor], rounds: int) -> Workbench:
    bench, data = Workbench(job, CPU, start), digits(job).train
    values = build_model(job, start=start)[0].state_dict()
    for number in range(rounds):
        bench.load({k: values[k].clone() for k in bench.spec.sent}, {})
        train(bench, data, Instruction("train", "r", "s", job, "", round=number, rounds=rounds,
                                       budget=Budget(epochs=1)), [{}, {}])  # fmt: skip
        values = {k: v.clone() for k, v in bench.entries.items()}
    return bench


def test_a_linear_probe_trains_the_head_alone_and_gains_from_what_rotation_taught() -> None:
    """Digits: the head alone, with a tenth of the labels, on the features that rotation taught and on random ones."""
    common: dict[str, Any] = {
        "name": "probe", "model": {"name": "cnn"}, "data": {"shape": [1, 8, 8], "mean": [0.3], "std": [0.35]},
        "train": {"optimizer": "adamw", "lr": 0.002},
    }  # fmt: skip
    pretext = Job.resolve({**common, "task": {"name": "rotation"}})
    taught = trained(pretext, {}, 4)
    assert make_task(pretext).values(evaluate(taught, digits(pretext).test))["accuracy"] > 0.8  # chance: 0.25
    probe = Job.resolve({
        **common, "task": {"labels": [str(i) for i in range(10)]}, "share": {"base": ["!@head"]},
        "data": {**common["data"], "train_share": 0.1}, "train": {"optimizer": "adamw", "lr": 0.01},
    })  # fmt: skip
    start = {k: v.clone() for k, v in taught.entries.items() if not k.startswith("head.")}
    assert start.keys() == carried(pretext, probe, taught.entries).keys()
    accuracy = {}
    for name, values in (("taught", start), ("random", {})):
        bench = trained(probe, values, 30)
        assert bench.spec.trained == bench.spec.sent == ("head.weight", "head.bias")
        begun = {**build_model(probe)[0].state_dict(), **values}
        assert {k for k, v in bench.entries.items() if not torch.equal(v, begun[k])} == {"head.weight", "head.bias"}
        accuracy[name] = make_task(probe).values(evaluate(bench, digits(probe).test))["accuracy"]
    assert accuracy["taught"] > 0.45
    assert accuracy["taught"] > accuracy["random"] + 0.1
