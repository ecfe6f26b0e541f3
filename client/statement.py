"""The ledger as a person or a program reads it: what each data set has spent, and by which runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from client.ledger import Entry, composed
from shared_models.privacy import RELATIONS, Spend, epsilon


def statement(entries: Iterable[Entry], cap: float, delta: float, current: str) -> list[dict[str, Any]]:
    """One account per data set, in the order of their first entries.

    Args:
        entries: of the whole ledger.
        cap: the site's cap on epsilon.
        delta: at which all is composed.
        current: the data set that the node reads now; it has an account even where nothing was spent of it.

    Returns:
        Values that JSON can carry: an infinite epsilon, cap or rest is None.
    """
    by_name: dict[str, list[Entry]] = {}
    for entry in entries:
        by_name.setdefault(entry.dataset, []).append(entry)
    by_name.setdefault(current, [])
    return [_account(name, mine, cap, delta) for name, mine in by_name.items()]


def _account(name: str, entries: Sequence[Entry], cap: float, delta: float) -> dict[str, Any]:
    unit, spends = composed(entries)
    spent = epsilon(spends, delta)
    by_run: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        by_run.setdefault((entry.site, entry.run), []).append(entry)
    return {
        "dataset": name,
        "epsilon": _finite(spent),
        "delta": delta,
        "unit": unit,
        "relation": RELATIONS[unit],
        "accountant": "rdp",
        "cap_epsilon": _finite(cap),
        "left": None if math.isinf(cap) else max(0.0, cap - spent),
        "unsampled": any(e.unit == "client" for e in entries),
        "converted": unit == "sample" and any(e.unit == "client" for e in entries),
        "runs": [_run(mine, delta) for mine in by_run.values()],
    }


def _run(entries: Sequence[Entry], delta: float) -> dict[str, Any]:
    unit, spends = composed(entries)
    return {
        "run": entries[0].run,
        "site": entries[0].site,
        "job": entries[-1].job,
        "rounds": sorted(e.round for e in entries),
        "unanswered": sum(not e.answered for e in entries),
        "unit": unit,
        "relation": RELATIONS[unit],
        "epsilon": _finite(epsilon(spends, delta)),
        "delta": delta,
        "mechanisms": [_mechanism(s) for s in spends],
    }


def _mechanism(spend: Spend) -> dict[str, Any]:
    return {"noise": spend.noise, "rate": spend.rate, "steps": spend.steps}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
