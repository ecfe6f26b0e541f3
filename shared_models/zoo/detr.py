"""DETR (Carion et al. 2020): detection as a set. A transformer turns N queries into N boxes, all at once.

========  ==================  ==============  =====  =====  =======  ============  =================================
size      backbone, stride    layers          width  mlp    queries  M parameters  from
========  ==================  ==============  =====  =====  =======  ============  =================================
tiny      4 basic blocks, 8   1 + 2           64     128    40       0.5           ours, images of 64 to 200 pixels
r50       ResNet-50, 32       6 + 6           256    2048   100      41.5          Carion et al. 2020, Table 1
r50-dc5   ResNet-50, 16       6 + 6           256    2048   100      41.5          the same: dilated last stage
r101      ResNet-101, 32      6 + 6           256    2048   100      60.5          the same
========  ==================  ==============  =====  =====  =======  ============  =================================

Parameters at 3 channels and 91 labels (20 for `tiny`). No region, no grid, no suppression of duplicates: a bipartite
matching pairs each true box with one query, and every other query learns to say that there is nothing. Attention is
written out, as in `vit`.

DETR is slow to learn: the paper trains 500 epochs, mostly because a query has to find out where to look. `tiny`
therefore starts each query at a point of its own (`anchors`; Wang et al. 2022, Anchor DETR). On 8 blood smears (BCCD at
160x120 pixels, 143 cells; AdamW 0.001, clip 1, cosine over 800 steps) that is a training mAP50 of 0.99 instead of 0.27
after 400 steps, and 1.00 instead of 0.39 at the end (one seed).

Hugging Face's weights load into the paper's sizes. Those of the authors hold the three projections of each attention
as one tensor, `in_proj_weight`, which is to be cut in three before.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from shared_models.boxes import PADDING, generalized_iou, to_centres, to_corners
from shared_models.detection import Detector
from shared_models.models import Shape, model
from shared_models.transformer import AttentionSettings
from shared_models.zoo.resnet import ResNetFeatures


class DETRSettings(AttentionSettings):
    """The backbone, the transformer, and the weights of the loss.

    Attributes:
        blocks: residual blocks of the backbone's four stages.
        bottleneck: whether they are bottlenecks (ResNet-50 and deeper).
        channels: of the backbone after its stem.
        dilate_last: how many of the last stages keep the resolution: the stride is 32, 16, 8 or 4.
        norm: of the backbone: `group`, or `frozen` batch normalisation for weights from elsewhere.
        encoder: layers.
        decoder: layers.
        width: numbers per token (d in the paper), a multiple of `heads` and of 4.
        heads: attention heads.
        mlp: width of a layer's hidden layer.
        queries: how many boxes an image has at most (N in the paper).
        dropout: after attention weights and layers.
        waves: periods that the fastest wave of the positions has along a side of the image.
        temperature: by what factor the slowest wave is slower.
        anchors: whether each query starts at a point, evenly spread, from which its box is told.
        auxiliary: whether the loss is taken after every decoder layer, each with a matching of its own, and added.
        nothing: weight of the class error of queries without an object.
        distance: weight of the L1 distance of centre and size.
        overlap: weight of 1 - GIoU.
    """

    blocks: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]
    bottleneck: bool
    channels: int = Field(gt=0, multiple_of=8)
    dilate_last: int = Field(0, ge=0, le=3)
    norm: Literal["group", "frozen"]
    encoder: int = Field(ge=0)
    decoder: PositiveInt
    width: int = Field(gt=0, multiple_of=4)
    mlp: PositiveInt
    queries: PositiveInt
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    waves: PositiveFloat = 1.0
    temperature: PositiveFloat = 10000.0
    anchors: bool = False
    auxiliary: bool = True
    nothing: PositiveFloat = 0.1
    distance: NonNegativeFloat = 5.0
    overlap: NonNegativeFloat = 2.0


class Attention(nn.Module):
    """Multi-head attention of N tokens to S tokens: (B, N, D), (B, S, D), (B, S, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(D/h)) v, per head."""
        given = ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer, x in given)  # (B, h, ., D/h)
        weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[3]), dim=-1)  # (B, h, N, S)
        out: Tensor = self.out_proj((self.dropout(weights) @ v).transpose(1, 2).flatten(2))  # (B, N, D)
        return out


class Layer(nn.Module):
    """What encoder and decoder layers share. Positions are added to what is compared, never to what is passed on."""

    def __init__(self, settings: DETRSettings) -> None:
        super().__init__()
        self.self_attn = Attention(settings.width, settings.heads, settings.dropout)
        self.linear1 = nn.Linear(settings.width, settings.mlp)
        self.linear2 = nn.Linear(settings.mlp, settings.width)
        self.norm1 = nn.LayerNorm(settings.width)
        self.norm2 = nn.LayerNorm(settings.width)
        self.dropout = nn.Dropout(settings.dropout)

    def attend(self, x: Tensor, places: Tensor) -> Tensor:
        """Tokens (B, N, D) to each other, with their positions (B or 1, N, D); normalised."""
        out: Tensor = self.norm1(x + self.dropout(self.self_attn(x + places, x + places, x)))
        return out

    def mlp(self, x: Tensor) -> Tensor:
        """Each token (B, N, D) by itself."""
        out: Tensor = x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x)))))
        return out


class EncoderLayer(Layer):
    """Self-attention, then an MLP, a normalisation after each (Carion et al. 2020, appendix A.3)."""

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """Tokens (B, S, D) and their positions (1, S, D) -> (B, S, D)."""
        out: Tensor = self.norm2(self.mlp(self.attend(x, places)))
        return out


class DecoderLayer(Layer):
    """Self-attention of the queries, attention to the image, then an MLP, a normalisation after each."""

    def __init__(self, settings: DETRSettings) -> None:
        super().__init__(settings)
        self.multihead_attn = Attention(settings.width, settings.heads, settings.dropout)
        self.norm3 = nn.LayerNorm(settings.width)

    def forward(self, x: Tensor, asked: Tensor, image: Tensor, places: Tensor) -> Tensor:
        """x (B, N, D), the queries' positions (B, N, D), image (B, S, D), its positions (1, S, D) -> (B, N, D)."""
        x = self.attend(x, asked)
        x = self.norm2(x + self.dropout(self.multihead_attn(x + asked, image + places, image)))
        out: Tensor = self.norm3(self.mlp(x))
        return out


