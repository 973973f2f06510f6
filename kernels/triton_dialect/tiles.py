"""Where the rows of an operand of any strides lie: the device's side of kernels/strides.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_offset(row, sizes, strides):
    """The offset of each row, whose number ``sizes``, innermost first, divide; int64 where ``row`` is."""
    offset = row * 0
    for dim in tl.static_range(len(sizes)):
        offset += (row % sizes[dim]) * strides[dim]
        row = row // sizes[dim]
    return offset
