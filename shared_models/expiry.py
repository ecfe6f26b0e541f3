"""When a certificate ends, in words, once that is near enough to be said."""

from __future__ import annotations

import time

DAY = 86400.0
SOON = 60 * DAY


def ending(until: float, now: float | None = None) -> str:
    """`ends on <date>, in <n> days` within 60 days of its end, `ended on <date>` after it; nothing before.

    Args:
        until: Unix seconds.
        now: Unix seconds, by default the clock's.
    """
    left = until - (time.time() if now is None else now)
    if left > SOON:
        return ""
    date = time.strftime("%Y-%m-%d", time.gmtime(until))
    return f"ends on {date}, in {left // DAY:.0f} days" if left > 0 else f"ended on {date}"
