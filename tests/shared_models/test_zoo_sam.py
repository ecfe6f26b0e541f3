"""Segment Anything against its published form, and promptable segmentation against numbers computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from shared_models.errors import ConfigError
from shared_models.models import configure
from shared_models.promptable import HIGH_CORNER, INSIDE, LOW_CORNER, OUTSIDE, PADDING
from shared_models.prompts import by_point, choose
from shared_models.sam_decoder import CrossAttention, FourierPositions
from shared_models.tasks.base import IGNORED, Batch, Task, tasks
from shared_models.tasks.promptable import best, overlaps
from shared_models.validation import validate
from shared_models.zoo.sam import GridAttention, WindowBlock

LABELS = ("background", "cell", "nucleus")


def sam(shape: tuple[int, ...] = (1, 32, 32), *, seed: int = 0, **keys: Any) -> Any:
    torch.manual_seed(seed)
    chosen, settings = configure("sam", keys)
    return chosen.build(settings, shape, 3)


def promptable(**keys: Any) -> Any:
    declared = tasks["promptable"]
    return declared(validate(declared.Settings, {"labels": LABELS, **keys}, "[task]"))


def drawn(count: int = 8, shape: tuple[int, ...] = (1, 32, 32), seed: int = 0, task: Task | None = None) -> Batch:
    return (task or promptable()).draw(shape, count, torch.Generator().manual_seed(seed))


def some_prompts(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A point of each kind, a box and padding."""
    points = torch.rand(count, 5, 2, generator=torch.Generator().manual_seed(seed))
    return points, torch.tensor([INSIDE, OUTSIDE, LOW_CORNER, HIGH_CORNER, PADDING]).expand(count, -1)


# ---- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "shape", "count", "entries"),
    [
        ("b", (3, 1024, 1024), 93_735_472, 314),
        ("l", (3, 1024, 1024), 312_342_832, 482),
        ("h", (3, 1024, 1024), 641_090_608, 594),
        ("tiny", (3, 64, 64), 836_192, 188),
    ],
)
def test_parameter_counts(size: str, shape: tuple[int, ...], count: int, entries: int) -> None:
    with torch.device("meta"):
        net = sam(shape, size=size)
    assert sum(p.numel() for p in net.parameters()) == count
    assert len(net.state_dict()) == entries


