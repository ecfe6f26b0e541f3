"""Freed memory is used again, without the kernel."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

STEPS, TENSORS, SIZE = 20, 8, 16 << 20
PROGRAM = f"""
import resource, sys
import torch
from client.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory() and keep_freed_memory()
def step():
    return [torch.ones({SIZE}, dtype=torch.uint8) for _ in range({TENSORS})]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({STEPS}):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())
"""


def faulted(way: str) -> int:
    """Bytes that the kernel mapped while steps took memory and freed it."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, way], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators stay as they are")
def test_what_a_step_frees_the_next_one_takes_without_the_kernel() -> None:
    assert faulted("returned") > STEPS * TENSORS * SIZE // 2
    assert faulted("kept") < TENSORS * SIZE
