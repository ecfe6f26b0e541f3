"""Faster R-CNN (Ren et al. 2015): the network proposes its regions itself, from the features that classify them.

=======  ===========================  =======  ======  ======================  ============  ================
size     backbone                     anchors  hidden  M parameters            proposals     from
=======  ===========================  =======  ======  ======================  ============  ================
tiny     4 convolutions, stride 4     9        128     0.2 at 3 labels         100           ours
r50-fpn  ResNet-50 with a pyramid     3        1024    41.8 at 90 labels       1000          Lin et al. 2017
=======  ===========================  =======  ======  ======================  ============  ================

A small convolution looks at every place of the features and says for each of its anchors (boxes of fixed sizes and
ratios around the place) whether an object is there and how the box should move: the region proposal network. The best
proposals, after non-maximum suppression, go through pooling and the head of Fast R-CNN. `r50-fpn` has a feature pyramid
(Lin et al. 2017), one size of anchors on each level, and the state-dict keys of torchvision's
`fasterrcnn_resnet50_fpn`, whose published weights load (label k is their class k + 1; images as ImageNet's,
normalised). Its batch normalisation is frozen, which is right for published weights (torchvision runs those of COCO
with an epsilon of 0 there, here it is 1e-5); without them set `norm = "group"`.

The loss is the sum of the two networks' losses (eq. 1 and Girshick 2015, eq. 1), each the mean over the anchors or
regions that were sampled in that image.

On a GPU the gradient of the pyramid's pooling (torchvision's `roi_align`) is not the same in every run: with
deterministic kernels torchvision puts a version in its place that it compiles and that is slower and needs more
memory, so `train.deterministic = false` may be wanted for `r50-fpn`. `tiny` needs neither.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, batched_nms
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from shared_models.boxes import area
from shared_models.detection import Detector
from shared_models.models import ModelSettings, Shape, model
from shared_models.regions import Chosen, Sampling, TwoBranches, choose, crop, decode, detections, region_loss, take
from shared_models.zoo.rcnn import Fraction, small
from shared_models.zoo.resnet import Norm, ResNetFeatures

PLAIN = (1.0, 1.0, 1.0, 1.0)  # the proposals' boxes are coded as they are


class FasterRCNNSettings(ModelSettings):
    """The network's form, and what is sampled and kept.

    Attributes:
        backbone: `small` (ours, one map of stride 4) or `resnet50-fpn` (five maps of strides 4 to 64).
        norm: of the backbone: `group`, `batch` or `frozen`.
        anchors: for each feature map the sides of its anchors, in pixels.
        ratios: of the anchors, height by width; every side comes in each.
        hidden: width of the head's two layers.
        grid: bins of a region's side.
        anchors_sampled: how many anchors of an image the loss sees, at most half of them objects.
        regions: how many regions of an image the loss of the head sees, at most a quarter of them objects.
        candidates: the best anchors of each feature map, before non-maximum suppression.
        proposals: what is left of them after it at most.
        proposal_overlap: IoU above which the less likely of two proposals goes.
        foreground: IoU with a true box from which a region is an object, below which it is background.
        detections: how many boxes an image has at most.
        overlap: IoU above which the lower score of one class goes.
        least: scores below it are no detection.
    """

    backbone: Literal["small", "resnet50-fpn"]
    norm: Norm = "group"
    anchors: Annotated[tuple[Annotated[tuple[PositiveFloat, ...], Field(min_length=1)], ...], Field(min_length=1)]
    ratios: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.5, 1.0, 2.0)
    hidden: PositiveInt
    grid: PositiveInt
    anchors_sampled: PositiveInt
    regions: PositiveInt
    candidates: PositiveInt
    proposals: PositiveInt
    proposal_overlap: Fraction = 0.7
    foreground: float = Field(0.5, gt=0.0, le=1.0)
    detections: PositiveInt = 100
    overlap: Fraction = 0.5
    least: float = Field(0.05, gt=0.0, le=1.0)

    @model_validator(mode="after")
    def _anchors_fit_maps(self) -> FasterRCNNSettings:
        maps = len(BACKBONES[self.backbone].strides)
        if len(self.anchors) != maps:
            raise ValueError(
                f"anchors should have {maps} entries for backbone {self.backbone}, not {len(self.anchors)}"
            )
        if len({len(sides) for sides in self.anchors}) != 1:
            raise ValueError("anchors should have as many sides on each feature map")
        return self


class Pyramid(nn.Module):
    """ResNet-50 and its feature pyramid: (B, C, H, W) -> five maps (B, 256, H / stride, W / stride)."""

    strides = (4, 8, 16, 32, 64)
    width = 256

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.body = ResNetFeatures((3, 4, 6, 3), True, 64, "imagenet", norm, channels)
        self.fpn = FeaturePyramidNetwork(list(self.body.widths), self.width, LastLevelMaxPool())

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps, finest first."""
        return list(self.fpn(OrderedDict((str(i), m) for i, m in enumerate(self.body(x)))).values())


