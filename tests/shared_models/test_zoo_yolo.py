"""YOLO: the paper's loss by hand, the code of a grid there and back, its size, and that it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torchmetrics.detection import MeanAveragePrecision

from shared_models.boxes import iou
from shared_models.errors import ConfigError
from shared_models.models import configure, models
from shared_models.zoo.yolo import YOLO, decode, encode, yolo_loss


def build(shape: tuple[int, ...] = (3, 64, 64), outputs: int = 2, **keys: Any) -> YOLO:
    torch.manual_seed(0)
    chosen, settings = configure("yolo", keys)
    net = chosen.build(settings, shape, outputs)
    assert isinstance(net, YOLO)
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


TRUTH = torch.tensor([[[1.0, 0.125, 0.625, 0.375, 0.875]]])  # a square of a quarter, in the middle of the third cell


@pytest.mark.parametrize(
    ("first", "off", "overlap"),
    [
        ((0.5, 0.5, 0.5, 0.5), 0.0, 1.0),
        ((0.5, 0.7, 0.5, 0.5), 0.2**2, 3 / 7),  # 0.1 of the image too low: 0.15 * 0.25 of 2 * 0.25^2 - that
        ((0.5, 0.5, 0.6, 0.5), 0.1**2, 25 / 36),  # 0.36 wide instead of 0.25
    ],
)
def test_the_loss_is_equation_3(first: tuple[float, ...], off: float, overlap: float) -> None:
    boxes, classes = torch.zeros(1, 4, 2, 5), torch.rand(1, 4, 2)
    boxes[0, 2, 0] = torch.tensor([*first, 0.9])
    boxes[0, 2, 1] = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.4])  # overlaps less: not responsible
    classes[0, 2] = torch.tensor([0.3, 0.6])
    boxes[0, 0, :, 4] = torch.tensor([0.2, 0.1])
    boxes[0, 3, :, 4] = torch.tensor([0.0, 0.6])
    by_hand = 5 * off + (0.9 - overlap) ** 2 + 0.5 * 0.4**2  # the cell's two boxes
    by_hand += 0.3**2 + 0.4**2  # its classes; those of empty cells do not count
    by_hand += 0.5 * (0.2**2 + 0.1**2 + 0.6**2)  # the confidences of empty cells
    assert yolo_loss(boxes, classes, TRUTH, (2, 2)).item() == pytest.approx(by_hand, abs=1e-6)


def test_the_weights_of_the_loss() -> None:
    boxes = torch.zeros(1, 4, 1, 5)
    boxes[0, :, 0] = torch.tensor([0.5, 0.7, 0.5, 0.5, 0.5])
    loss = yolo_loss(boxes, torch.tensor([0.0, 1.0]).expand(1, 4, 2), TRUTH, (2, 2), coordinates=7.0, nothing=0.25)
    assert loss.item() == pytest.approx(7 * 0.04 + (0.5 - 3 / 7) ** 2 + 0.25 * 3 * 0.25, abs=1e-6)


def test_what_the_grid_says_comes_back() -> None:
    net = build((3, 64, 96), outputs=3, boxes=1, overlap=0.9)
    source = torch.Generator().manual_seed(3)
    cells = torch.stack([torch.randperm(12, generator=source)[:6], torch.randperm(8, generator=source)[:6]], 1)
    centre = (cells + torch.rand(6, 2, generator=source)) / torch.tensor([12, 8])
    size = 2 * torch.minimum(centre, 1 - centre) * torch.rand(6, 2, generator=source)
    y = torch.cat([torch.tensor([[0.0], [1], [2], [0], [1], [2]]), centre - size / 2, centre + size / 2], dim=1)[None]
    labels, boxes = encode(y, net.grid)
    assert net.grid == (8, 12)
    assert int((labels >= 0).sum()) == 6
    certain = torch.cat([boxes, (labels >= 0)[..., None]], dim=2)[:, :, None]
    found = net.found(certain, nn.functional.one_hot(labels.clamp(min=0), 3).float())
    assert found.shape == (1, 100, 6)
    assert (found[0, 6:, 0] == -1).all()
    kept = found[0, :6]
    place = (kept[:, None, :5] - y[0, None]).abs().sum(2).argmin(1)
    assert sorted(place.tolist()) == list(range(6))
    torch.testing.assert_close(kept[:, :5], y[0, place], atol=1e-6, rtol=0.0)
    torch.testing.assert_close(iou(kept[:, 1:5], y[0, place, 1:]), torch.ones(6), atol=1e-4, rtol=0.0)
    assert (kept[:, 5] == 1).all()


def test_of_two_centres_in_one_cell_the_larger_is_learned() -> None:
    small, large = [0.0, 0.4, 0.4, 0.44, 0.44], [1.0, 0.2, 0.2, 0.6, 0.6]
    other = [0.0, 0.8, 0.0, 1.0, 0.2]
    for rows in ([small, large, other], [large, small, other]):
        labels, boxes = encode(torch.tensor([rows]), (2, 2))
        assert labels.tolist() == [[1, 0, -1, -1]]
        torch.testing.assert_close(decode(boxes[:, :, None], (2, 2))[0, 0, 0], torch.tensor(large[1:]))


def test_a_centre_on_the_far_edge_belongs_to_the_last_cell() -> None:
    labels, boxes = encode(torch.tensor([[[1.0, 1.0, 0.5, 1.0, 1.0]]]), (2, 3))
    assert labels.tolist() == [[-1, -1, -1, -1, -1, 1]]
    torch.testing.assert_close(boxes[0, 5], torch.tensor([1.0, 0.5, 0.0, 0.5**0.5]))


def test_an_image_without_objects_only_lowers_confidences() -> None:
    boxes, classes = torch.rand(2, 4, 2, 5), torch.rand(2, 4, 3)
    padding = torch.tensor([-1.0, 0, 0, 0, 0]).expand(2, 3, 5)
    loss = yolo_loss(boxes, classes, torch.zeros(2, 0, 5), (2, 2))
    torch.testing.assert_close(loss, 0.5 * boxes[..., 4].square().sum(dim=(1, 2)))
    assert torch.equal(loss, yolo_loss(boxes, classes, padding, (2, 2)))


def test_paper_size_is_figure_3() -> None:
    convolutions = [(7, 3, 64), (3, 64, 192), (1, 192, 128), (3, 128, 256), (1, 256, 256), (3, 256, 512)]
    convolutions += 4 * [(1, 512, 256), (3, 256, 512)] + [(1, 512, 512), (3, 512, 1024)]
    convolutions += 2 * [(1, 1024, 512), (3, 512, 1024)] + 4 * [(3, 1024, 1024)]
    assert len(convolutions) == 24
    by_hand = sum(k * k * before * after + after for k, before, after in convolutions)
    by_hand += 7 * 7 * 1024 * 4096 + 4096 + 4096 * 7 * 7 * 30 + 7 * 7 * 30
    assert by_hand == 271_703_550
    with torch.device("meta"):
        net = build((3, 448, 448), 20, size="paper").train()
        assert sum(p.numel() for p in net.parameters()) == by_hand
        boxes, classes = net.cells(torch.empty(2, 3, 448, 448))
        assert net(torch.empty(2, 3, 448, 448), torch.empty(2, 3, 5))["loss"].shape == (2,)
    assert net.grid == (7, 7)
    assert (boxes.shape, classes.shape) == ((2, 49, 2, 5), (2, 49, 20))


def test_tiny_size() -> None:
    widths = [(3, 16), (16, 32), (32, 64), (64, 64), (64, 64), (64, 64)]
    by_hand = sum(9 * a * b + 3 * b for a, b in widths) + 64 * 30 + 30  # a bias and two numbers of the norm a channel
    assert sum(p.numel() for p in build((3, 120, 160), 20).parameters()) == by_hand


def test_fully_connected_outputs_belong_to_their_cells() -> None:
    net = build((1, 16, 24), layers="3x3x4-s-2 maxpool", norm="none", hidden=6, ends="linear").eval()
    assert net.grid == (4, 6)
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.copy_(torch.arange(24).repeat_interleave(12))
        boxes, classes = net.cells(torch.randn(2, 1, 16, 24))
    assert torch.equal(boxes, torch.arange(24.0)[:, None, None].expand(2, 24, 2, 5))
    assert torch.equal(classes, torch.arange(24.0)[:, None].expand(2, 24, 2))


def test_per_sample_gradients_equal_a_loop_and_samples_do_not_mix() -> None:
    net, (x, y) = build().double().train(), drawn(4)
    x, y = x.double(), y.double()
    y[2, :, 0] = -1  # nothing there
    weights = {k: v.detach() for k, v in net.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs: Tensor = functional_call(net, weights, (x[None], y[None]))["loss"][0]
        return outputs

    assert "vmap" in models["yolo"].per_sample_gradients
    stacked = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    for i in range(4):
        net.zero_grad()
        alone = net(x[i : i + 1], y[i : i + 1])["loss"]
        alone.sum().backward()
        torch.testing.assert_close(net(x, y)["loss"][i], alone[0])
        for key, parameter in net.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.any(), key
            torch.testing.assert_close(stacked[key][i], parameter.grad, atol=1e-10, rtol=1e-8, msg=key)


def test_tiny_learns_drawn_images() -> None:
    net, (x, y) = build(), drawn()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        loss = net.train()(x, y)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        found = net.eval()(x, y)["found"]
    assert losses[-1] < 0.1 * losses[0]
    assert map50(found, y) >= 0.9
    assert (found[:, :-1, 5] >= found[:, 1:, 5]).all()  # best first


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layers": "3x3x8 5x3x8"}, "'5x3x8' is neither 'maxpool' nor a layer like '3x3x64' or '3x3x64-s-2' of odd"),
        ({"layers": "2x2x8"}, "'2x2x8' is neither"),
        ({"layers": "maxpool"}, "should have a convolution"),
        ({"boxes": 0}, "'boxes' should be greater than 0"),
    ],
)
def test_wrong_settings_get_one_clear_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**keys)


def test_an_image_that_does_not_fit_the_cells() -> None:
    with pytest.raises(ConfigError, match="cannot cut an image of 60x64 pixels into cells of 8x8"):
        build((3, 60, 64))
