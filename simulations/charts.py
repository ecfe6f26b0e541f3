"""Inline SVG for the report: learning curves, bars and stacks of them, drawn without a plotting library.

Colours come from the page's CSS through class names (`centralized`, `isolated`, `federated`; `continual` is dashed or
hollow), so that one drawing serves light, dark and print. A place differs from another by colour and by marker shape,
a time by its stroke, so nothing depends on colour alone. Every text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH = 390  # units of every drawing; about one pixel on a phone, so that 13-unit text stays readable there
MARKERS = {
    "centralized": "M-4-4h8v8h-8z",
    "isolated": "M0-5.5L5 4h-10z",
    "federated": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
}


@dataclass(frozen=True)
class Point:
    """One place on a curve: x, the mean over seeds, and the smallest and largest of them."""

    x: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """One curve; `style` is a place and a time, e.g. `federated continual`, then `m1` to `m5` for other methods."""

    label: str
    style: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Bar:
    """One bar in the axis' unit: a value with its sd (None: one seed), or no value and the reason in `text`.

    `mark` is a second value shown as a diamond on the same axis.
    """

    label: str
    style: str
    value: float | None
    sd: float | None
    text: str
    mark: float | None = None


@dataclass(frozen=True)
class Stack:
    """One bar of several segments, one after another; `text` is the figure beside it."""

    label: str
    values: Sequence[float]
    text: str


@dataclass(frozen=True)
class Axis:
    """What bars are drawn against.

    Attributes:
        ticks: round numbers from end to end, 0 among them.
        unit: theirs.
        room: for the figures beside the bars.
    """

    ticks: Sequence[float]
    unit: str
    room: int = 68


PERCENT = Axis((0, 50, 100), "%")


def axis(values: Sequence[float], unit: str, figures: Sequence[str] = ()) -> Axis:
    """An axis from 0, or below it, that holds the values; percent ends at 100 where none is larger."""
    low, high = min([0.0, *values]), max([0.0, *values])
    usual = unit == "%" and low >= 0 and high <= 100
    room = max([PERCENT.room, *map(_width, figures)])
    return Axis(PERCENT.ticks if usual else ticks(low, high, 3), unit, room)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to at least `high` (1, 2 or 5 times a power of ten apart), about so many."""
    span = high - low if high > low else 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= about + 1e-9)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def lines(
    key: str, title: str, series: Sequence[Series], x_label: str, y_label: str, top: float | None = None
) -> Markup:
    """Learning curves with a min-max band.

    Args:
        key: prefix of the element ids, unique in the page.
        title: what is drawn, for a screen reader too.
        series: one a paradigm.
        x_label: quantity and unit of x.
        y_label: quantity and unit of y, written above the axis.
        top: the end of the y axis, which starts at 0 or the smallest value below it; by default the largest value.
    """
    left, right, head, foot, height = 52, 14, 30, 44, 300
    every = [p for s in series for p in s.points]
    xs = ticks(min(p.x for p in every), max(p.x for p in every))
    x0, x1 = min(p.x for p in every), max(max(p.x for p in every), min(p.x for p in every) + 1)
    ys = ticks(min(0.0, *(p.low for p in every)), top if top is not None else max(0.0, *(p.high for p in every)))

    def sx(x: float) -> float:
        return round(left + (x - x0) / (x1 - x0) * (WIDTH - left - right), 1)

    def sy(y: float) -> float:
        return round(height - foot - (min(y, ys[-1]) - ys[0]) / (ys[-1] - ys[0]) * (height - head - foot), 1)

    out = [Markup('<text class="axis" x="4" y="16">{}</text>').format(y_label)]
    for y in ys:
        out.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(left, sy(y), WIDTH - right))
        out.append(Markup('<text class="tick end" x="{}" y="{}">{:g}</text>').format(left - 8, sy(y) + 4, y))
    for x in (x for x in xs if x0 <= x <= x1 and x == int(x)):
        out.append(Markup('<path class="stub" d="M{} {}v5"/>').format(sx(x), height - foot))
        out.append(Markup('<text class="tick mid" x="{}" y="{}">{:g}</text>').format(sx(x), height - foot + 19, x))
    middle = (left + WIDTH - right) / 2
    out.append(Markup('<text class="axis mid" x="{}" y="{}">{}</text>').format(middle, height - 6, x_label))
    for s in series:
        upper = [f"{sx(p.x)} {sy(p.high)}" for p in s.points]
        lower = [f"{sx(p.x)} {sy(p.low)}" for p in reversed(s.points)]
        out.append(Markup('<path class="band {}" d="M{}z"/>').format(s.style, "L".join(upper + lower)))
    for s in series:
        path = "L".join(f"{sx(p.x)} {sy(p.mean)}" for p in s.points)
        out.append(Markup('<path class="line {}" d="M{}"/>').format(s.style, path))
        out.append(_marker(s.style, sx(s.points[-1].x), sy(s.points[-1].mean)))
    ends = "; ".join(f"{s.label} ends at {s.points[-1].mean:.3g}" for s in series)
    return svg(key, title, f"{y_label} over {x_label}. {ends}.", height, out)