class MLP(nn.Module):
    """Three linear layers: (..., D) -> (..., 4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, after) for after in (width, width, 4))

    def forward(self, x: Tensor) -> Tensor:
        """With rectifiers between."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        out: Tensor = self.layers[-1](x)
        return out


def sines(points: Tensor, width: int, waves: float, temperature: float) -> Tensor:
    """(..., 2) x, y in [0, 1] -> (..., width): half for y, half for x, sines and cosines beside each other.

    The fastest has `waves` periods along a side, the slowest is nearly `temperature` times slower.
    """
    steps = torch.arange(width // 4, device=points.device) / (width // 4)
    angles = points.flip(-1)[..., None] * (2 * math.pi * waves * temperature**-steps)  # (..., 2, D/4)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)


def even_points(count: int) -> Tensor:
    """`count` points spread evenly over the unit square, (count, 2): a sequence of low discrepancy (Roberts 2018)."""
    steps = torch.tensor([0.7548776662466927, 0.5698402909980532])  # 1/p and 1/p^2 where p^3 = p + 1
    return (0.5 + torch.arange(1, count + 1)[:, None] * steps) % 1


class Hungarian(torch.autograd.Function):
    """The cheapest pairing (Kuhn 1955): costs (..., N, M) and which columns count (..., M) -> (..., M) int64 rows.

    Columns that do not count, and those for which no row is left, get -1. As a function of its own, it may stand inside
    `torch.func.vmap`.
    """

    @staticmethod
    def forward(costs: Tensor, there: Tensor) -> Tensor:
        """Solve each problem by itself, on the CPU."""
        *leading, count = there.shape
        tables = costs.detach().float().nan_to_num().cpu().numpy().reshape(math.prod(leading), -1, count)
        columns = there.cpu().numpy().reshape(-1, count)
        rows = np.full_like(columns, -1, dtype=np.int64)
        for i in range(len(tables)):
            kept = columns[i].nonzero()[0]
            row, column = linear_sum_assignment(tables[i][:, kept])
            rows[i, kept[column]] = row
        return torch.from_numpy(rows.reshape(there.shape)).to(costs.device)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        """A choice has no gradient."""
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, costs: Tensor, there: Tensor) -> tuple[Tensor, int]:
        """One more leading dimension."""
        moved = (
            value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
            for value, dim in zip((costs, there), in_dims, strict=True)
        )
        return Hungarian.apply(*moved), 0


