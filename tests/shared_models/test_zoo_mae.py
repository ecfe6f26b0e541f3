"""MAE: the paper's sizes, transformers' numbers, the authors' keys, and an encoder that is a ViT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from shared_models.errors import ConfigError
from shared_models.job_parts import WeightsPart
from shared_models.models import configure, models
from shared_models.weights import load_weights
from shared_models.zoo.mae import MAE, RENAMES, sine_cosine

SMALL = {"layers": 2, "width": 32, "mlp": 48, "heads": 4, "patch": 4, "decoder_width": 24, "decoder_layers": 2}


def build(shape: tuple[int, ...] = (3, 12, 12), name: str = "mae", **keys: Any) -> Any:
    torch.manual_seed(0)
    chosen, settings = configure(name, keys)
    return chosen.build(settings, shape, 10)


def orders(count: int, patches: int, seed: int = 1) -> Tensor:
    return torch.rand(count, patches, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)


# ---- sizes -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("size", "shape", "count"),
    [
        ("b16", (3, 224, 224), 111_907_840),  # as transformers' ViTMAEForPreTraining at its defaults
        ("l16", (3, 224, 224), 329_541_888),
        ("h14", (3, 224, 224), 657_074_508),
        ("tiny", (1, 8, 8), 117_572),
    ],
)
def test_parameter_counts(size: str, shape: tuple[int, ...], count: int) -> None:
    with torch.device("meta"):
        net = build(shape, size=size)
    assert sum(p.numel() for p in net.parameters()) == count


def test_transformers_counts_the_same() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        theirs, ours = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig()), build((3, 224, 224), size="b16")
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())


# ---- transformers ----------------------------------------------------------------------------------------------------
def of_transformers(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their weights under the authors' keys, queries, keys and values in one, which `RENAMES` then turns into ours."""
    found = {}
    for key, value in theirs.items():
        for old, new in (
            ("vit.embeddings.cls_token", "cls_token"), ("vit.embeddings.position_embeddings", "pos_embed"),
            ("vit.embeddings.patch_embeddings.projection", "patch_embed.proj"), ("vit.layers.", "blocks."),
            ("vit.layernorm.", "norm."), ("decoder.decoder_layers.", "decoder_blocks."), ("decoder.", ""),
            ("layernorm_before", "norm1"), ("layernorm_after", "norm2"), ("attention.o_proj", "attn.proj"),
        ):  # fmt: skip
            key = key.replace(old, new)
        if "attention.k_proj" in key or "attention.v_proj" in key:
            continue
        if "attention.q_proj" in key:
            start = next(k for k, v in theirs.items() if v is value)
            value = torch.cat([theirs[start.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        found[key.replace("attention.q_proj", "attn.qkv")] = value
    return found


@pytest.fixture(scope="module")
def pair() -> tuple[Any, MAE]:
    """transformers' model and ours with its weights, random ones everywhere."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.ViTMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=12, patch_size=4,
        decoder_hidden_size=24, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
        decoder_intermediate_size=96, mask_ratio=0.75, layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = transformers.ViTMAEForPreTraining(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = cast(MAE, build(**SMALL, decoder_heads=4).eval())
    return theirs, ours


def test_pixels_and_loss_are_transformers(
    pair: tuple[Any, MAE], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = pair
    save_file(of_transformers(theirs.state_dict()), tmp_path / "mae.safetensors")
    monkeypatch.setenv("FEDZOO_WEIGHTS", str(tmp_path))
    match = load_weights(ours, WeightsPart(file="mae.safetensors"), RENAMES)
    assert (match.missing, match.mismatched, match.unused) == ((), (), ())
    x, noise = torch.randn(3, 3, 12, 12), torch.rand(3, 9)
    with torch.no_grad():
        expected = theirs(x, noise=noise)
        order = noise.argsort(dim=1)
        painted = ours.reconstruct(x, order, 2)
        torch.testing.assert_close(painted, theirs.unpatchify(expected.logits), atol=1e-4, rtol=1e-4)
        hidden = theirs.unpatchify(expected.mask[:, :, None].expand(-1, -1, 48))
        assert hidden[:, 0].sum(dim=(1, 2)).tolist() == [7 * 16] * 3
        loss = ((painted - x).square() * hidden).sum() / hidden.sum()
        torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-4)


def test_positions_are_the_papers_table() -> None:
    """The first numbers are sine and cosine of the column, then of the row."""
    table = sine_cosine((2, 3), 8)
    assert table.shape == (7, 8)
    assert not table[0].any()
    row, column = 1.0, 2.0
    expected = [np.sin(column), np.sin(column / 100), np.cos(column), np.cos(column / 100),
                np.sin(row), np.sin(row / 100), np.cos(row), np.cos(row / 100)]  # fmt: skip
    np.testing.assert_allclose(table[1 + 1 * 3 + 2].numpy(), expected, rtol=1e-6)
    net = build((1, 8, 12))
    torch.testing.assert_close(net.positions.weight, sine_cosine((4, 6), 64))
    torch.testing.assert_close(net.decoder.positions.weight, sine_cosine((4, 6), 32))


def test_positions_are_transformers_but_for_the_order_of_the_halves() -> None:
    """The authors write the column first; transformers did, too, and now it writes the row first."""
    theirs = pytest.importorskip("transformers.models.vit_mae.modeling_vit_mae")
    if not hasattr(theirs, "build_2d_sinusoidal_position_embedding"):
        pytest.skip("another version of transformers")
    expected = theirs.build_2d_sinusoidal_position_embedding(3, 5, 32, cls_token=True)
    torch.testing.assert_close(torch.cat(sine_cosine((3, 5), 32).chunk(2, dim=1)[::-1], dim=1), expected)


# ---- the encoder is a ViT's ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", ["tiny", "b16", "l16"])
def test_its_encoder_has_the_entries_of_a_vit(size: str) -> None:
    shape = models["mae"].usual[size]
    with torch.device("meta"):
        ours, vit = (build(shape, name, size=size).state_dict() for name in ("mae", "vit"))
    encoder = {k: v.shape for k, v in ours.items() if not k.startswith("decoder.")}
    assert encoder == {k: v.shape for k, v in vit.items() if not k.startswith("head.")}


def test_with_everything_visible_it_encodes_as_a_vit_does() -> None:
    ours, vit = build((3, 12, 12), patch=4).eval(), build((3, 12, 12), "vit", patch=4).eval()
    vit.load_state_dict({k: v for k, v in ours.state_dict().items() if not k.startswith("decoder.")}, strict=False)
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), vit.norm(vit.tokens(x)))
        shuffled, straight = (ours.reconstruct(x, order, 9) for order in (orders(2, 9), torch.arange(9).expand(2, -1)))
    torch.testing.assert_close(shuffled, straight, atol=1e-5, rtol=1e-4)  # the order of what is seen means nothing


# ---- what federated training asks of it ------------------------------------------------------------------------------
def test_gradients_of_each_sample_under_vmap_are_those_of_a_loop() -> None:
    net = build(**SMALL, decoder_heads=4).double()
    x, order = torch.randn(3, 3, 12, 12, dtype=torch.float64), orders(3, 9)
    weights = {k: v.detach() for k, v in net.named_parameters()}

    class Painted(nn.Module):
        """What functional_call calls."""

        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, order: Tensor) -> Tensor:
            out: Tensor = self.net.reconstruct(x[None], order[None], 2)
            return (out[0] - x).square().mean()

    painted = Painted()

    def loss(weights: dict[str, Tensor], x: Tensor, order: Tensor) -> Tensor:
        value: Tensor = functional_call(painted, {f"net.{k}": v for k, v in weights.items()}, (x, order))
        return value

    stacked = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, order)
    for i in range(3):
        for key, value in grad(loss)(weights, x[i], order[i]).items():
            assert value.any(), key
            torch.testing.assert_close(stacked[key][i], value, atol=1e-10, rtol=1e-8, msg=key)


def test_no_operation_is_in_place(in_place: Any) -> None:
    net = build()
    with in_place() as mode:
        net.reconstruct(torch.randn(2, 3, 12, 12), orders(2, 36), 9)
    assert mode.seen == []


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="model 'mae' cannot cut an image of 9x8 pixels into patches of side 2"):
        build((1, 9, 8))
    with pytest.raises(ConfigError, match="decoder_width 30 should be a multiple of decoder_heads 4"):
        build(decoder_width=30)
    with pytest.raises(ConfigError, match="should be multiples of 4"):
        build(width=6, heads=3)
