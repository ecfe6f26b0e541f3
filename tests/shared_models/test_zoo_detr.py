"""DETR: matching against brute force, layers against torch's own, published sizes and names, and that it learns."""

from __future__ import annotations

import math
import re
from itertools import permutations
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torchmetrics.detection import MeanAveragePrecision

from shared_models.boxes import generalized_iou, iou, to_centres, to_corners
from shared_models.errors import ConfigError
from shared_models.models import configure, models
from shared_models.zoo.detr import (
    DETR,
    Attention,
    DecoderLayer,
    DETRSettings,
    EncoderLayer,
    detections,
    detr_loss,
    even_points,
    match,
    sines,
)


def build(shape: tuple[int, ...] = (3, 64, 64), outputs: int = 2, **keys: Any) -> DETR:
    torch.manual_seed(0)
    chosen, settings = configure("detr", keys)
    net = chosen.build(settings, shape, outputs)
    assert isinstance(net, DETR)
    return net


def drawn(count: int = 8, side: int = 64) -> tuple[Tensor, Tensor]:
    """Images with one to three things in a third each, rectangles (0) and discs (1) of random size and colour."""
    source = torch.Generator().manual_seed(1)
    x, y = 0.1 * torch.randn(count, 3, side, side, generator=source), torch.full((count, 3, 5), -1.0)
    down, right = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    for i in range(count):
        for j in range(1 + i % 3):
            kind, third = (i + j) % 2, side // 3
            w, h = (int(v) for v in torch.randint(third // 2, third, (2,), generator=source))
            h = w if kind else h
            x0 = j * third + int(torch.randint(third - w + 1, (), generator=source))
            y0 = int(torch.randint(side - h, (), generator=source))
            inside = (right >= x0) & (right < x0 + w) & (down >= y0) & (down < y0 + h)
            if kind:
                inside &= (right + 0.5 - x0 - w / 2) ** 2 + (down + 0.5 - y0 - h / 2) ** 2 <= w**2 / 4
            x[i] = torch.where(inside, 0.5 + torch.rand(3, 1, 1, generator=source), x[i])
            y[i, j] = torch.tensor([kind, x0 / side, y0 / side, (x0 + w) / side, (y0 + h) / side])
    return x, y


def map50(found: Tensor, y: Tensor) -> float:
    metric = MeanAveragePrecision(iou_thresholds=[0.5])
    for f, t in zip((f[f[:, 0] >= 0] for f in found), (t[t[:, 0] >= 0] for t in y), strict=True):
        metric.update(
            [{"boxes": 640 * f[:, 1:5], "scores": f[:, 5], "labels": f[:, 0].long()}],
            [{"boxes": 640 * t[:, 1:], "labels": t[:, 0].long()}],
        )
    return float(metric.compute()["map_50"])


def a_case(queries: int, objects: list[int], layers: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random scores (B, L, N, 4), boxes (B, L, N, 4) and targets with so many objects in each image, (B, M, 5)."""
    source = torch.Generator().manual_seed(seed)
    count, most = len(objects), max(objects)
    scores = 2 * torch.randn(count, layers, queries, 4, generator=source)
    boxes = 0.1 + 0.3 * torch.rand(count, layers, queries, 4, generator=source)
    truth = to_corners(0.2 + 0.3 * torch.rand(count, most, 4, generator=source))
    y = torch.cat([torch.randint(3, (count, most, 1), generator=source).float(), truth], dim=2)
    y[torch.arange(most) >= torch.tensor(objects)[:, None]] = torch.tensor([-1.0, 0, 0, 0, 0])
    return scores, boxes, y


def cost(scores: Tensor, boxes: Tensor, target: Tensor) -> Tensor:
    """Equation 1 for one target (5,) and every query: (N,)."""
    chance = scores.softmax(1)[:, int(target[0])]
    apart = (boxes - to_centres(target[1:])).abs().sum(1)
    return 5 * apart + 2 * (1 - generalized_iou(to_corners(boxes), target[1:])) - chance


@pytest.mark.parametrize("seed", range(3))
def test_the_matching_is_the_best_of_all_permutations(seed: int) -> None:
    objects = [3, 0, 2, 4]
    scores, boxes, y = a_case(5, objects, layers=2, seed=seed)
    found = match(scores, boxes, y)
    assert found.shape == (4, 2, 4)
    for i, count in enumerate(objects):
        for layer in range(2):
            table = torch.stack(
                [cost(scores[i, layer], boxes[i, layer], y[i, j]) for j in range(count)] or [torch.zeros(5)]
            )
            best = min(
                permutations(range(5), count), key=lambda rows: sum(table[j, q].item() for j, q in enumerate(rows))
            )
            assert found[i, layer].tolist() == [*best, *[-1] * (4 - count)]


def test_more_objects_than_queries_leave_the_dearest_without_one() -> None:
    scores, boxes, y = a_case(2, [4])
    table = torch.stack([cost(scores[0, 0], boxes[0, 0], y[0, j]) for j in range(4)])
    best = min(permutations(range(4), 2), key=lambda rows: sum(table[j, q].item() for q, j in enumerate(rows)))
    expected = [best.index(j) if j in best else -1 for j in range(4)]
    assert match(scores, boxes, y)[0, 0].tolist() == expected
    assert torch.isfinite(detr_loss(scores, boxes, y)).all()


def test_the_loss_by_hand() -> None:
    """Two queries, one object of class 1: the second lies better and gets it."""
    y = torch.tensor([[[1.0, 0.2, 0.2, 0.6, 0.6], [-1, 0, 0, 0, 0]]])
    boxes = torch.tensor([[[[0.9, 0.9, 0.2, 0.2], [0.5, 0.4, 0.4, 0.4]]]])  # the object's centre is 0.4, 0.4
    chances = torch.tensor([[[[0.2, 0.3, 0.5], [0.1, 0.6, 0.3]]]])
    classes = -(math.log(0.6) + 0.1 * math.log(0.5)) / 1.1
    overlap = 0.3 * 0.4 / (0.32 - 0.12)
    hull = 0.5 * 0.4  # nothing of it is uncovered
    by_hand = classes + 5 * 0.1 + 2 * (1 - (overlap - (hull - 0.2) / hull))
    assert detr_loss(chances.log(), boxes, y).item() == pytest.approx(by_hand, abs=1e-5)


def test_the_boxes_errors_are_divided_by_the_images_own_number() -> None:
    scores, boxes, y = a_case(6, [3, 1, 0], seed=4)
    loss = detr_loss(scores, boxes, y, distance=5.0, overlap=2.0, nothing=0.2)
    for i, count in enumerate((3, 1, 0)):
        found = match(scores[i : i + 1], boxes[i : i + 1], y[i : i + 1])[0, 0].tolist()
        wanted, weight = torch.full((6,), 3), torch.full((6,), 0.2)
        own = 0.0
        for j in range(count):
            wanted[found[j]], weight[found[j]] = int(y[i, j, 0]), 1.0
            box = boxes[i, 0, found[j]]
            own += 5 * (box - to_centres(y[i, j, 1:])).abs().sum().item() / count
            own += 2 * (1 - generalized_iou(to_corners(box), y[i, j, 1:]).item()) / count
        classes = (weight * nn.functional.cross_entropy(scores[i, 0], wanted, reduction="none")).sum() / weight.sum()
        assert loss[i].item() == pytest.approx(classes.item() + own, abs=1e-5)


def test_every_decoder_layer_has_a_loss_and_a_matching_of_its_own() -> None:
    scores, boxes, y = a_case(5, [3, 2], layers=3)
    each = [detr_loss(scores[:, i : i + 1], boxes[:, i : i + 1], y) for i in range(3)]
    torch.testing.assert_close(detr_loss(scores, boxes, y), torch.stack(each).sum(0))
    x = torch.randn(2, 3, 64, 64)
    all_layers, last = (build(decoder=3, auxiliary=a).eval().ask(x) for a in (True, False))
    assert all_layers[0].shape == (2, 3, 40, 3)
    for several, one in zip(all_layers, last, strict=True):
        assert torch.equal(several[:, -1:], one)


def test_an_image_without_objects_learns_that_there_is_nothing() -> None:
    scores, boxes, y = a_case(4, [0, 0])
    assert y.shape[1] == 0
    loss = detr_loss(scores, boxes.requires_grad_(), y)
    torch.testing.assert_close(loss, -scores.log_softmax(-1)[..., -1].mean(dim=(1, 2)))
    padding = torch.tensor([-1.0, 0, 0, 0, 0]).expand(2, 3, 5)
    assert torch.equal(loss, detr_loss(scores, boxes, padding))
    loss.sum().backward()
    assert boxes.grad is not None
    assert not boxes.grad.any()


def test_numbers_that_are_none_give_a_loss_that_is_none() -> None:
    scores, boxes, y = a_case(4, [2, 2])
    scores[0] = torch.nan
    loss = detr_loss(scores, boxes, y)
    assert loss.isnan().tolist() == [True, False]


def test_perfect_queries_come_back_as_the_boxes() -> None:
    _, _, y = a_case(5, [5])
    order = torch.tensor([3, 0, 4, 1, 2])
    scores = torch.full((1, 1, 8, 4), -100.0)
    scores[..., 3] = 0.0  # three queries say that there is nothing
    scores[0, 0, range(5), y[0, order, 0].long()] = 100.0
    boxes = torch.cat([to_centres(y[:, order, 1:]), torch.rand(1, 3, 4)], dim=1)[:, None]
    assert match(scores, boxes, y)[0, 0].tolist() == order.argsort().tolist()
    assert detr_loss(scores, boxes, y).item() == pytest.approx(0.0, abs=1e-5)
    found = detections(scores[:, 0], boxes[:, 0])[0]
    assert found.shape == (8, 6)
    torch.testing.assert_close(found[:5, :5], y[0, order], atol=1e-6, rtol=0.0)
    torch.testing.assert_close(iou(found[:5, 1:5], y[0, order, 1:]), torch.ones(5), atol=1e-4, rtol=0.0)
    assert (found[:5, 5] == 1).all()
    assert (found[5:, 5] < 1e-30).all()


SMALL = configure("detr", {"width": 16, "heads": 4, "mlp": 24})[1]


def attention_weights(theirs: nn.MultiheadAttention, prefix: str = "") -> dict[str, Tensor]:
    """The weights of torch's attention under our keys, as the authors' file is to be cut."""
    own = {"out_proj.weight": theirs.out_proj.weight, "out_proj.bias": theirs.out_proj.bias}
    for kind in ("weight", "bias"):
        parts = getattr(theirs, f"in_proj_{kind}").chunk(3)
        own |= {f"{name}_proj.{kind}": part for name, part in zip("qkv", parts, strict=True)}
    return {prefix + key: value.detach() for key, value in own.items()}


def layer_weights(theirs: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights of one of torch's transformer layers under our keys."""
    found = {k: v for k, v in theirs.state_dict().items() if not any(k.startswith(f"{name}.") for name in names)}
    for name in names:
        attention = theirs.get_submodule(name)
        assert isinstance(attention, nn.MultiheadAttention)
        found |= attention_weights(attention, f"{name}.")
    return found


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def test_attention_is_torchs() -> None:
    theirs = randomised(nn.MultiheadAttention(16, 4, batch_first=True))
    assert isinstance(theirs, nn.MultiheadAttention)
    ours = Attention(16, 4, 0.0)
    ours.load_state_dict(attention_weights(theirs))
    query, key, value = torch.randn(2, 3, 16), torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(query, key, value), theirs(query, key, value)[0], atol=1e-5, rtol=1e-5)


def test_without_positions_the_layers_are_torchs() -> None:
    assert isinstance(SMALL, DETRSettings)
    tokens, queries, nowhere = torch.randn(2, 7, 16), torch.randn(2, 5, 16), torch.zeros(1, 1, 16)
    encoder = randomised(nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True))
    ours = EncoderLayer(SMALL)
    ours.load_state_dict(layer_weights(encoder, ("self_attn",)))
    torch.testing.assert_close(ours(tokens, nowhere), encoder(tokens), atol=1e-5, rtol=1e-5)
    decoder = randomised(nn.TransformerDecoderLayer(16, 4, 24, dropout=0.0, batch_first=True))
    own = DecoderLayer(SMALL)
    own.load_state_dict(layer_weights(decoder, ("self_attn", "multihead_attn")))
    result = own(queries, nowhere, tokens, nowhere)
    torch.testing.assert_close(result, decoder(queries, tokens), atol=1e-5, rtol=1e-5)


def test_positions_are_compared_and_not_passed_on() -> None:
    """With one key to look at, attention gives its value, wherever everything lies."""
    assert isinstance(SMALL, DETRSettings)
    own = DecoderLayer(SMALL)
    x, image = torch.randn(2, 1, 16), torch.randn(2, 1, 16)
    here, there = (own(x, torch.randn(2, 1, 16), image, torch.randn(1, 1, 16)) for _ in range(2))
    torch.testing.assert_close(here, there)


def test_positions_are_sines_and_cosines_of_y_then_x() -> None:
    code = sines(torch.tensor([0.25, 0.125]), 8, 1.0, 10000.0)
    waves = (2 * math.pi, 2 * math.pi / 100)  # 100 = 10000^(1/2)
    expected = [f(wave * place) for place in (0.125, 0.25) for wave in waves for f in (math.sin, math.cos)]
    torch.testing.assert_close(code, torch.tensor(expected))


def test_anchors_are_spread_evenly() -> None:
    points = even_points(40)
    assert ((points > 0) & (points < 1)).all()
    quarters = (points * 2).long() @ torch.tensor([1, 2])
    assert torch.bincount(quarters).tolist() == pytest.approx([10] * 4, abs=2)
    apart = torch.cdist(points, points) + torch.eye(40)
    assert apart.min() > 0.5 / 40**0.5


@pytest.mark.parametrize(
    ("size", "shape", "outputs", "count", "trained"),
    [
        ("r50", (3, 800, 1066), 91, 41_524_768, 41_302_368),  # the authors' log says n_parameters 41302368
        ("r50-dc5", (3, 800, 1066), 91, 41_524_768, 41_302_368),
        ("r101", (3, 800, 1066), 91, 60_464_672, 60_242_272),  # 60M in Table 1
        ("tiny", (3, 120, 160), 20, 464_297, 457_273),
    ],
)
def test_parameter_counts(size: str, shape: tuple[int, ...], outputs: int, count: int, trained: int) -> None:
    with torch.device("meta"):
        net = build(shape, outputs, size=size)
    fixed = ("backbone.conv1.", "backbone.layer1.")  # which the authors do not train
    assert sum(p.numel() for p in net.parameters()) == count
    assert sum(p.numel() for n, p in net.named_parameters() if not n.startswith(fixed)) == trained


@pytest.mark.parametrize(("size", "step"), [("r50", 32), ("r50-dc5", 16)])
def test_paper_sizes_run(size: str, step: int) -> None:
    with torch.device("meta"):
        net = build((3, 64, 96), 91, size=size)
        scores, boxes = net.ask(torch.empty(2, 3, 64, 96))
        assert net.backbone(torch.empty(2, 3, 64, 96))[-1].shape == (2, 2048, 64 // step, 96 // step)
    assert (scores.shape, boxes.shape) == ((2, 6, 100, 92), (2, 6, 100, 4))


def test_published_names_are_ours() -> None:
    """Hugging Face's and the authors' names of the same layers; the authors' attention apart, which is to be cut."""
    body = [k for k in torchvision.models.resnet50().state_dict() if not k.startswith("fc.") and "tracked" not in k]
    attention = [f"{p}_proj" for p in ("q", "k", "v", "out")]
    theirs = [f"model.backbone.conv_encoder.model.{k}" for k in body]
    layers = ["class_labels_classifier", "model.input_projection", "model.decoder.layernorm"]
    layers += [f"bbox_predictor.layers.{i}" for i in range(3)]
    for i in range(6):
        encoder, decoder = f"model.encoder.layers.{i}", f"model.decoder.layers.{i}"
        layers += [f"{part}.self_attn.{p}" for part in (encoder, decoder) for p in attention]
        layers += [f"{decoder}.encoder_attn.{p}" for p in attention] + [f"{decoder}.encoder_attn_layer_norm"]
        for part in (encoder, decoder):
            layers += [f"{part}.{name}" for name in ("self_attn_layer_norm", "final_layer_norm", "fc1", "fc2")]
    theirs += [f"{name}.{kind}" for name in layers for kind in ("weight", "bias")]
    theirs += ["model.query_position_embeddings.weight"]
    with torch.device("meta"):
        ours = build(outputs=91, size="r50").state_dict()
    assert {renamed(k) for k in theirs} == set(ours)
    assert len(theirs) == len(ours)
    for name in (
        "backbone.0.body.layer3.5.bn2.running_mean", "input_proj.weight", "query_embed.weight", "class_embed.bias",
        "bbox_embed.layers.2.weight", "transformer.encoder.layers.5.norm2.bias", "transformer.decoder.norm.weight",
        "transformer.decoder.layers.0.linear1.weight", "transformer.decoder.layers.3.multihead_attn.out_proj.bias",
    ):  # fmt: skip
        assert renamed(name) in ours


def renamed(key: str) -> str:
    for pattern, replacement in models["detr"].renames:
        key = re.sub(pattern, replacement, key)
    return key


def test_per_sample_gradients_equal_a_loop_and_samples_do_not_mix() -> None:
    net, (x, y) = build().double().train(), drawn(4)
    x, y = x.double(), y.double()
    y[2, :, 0] = -1  # nothing there
    weights = {k: v.detach() for k, v in net.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs: Tensor = functional_call(net, weights, (x[None], y[None]))["loss"][0]
        return outputs

    assert "vmap" in models["detr"].per_sample_gradients
    stacked = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    for i in range(4):
        net.zero_grad()
        alone = net(x[i : i + 1], y[i : i + 1])["loss"]
        alone.sum().backward()
        torch.testing.assert_close(net(x, y)["loss"][i], alone[0])
        for key, parameter in net.named_parameters():
            assert parameter.grad is not None, key
            torch.testing.assert_close(stacked[key][i], parameter.grad, atol=1e-10, rtol=1e-8, msg=key)


def test_models_of_several_clients_may_be_stacked() -> None:
    nets, (x, y) = [build().train() for _ in range(2)], drawn(2)
    with torch.no_grad():
        for parameter in nets[1].parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    stacked = {
        k: torch.stack([dict(net.named_parameters())[k].detach() for net in nets])
        for k, _ in nets[0].named_parameters()
    }
    found = vmap(lambda weights: functional_call(nets[0], weights, (x, y))["loss"])(stacked)
    torch.testing.assert_close(found, torch.stack([net(x, y)["loss"] for net in nets]), atol=1e-4, rtol=1e-4)


def test_tiny_learns_drawn_images() -> None:
    net, (x, y) = build(), drawn()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(120):
        loss = net.train()(x, y)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        found = net.eval()(x, y)["found"]
    assert losses[-1] < 0.3 * losses[0]
    assert map50(found, y) >= 0.9
    assert found.shape == (8, 40, 6)
    assert (found[:, :-1, 5] >= found[:, 1:, 5]).all()  # best first


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"heads": 5}, "width 64 should be a multiple of heads 5"),
        ({"width": 30}, "'width' should be a multiple of 4, not 30"),
    ],
)
def test_wrong_settings_get_one_clear_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**keys)
