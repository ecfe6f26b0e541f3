"""The same bits again: one thread per operation and deterministic kernels, at a site and at the server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def determinism(enabled: bool) -> Iterator[None]:
    """One thread per operation and deterministic kernels inside the block.

    Torch would then also fill every new tensor with NaN, to show a kernel that reads what it never wrote; that costs
    a pass over all memory and no kernel in use needs it.
    """
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, torch refuses matrix products on CUDA
    threads, kernels = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(kernels)
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]