def match(scores: Tensor, boxes: Tensor, y: Tensor, distance: float = 5.0, overlap: float = 2.0) -> Tensor:
    """Which query each true box is paired with, at the least total cost (Carion et al. 2020, eq. 1).

    A pair costs -p(class) + distance * L1 - overlap * GIoU.

    Args:
        scores: (B, L, N, K + 1) of N queries after each of L layers, the last column is "nothing".
        boxes: (B, L, N, 4) centre and size.
        y: (B, M, 5) class and corners, class -1 pads.
        distance: weight of L1.
        overlap: weight of GIoU.

    Returns:
        (B, L, M) int64, -1 for padding and for boxes beyond the N queries.
    """
    labels, truth = y[..., 0], y[:, None, None, :, 1:]  # (B, M), (B, 1, 1, M, 4)
    layers, queries = boxes.shape[1:3]
    index = labels.clamp(min=0).long()[:, None, None].expand(-1, layers, queries, -1)
    chances = torch.softmax(scores, dim=-1).gather(3, index)  # (B, L, N, M)
    apart = (boxes[:, :, :, None] - to_centres(truth)).abs().sum(dim=4)
    shared = generalized_iou(to_corners(boxes)[:, :, :, None], truth)
    costs = distance * apart - overlap * shared - chances
    found: Tensor = Hungarian.apply(costs.detach(), (labels >= 0)[:, None].expand(-1, layers, -1))
    return found


def detr_loss(
    scores: Tensor, boxes: Tensor, y: Tensor, *, distance: float = 5.0, overlap: float = 2.0, nothing: float = 0.1
) -> Tensor:
    """Classes and boxes of the paired queries, "nothing" for all others (Carion et al. 2020, eq. 2 and appendix A.2).

    The class error is the weighted mean over an image's queries, the box error is divided by the image's own number of
    boxes (the authors' code takes the mean number of the batch). Arguments as for `match`; the sum over layers, (B,).
    """
    y = F.pad(y, (0, 0, 0, 1), value=PADDING)  # at least one row
    paired = match(scores, boxes, y, distance, overlap)  # (B, L, M)
    queries, none = boxes.shape[2], scores.shape[3] - 1

    taken = paired[..., None] == torch.arange(queries, device=y.device)  # (B, L, M, N)
    wanted = y[:, None, :, :1].long().where(taken, -1).amax(dim=2)  # (B, L, N)
    wanted = wanted.where(wanted >= 0, none)
    weights = torch.where(wanted == none, nothing, 1.0)
    errors = -torch.log_softmax(scores, dim=-1).gather(3, wanted[..., None]).squeeze(3)  # (B, L, N)
    classes = (weights * errors).sum(dim=2) / weights.sum(dim=2)  # (B, L)

    own = boxes.gather(2, paired.clamp(min=0)[..., None].expand(-1, -1, -1, 4))  # (B, L, M, 4)
    truth = y[:, None, :, 1:]
    apart = (own - to_centres(truth)).abs().sum(dim=3)
    missed = 1 - generalized_iou(to_corners(own), truth)
    each = ((distance * apart + overlap * missed) * (paired >= 0)).sum(dim=2)  # (B, L)
    count = (y[..., 0] >= 0).sum(dim=1, keepdim=True).clamp(min=1)
    return (classes + each / count).sum(dim=1)


def detections(scores: Tensor, boxes: Tensor) -> Tensor:
    """What `Detector` calls `found`: every query's likeliest class, (B, N, K + 1) and (B, N, 4) -> (B, N, 6)."""
    chance, labels = torch.softmax(scores, dim=-1)[..., :-1].max(dim=2)
    corners = to_corners(boxes).clamp(0, 1)
    found = torch.cat([labels[..., None].to(boxes.dtype), corners, chance[..., None]], dim=2)
    order = chance.argsort(dim=1, descending=True, stable=True)
    return found.take_along_dim(order[..., None], dim=1)


