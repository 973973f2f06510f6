"""Coefficients through pooling that picks winners."""

from __future__ import annotations

import math

from torch import Tensor


def max_pool_transpose(c: Tensor, indices: Tensor, input_shape: list[int], spatial_dims: int) -> Tensor:
    """Each coefficient goes to its window's winner; overlapping windows add up.

    ``c`` and ``indices`` (..., pooled), indices flat over the last ``spatial_dims`` of ``input_shape``.
    """
    flat = c.new_zeros([*input_shape[:-spatial_dims], math.prod(input_shape[-spatial_dims:])])
    return flat.scatter_add(-1, indices.flatten(-spatial_dims), c.flatten(-spatial_dims)).view(input_shape)
