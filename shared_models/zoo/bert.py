"""BERT (Devlin et al. 2019): a transformer that sees the whole text, trained to find the tokens that were masked.

=====  ======  =====  ====  =====  ============  =============================
size   layers  width  mlp   heads  M parameters  from
=====  ======  =====  ====  =====  ============  =============================
tiny   2       64     256   4      0.1           ours
base   12      768    3072  12     109.5         Devlin et al. 2019, section 3
large  24      1024   4096  16     335.2         Devlin et al. 2019, section 3
=====  ======  =====  ====  =====  ============  =============================

Parameters for masked tokens at (T, V) = (512, 30522), for `tiny` at (64, 293): the encoder and the head that says a
token, whose last layer is the table of tokens. Post-norm, learned positions, GELU. There is no next-sentence prediction
(Liu et al. 2019 do as well without).

A class is told from the first token, which the reader puts in front of every text (the paper's [CLS]), by the paper's
pooler. All tokens are of segment A; segment B has its row for published weights alone.

`tiny` starts with larger weights; the usual 0.02 is for wide layers. On the bytes of a Python file (32 a text, 32 a
batch, 450 steps of AdamW 0.003, one seed) that is 2.75 instead of 3.15 nats a hidden byte of held-out text, where the
frequencies alone give 3.11.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_models.models import Shape, model
from shared_models.transformer import BlockSettings, EncoderBlock, Positions, not_padding
from shared_models.zoo.gpt import GPTSettings, normal
from shared_models.zoo.lstm import tied

EPS = 1e-12  # added to the variance in the norms


class BERTSettings(GPTSettings):
    """The columns of the table above, start values and dropout: the same as GPT's."""


class Embeddings(nn.Module):
    """Token + segment + position, normalised."""

    def __init__(self, shape: Shape, width: int, dropout: float) -> None:
        super().__init__()
        length, vocabulary = shape
        self.tokens = nn.Embedding(vocabulary, width)
        self.segments = nn.Embedding(2, width)
        self.positions = Positions("learnable", length, width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T) -> (B, T, E)."""
        states = self.positions(self.tokens(x) + self.segments(torch.zeros_like(x)))
        out: Tensor = self.dropout(self.norm(states))
        return out


class Encoder(nn.Module):
    """Blocks, on a projection of the embedding where that has another width."""

    def __init__(self, settings: BERTSettings, embedding: int) -> None:
        super().__init__()
        width, heads, mlp = settings.width, settings.heads, settings.mlp
        block = BlockSettings(
            width, heads, mlp, activation="gelu", dropout=settings.dropout, hidden_dropout=0.0, eps=EPS
        )
        self.project = nn.Linear(embedding, width) if embedding != width else nn.Identity()
        self.blocks = nn.ModuleList(EncoderBlock(block) for _ in range(settings.layers))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        """(B, T, E), keep (B, 1, 1, T) -> (B, T, D)."""
        x = self.project(x)
        for block in self.blocks:
            x = block(x, keep)
        return x


class TokenHead(nn.Module):
    """Says a token at each place: norm(gelu(dense(x))) times the table of tokens, and a bias."""

    def __init__(self, width: int, tokens: nn.Embedding) -> None:
        super().__init__()
        self.dense = nn.Linear(width, tokens.embedding_dim)
        self.norm = nn.LayerNorm(tokens.embedding_dim, eps=EPS)
        self.output = tied(tokens, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, V)."""
        scores: Tensor = self.output(self.norm(F.gelu(self.dense(x))))
        return scores


class BERT(nn.Module):
    """Embeddings, encoder, and what the task asks for: a token at each place, else a linear head."""

    def __init__(self, settings: BERTSettings, shape: Shape, outputs: int, each: bool) -> None:
        super().__init__()
        width = settings.width
        self.each = each
        self.masked = each and outputs == shape[1]
        self.embeddings = Embeddings(shape, width, settings.dropout)
        self.encoder = Encoder(settings, width)
        if self.masked:
            self.token_head = TokenHead(width, self.embeddings.tokens)
        else:
            self.pooler = nn.Identity() if each else nn.Sequential(nn.Linear(width, width), nn.Tanh())
            self.dropout = nn.Dropout(settings.dropout)
            self.head = nn.Linear(width, outputs)
        normal(self, settings.std)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T) int64 -> (B, outputs) scores, or (B, T, outputs) at each token."""
        states = self.encoder(self.embeddings(x), not_padding(x))  # (B, T, D)
        if self.masked:
            scores: Tensor = self.token_head(states)
        else:
            scores = self.head(self.dropout(self.pooler(states if self.each else states[:, 0])))
        return scores


ENCODER = (  # what BERT and ELECTRA have in common
    (r"\bLayerNorm\.", "norm."),
    (r"\.gamma$", ".weight"),  # in old files
    (r"\.beta$", ".bias"),
    (r"^(bert|electra)\.", ""),
    (r"^embeddings\.word_embeddings\.", "embeddings.tokens."),
    (r"^embeddings\.token_type_embeddings\.", "embeddings.segments."),
    (r"^embeddings\.position_embeddings\.", "embeddings.positions.table."),
    (r"^encoder\.layer\.", "encoder.blocks."),
    (r"\.attention\.self\.([qkv])(uery|ey|alue)\.", r".attention.\1."),
    (r"\.attention\.output\.dense\.", ".attention.out."),
    (r"\.attention\.output\.norm\.", ".norm1."),
    (r"\.intermediate\.dense\.", ".mlp.hidden."),
    (r"\.output\.dense\.", ".mlp.out."),
    (r"\.output\.norm\.", ".norm2."),
)


@model(
    "bert",
    settings=BERTSettings,
    sizes={
        "tiny": {"layers": 2, "width": 64, "mlp": 256, "heads": 4, "std": 0.1},
        "base": {"layers": 12, "width": 768, "mlp": 3072, "heads": 12, "dropout": 0.1},
        "large": {"layers": 24, "width": 1024, "mlp": 4096, "heads": 16, "dropout": 0.1},
    },
    paper="Devlin et al. 2019, BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
    tasks=("masked-language-modelling", "classification"),
    inputs=("tokens",),
    renames=(
        *ENCODER,
        (r"^pooler\.dense\.", "pooler.0."),
        (r"^classifier\.", "head."),
        (r"^cls\.predictions\.transform\.", "token_head."),
        (r"^cls\.predictions\.(decoder\.)?", "token_head.output."),
    ),
    family="text",
    notes="The usual reader of texts: train it on masked tokens without labels, then for classes. It says nothing by "
    "itself, and attention costs the square of the length.",
    usual={"tiny": (64, 293), "base": (512, 30_522), "large": (512, 30_522)},
)
def build(settings: BERTSettings, shape: Shape, outputs: int, *, each: bool = False) -> nn.Module:
    """Tokens (B, at most T) -> (B, outputs) scores, or (B, T, outputs) with `each`."""
    return BERT(settings, shape, outputs, each)
