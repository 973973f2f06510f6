"""Kernel form of softmax's transpose."""

from __future__ import annotations

from torch import Tensor

from lrp_compiler.kernels.dialect.softmax import SOFTMAX_BWD


def softmax_form(c: Tensor, s: Tensor, dim: int) -> Tensor:
    """As softmax_transpose; other dimensions than the last are moved there."""
    made: Tensor = SOFTMAX_BWD(c.movedim(dim, -1), s.movedim(dim, -1), None)
    return made.movedim(-1, dim)
