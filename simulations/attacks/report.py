"""The result of an attack as one self-contained HTML page, as terminal tables, and in plain sentences."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from shared_models.job import Job
from shared_models.privacy import bound
from shared_models.tasks.base import make_task
from simulations import pages
from simulations.attacks.audit import most_tpr
from simulations.attacks.drawing import Mark, Trace, auc_chart, roc_chart, swatch
from simulations.attacks.levels import PLAIN
from simulations.attacks.results import Facts, Guessed, Inversion, Inverted, Membership
from simulations.measures import measures_of, words
from simulations.tables import NOTHING, SIMULATED, spread

STYLES = 6  # colours and strokes of levels


def write(found: Membership | Inversion, path: Path) -> Path:
    """Write the page and return its path; raises RunError where that cannot be."""
    name, view = ("membership", _guessed(found)) if isinstance(found, Membership) else ("inversion", _inverted(found))
    view |= _common(found.facts, table(found), says(found))
    return pages.write(f"{name}.html.j2", view, path, "the report")


def table(found: Membership | Inversion) -> tuple[list[str], list[list[str]]]:
    """Head and rows, the same for terminal, page and Markdown."""
    return _membership_table(found) if isinstance(found, Membership) else _inversion_table(found)


def terminal(found: Membership | Inversion) -> Table:
    """The same for a terminal, where levels stand side by side."""
    head, rows = table(found)
    if isinstance(found, Membership):
        head, *rows = [list(column) for column in zip(head, *rows, strict=True)]
    shown = Table(title=Text(found.facts.title), title_justify="left")
    for i, name in enumerate(head):
        shown.add_column(Text(name), justify="right" if i else "left")
    for row in rows:
        shown.add_row(*map(Text, row))
    return shown


def says(found: Membership | Inversion) -> list[str]:
    """Sentences that claim no more than was measured."""
    if isinstance(found, Membership):
        said = [_claim(level, found) for level in found.levels]
        return [*said, SIMULATED] if any(level.epsilon is not None for level in found.levels) else said
    blind, said = fmean(found.blind.quality.mse), []
    for name in dict.fromkeys(level.level for level in found.levels):
        best = min((level for level in found.levels if level.level == name), key=lambda level: fmean(level.quality.mse))
        error = fmean(best.quality.mse)
        what = "nearer to the images than" if error < blind else "no nearer to the images than"
        said.append(
            f"{name}: what is reconstructed ({best.way}) is {what} a mean image, which needs no answer of the site "
            f"(mean squared error {error:.2g} against {blind:.2g})."
        )
    return [*said, SIMULATED] if any(level.level != PLAIN for level in found.levels) else said


def _claim(level: Guessed, found: Membership) -> str:
    models = f"{found.targets} target models"
    interval = f"AUC {fmean(level.auc):.3f}, 95 % interval {level.low:.3f} to {level.high:.3f}, {models}"
    proved = ""
    if level.least_epsilon > 0:
        proved = f"; it proves an epsilon of at least {level.least_epsilon:.2f} at delta {found.delta:g}"
    allowed = f" Guaranteed: {level.statement}." if level.epsilon is not None else ""
    if level.low > 0.5:
        return f"{level.level}: the attack tells members from others ({interval}){proved}.{allowed}"
    sure = f", but at those of which it is surest it does{proved}" if proved else ""
    return f"{level.level}: it cannot be claimed that the attack does better than guessing ({interval}){sure}.{allowed}"


def _membership_table(found: Membership) -> tuple[list[str], list[list[str]]]:
    measure = measures_of(make_task(Job.resolve(found.facts.job)))[found.metric]
    private = any(level.epsilon is not None for level in found.levels)
    rates = list(found.levels[0].tpr)
    unit = found.facts.job["privacy"]["mode"]
    head = ["level", *([f"epsilon (± one {unit}, delta {found.delta:g})"] if private else [])]
    head.append(measure.title(words(found.metric)))
    head += ["AUC (95 % interval)", *(["AUC allowed"] if private else [])]
    for rate in rates:
        head += [f"TPR at {100 * float(rate):g} % FPR, %", *(["allowed, %"] if private else [])]
    head.append(f"epsilon proved (delta {found.delta:g})")
    rows = []
    for level in found.levels:
        row = [level.level]
        if private:
            row.append("infinite" if level.epsilon is None else bound(level.epsilon))
        row += [spread(level.accuracy, measure), f"{fmean(level.auc):.3f} ({level.low:.3f} to {level.high:.3f})"]
        if private:
            row.append(_up(level.most_auc, 1))
        for rate in rates:
            value = level.tpr[rate]
            row.append("too few" if value is None else f"{100 * value:.1f}")
            if private:
                row.append(_up(level.most_tpr[rate] if level.most_tpr else None, 100))
        rows.append([*row, f"{level.least_epsilon:.2f}"])
    return head, rows


def _up(value: float | None, factor: int) -> str:
    """A bound, rounded up: three digits of an AUC, one of a percentage."""
    if value is None:
        return NOTHING
    digits = 3 if factor == 1 else 1
    return f"{min(float(factor), math.ceil(factor * value * 10**digits - 1e-9) / 10**digits):.{digits}f}"


def _inversion_table(found: Inversion) -> tuple[list[str], list[list[str]]]:
    head = ["level", "way", "noise", "cosine", "MSE", "PSNR, dB", "SSIM"]
    rows = []
    for level in (*found.levels, found.blind):
        q = level.quality
        near = f"{fmean(level.similarity):.3f}" if level.similarity else NOTHING
        noise = NOTHING if level is found.blind else f"{level.noise:.3g}"
        rows.append(
            [level.level, level.way, noise, near, f"{fmean(q.mse):.2g}", _wide(q.psnr, ".1f"), _wide(q.ssim, "z.2f")]
        )
    return head, rows


def _wide(values: list[float], form: str) -> str:
    mean = f"{fmean(values):{form}}"
    return (f"{mean} ± {stdev(values):{form}}" if len(values) > 1 else mean).replace("-", "−")


def _common(facts: Facts, shown: tuple[list[str], list[list[str]]], said: list[str]) -> dict[str, Any]:
    """What every page has."""
    return {
        "c": facts,
        "created": f"{facts.created:%Y-%m-%d %H:%M %Z}".strip(),
        "headers": shown[0],
        "rows": shown[1],
        "said": said,
        "settings": pages.flat(facts.job),
    }


def _guessed(found: Membership) -> dict[str, Any]:
    names = [level.level for level in found.levels]
    decades = max(2, min(4, math.floor(math.log10(found.non_members))))
    traces, marks = [], []
    for i, level in enumerate(found.levels):
        style, shown = (
            f"level-{i % STYLES}",
            [f"{100 * v:.1f} % at {100 * float(r):g} %" for r, v in level.tpr.items() if v],
        )
        said = f"{level.level}: AUC {fmean(level.auc):.3f}" + (f", TPR {', '.join(shown)} FPR" if shown else "")
        traces.append(Trace(style, list(zip(level.fpr, level.hits, strict=True)), _allowed(level, found.delta), said))
        marks.append(Mark(level.level, style, fmean(level.auc), level.low, level.high, level.most_auc))
    return {
        "m": found,
        "roc": roc_chart("roc", "ROC curves of the attack, both axes logarithmic", traces, decades),
        "aucs": auc_chart("auc", "AUC of the attack by level of privacy", marks),
        "legend": [(name, swatch(f"level-{i % STYLES}")) for i, name in enumerate(names)],
        "unmeasured": [f"{100 * float(r):g} %" for r, v in found.levels[0].tpr.items() if v is None],
    }


def _allowed(level: Guessed, delta: float) -> list[tuple[float, float]]:
    """The bound where it is below 1."""
    if level.epsilon is None:
        return []
    fpr = np.geomspace(1e-4, 1, 121)
    tpr = most_tpr(fpr, level.epsilon, delta)
    return [(float(x), float(y)) for x, y in zip(fpr, tpr, strict=True) if y < 0.9995]


def _inverted(found: Inversion) -> dict[str, Any]:
    strips = [("truth", "", found.truth)]
    strips.append((found.blind.level, found.blind.way, found.blind.images[:1]))
    strips += [(level.level, _caption(level), level.images) for level in found.levels]
    return {"m": found, "strips": strips}


def _caption(level: Inverted) -> str:
    return f"{level.way}: PSNR {_wide(level.quality.psnr, '.1f')} dB, SSIM {_wide(level.quality.ssim, 'z.2f')}"
