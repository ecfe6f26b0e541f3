"""What the report of an attack shows: images as PNG files, and ROC curves on two logarithmic axes as inline SVG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from PIL import Image
from torch import Tensor

from simulations.charts import WIDTH, svg

SIDE = 128  # pixels of a picture's longer side, about


def png(image: Tensor) -> str:
    """A (C, H, W) image of pixels from 0 to 1, enlarged without smoothing: a PNG file, base64."""
    grey = (image * 255).round().clamp(0, 255).byte()
    array = grey[0].numpy() if len(grey) == 1 else grey.permute(1, 2, 0).numpy()
    drawn = Image.fromarray(array)
    factor = max(1, round(SIDE / max(drawn.size)))
    drawn = drawn.resize((drawn.width * factor, drawn.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    drawn.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Trace:
    """One ROC curve.

    Attributes:
        style: class of its colour and stroke, e.g. `level-0`.
        points: (FPR, TPR), both rising.
        bound: (FPR, TPR) of what the guarantee allows; empty without one.
        said: for a screen reader.
    """

    style: str
    points: Sequence[tuple[float, float]]
    bound: Sequence[tuple[float, float]]
    said: str


@dataclass(frozen=True)
class Mark:
    """One level's AUC with its interval, and the most that its guarantee allows."""

    label: str
    style: str
    mean: float
    low: float
    high: float
    most: float | None


def roc_chart(key: str, title: str, traces: Sequence[Trace], decades: int) -> Markup:
    """TPR over FPR, both from 10^-decades to 1 on logarithmic axes; dashed: guessing; dotted: what is allowed."""
    left, right, head, foot, height = 58, 14, 30, 44, 350

    def sx(fpr: float) -> float:
        return round(WIDTH - right + _decade(fpr, decades) / decades * (WIDTH - left - right), 1)

    def sy(tpr: float) -> float:
        return round(head - _decade(tpr, decades) / decades * (height - head - foot), 1)

    out = [Markup('<text class="axis" x="4" y="16">true-positive rate</text>')]
    for power in range(-decades, 1):
        rate, name = 10.0**power, f"{100 * 10.0**power:g} %"
        out.append(Markup('<path class="grid" d="M{} {}H{}M{} {}V{}"/>').format(
            left, sy(rate), WIDTH - right, sx(rate), head, height - foot))  # fmt: skip
        out.append(Markup('<text class="tick end" x="{}" y="{}">{}</text>').format(left - 8, sy(rate) + 4, name))
        place = "end" if power == 0 else "mid"
        x = sx(rate) + (right - 2 if power == 0 else 0)
        out.append(Markup('<text class="tick {}" x="{}" y="{}">{}</text>').format(place, x, height - foot + 19, name))
    out.append(Markup('<text class="axis mid" x="{}" y="{}">false-positive rate</text>').format(
        (left + WIDTH - right) / 2, height - 6))  # fmt: skip
    low = 10.0**-decades
    out.append(Markup('<path class="guess" d="M{} {}L{} {}"/>').format(sx(low), sy(low), sx(1), sy(1)))
    for kind in ("bound", "points"):
        for trace in traces:
            if shown := [(x, y) for x, y in getattr(trace, kind) if x >= low * 0.999]:
                path = "L".join(f"{sx(x)} {sy(y)}" for x, y in shown)
                name = "allowed" if kind == "bound" else "line"
                out.append(Markup('<path class="{} {}" d="M{}"/>').format(name, trace.style, path))
    return svg(key, title, "; ".join(trace.said for trace in traces) + ".", height, out)


def _decade(rate: float, decades: int) -> float:
    return max(math.log10(rate), -decades) if rate > 0 else -decades


def auc_chart(key: str, title: str, marks: Sequence[Mark]) -> Markup:
    """AUC by level, from left to right: mean with interval, a short bar where the guarantee's bound lies."""
    left, right, head, foot, height = 44, 14, 30, 30, 300
    bottom = min(0.4, math.floor(10 * min(m.low for m in marks)) / 10)
    step = (WIDTH - left - right) / len(marks)

    def sy(value: float) -> float:
        return round(height - foot - (value - bottom) / (1 - bottom) * (height - head - foot), 1)

    out = [Markup('<text class="axis" x="4" y="16">AUC</text>')]
    for tenth in range(round(10 * bottom), 11):
        y = tenth / 10
        kind = "guess" if tenth == 5 else "grid"
        out.append(Markup('<path class="{}" d="M{} {}H{}"/>').format(kind, left, sy(y), WIDTH - right))
        out.append(Markup('<text class="tick end" x="{}" y="{}">{:.1f}</text>').format(left - 8, sy(y) + 4, y))
    for i, m in enumerate(marks):
        x = round(left + (i + 0.5) * step, 1)
        if m.most is not None:
            out.append(Markup('<path class="most {}" d="M{} {}h36"/>').format(m.style, x - 18, sy(m.most)))
        low, high = sy(m.low), sy(m.high)
        d = f"M{x} {low}V{high}M{x - 5} {low}h10M{x - 5} {high}h10"
        out.append(Markup('<path class="whisker" d="{}"/>').format(d))
        circle = '<circle class="dot {}" cx="{}" cy="{}" r="4.5"/>'
        out.append(Markup(circle).format(m.style, x, sy(m.mean)))
        out.append(Markup('<text class="value" x="{}" y="{}">{:.3f}</text>').format(x + 10, sy(m.mean) - 6, m.mean))
        out.append(Markup('<text class="tick mid" x="{}" y="{}">{}</text>').format(x, height - 8, m.label))
    said = "; ".join(
        f"{m.label}: {m.mean:.3f}, interval {m.low:.3f} to {m.high:.3f}"
        + (f", allowed {m.most:.3f}" if m.most is not None else "")
        for m in marks
    )
    return svg(key, title, f"AUC by level of privacy. {said}.", height, out)


def swatch(style: str) -> Markup:
    """The legend's sample of a curve."""
    line = '<svg class="swatch" viewBox="0 0 38 16" aria-hidden="true"><path class="line {}" d="M1 8H37"/></svg>'
    return Markup(line).format(style)