def bars(
    key: str, title: str, rows: Sequence[Bar], axis: Axis = PERCENT, whiskers: str = "standard deviation over seeds"
) -> Markup:
    """Horizontal bars from 0 with sd whiskers and the figure beside each.

    Args:
        key: prefix of the element ids, unique in the page.
        title: what is drawn, for a screen reader too.
        rows: from top to bottom; values in the axis' unit.
        axis: from end to end.
        whiskers: what they are, for a screen reader; said where there are any.
    """
    left = min(200, max(144, *(_width(bar.label) + 6 for bar in rows)))
    right, step = axis.room + 12, 25
    height = len(rows) * step + 30
    low, high = axis.ticks[0], axis.ticks[-1]

    def sx(value: float) -> float:
        return round(left + (min(max(value, low), high) - low) / (high - low) * (WIDTH - left - right), 1)

    out = []
    labels = [f"{x:,g}{' %' if x and axis.unit == '%' else ''}".replace("-", "−") for x in axis.ticks]
    every = math.ceil((max(map(_width, labels)) + 8) * (len(labels) - 1) / (WIDTH - left - right))  # so that none meet
    for x, label in zip(axis.ticks, labels, strict=True):
        out.append(Markup('<path class="grid" d="M{} 4V{}"/>').format(sx(x), height - 26))
        if axis.ticks.index(x) % every == axis.ticks.index(0) % every:
            out.append(Markup('<text class="tick mid" x="{}" y="{}">{}</text>').format(sx(x), height - 8, label))
    if axis.unit != "%":
        out.append(Markup('<text class="tick" x="0" y="{}">{}</text>').format(height - 8, axis.unit))
    for i, bar in enumerate(rows):
        y = i * step + 6
        out.append(Markup('<text class="name" x="0" y="{}">{}</text>').format(y + 13, bar.label))
        if bar.value is None:
            out.append(Markup('<text class="tick" x="{}" y="{}">{}</text>').format(left + 6, y + 13, bar.text))
            continue
        start, end = sorted((sx(0), sx(bar.value)))
        shape = '<rect class="bar {}" x="{:g}" y="{}" width="{}" height="17" rx="2"/>'
        out.append(Markup(shape).format(bar.style, start, y, round(end - start, 1)))
        if bar.sd is not None:
            a, b = sx(bar.value - bar.sd), sx(bar.value + bar.sd)
            d = f"M{a} {y + 8.5}H{b}M{a} {y + 4.5}v8M{b} {y + 4.5}v8"
            out.append(Markup('<path class="halo" d="{}"/><path class="whisker" d="{}"/>').format(d, d))
        if bar.mark is not None:
            out.append(Markup('<path class="mark" d="M{} {}l5 5l-5 5l-5-5z"/>').format(sx(bar.mark), y + 3.5))
        out.append(Markup('<text class="value" x="{}" y="{}">{}</text>').format(WIDTH - right + 12, y + 13, bar.text))
    said = "; ".join(f"{bar.label}: {bar.text}" for bar in rows)
    unit = "Percent, mean" if axis.unit == "%" else f"In {axis.unit}, mean" if axis.unit else "Mean"
    spread = f" and {whiskers}" if any(bar.sd is not None for bar in rows) else ""
    return svg(key, title, f"{unit}{spread}. {said}.", height, out)


