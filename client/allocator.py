"""Freed memory stays with the process that trains, instead of going back to the kernel at every step.

When a step's tensors die, glibc gives the end of its heap back to the kernel, which fills every page with zeros and
maps it once more at the next step's first write; but a model's steps ask for the same memory over and over. What that
costs: `benchmarks/allocator.py`. A process then stays as large as it once was, up to `KEPT`.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 32 << 20  # bytes of a block that comes from the heap; glibc takes no higher limit
KEPT = (2 << 30) - 1  # bytes free at the heap's end before they are given back; no more fit into an int


@cache
def keep_freed_memory() -> bool:
    """Tell glibc so, once a process; `False` where there is another allocator, which stays as it is."""
    change = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if change is None:
        return False
    return bool(change(_MMAP_THRESHOLD, LARGEST) and change(_TRIM_THRESHOLD, KEPT))