class SingleMap(nn.Module):
    """Four convolutions: (B, C, H, W) -> one map (B, 64, H / 4, W / 4)."""

    strides = (4,)
    width = 64

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.body = small(channels, norm)[:-1]

    def forward(self, x: Tensor) -> list[Tensor]:
        """The map."""
        return [self.body(x)]


BACKBONES: dict[str, type[Pyramid | SingleMap]] = {"small": SingleMap, "resnet50-fpn": Pyramid}


class ProposalHead(nn.Module):
    """For each anchor at each place of each map a score and a shift (Ren et al. 2015, Figure 3)."""

    def __init__(self, width: int, anchors: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Sequential(nn.Conv2d(width, width, 3, padding=1)))  # nested as in torchvision
        self.cls_logits = nn.Conv2d(width, anchors, 1)
        self.bbox_pred = nn.Conv2d(width, 4 * anchors, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.get_parameter("bias"))

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """For each map scores (B, A) and shifts (B, A, 4), float32; A goes through rows, columns and anchors."""
        hidden = [F.relu(self.conv(m)) for m in maps]
        scores = [self.cls_logits(h).float().permute(0, 2, 3, 1).flatten(1) for h in hidden]
        shifts = [self.bbox_pred(h).float().permute(0, 2, 3, 1).unflatten(3, (-1, 4)).flatten(1, 3) for h in hidden]
        return scores, shifts


def lay_anchors(size: tuple[int, int], stride: int, sides: tuple[float, ...], ratios: tuple[float, ...]) -> Tensor:
    """Anchors of one map in pixels: (rows columns ratios sides, 4), around the upper left corner of each place."""
    side, ratio = torch.tensor(sides), torch.tensor(ratios)[:, None]
    extent = torch.stack([side / ratio.sqrt(), side * ratio.sqrt()], dim=-1).reshape(-1, 2)  # width, height
    around = (torch.cat([-extent, extent], dim=1) / 2).round()  # whole pixels, as in the published models
    rows, columns = torch.meshgrid(*(torch.arange(n) * stride for n in size), indexing="ij")
    places = torch.stack([columns, rows, columns, rows], dim=-1)  # (rows, columns, 4)
    return (places[:, :, None] + around).reshape(-1, 4)