def stacks(key: str, title: str, rows: Sequence[Stack], segments: Sequence[str], colours: Sequence[str]) -> Markup:
    """Horizontal bars of segments; one that is wide enough holds its name, and each says its value when pointed at.

    Args:
        key: prefix of the element ids, unique in the page.
        title: what is drawn, for a screen reader too.
        rows: from top to bottom, drawn to one scale.
        segments: names of a bar's values, the same for all bars.
        colours: `#rrggbb` of each.
    """
    left, step = 110, 25 if len(rows) <= 30 else 14
    right = 12 + max([0, *(_width(row.text) for row in rows)])
    most, tall = max([1e-12, *(sum(row.values) for row in rows)]), step - 8 if step > 20 else step - 3
    out = []
    for i, row in enumerate(rows):
        y, x = i * step + 4, float(left)
        label = row.label if _width(row.label) < left + 20 else row.label[:13] + "…"
        out.append(Markup('<text class="name" x="0" y="{}">{}</text>').format(y + tall / 2 + 4.5, label))
        for name, value, colour in zip(segments, row.values, colours, strict=True):
            width = value / most * (WIDTH - left - right)
            if value:
                shape = (
                    '<rect class="seg" x="{:.2f}" y="{}" width="{:.2f}" height="{}" fill="{}"><title>{}</title></rect>'
                )
                said = f"{row.label}, {name}: {value:,g}"
                out.append(Markup(shape).format(x, y, width, tall, colour, said))
                if step > 20 and _width(name) + 4 <= width:
                    inside = '<text class="in mid" x="{:.2f}" y="{}" style="fill:{}" aria-hidden="true">{}</text>'
                    out.append(Markup(inside).format(x + width / 2, y + tall / 2 + 4.5, _legible(colour), name))
            x += width
        out.append(
            Markup('<text class="value" x="{:.2f}" y="{}">{}</text>').format(x + 6, y + tall / 2 + 4.5, row.text)
        )
    said = "; ".join(
        f"{row.label}: {row.text} ("
        + ", ".join(f"{name} {value:,g}" for name, value in zip(segments, row.values, strict=True) if value)
        + ")"
        for row in rows
    )
    return svg(key, title, f"{said}.", len(rows) * step + 8, out)


def shades(palette: Sequence[str], count: int) -> list[str]:
    """So many colours: those of the palette, then the same ones paler and paler."""
    found = []
    for i in range(count):
        paler = 1 - 0.55 ** (i // len(palette))
        rgb = _rgb(palette[i % len(palette)])
        found.append("#" + "".join(f"{round(255 * (value + (1 - value) * paler)):02x}" for value in rgb))
    return found


def _legible(colour: str) -> str:
    """Black or white, whichever contrasts more (WCAG's relative luminance)."""
    red, green, blue = ((v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4) for v in _rgb(colour))
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "#ffffff"


def _rgb(colour: str) -> list[float]:
    """`#rrggbb` -> three numbers from 0 to 1."""
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def _width(figure: str) -> int:
    """About how wide a figure is in the widest of the usual fonts."""
    return round(sum(4.1 if sign in " .," else 8.6 for sign in figure))


def swatch(style: str) -> Markup:
    """The legend's sample of a curve: stroke and marker as in the charts; hidden from screen readers."""
    line = Markup('<path class="line {}" d="M1 8H37"/>').format(style)
    return Markup('<svg class="swatch" viewBox="0 0 38 16" aria-hidden="true">{}{}</svg>').format(
        line, _marker(style, 19, 8)
    )


def _marker(style: str, x: float, y: float) -> Markup:
    shape = MARKERS[style.split()[0]]
    return Markup('<path class="dot {}" transform="translate({} {})" d="{}"/>').format(style, x, y, shape)


def svg(key: str, title: str, description: str, height: int, parts: Sequence[Markup]) -> Markup:
    """A drawing of the parts, `WIDTH` wide, with a title and a description for a screen reader."""
    return Markup(
        '<svg class="chart" role="img" viewBox="0 0 {w} {h}" aria-labelledby="{k}-t {k}-d">'
        '<title id="{k}-t">{t}</title><desc id="{k}-d">{d}</desc>{body}</svg>'
    ).format(w=WIDTH, h=height, k=key, t=title, d=description, body=Markup("").join(parts))