def published_keys(layers: int) -> list[str]:
    """The keys of `sam_vit_b_01ec64.pth` (12 layers) and its larger sisters, in order."""

    def both(*names: str) -> list[str]:
        return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]

    def attention(name: str) -> list[str]:
        return both(*(f"{name}.{part}_proj" for part in ("q", "k", "v", "out")))

    keys = ["image_encoder.pos_embed", *both("image_encoder.patch_embed.proj")]
    for i in range(layers):
        block = f"image_encoder.blocks.{i}"
        keys += [*both(f"{block}.norm1"), f"{block}.attn.rel_pos_h", f"{block}.attn.rel_pos_w"]
        keys += both(*(f"{block}.{name}" for name in ("attn.qkv", "attn.proj", "norm2", "mlp.lin1", "mlp.lin2")))
    keys += ["image_encoder.neck.0.weight", *both("image_encoder.neck.1")]
    keys += ["image_encoder.neck.2.weight", *both("image_encoder.neck.3")]
    keys += ["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
    keys += [f"prompt_encoder.point_embeddings.{i}.weight" for i in range(4)]
    keys += ["prompt_encoder.not_a_point_embed.weight"]
    keys += both(*(f"prompt_encoder.mask_downscaling.{i}" for i in (0, 1, 3, 4, 6)))
    keys += ["prompt_encoder.no_mask_embed.weight"]
    for i in range(2):
        layer = f"mask_decoder.transformer.layers.{i}"
        keys += attention(f"{layer}.self_attn") + both(f"{layer}.norm1")
        keys += attention(f"{layer}.cross_attn_token_to_image") + both(f"{layer}.norm2")
        keys += both(*(f"{layer}.{name}" for name in ("mlp.lin1", "mlp.lin2", "norm3", "norm4")))
        keys += attention(f"{layer}.cross_attn_image_to_token")
    keys += attention("mask_decoder.transformer.final_attn_token_to_image")
    keys += both("mask_decoder.transformer.norm_final_attn")
    keys += ["mask_decoder.iou_token.weight", "mask_decoder.mask_tokens.weight"]
    keys += both(*(f"mask_decoder.output_upscaling.{i}" for i in (0, 1, 3)))
    keys += both(*(f"mask_decoder.output_hypernetworks_mlps.{i}.layers.{j}" for i in range(4) for j in range(3)))
    return keys + both(*(f"mask_decoder.iou_prediction_head.layers.{j}" for j in range(3)))


def test_keys_and_shapes_are_those_of_the_published_weights() -> None:
    with torch.device("meta"):
        net = sam((3, 1024, 1024), size="b")
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    assert list(shapes) == published_keys(12)
    expected = {
        "image_encoder.pos_embed": (1, 64, 64, 768),
        "image_encoder.blocks.0.attn.rel_pos_h": (27, 64),  # within windows of 14
        "image_encoder.blocks.2.attn.rel_pos_w": (127, 64),  # over the whole image
        "image_encoder.neck.2.weight": (256, 256, 3, 3),
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 128),
        "prompt_encoder.mask_downscaling.6.weight": (256, 16, 1, 1),
        "mask_decoder.transformer.layers.1.self_attn.q_proj.weight": (256, 256),
        "mask_decoder.transformer.layers.1.cross_attn_image_to_token.out_proj.weight": (256, 128),
        "mask_decoder.mask_tokens.weight": (4, 256),
        "mask_decoder.output_upscaling.3.weight": (64, 32, 2, 2),
        "mask_decoder.output_hypernetworks_mlps.3.layers.2.weight": (32, 256),
        "mask_decoder.iou_prediction_head.layers.2.bias": (4,),
    }
    assert {key: shapes[key] for key in expected} == expected
    buffers = [key for key, _ in net.named_buffers()]
    assert buffers == ["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]


@pytest.mark.parametrize(
    ("keys", "shape", "size"),
    [
        ({}, (1, 32, 32), (16, 16)),
        ({}, (3, 24, 40), (12, 20)),  # windows of 4 do not divide a grid of 3 x 5
        ({"patch": 16}, (3, 64, 32), (16, 8)),  # a quarter of each side, as in the paper
    ],
)
def test_masks_are_four_times_as_fine_as_patches(
    keys: dict[str, Any], shape: tuple[int, ...], size: tuple[int, int]
) -> None:
    net = sam(shape, **keys)
    points, labels = some_prompts(2)
    masks = net(torch.randn(2, *shape), points, labels)
    assert masks.logits.shape == (2, 3, *size)
    assert masks.scores.shape == (2, 3)
    image = net.encode(torch.randn(2, *shape))
    again = net.decode(image, points, labels, masks.logits[:, 0], single=True)
    assert again.logits.shape == (2, 1, *size)
    assert again.scores.shape == (2, 1)


@pytest.mark.parametrize(
    ("keys", "shape", "message"),
    [
        (
            {}, (1, 32, 36),
            "model 'sam' cannot cut an image of 32x36 pixels into patches of side 8. "
            "Set patch to one of 1, 2, 4, or the image size to a multiple of 8",
        ),
        ({"heads": 5}, (1, 32, 32), "[model] sam: width 64 should be a multiple of heads 5"),
        ({"decoder_heads": 3}, (1, 32, 32), "embedding 128 should be a multiple of twice the decoder_heads 3"),
        ({"embedding": 12}, (1, 32, 32), "'embedding' should be a multiple of 8, not 12"),
        ({"global_layers": [0, 3]}, (1, 32, 32), "global_layers names block 3, the last of 3 is 2"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(keys: dict[str, Any], shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        sam(shape, **keys)
    assert message in str(error.value)


def test_the_seed_of_torch_draws_everything() -> None:
    first, again, other = (sam(seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(first[k], again[k]) for k in first)
    matrix = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    assert not torch.equal(first[matrix], other[matrix])


def test_grid_attention_pair_by_pair() -> None:
    """Every score as its formula says, on a grid of 2 x 3."""
    torch.manual_seed(0)
    h, w, heads, d = 2, 3, 2, 4
    attention = GridAttention(heads * d, heads, (h, w)).double()
    nn.init.normal_(attention.rel_pos_h)
    nn.init.normal_(attention.rel_pos_w)
    x = torch.randn(1, h, w, heads * d, dtype=torch.float64)
    q, k, v = attention.qkv(x).reshape(h * w, 3, heads, d).unbind(1)  # (N, heads, d)
    out = torch.zeros(h * w, heads, d, dtype=torch.float64)
    for head in range(heads):
        for i in range(h * w):
            scores = [
                q[i, head] @ k[j, head] / math.sqrt(d)
                + q[i, head] @ attention.rel_pos_h[i // w - j // w + h - 1]
                + q[i, head] @ attention.rel_pos_w[i % w - j % w + w - 1]
                for j in range(h * w)
            ]
            out[i, head] = torch.stack(scores).softmax(0) @ v[:, head]
    torch.testing.assert_close(attention(x), attention.proj(out.reshape(1, h, w, heads * d)))


def test_one_window_is_the_whole_grid_and_more_do_not_see_each_other() -> None:
    _, settings = configure("sam", {})
    torch.manual_seed(0)
    within = WindowBlock(settings, (4, 4), 4).double()
    whole = WindowBlock(settings, (4, 4), 0).double()
    whole.load_state_dict(within.state_dict())
    x = torch.randn(1, 4, 4, settings.width, dtype=torch.float64)
    torch.testing.assert_close(within(x), whole(x))
    x = torch.randn(1, 6, 8, settings.width, dtype=torch.float64)  # filled up to 8 x 8: four windows
    other = torch.cat([torch.randn_like(x[:, :, :1]), x[:, :, 1:]], dim=2)  # column 0 changes
    moved = within(other) - within(x)
    assert moved[:, :, :4].abs().amin() > 0
    assert moved[:, :, 4:].abs().amax() == 0


def test_cross_attention_is_torchs() -> None:
    torch.manual_seed(0)
    ours, theirs = CrossAttention(16, 4, 1), nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.in_proj_weight.data = torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]).detach()
    theirs.in_proj_bias.data = torch.cat([ours.q_proj.bias, ours.k_proj.bias, ours.v_proj.bias]).detach()
    theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    query, key, value = torch.randn(2, 3, 16), torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(query, key, value), theirs(query, key, value)[0])


def test_fourier_positions_by_formula() -> None:
    places = FourierPositions(4)
    places.positional_encoding_gaussian_matrix = torch.tensor([[0.25, 0.0], [0.0, 0.5]])
    angles = [math.pi / 2 * 0.5, math.pi * -0.25]  # of x = 0.75 and y = 0.375, that is 0.5 and -0.25
    expected = torch.tensor([*(math.sin(a) for a in angles), *(math.cos(a) for a in angles)])
    torch.testing.assert_close(places(torch.tensor([0.75, 0.375])), expected)
    grid = places.grid(4, 2)
    assert grid.shape == (4, 4, 2)
    torch.testing.assert_close(grid[:, 1, 1], places(torch.tensor([1.5 / 2, 1.5 / 4])))


def test_padding_has_no_place_and_prompts_have_no_order() -> None:
    net = sam().eval()
    x, (points, labels) = torch.randn(2, 1, 32, 32), some_prompts(2)
    said = net(x, points, labels)
    moved = points.clone()
    moved[:, 4] = 0.9  # padding
    torch.testing.assert_close(net(x, moved, labels).logits, said.logits)
    order = torch.tensor([4, 2, 0, 3, 1])
    torch.testing.assert_close(net(x, points[:, order], labels[:, order]).logits, said.logits, rtol=1e-4, atol=1e-5)
    for i in range(4):  # every other point has its place, and its kind
        moved, other = points.clone(), labels.clone()
        moved[:, i], other[:, i] = 0.99, (labels[:, i] + 1) % 4
        assert (net(x, moved, labels).logits - said.logits).abs().amax() > 1e-4
        assert (net(x, points, other).logits - said.logits).abs().amax() > 1e-4


def test_per_sample_gradients_equal_a_loop_and_samples_do_not_mix() -> None:
    net = sam(embedding=32, decoder_heads=4).double()
    x, (points, labels) = torch.randn(3, 1, 32, 32).double(), some_prompts(3)
    points = points.double()
    weights = {k: v.detach() for k, v in net.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        masks = functional_call(net, weights, (x[None], points[None], labels[None]))
        return masks.logits.square().mean() + masks.scores.square().mean()

    stacked = vmap(grad(loss), in_dims=(None, 0, 0, 0))(weights, x, points, labels)
    together = net(x, points, labels)
    for i in range(3):
        alone = net(x[i : i + 1], points[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(alone.logits[0], together.logits[i])
        torch.testing.assert_close(alone.scores[0], together.scores[i])
        one = grad(loss)(weights, x[i], points[i], labels[i])
        for key in weights:
            torch.testing.assert_close(stacked[key][i], one[key], atol=1e-10, rtol=1e-8, msg=key)


# ---- both ------------------------------------------------------------------------------------------------------------


def test_it_learns_eight_images_and_obeys_the_prompt() -> None:
    """After some hundred steps it finds the largest object of each image, and the other one by a point on it."""
    task, net, batch = promptable(), sam(), drawn(8)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    values = {"iou": 0.0}
    for step in range(240):
        if step % 20 == 0 and step >= 80:
            net.eval()
            with torch.no_grad():
                values = task.values(task.sums(task.forward(net, batch), batch))
            if min(values[name] for name in task.metrics) > 0.9:
                break
        net.train()
        optimizer.zero_grad()
        task.loss(task.forward(net, batch), batch).mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    assert values["iou"] >= 0.85
    assert values["iou_point"] >= 0.8

    net.eval()
    masks = batch.y.numpy()
    left, right = masks.copy(), masks.copy()
    left[:, :, 16:], right[:, :, :16] = 0, 0
    found = []
    for half in (left, right):
        objects = [choose(mask, [1, 2], 1) for mask in half]
        prompts = [by_point(thing) for thing in objects]
        points = torch.stack([torch.from_numpy(p.points) for p in prompts]).float()
        with torch.no_grad():
            seen = best(net(batch.x, points, torch.tensor([p.labels for p in prompts])))
        target = torch.stack([torch.from_numpy(thing.pixels) for thing in objects])
        fine = F.interpolate(seen[:, None], (32, 32), mode="bilinear", align_corners=False)
        found.append(overlaps(fine, target, batch.y != IGNORED)[0].mean().item())
    assert min(found) > 0.75
