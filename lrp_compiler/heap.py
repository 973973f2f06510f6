"""The C library's heap: memory that one call frees is there for the next."""

from __future__ import annotations

import torch

LARGEST = (32 << 20) - (1 << 16)
"""Bytes: just below the largest block whose release glibc learns from (DEFAULT_MMAP_THRESHOLD_MAX in malloc.c)."""


def keep_freed_memory() -> None:
    """Have the heap keep blocks of up to 32 MiB for later calls, 64 MiB in all, instead of returning them at once.

    glibc maps large blocks one by one. It raises its bound for that, and for what it keeps of the heap (twice as much),
    to the size of those it sees freed; one that nothing is written to costs no memory. Otherwise every call may have
    the system map and clear its activations anew, which takes up to a fifth of a convolutional network's time. Peaks
    stay the same, ``malloc_trim`` still gives all back, and other C libraries are not affected.
    """
    torch.empty(LARGEST, dtype=torch.uint8, device="cpu")
