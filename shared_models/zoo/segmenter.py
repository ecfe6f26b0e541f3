"""Segmenter (Strudel et al. 2021): a ViT encodes patches, a mask transformer sets them against one token per class.

====  ======  =====  =====  =====  =======  ============  ===================================
size  layers  width  heads  patch  decoder  M parameters  from
====  ======  =====  =====  =====  =======  ============  ===================================
tiny  2       64     2      4      1        0.1           ours, for images of about 32 to 128
ti16  12      192    3      16     2        6.7           Strudel et al. 2021, Seg-T-Mask/16
s16   12      384    6      16     2        26.0          Strudel et al. 2021, Seg-S-Mask/16
b16   12      768    12     16     2        102.5         Strudel et al. 2021, Seg-B-Mask/16
l16   24      1024   16     16     2        332.6         Strudel et al. 2021, Seg-L-Mask/16
====  ======  =====  =====  =====  =======  ============  ===================================

Parameters at 512x512x3 and the 150 classes of ADE20K, but for `tiny` (64x64x3, 3). The authors count 7, 27, 106 and
334, with the ImageNet head of their encoder, which nothing uses. Weights of torchvision's ViT load into the encoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from shared_models.models import Shape, model
from shared_models.zoo.vit import RENAMES, Block, Encoder, ViTSettings, initialise, require_patches


class SegmenterSettings(ViTSettings):
    """A ViT and the decoder above it, whose blocks have the same width.

    Attributes:
        decoder_layers: transformer blocks over patches and classes together.
        mask_eps: added to the variance of a patch's cosines before they are divided by its root.
        mask_scale: what they are multiplied by afterwards, at the start.

    The paper's code has a `mask_eps` of 1e-5 and a `mask_scale` of 1. With two classes that leaves little more than the
    sign of their difference, and hardly a gradient: on crops of electron microscopy (membranes, 8 of 64x64 pixels, 4 in
    a step, 240 steps of AdamW 0.004) training Dice gets to 0.94 with the values here and stays below 0.7 with those.
    """

    decoder_layers: PositiveInt = 2
    mask_eps: float = Field(0.1, gt=0.0)
    mask_scale: float = Field(3.0, gt=0.0)


class Segmenter(nn.Module):
    """A class mask is the cosine of each patch with the class's token (section 3.2), interpolated to the image."""

    def __init__(self, settings: SegmenterSettings, shape: Shape, outputs: int) -> None:
        super().__init__()
        width = settings.width
        self.grid = (shape[1] // settings.patch, shape[2] // settings.patch)
        self.encoder = Encoder(settings, shape)
        self.project = nn.Linear(width, width)
        self.classes = nn.Embedding(outputs, width)
        self.decoder = nn.Sequential(*(Block(settings) for _ in range(settings.decoder_layers)))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.patch_space = nn.Linear(width, width, bias=False)
        self.class_space = nn.Linear(width, width, bias=False)
        self.mask_norm = nn.LayerNorm(outputs, eps=settings.mask_eps)
        self.apply(initialise)
        self.encoder.initialise()
        nn.init.constant_(self.mask_norm.weight, settings.mask_scale)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, outputs, H, W) logits."""
        patches = self.project(self.encoder(x)[:, 1:])  # (B, N, D), without the class token of the ViT
        ids = torch.arange(self.classes.num_embeddings, device=x.device).expand(x.shape[0], -1)  # (B, K)
        tokens = self.decoder_norm(self.decoder(torch.cat([patches, self.classes(ids)], dim=1)))  # (B, N + K, D)
        patches, classes = tokens.split([patches.shape[1], ids.shape[1]], dim=1)
        patches = F.normalize(self.patch_space(patches), dim=-1)  # (B, N, D)
        classes = F.normalize(self.class_space(classes), dim=-1)  # (B, K, D)
        masks = self.mask_norm(patches @ classes.transpose(1, 2))  # (B, N, K)
        masks = masks.transpose(1, 2).unflatten(2, self.grid)  # (B, K, H/p, W/p)
        return F.interpolate(masks, x.shape[2:], mode="bilinear", align_corners=False)


@model(
    "segmenter",
    settings=SegmenterSettings,
    sizes={
        "tiny": {
            "layers": 2, "width": 64, "mlp": 128, "heads": 2, "patch": 4, "position_std": 1.0, "decoder_layers": 1,
        },
        "ti16": {"layers": 12, "width": 192, "mlp": 768, "heads": 3, "patch": 16},
        "s16": {"layers": 12, "width": 384, "mlp": 1536, "heads": 6, "patch": 16},
        "b16": {"layers": 12, "width": 768, "mlp": 3072, "heads": 12, "patch": 16},
        "l16": {"layers": 24, "width": 1024, "mlp": 4096, "heads": 16, "patch": 16},
    },
    paper="Strudel et al. 2021, Segmenter: Transformer for Semantic Segmentation",
    tasks=("segmentation",),
    heads=("classes.*", "mask_norm.*"),
    renames=(*RENAMES, (r"^(patches|class_token|positions|blocks|norm)\.", r"encoder.\1.")),
    family="segmentation",
    notes="Every patch sees the whole image from the first layer on. It wants pretrained weights or much data, and "
    "contours are as fine as its patches.",
    usual={"tiny": (3, 64, 64)} | dict.fromkeys(("ti16", "s16", "b16", "l16"), (3, 512, 512)),
)  # fmt: skip
def build(settings: SegmenterSettings, shape: Shape, outputs: int) -> nn.Module:
    """(B, C, H, W) -> (B, outputs, H, W) logits.

    Raises:
        ConfigError: the patch does not divide the image; names the patches that do.
    """
    require_patches("segmenter", settings, shape)
    return Segmenter(settings, shape, outputs)