class DETR(Detector):
    """Backbone, encoder, decoder, and two heads on each query."""

    points: Tensor

    def __init__(self, settings: DETRSettings, channels: int, outputs: int) -> None:
        super().__init__()
        self.settings = settings
        blocks, deep, start = settings.blocks, settings.bottleneck, settings.channels
        self.backbone = ResNetFeatures(blocks, deep, start, "imagenet", settings.norm, channels, settings.dilate_last)
        self.input_proj = nn.Conv2d(self.backbone.widths[-1], settings.width, 1)
        self.encoder = nn.ModuleList(EncoderLayer(settings) for _ in range(settings.encoder))
        self.decoder = nn.ModuleList(DecoderLayer(settings) for _ in range(settings.decoder))
        self.norm = nn.LayerNorm(settings.width)
        self.query_embed = nn.Embedding(settings.queries, settings.width)
        self.class_embed = nn.Linear(settings.width, outputs + 1)
        self.bbox_embed = MLP(settings.width)
        for weight in (*self.encoder.parameters(), *self.decoder.parameters()):
            if weight.dim() > 1:
                nn.init.xavier_uniform_(weight)
        self.register_buffer("points", even_points(settings.queries), persistent=False)

    def ask(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> scores (B, L, N, K + 1) and boxes (B, L, N, 4), centre and size, after each decoder layer."""
        settings = self.settings
        maps = self.input_proj(self.backbone(x)[-1])  # (B, D, h, w)
        rows, columns = ((torch.arange(n, device=x.device) + 1) / n for n in maps.shape[2:])
        grid = torch.cartesian_prod(rows, columns).flip(1)  # (S, 2) x, y
        places = sines(grid, settings.width, settings.waves, settings.temperature)[None]  # (1, S, D)
        image = maps.flatten(2).transpose(1, 2)  # (B, S, D)
        for layer in self.encoder:
            image = layer(image, places)

        ids = torch.arange(settings.queries, device=x.device).expand(len(x), -1)
        asked = self.query_embed(ids)  # (B, N, D)
        if settings.anchors:
            asked = asked + sines(self.points, settings.width, settings.waves, settings.temperature)
        out, after = torch.zeros_like(asked), []
        for layer in self.decoder:
            out = layer(out, asked, image, places)
            after.append(out)
        out = self.norm(torch.stack(after if settings.auxiliary else after[-1:], dim=1))  # (B, L, N, D)

        boxes = self.bbox_embed(out).float()
        if settings.anchors:
            boxes = boxes + F.pad(torch.logit(self.points, eps=1e-3), (0, 2))
        return self.class_embed(out).float(), boxes.sigmoid()

    def forward(self, x: Tensor, y: Tensor, proposals: Tensor | None = None) -> dict[str, Tensor]:
        """See `Detector`."""
        settings = self.settings
        scores, boxes = self.ask(x)
        weights = {"distance": settings.distance, "overlap": settings.overlap, "nothing": settings.nothing}
        outputs = {"loss": detr_loss(scores, boxes, y, **weights)}
        if not self.training:
            outputs["found"] = detections(scores[:, -1], boxes[:, -1])
        return outputs


PAPER = {
    "bottleneck": True, "channels": 64, "norm": "frozen", "encoder": 6, "decoder": 6, "width": 256, "heads": 8,
    "mlp": 2048, "queries": 100, "dropout": 0.1,
}  # fmt: skip


@model(
    "detr",
    settings=DETRSettings,
    sizes={
        "tiny": {
            "blocks": (1, 1, 1, 1), "bottleneck": False, "channels": 16, "dilate_last": 2, "norm": "group",
            "encoder": 1, "decoder": 2, "width": 64, "heads": 4, "mlp": 128, "queries": 40, "waves": 4.0,
            "temperature": 20.0, "anchors": True,
        },
        "r50": {**PAPER, "blocks": (3, 4, 6, 3)},
        "r50-dc5": {**PAPER, "blocks": (3, 4, 6, 3), "dilate_last": 1},
        "r101": {**PAPER, "blocks": (3, 4, 23, 3)},
    },
    paper="Carion et al. 2020, End-to-End Object Detection with Transformers",
    tasks=("detection",),
    heads=("class_embed.*",),
    renames=(
        (r"^(transformer|model)\.", ""),
        (r"^backbone\.(0\.body|conv_encoder\.model)\.", "backbone."),
        (r"^input_projection\.", "input_proj."),
        (r"^query_position_embeddings\.", "query_embed."),
        (r"^class_labels_classifier\.", "class_embed."),
        (r"^bbox_predictor\.", "bbox_embed."),
        (r"^decoder\.(layer)?norm\.", "norm."),
        (r"^(encoder|decoder)\.layers\.", r"\1."),
        (r"\.self_attn_layer_norm\.", ".norm1."),
        (r"\.encoder_attn_layer_norm\.", ".norm2."),
        (r"^(encoder\..*)\.final_layer_norm\.", r"\1.norm2."),
        (r"^(decoder\..*)\.final_layer_norm\.", r"\1.norm3."),
        (r"\.encoder_attn\.", ".multihead_attn."),
        (r"\.fc(\d)\.", r".linear\1."),
    ),
    family="detection",
    notes="Nothing to tune about regions or duplicates, and good with large objects; slow to learn (hundreds of "
    "epochs), weaker with small ones, and attention costs the square of the image's tokens.",
    usual={"tiny": (3, 120, 160), "r50": (3, 800, 1066)},
)  # fmt: skip
def build(settings: DETRSettings, shape: Shape, outputs: int) -> nn.Module:
    """A `Detector` for images of any size."""
    return DETR(settings, shape[0], outputs)