class ProposalNetwork(nn.Module):
    """Proposes regions and says how wrong it was."""

    def __init__(self, settings: FasterRCNNSettings, width: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.settings, self.strides = settings, strides
        self.head = ProposalHead(width, len(settings.anchors[0]) * len(settings.ratios))
        self.sampling = Sampling(settings.anchors_sampled, 0.5, 0.7, (0.0, 0.3), nearest=True)

    def forward(self, x: Tensor, maps: list[Tensor], y: Tensor) -> tuple[Tensor, Tensor]:
        """Proposals (B, P, 4), best first and padded with zeros, through which no gradient goes; losses (B,)."""
        settings, (height, width) = self.settings, x.shape[2:]
        laid = [
            lay_anchors((m.shape[2], m.shape[3]), stride, sides, settings.ratios)
            for m, stride, sides in zip(maps, self.strides, settings.anchors, strict=True)
        ]
        pixels = torch.tensor([width, height, width, height], device=x.device)
        anchors = [level.to(x.device) / pixels for level in laid]  # fractions, (A_l, 4) each
        scores, shifts = self.head(maps)
        proposals = self._best([s.detach() for s in scores], [s.detach() for s in shifts], anchors)
        every = torch.cat(anchors).expand(len(x), -1, -1)  # (B, A, 4)
        chosen = choose(every, y, self.sampling, training=self.training, spread=PLAIN)
        return proposals, proposal_loss(torch.cat(scores, dim=1), torch.cat(shifts, dim=1), chosen)

    def _best(self, scores: list[Tensor], shifts: list[Tensor], anchors: list[Tensor]) -> Tensor:
        """The most likely boxes of each map, then non-maximum suppression per map."""
        values, boxes, levels = [], [], []
        for level, (score, shift, anchor) in enumerate(zip(scores, shifts, anchors, strict=True)):
            value, index = score.topk(min(self.settings.candidates, score.shape[1]), dim=1)
            values.append(value)
            boxes.append(decode(take(shift, index), anchor[index], PLAIN).clamp(0, 1))
            levels.append(torch.full_like(index, level))
        best = zip(*(torch.cat(parts, dim=1) for parts in (boxes, values, levels)), strict=True)
        return torch.stack([self._thinned(*image) for image in best])

    def _thinned(self, boxes: Tensor, scores: Tensor, levels: Tensor) -> Tensor:
        there = area(boxes) > 0
        boxes, scores, levels = boxes[there], scores[there], levels[there]
        kept = batched_nms(boxes, scores, levels, self.settings.proposal_overlap)[: self.settings.proposals]
        return F.pad(boxes[kept], (0, 0, 0, self.settings.proposals - len(kept)))


def proposal_loss(scores: Tensor, shifts: Tensor, chosen: Chosen) -> Tensor:
    """Ren et al. 2015, eq. 1: mean over an image's sampled anchors of L_cls + [object] L_reg.

    Args:
        scores: (B, A).
        shifts: (B, A, 4).
        chosen: S of the anchors.

    Returns:
        (B,).
    """
    objects = (chosen.labels > 0).float()  # (B, S)
    classes = F.binary_cross_entropy_with_logits(take(scores, chosen.index), objects, reduction="none")
    own = take(shifts, chosen.index)  # (B, S, 4)
    boxes = F.smooth_l1_loss(own, chosen.targets, reduction="none", beta=1 / 9).sum(dim=2) * objects
    return ((classes + boxes) * chosen.weights).sum(dim=1) / chosen.weights.sum(dim=1).clamp(min=1)


class RegionHead(nn.Module):
    """Pools regions and classifies them: the second half of Fast R-CNN."""

    def __init__(self, settings: FasterRCNNSettings, width: int, levels: int, outputs: int) -> None:
        super().__init__()
        self.grid = settings.grid
        self.pool = MultiScaleRoIAlign([str(i) for i in range(levels)], settings.grid, 2) if levels > 1 else None
        self.box_head = TwoMLPHead(width * settings.grid**2, settings.hidden)
        self.box_predictor = TwoBranches(settings.hidden, outputs)

    def forward(self, x: Tensor, maps: list[Tensor], regions: Tensor) -> tuple[Tensor, Tensor]:
        """Regions (B, S, 4) -> scores (B, S, K + 1) and shifts (B, S, K + 1, 4)."""
        if self.pool is None:
            windows = crop(maps[0], regions, self.grid, points=2).flatten(0, 1)  # (B S, C', grid, grid)
        else:  # each from the map that fits its size (Lin et al. 2017, eq. 1)
            height, width = x.shape[2:]
            boxes = list(regions * torch.tensor([width, height, width, height], device=x.device))
            named = OrderedDict((str(i), m) for i, m in enumerate(maps))
            windows = self.pool(named, boxes, [(height, width)] * len(x))
        scores, shifts = self.box_predictor(self.box_head(windows).unflatten(0, regions.shape[:2]))
        return scores, shifts


class FasterRCNN(Detector):
    """Backbone, proposals, head."""

    def __init__(self, settings: FasterRCNNSettings, channels: int, outputs: int) -> None:
        super().__init__()
        self.settings = settings
        self.backbone = BACKBONES[settings.backbone](channels, settings.norm)
        self.levels = levels = min(len(self.backbone.strides), 4)  # of a pyramid the coarsest map only proposes
        self.rpn = ProposalNetwork(settings, self.backbone.width, self.backbone.strides)
        self.roi_heads = RegionHead(settings, self.backbone.width, levels, outputs)
        self.sampling = Sampling(settings.regions, 0.25, settings.foreground, (0.0, settings.foreground))

    def forward(self, x: Tensor, y: Tensor, proposals: Tensor | None = None) -> dict[str, Tensor]:
        """See `Detector`; proposals from outside are not used. In training the true boxes join the network's own."""
        settings = self.settings
        maps = self.backbone(x)
        regions, loss = self.rpn(x, maps, y)
        maps = maps[: self.levels]
        if self.training:
            regions = torch.cat([regions, y[..., 1:]], dim=1)  # (B, P + M, 4)
        chosen = choose(regions, y, self.sampling, training=self.training)
        if self.training:
            scores, shifts = self.roi_heads(x, maps, take(regions, chosen.index))
            return {"loss": loss + region_loss(scores, shifts, chosen)}
        scores, shifts = self.roi_heads(x, maps, regions)
        own = region_loss(take(scores, chosen.index), take(shifts, chosen.index), chosen)
        found = detections(
            regions, scores, shifts, keep=settings.detections, overlap=settings.overlap, least=settings.least
        )
        return {"loss": loss + own, "found": found}


@model(
    "faster-rcnn",
    settings=FasterRCNNSettings,
    sizes={
        "tiny": {
            "backbone": "small", "anchors": ((10.0, 24.0, 48.0),), "hidden": 128, "grid": 4,
            "anchors_sampled": 128, "regions": 64, "candidates": 300, "proposals": 100, "least": 0.01,
        },
        "r50-fpn": {
            "backbone": "resnet50-fpn", "norm": "frozen", "anchors": ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,)),
            "hidden": 1024, "grid": 7, "anchors_sampled": 256, "regions": 512, "candidates": 1000, "proposals": 1000,
        },
    },
    paper="Ren et al. 2015, Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks",
    tasks=("detection",),
    per_sample_gradients=("loop",),
    heads=("roi_heads.box_predictor.*",),
    family="detection",
    notes="The most accurate of its family, and needs no search for proposals: a small network finds them in the "
    "features that are there already, and learns to. The most parts to tune: anchors should have the objects' sizes.",
    usual={"tiny": (3, 120, 160), "r50-fpn": (3, 800, 1088)},
)  # fmt: skip
def build(settings: FasterRCNNSettings, shape: Shape, outputs: int) -> nn.Module:
    """A `Detector` for images of any size."""
    return FasterRCNN(settings, shape[0], outputs)
