"""BART (Lewis et al. 2020): a transformer that learns language by repairing damaged text.

=====  =======  =====  ====  =====  =======  ============  ======================================
size   layers   width  mlp   heads  dropout  M parameters  from
=====  =======  =====  ====  =====  =======  ============  ======================================
tiny   2 + 2    64     128   4      0        0.2           ours, for texts of about 32
base   6 + 6    768    3072  12     0.1      139.4         Lewis et al. 2020, section 2.1, and code
large  12 + 12  1024   4096  16     0.1      406.3         the same
=====  =======  =====  ====  =====  =======  ============  ======================================

Parameters with a vocabulary of 50,265 and 1,024 positions, of 293 and 32 for `tiny`. It differs from `transformer` in
its positions, which are learned, in a norm behind the embeddings, and in GELU. Outputs are those of Hugging Face's
BartForConditionalGeneration with its weights; a vocabulary with other ids keeps its own embeddings.

`tiny` starts from larger weights: with the paper's 0.02 it needs three times as many steps. On 16 texts of 4 to 10
letters that it learns to write backwards (AdamW 0.001), 0.97 instead of 0.27 of the tokens are right after 40 steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from shared_models.models import Shape, model
from shared_models.tokens import Bytes
from shared_models.transformer import (
    AttentionSettings,
    BlockSettings,
    DecoderBlock,
    EncoderBlock,
    EncoderDecoder,
    causal,
    not_padding,
    require_positions,
)

OFFSET = 2  # rows of the published position tables that come before the first place, and that nothing uses


class BartSettings(AttentionSettings):
    """The columns of the table above, and the positions.

    Attributes:
        encoder: layers.
        decoder: layers.
        width: numbers per token, a multiple of `heads`.
        mlp: width of a layer's hidden layer.
        heads: attention heads.
        positions: places that have a row in the tables; as many as the longest text unless told. Published weights
            have 1,024.
        dropout: after the embeddings, the attention weights and layers; 0 is none.
        std: standard deviation of all weights at the start.
    """

    encoder: NonNegativeInt
    decoder: PositiveInt
    mlp: PositiveInt
    positions: PositiveInt | None = None
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    std: PositiveFloat = 0.02


class Start(nn.Module):
    """Adds places to tokens and normalises the sum: (B, N, D) -> (B, N, D)."""

    def __init__(self, positions: int, width: int, dropout: float) -> None:
        super().__init__()
        self.positions = nn.Embedding(OFFSET + positions, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """norm(x + positions)."""
        places = OFFSET + torch.arange(x.shape[1], device=x.device).expand(len(x), -1)  # (B, N)
        out: Tensor = self.dropout(self.norm(x + self.positions(places)))
        return out


class Bart(EncoderDecoder):
    """One table embeds the source and the target and gives the scores."""

    def __init__(self, settings: BartSettings, length: int, vocabulary: int) -> None:
        super().__init__()
        positions, width = settings.positions or length, settings.width
        block = BlockSettings(width, settings.heads, settings.mlp, "gelu", dropout=settings.dropout)
        self.std = settings.std
        self.embedding = nn.Embedding(vocabulary, width)
        self.source = Start(positions, width, settings.dropout)
        self.target = Start(positions, width, settings.dropout)
        self.encoder = nn.ModuleList(EncoderBlock(block) for _ in range(settings.encoder))
        self.decoder = nn.ModuleList(DecoderBlock(block) for _ in range(settings.decoder))
        self.apply(self.initialise)

    def initialise(self, module: nn.Module) -> None:
        """Normal weights, biases at zero."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def encode(self, source: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)."""
        x: Tensor = self.source(self.embedding(source))
        for block in self.encoder:
            x = block(x, not_padding(source))
        return x

    def decode(self, memory: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """(B, T, D), (B, T), (B, U) -> (B, U, V)."""
        x = self.target(self.embedding(target))
        keep = causal(target.shape[1], target.device) & not_padding(target)
        for block in self.decoder:
            x = block(x, memory, keep, not_padding(source))
        return F.linear(x, self.embedding.weight)


PAPER = {"dropout": 0.1, "positions": 1024}


@model(
    "bart",
    settings=BartSettings,
    sizes={
        "tiny": {"encoder": 2, "decoder": 2, "width": 64, "mlp": 128, "heads": 4, "std": 0.1},
        "base": {**PAPER, "encoder": 6, "decoder": 6, "width": 768, "mlp": 3072, "heads": 12},
        "large": {**PAPER, "encoder": 12, "decoder": 12, "width": 1024, "mlp": 4096, "heads": 16},
    },
    paper="Lewis et al. 2020, BART: Denoising Sequence-to-Sequence Pre-training for Natural Language Generation, "
    "Translation, and Comprehension",
    tasks=("translation", "denoising"),
    inputs=("tokens",),
    heads=(),
    per_sample_gradients=("vmap", "loop"),
    renames=(
        (r"^model\.", ""),
        (r"^(shared|(en|de)coder\.embed_tokens|lm_head)\.", "embedding."),
        (r"^encoder\.(embed_positions|layernorm_embedding)\.", r"source.\1."),
        (r"^decoder\.(embed_positions|layernorm_embedding)\.", r"target.\1."),
        (r"\.embed_positions\.", ".positions."),
        (r"\.layernorm_embedding\.", ".norm."),
        (r"^(encoder|decoder)\.layers\.", r"\1."),
        (r"\.self_attn_layer_norm\.", ".norm1."),
        (r"\.encoder_attn_layer_norm\.", ".norm2."),
        (r"^(encoder\..*)\.final_layer_norm\.", r"\1.norm2."),
        (r"^(decoder\..*)\.final_layer_norm\.", r"\1.norm3."),
        (r"\.self_attn\.", ".attention."),
        (r"\.encoder_attn\.", ".cross."),
        (r"\.(q|k|v|out)_proj\.", r".\1."),
        (r"\.fc1\.", ".mlp.hidden."),
        (r"\.fc2\.", ".mlp.out."),
    ),
    family="sequence to sequence",
    notes="Published weights load into it. Made for repairing text of which tokens and spans are masked, deleted or "
    "moved: it writes the whole text again, so that learning costs more than with `t5`, which writes the gaps alone.",
    usual={"tiny": (32, Bytes.size), "base": (1024, 50265), "large": (1024, 50265)},
)
def build(settings: BartSettings, shape: Shape, outputs: int) -> nn.Module:
    """An `EncoderDecoder` for texts of at most T tokens, `outputs` being the vocabulary V again.

    Raises:
        ConfigError: texts are longer than the model has positions.
    """
    length, vocabulary = shape
    require_positions("bart", settings.positions, length)
    return Bart(settings, length, vocabulary)
