"""CLIP (Radford et al. 2021): images and texts in one space, where each image is nearest to its own text.

====  ==============================  =====================================  ============  =========================
size  image                           text                                   M parameters  from
====  ==============================  =====================================  ============  =========================
tiny  3 convolutions, 32 to 128 wide  a bag of words                         0.4           ours, for images of about
                                                                                           64x64
b32   ViT: 12 layers, width 768,      transformer: 12 layers, width 512,     151.3         Radford et al. 2021,
      patch 32                        causal                                               Table 20
====  ==============================  =====================================  ============  =========================

Parameters with a space of 64 numbers for `tiny` and of 512 for `b32`, at 224x224, texts of 77 tokens and a vocabulary
of 49,408. The settings mix both: `vision = "vit"` and `text = "transformer"` at `tiny` are small ones of the paper's
kind.

Published weights (Hugging Face's `CLIPModel`) name tokens by the numbers of their own tokenizer file, which here come
behind the special ones (`shared_models.tokens`): `convert` makes room for these, once. ::

    save_file(convert(load_file("clip-vit-base-patch32/model.safetensors")), "clip-converted.safetensors")
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from shared_models.errors import ConfigError
from shared_models.image_text import ImageText
from shared_models.models import ModelSettings, Shape, model
from shared_models.tokens import BEGIN, END, TEXT
from shared_models.towers import Bag, Convolutions, TextTransformer, VisionTransformer
from shared_models.transformer import BlockSettings

HOTTEST = math.log(100.0)  # the logarithm of the scale, at most (section 2.5)


class CLIPSettings(ModelSettings):
    """The two encoders; what belongs to the kind that was not chosen means nothing.

    Attributes:
        vision: the image's encoder: a Vision Transformer (`vit`) or convolutions (`cnn`).
        patch: side of a square patch in pixels; must divide both sides of the image.
        layers: transformer blocks of the image's encoder.
        width: numbers per token, a multiple of `heads`.
        heads: attention heads.
        channels: of each convolution; a 2x2 max pooling follows each.
        colours: what is seen of single pixels beside what the convolutions see (`shared_models.towers.Convolutions`).
        norm: of what the convolutions found, before the last layer: over all of one image (`layer`), or of each number
            over the images of a batch (`batch`), which brings out in what images differ.
        dropout: of what the convolutions found, before the last layer.
        text: the text's encoder: a causal `transformer`, or a `bag` of words.
        text_layers: transformer blocks of the text's encoder.
        text_width: numbers per token, a multiple of `text_heads`.
        text_heads: attention heads.
        buckets: rows of the table of a bag's words.
        text_dropout: share of a bag's words that are left out in training.
        text_std: standard deviation of a bag's table at the start. With next to nothing (0.01) a word adds little until
            it is trained; with one over the root of the space's width, words start as points of length 1, all about
            equally far from each other, and images learn to find them: better for few texts, in a wide space (256).
        temperature: at the start; it is learned.
    """

    vision: Literal["vit", "cnn"]
    patch: PositiveInt
    layers: PositiveInt
    width: PositiveInt
    heads: PositiveInt
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    colours: int = Field(0, ge=0)
    norm: Literal["layer", "batch"] = "layer"
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    text: Literal["transformer", "bag"]
    text_layers: PositiveInt
    text_width: PositiveInt
    text_heads: PositiveInt
    buckets: PositiveInt
    text_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    text_std: float = Field(0.01, gt=0.0, le=1.0)
    temperature: float = Field(0.07, ge=0.01)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> CLIPSettings:
        for width, heads in (("width", "heads"), ("text_width", "text_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(f"{width} {getattr(self, width)} should be a multiple of {heads}")
        return self


class CLIP(ImageText):
    """Figure 3 of the paper: two encoders, their points divided by their length, and a learned temperature."""

    def __init__(self, settings: CLIPSettings, shape: Shape, outputs: int) -> None:
        super().__init__()
        *image, length, vocabulary = shape
        if settings.vision == "vit":
            block = _block(settings.width, settings.heads)
            self.vision: nn.Module = VisionTransformer(block, settings.layers, settings.patch, tuple(image), outputs)
        else:
            self.vision = Convolutions(
                settings.channels, settings.colours, settings.norm, settings.dropout, tuple(image), outputs
            )
        if settings.text == "transformer":
            block = _block(settings.text_width, settings.text_heads)
            self.language: nn.Module = TextTransformer(block, settings.text_layers, length, vocabulary, outputs)
        else:
            self.language = Bag(settings.buckets, settings.text_dropout, vocabulary, outputs, settings.text_std)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(settings.temperature)))

    def image(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, E)."""
        return F.normalize(self.vision(x), dim=1)

    def text(self, ids: Tensor) -> Tensor:
        """(B, T) int64 -> (B, E)."""
        return F.normalize(self.language(ids), dim=1)

    def scale(self) -> Tensor:
        """At most 100."""
        return self.log_scale.clamp(max=HOTTEST).exp()


