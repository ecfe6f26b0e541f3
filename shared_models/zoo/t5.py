"""T5 (Raffel et al. 2020), version 1.0: a transformer that knows distances between tokens and not their places.

=====  =======  =====  ==========  ====  =====  =======  ============  ================================
size   layers   width  head width  mlp   heads  dropout  M parameters  from
=====  =======  =====  ==========  ====  =====  =======  ============  ================================
tiny   2 + 2    64     16          128   4      0        0.2           ours, for texts of about 32
small  6 + 6    512    64          2048  8      0.1      60.5          Raffel et al. 2020, section 3.7
base   12 + 12  768    64          3072  12     0.1      222.9         Raffel et al. 2020, section 3.1.1
=====  =======  =====  ==========  ====  =====  =======  ============  ================================

Parameters with a vocabulary of 32,128, of 293 for `tiny`. The norm comes before each layer and only scales, no layer
has a bias, the products of attention are not scaled, and a number for each distance and head is added to them, the same
in all layers. Outputs are those of Hugging Face's T5ForConditionalGeneration with its weights; a vocabulary with other
ids keeps its own embeddings.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from shared_models.models import ModelSettings, Shape, model
from shared_models.tokens import Bytes
from shared_models.transformer import BlockSettings, DecoderBlock, EncoderBlock, EncoderDecoder, causal, not_padding


class T5Settings(ModelSettings):
    """The columns of the table above, and the distances.

    Attributes:
        encoder: layers.
        decoder: layers.
        width: numbers per token (d_model).
        head_width: numbers per token and head (d_kv).
        mlp: width of a layer's hidden layer (d_ff).
        heads: attention heads.
        buckets: into how many classes distances are put.
        distance: tokens that are further apart than this are all in the last one.
        dropout: of the embeddings, the attention weights, layers and the last norm; 0 is none.
    """

    encoder: NonNegativeInt
    decoder: PositiveInt
    width: PositiveInt
    head_width: PositiveInt
    mlp: PositiveInt
    heads: PositiveInt
    buckets: int = Field(32, ge=4, multiple_of=2)
    distance: PositiveInt = 128
    dropout: float = Field(0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _far_is_beyond_near(self) -> T5Settings:
        if self.distance <= self.buckets // 2:
            raise ValueError(f"distance {self.distance} should be more than half of the {self.buckets} buckets")
        return self


def bucket(apart: Tensor, buckets: int, distance: int, both: bool) -> Tensor:
    """The class of a signed distance j - i from token i to token j (Raffel et al. 2020, section 2.1): int64, any shape.

    Half of the classes are for 0, 1, 2, ..., the others grow wider like a logarithm up to `distance`. With `both`, half
    of all are for tokens ahead; without, those are all at 0, for a causal mask hides them.
    """
    if both:
        buckets = buckets // 2
        ahead, apart = buckets * (apart > 0), apart.abs()
    else:
        ahead, apart = torch.zeros_like(apart), (-apart).clamp(min=0)
    near = buckets // 2
    far = near + ((apart.clamp(min=1) / near).log() / math.log(distance / near) * (buckets - near)).long()
    return ahead + torch.where(apart < near, apart, far.clamp(max=buckets - 1))


class Distances(nn.Module):
    """What is added to the products of attention: (1, h, N, N)."""

    def __init__(self, settings: T5Settings, both: bool) -> None:
        super().__init__()
        self.distance = settings.distance
        self.both = both
        self.table = nn.Embedding(settings.buckets, settings.heads)

    def forward(self, index: Tensor) -> Tensor:
        """A number per head for each pair of places, index (N,) int64."""
        apart = index - index[:, None]  # (N, N)
        found: Tensor = self.table(bucket(apart, self.table.num_embeddings, self.distance, self.both))  # (N, N, h)
        return found.permute(2, 0, 1)[None]


class T5(EncoderDecoder):
    """One table embeds the source and the target and gives the scores, and one of distances serves all layers."""

    def __init__(self, settings: T5Settings, vocabulary: int) -> None:
        super().__init__()
        block = BlockSettings(
            settings.width,
            settings.heads,
            settings.mlp,
            norm="rms",
            before=True,
            dropout=settings.dropout,
            bias=False,
            eps=1e-6,
            head_width=settings.head_width,
            scale=1.0,
        )
        self.embedding = nn.Embedding(vocabulary, settings.width)
        self.encoder_distances = Distances(settings, both=True)
        self.encoder = nn.ModuleList(EncoderBlock(block) for _ in range(settings.encoder))
        self.encoder_norm = block.make_norm()
        self.decoder_distances = Distances(settings, both=False)
        self.decoder = nn.ModuleList(DecoderBlock(block) for _ in range(settings.decoder))
        self.decoder_norm = block.make_norm()
        self.dropout = nn.Dropout(settings.dropout)
        self.initialise(settings)

    def initialise(self, settings: T5Settings) -> None:
        """The authors': tokens of variance 1, and queries that are small enough to do without a scale."""
        nn.init.normal_(self.embedding.weight)
        for name, module in self.named_modules():
            if isinstance(module, Distances):
                nn.init.normal_(module.table.weight, std=settings.width**-0.5)
            elif isinstance(module, nn.Linear):
                fan = module.in_features * (settings.head_width if name.endswith(".q") else 1)
                nn.init.normal_(module.weight, std=fan**-0.5)

    def encode(self, source: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)."""
        x = self.dropout(self.embedding(source))
        bias = self.encoder_distances(torch.arange(source.shape[1], device=source.device))
        for block in self.encoder:
            x = block(x, not_padding(source), bias)
        memory: Tensor = self.dropout(self.encoder_norm(x))
        return memory

    def decode(self, memory: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """(B, T, D), (B, T), (B, U) -> (B, U, V)."""
        x = self.dropout(self.embedding(target))
        bias = self.decoder_distances(torch.arange(target.shape[1], device=target.device))
        keep = causal(target.shape[1], target.device) & not_padding(target)
        for block in self.decoder:
            x = block(x, memory, keep, not_padding(source), bias)
        x = self.dropout(self.decoder_norm(x)) * self.embedding.embedding_dim**-0.5  # for the table's other use
        return F.linear(x, self.embedding.weight)


@model(
    "t5",
    settings=T5Settings,
    sizes={
        "tiny": {"encoder": 2, "decoder": 2, "width": 64, "head_width": 16, "mlp": 128, "heads": 4},
        "small": {
            "encoder": 6, "decoder": 6, "width": 512, "head_width": 64, "mlp": 2048, "heads": 8, "dropout": 0.1,
        },
        "base": {
            "encoder": 12, "decoder": 12, "width": 768, "head_width": 64, "mlp": 3072, "heads": 12, "dropout": 0.1,
        },
    },
    paper="Raffel et al. 2020, Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
    tasks=("translation", "denoising"),
    inputs=("tokens",),
    heads=(),
    per_sample_gradients=("vmap", "loop"),
    renames=(
        (r"^(shared|(en|de)coder\.embed_tokens|lm_head)\.", "embedding."),
        (r"^(encoder|decoder)\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.", r"\1_distances.table."),
        (r"^(encoder|decoder)\.final_layer_norm\.", r"\1_norm."),
        (r"^(encoder|decoder)\.block\.", r"\1."),
        (r"\.layer\.0\.SelfAttention\.", ".attention."),
        (r"\.layer\.1\.EncDecAttention\.", ".cross."),
        (r"\.layer\.\d\.DenseReluDense\.", ".mlp."),
        (r"\.layer\.0\.layer_norm\.", ".norm1."),
        (r"\.layer\.1\.layer_norm\.", ".norm2."),
        (r"\.layer\.2\.layer_norm\.", ".norm3."),
        (r"\.wi\.", ".hidden."),
        (r"\.wo\.", ".out."),
        (r"\.o\.", ".out."),
    ),
    family="sequence to sequence",
    notes="Published weights load into it. It has no longest text: distances are learned, and those beyond `distance` "
    "look alike. Made for filling in spans that are left out, of which it writes the gaps alone.",
    usual={"tiny": (32, Bytes.size), "small": (512, 32128), "base": (512, 32128)},
)  # fmt: skip
def build(settings: T5Settings, shape: Shape, outputs: int) -> nn.Module:
    """An `EncoderDecoder` for texts of any length, `outputs` being the vocabulary V again."""
    return T5(settings, shape[1])
