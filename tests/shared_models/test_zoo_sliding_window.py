"""Sliding windows: which windows there are, that each is seen by itself, the balanced loss, and that it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import roi_align

from shared_models.boxes import iou, pairwise_iou, to_corners
from shared_models.errors import ConfigError
from shared_models.models import configure, models
from shared_models.zoo.sliding_window import SlidingWindow, SlidingWindowSettings, balanced, slide


def build(shape: tuple[int, ...] = (3, 64, 64), outputs: int = 2, **keys: Any) -> SlidingWindow:
    torch.manual_seed(0)
    chosen, settings = configure("sliding-window", keys)
    net = chosen.build(settings, shape, outputs)
    assert isinstance(net, SlidingWindow)
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


COARSE: dict[str, Any] = {"scales": (0.3, 0.6), "step": 0.5}


def test_windows_stand_evenly_from_edge_to_edge() -> None:
    found = slide((0.5,), (1.0,), 0.5, 40, 60)  # 20x20 pixels, at 0, 10, 20 down and 0, 10, ..., 40 right
    assert found.shape == (15, 4)
    pixels = found * torch.tensor([60, 40, 60, 40])
    expected = [[x, y, x + 20, y + 20] for y in (0, 10, 20) for x in (0, 10, 20, 30, 40)]
    torch.testing.assert_close(pixels, torch.tensor(expected, dtype=torch.float32))


def test_a_step_is_never_longer_than_asked_and_a_ratio_keeps_the_area() -> None:
    found = slide((0.4,), (4.0,), 0.3, 50, 100)  # a square of 20 pixels, drawn out to 40x10
    pixels = found * torch.tensor([100, 50, 100, 50])
    torch.testing.assert_close(pixels[:, 2:] - pixels[:, :2], torch.tensor([40.0, 10.0]).expand(len(found), 2))
    for column, side, end in ((0, 40, 60), (1, 10, 40)):
        starts = pixels[:, column].unique()
        assert starts[0] == 0
        assert starts[-1].item() == pytest.approx(end, abs=1e-4)
        assert starts.diff().max() <= 0.3 * side + 1e-4


def test_a_window_larger_than_the_image_is_the_image() -> None:
    found = slide((1.0,), (1.0, 16.0), 0.5, 32, 32)  # the second would be four times as wide
    assert found[0].tolist() == [0, 0, 1, 1]
    assert found[1:, 0].unique().tolist() == [0]
    assert found[1:, 2].unique().tolist() == [1]


def test_tiny_windows_cover_every_square() -> None:
    settings = configure("sliding-window", {})[1]
    assert isinstance(settings, SlidingWindowSettings)
    windows = slide(settings.scales, settings.ratios, settings.step, 120, 160)
    assert len(windows) == 1985
    assert ((windows >= 0) & (windows <= 1)).all()
    source = torch.Generator().manual_seed(0)
    side = (0.08 + 0.72 * torch.rand(500, 1, generator=source)) * torch.tensor([0.75, 1.0])
    centre = side / 2 + torch.rand(500, 2, generator=source) * (1 - side)
    squares = to_corners(torch.cat([centre, side], dim=1))
    assert pairwise_iou(squares, windows).amax(dim=1).min() >= 0.5


def test_each_window_is_cut_warped_and_classified_by_itself() -> None:
    net = build((3, 48, 64), **COARSE).eval()
    x, regions = torch.randn(2, 3, 48, 64), net.windows[::7].expand(2, -1, -1)
    with torch.no_grad():
        scores = net.classify(x, regions)
        pixels = [boxes * torch.tensor([64, 48, 64, 48]) for boxes in regions]
        cut = roi_align(x, pixels, 16, sampling_ratio=2, aligned=True)
        alone = torch.cat([net.head(net.hidden(net.features(window[None]))) for window in cut])
        torch.testing.assert_close(scores.flatten(0, 1), alone, atol=1e-5, rtol=1e-4)
        changed = x.clone()
        left = int(pixels[0][0, 2]) + 1  # right of the first window
        changed[..., left:] = 9.0
        other = net.classify(changed, regions)
    assert torch.equal(other[:, 0], scores[:, 0])
    assert not torch.equal(other[:, -1], scores[:, -1])


def test_the_loss_is_the_mean_over_objects_plus_the_mean_over_background() -> None:
    chances = torch.tensor([[[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.6, 0.3, 0.1]]]).expand(3, 4, 3)
    labels = torch.tensor([[0, 0, 2, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    weights = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]])
    loss = balanced(chances.log(), labels, weights)
    first = -torch.tensor([0.8, 0.3]).log().mean() - torch.tensor([0.7, 0.5]).log().mean()
    second = -torch.tensor([0.7, 0.5, 0.1]).log().mean()
    torch.testing.assert_close(loss, torch.stack([first, second, torch.tensor(0.0)]))


def test_the_best_window_comes_back_with_score_1(monkeypatch: pytest.MonkeyPatch) -> None:
    net = build(**COARSE).eval()
    box = net.windows[5]

    def by_overlap(self: SlidingWindow, x: Tensor, regions: Tensor) -> Tensor:
        overlap = iou(regions, box)
        return torch.stack([torch.zeros_like(overlap), torch.full_like(overlap, -99), 40 * overlap - 22], dim=2)

    monkeypatch.setattr(SlidingWindow, "classify", by_overlap)
    outputs = net(torch.zeros(1, 3, 64, 64), torch.tensor([[[1.0, *box.tolist()]]]))
    kept = outputs["found"][0]
    assert kept.shape == (100, 6)
    torch.testing.assert_close(kept[0], torch.tensor([1.0, *box.tolist(), 1.0]))
    overlaps = iou(kept[1:, 1:5], box)[kept[1:, 0] >= 0]
    assert (overlaps <= 0.3).all()  # duplicates are gone
    assert outputs["loss"].item() == pytest.approx(0.0, abs=1e-3)


def test_images_without_objects_and_no_images() -> None:
    net, x = build(**COARSE), torch.randn(2, 3, 64, 64)
    padding = torch.tensor([-1.0, 0, 0, 0, 0]).expand(2, 3, 5)
    for training in (True, False):
        outputs = net.train(training)(x, torch.zeros(2, 0, 5))
        assert torch.isfinite(outputs["loss"]).all()
        assert (outputs["loss"] > 0).all()
        assert torch.isfinite(net(x, padding)["loss"]).all()
    assert net(x[:0], padding[:0])["found"].shape == (0, 100, 6)


def test_in_evaluation_the_loss_repeats_and_in_training_windows_are_drawn() -> None:
    net, (x, y) = build(**COARSE, windows=8), drawn(3)
    assert torch.equal(net.eval()(x, y)["loss"], net(x, y)["loss"])
    assert not torch.equal(net.train()(x, y)["loss"], net(x, y)["loss"])


def test_a_draw_does_not_depend_on_what_the_others_hold() -> None:
    net, (x, y) = build(**COARSE).train(), drawn(4)
    others = torch.cat([x[:1], torch.randn(3, 3, 64, 64)]), torch.cat([y[:1], y[[2, 2, 3]]])
    found = []
    for batch in ((x, y), others):
        torch.manual_seed(5)
        found.append(net(*batch)["loss"])
    torch.testing.assert_close(found[0][0], found[1][0])
    assert not torch.isclose(found[0][1:], found[1][1:]).any()


def test_per_sample_gradients_under_one_seed_equal_a_loop() -> None:
    net, (x, y) = build(**COARSE, windows=16).double().train(), drawn(4)
    x, y = x.double(), y.double()
    y[2, :, 0] = -1  # nothing there
    weights = {k: v.detach() for k, v in net.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs: Tensor = functional_call(net, weights, (x[None], y[None]))["loss"][0]
        return outputs

    assert models["sliding-window"].per_sample_gradients == ("vmap", "loop")
    torch.manual_seed(7)
    stacked = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")(weights, x, y)
    for i in range(4):
        net.zero_grad()
        torch.manual_seed(7)
        net(x, y)["loss"][i].backward()
        for key, parameter in net.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.any(), key
            torch.testing.assert_close(stacked[key][i], parameter.grad, atol=1e-10, rtol=1e-8, msg=key)


def test_parameter_count() -> None:
    by_hand = sum(9 * a * b + 3 * b for a, b in ((3, 16), (16, 32), (32, 64)))  # a bias and two of the norm a channel
    by_hand += 64 * 2 * 2 * 64 + 64 + 64 * 21 + 21
    assert sum(p.numel() for p in build(outputs=20).parameters()) == by_hand


def test_the_windows_are_no_part_of_the_state() -> None:
    assert not [k for k in build().state_dict() if "windows" in k]


def test_tiny_learns_drawn_images() -> None:
    net, (x, y) = build(windows=48), drawn()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = net.train()(x, y)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        found = net.eval()(x, y)["found"]
    assert losses[-1] < 0.2 * losses[0]
    assert map50(found, y) >= 0.5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"background": 0.6}, "background 0.6 should be at most foreground 0.5"),
        ({"side": 7}, "side 7 should be at least 8 for that many convolutions"),
        ({"scales": (0.5, 1.5)}, "'scales.1' should be less than or equal to 1"),
        ({"ratios": ()}, "'ratios'"),
    ],
)
def test_wrong_settings_get_one_clear_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**keys)
