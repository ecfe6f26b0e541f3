"""GPT-2 (Radford et al. 2019): a causal transformer that says the next token; pre-norm, learned positions, GELU.

======  ======  =====  ====  =====  ============  =============================
size    layers  width  mlp   heads  M parameters  from
======  ======  =====  ====  =====  ============  =============================
tiny    2       64     256   4      0.1           ours
small   12      768    3072  12     124.4         Radford et al. 2019, Table 2
medium  24      1024   4096  16     354.8         Radford et al. 2019, Table 2
======  ======  =====  ====  =====  ============  =============================

Parameters for next tokens at (T, V) = (1024, 50257), for `tiny` at (64, 293); the paper's table says 117 and 345, which
is not what its layers and widths make. The output layer is the table of tokens. A class is told from the last token of
a text (Radford et al. 2018, section 3.2).

`tiny` starts with larger weights; the usual 0.02 is for wide layers. On the bytes of a Python file (64 a text, 32 a
batch, 300 steps of AdamW 0.003, one seed) that is 1.55 instead of 1.78 nats a byte of held-out text.

Published weights hold linear layers transposed and q, k and v as one, which no renaming mends: `convert` does, once. ::

    save_file(convert(load_file("gpt2/model.safetensors")), "gpt2-converted.safetensors")
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from shared_models.models import Shape, model
from shared_models.transformer import (
    AttentionSettings,
    BlockSettings,
    EncoderBlock,
    Positions,
    causal,
    not_padding,
    require_positions,
)
from shared_models.zoo.lstm import last, tied


class GPTSettings(AttentionSettings):
    """The columns of the table above, start values and dropout.

    Attributes:
        layers: transformer blocks.
        width: numbers per token (D), a multiple of `heads`.
        mlp: width of a block's hidden layer.
        heads: attention heads.
        std: standard deviation of all weights at the start.
        dropout: of the embedding, of the attention weights and of what attention and MLP add; not within the MLP.
        positions: places that have a row in their table; as many as the model sees tokens unless told. Published
            weights have 1024. Stages of a job need one number: the next token is said from one token less than a text
            has.
    """

    layers: PositiveInt
    mlp: PositiveInt
    positions: PositiveInt | None = None
    std: PositiveFloat = 0.02
    dropout: float = Field(0.0, ge=0.0, lt=1.0)


class GPT(nn.Module):
    """Tokens and positions, causal blocks, a norm, and an output layer at the last token or at each."""

    def __init__(self, settings: GPTSettings, shape: Shape, outputs: int, each: bool) -> None:
        super().__init__()
        length, vocabulary = shape
        width, std = settings.width, settings.std
        self.each = each
        self.tied = each and outputs == vocabulary
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = Positions("learnable", settings.positions or length, width)
        self.dropout = nn.Dropout(settings.dropout)
        block = BlockSettings(
            width,
            settings.heads,
            settings.mlp,
            activation="gelu-tanh",
            before=True,
            dropout=settings.dropout,
            hidden_dropout=0.0,
        )
        blocks = [EncoderBlock(block) for _ in range(settings.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        if self.tied:
            self.output = tied(self.tokens, bias=False)
        else:
            self.head = nn.Linear(width, outputs)
        normal(self, std)
        for layer in (layer for b in blocks for layer in (b.attention.out, b.mlp.out)):
            nn.init.normal_(layer.weight, std=std * (2 * settings.layers) ** -0.5)  # section 2.3: 1/sqrt(N) of N sums

    def features(self, x: Tensor) -> Tensor:
        """Tokens (B, T) -> (B, T, D)."""
        keep = causal(x.shape[1], x.device) & not_padding(x)  # (B, 1, T, T)
        states = self.dropout(self.positions(self.tokens(x)))  # (B, T, D)
        for block in self.blocks:
            states = block(states, keep)
        out: Tensor = self.norm(states)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T) int64 -> (B, outputs) scores, or (B, T, outputs) at each token."""
        states = self.features(x) if self.each else last(self.features(x), x)
        scores: Tensor = self.output(states) if self.tied else self.head(states)
        return scores


def normal(model: nn.Module, std: float) -> None:
    """Weights of linear layers and tables from N(0, std^2), biases at zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


NAMES = (
    (r"^transformer\.", ""),
    (r"^lm_head\.", "output."),
    (r"^wte\.", "tokens."),
    (r"^wpe\.", "positions.table."),
    (r"^ln_f\.", "norm."),
    (r"^h\.", "blocks."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.attn\.c_proj\.", ".attention.out."),
    (r"\.attn\.c_attn\.", ".attention.qkv."),
    (r"\.mlp\.c_fc\.", ".mlp.hidden."),
    (r"\.mlp\.c_proj\.", ".mlp.out."),
)


def convert(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's entries of GPT-2 as ours: linear layers (in, out) are transposed, q, k and v become three."""
    ours: dict[str, Tensor] = {}
    for key, value in theirs.items():
        for pattern, replacement in NAMES:
            key = re.sub(pattern, replacement, key)
        if re.search(r"\.(qkv|out|hidden)\.weight$", key):
            value = value.T
        if ".qkv." in key:
            ours |= {key.replace("qkv", name): part for name, part in zip("qkv", value.chunk(3), strict=True)}
        else:
            ours[key] = value
    return {key: value.contiguous() for key, value in ours.items() if ".attn." not in key}  # old files keep the mask


@model(
    "gpt",
    settings=GPTSettings,
    sizes={
        "tiny": {"layers": 2, "width": 64, "mlp": 256, "heads": 4, "std": 0.1},
        "small": {"layers": 12, "width": 768, "mlp": 3072, "heads": 12, "dropout": 0.1, "positions": 1024},
        "medium": {"layers": 24, "width": 1024, "mlp": 4096, "heads": 16, "dropout": 0.1, "positions": 1024},
    },
    paper="Radford et al. 2019, Language Models are Unsupervised Multitask Learners",
    tasks=("language-modelling", "classification"),
    inputs=("tokens",),
    family="text",
    notes="Writes text; each token sees only those before it, so for classes BERT is the better reader. Attention "
    "costs the square of the length.",
    usual={"tiny": (64, 293), "small": (1024, 50_257), "medium": (1024, 50_257)},
)
def build(settings: GPTSettings, shape: Shape, outputs: int, *, each: bool = False) -> nn.Module:
    """Tokens (B, at most T) -> (B, outputs) scores, or (B, T, outputs) with `each`.

    Raises:
        ConfigError: texts are longer than the model has positions.
    """
    require_positions("gpt", settings.positions, shape[0])
    return GPT(settings, shape, outputs, each)