def _block(width: int, heads: int) -> BlockSettings:
    return BlockSettings(width, heads, 4 * width, activation="gelu-quick", before=True)


def convert(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a published CLIP with rows for our special ids in front of its own tokens.

    Its last two tokens mark begin and end of a text, as ours do; the other special ids get the mean of all rows.
    """
    key = "text_model.embeddings.token_embedding.weight"
    table = theirs[key]
    special = table.mean(dim=0, keepdim=True).repeat(TEXT, 1)
    special[BEGIN], special[END] = table[-2], table[-1]
    return {**theirs, key: torch.cat([special, table])}


# Hugging Face's keys -> ours.
RENAMES = (
    (r"^logit_scale$", "log_scale"),
    (r"^visual_projection\.", "vision.head."),
    (r"^text_projection\.", "language.head."),
    (r"^vision_model\.embeddings\.class_embedding$", "vision.class_token"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "vision.patches."),
    (r"^vision_model\.pre_layrnorm\.", "vision.first_norm."),
    (r"^vision_model\.post_layernorm\.", "vision.norm."),
    (r"^text_model\.embeddings\.token_embedding\.", "language.tokens."),
    (r"^text_model\.final_layer_norm\.", "language.norm."),
    (r"^vision_model\.", "vision."),
    (r"^text_model\.", "language."),
    (r"\.embeddings\.position_embedding\.", ".positions.table."),
    (r"\.encoder\.layers\.", ".blocks."),
    (r"\.self_attn\.([qkv])_proj\.", r".attention.\1."),
    (r"\.self_attn\.out_proj\.", ".attention.out."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"\.mlp\.fc1\.", ".mlp.hidden."),
    (r"\.mlp\.fc2\.", ".mlp.out."),
)


@model(
    "clip",
    settings=CLIPSettings,
    sizes={
        "tiny": {
            "vision": "cnn", "channels": (32, 64, 128), "patch": 8, "layers": 3, "width": 64, "heads": 4,
            "text": "bag", "buckets": 4096,
            "text_layers": 2, "text_width": 64, "text_heads": 4,
        },
        "b32": {
            "vision": "vit", "channels": (32, 64, 128), "patch": 32, "layers": 12, "width": 768, "heads": 12,
            "text": "transformer", "buckets": 65536,
            "text_layers": 12, "text_width": 512, "text_heads": 8,
        },
    },
    paper="Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision",
    tasks=("contrastive", "zero-shot"),
    inputs=("image-text",),
    heads=(),
    per_sample_gradients=(),  # every sample is a negative of the others
    renames=RENAMES,
    notes="Finds the text of an image and the image of a text, and classes by what is written of them. It learns from "
    "pairs alone, of which the paper has 400 million: without loaded weights expect to find what colours and coarse "
    "forms tell.",
    usual={"tiny": (3, 64, 64, 64, 293), "b32": (3, 224, 224, 77, 49_408)},
)  # fmt: skip
def build(settings: CLIPSettings, shape: Shape, outputs: int) -> nn.Module:
    """An `ImageText` for images (C, H, W) and texts of at most T tokens of V; `outputs` is the width of their space.

    Raises:
        ConfigError: the patch does not divide the image, or the convolutions find nothing left of it.
    """
    _, height, width, *_ = shape
    if settings.vision == "vit" and (height % settings.patch or width % settings.patch):
        raise ConfigError(
            f"model 'clip' cannot cut an image of {height}x{width} pixels into patches of side {settings.patch}",
            hint="Set patch to a divisor of both, or the image size to multiples of it",
        )
    smallest = 2 ** (len(settings.channels) + 1) - 1
    if settings.vision == "cnn" and min(height, width) < smallest:
        raise ConfigError(
            f"model 'clip' cannot take an image of {height}x{width} pixels: its smallest is {smallest}x{smallest}",
            hint="Enlarge the images, or use fewer channels",
        )
    return CLIP(settings, shape, outputs)
