"""Weights of published architectures compute in our models what they compute in theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from shared_models.job_parts import WeightsPart
from shared_models.models import configure
from shared_models.weights import Match, load_weights

pytestmark = pytest.mark.usefixtures("weights_here")


def load(file: str, model: nn.Module, renames: Any = (), **part: Any) -> Match:
    return load_weights(model, WeightsPart(file=file, **part), renames)


def test_torchvisions_resnet_gives_its_features_to_ours(tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = torchvision.models.resnet18(num_classes=3)
    theirs(torch.randn(4, 3, 32, 32))  # running statistics that are not the initial ones
    torch.save(theirs.eval().state_dict(), tmp_path / "resnet18.pth")
    declared, settings = configure("resnet18", {"size": "paper", "norm": "batch"})
    ours = declared.build(settings, (3, 32, 32), 2).eval()
    match = load("resnet18.pth", ours, renames=declared.renames)
    assert len(match.loaded) == 100
    assert match.missing == match.unused == ()
    assert str(match) == (
        "weights resnet18.pth: 100 of 102 entries loaded; left as initialised: "
        "fc.weight ((3, 512) there, (2, 512) here), fc.bias ((3,) there, (2,) here)"
    )
    theirs.fc = ours.get_submodule("fc")
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


TORCHVISION_VIT = (
    ("conv_proj", "patches"), (r"encoder\.layers\.encoder_layer_(\d+)", r"blocks.\1"), (r"ln_(\d)", r"norm\1"),
    (r"self_attention\.in_proj_", "attention.qkv."), (r"self_attention\.out_proj", "attention.out"),
    (r"mlp\.0", "hidden"), (r"mlp\.3", "out"), (r"encoder\.ln", "norm"), (r"heads\.head", "head"),
    (r"encoder\.pos_embedding", "positions.weight"), ("class_token$", "class_token.weight"),
)  # fmt: skip


def test_torchvisions_vit_computes_the_same_in_ours(tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = torchvision.models.VisionTransformer(
        image_size=12, patch_size=4, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=10
    ).eval()
    for parameter in theirs.parameters():  # torchvision starts the head and the class token at zero
        nn.init.normal_(parameter, std=0.3)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    declared, settings = configure("vit", {"layers": 2, "heads": 4, "width": 32, "mlp": 48, "patch": 4})
    ours = declared.build(settings, (3, 12, 12), 10).eval()
    match = load("vit.pth", ours, rename=TORCHVISION_VIT)
    assert match.missing == match.mismatched == match.unused == ()
    assert {d.key for d in match.reshaped} == {"class_token.weight", "positions.weight"}
    x = torch.randn(5, 3, 12, 12)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
