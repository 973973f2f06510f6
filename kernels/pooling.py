"""Coefficients through pooling that picks winners, and winners as small numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def max_pool_transpose(c: Tensor, indices: Tensor, input_shape: list[int], spatial_dims: int) -> Tensor:
    """Each coefficient goes to its window's winner; overlapping windows add up.

    ``c`` and ``indices`` (..., pooled), indices flat over the last ``spatial_dims`` of ``input_shape``.
    """
    flat = c.new_zeros([*input_shape[:-spatial_dims], math.prod(input_shape[-spatial_dims:])])
    return flat.scatter_add(-1, indices.flatten(-spatial_dims), c.flatten(-spatial_dims)).view(input_shape)


Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]
"""Of a pooling op, one number per spatial dimension each: kernel, stride, padding, dilation."""


def _corner(dim: int, pooled: Tensor, geometry: Geometry) -> Tensor:
    """Where each window begins along a spatial dimension, to broadcast to ``pooled``."""
    kernel, stride, padding, _ = geometry
    start = torch.arange(pooled.shape[dim - len(kernel)], device=pooled.device) * stride[dim] - padding[dim]
    return start.view([-1 if other == dim else 1 for other in range(len(kernel))])


def window_offsets(indices: Tensor, input_sizes: Sequence[int], geometry: Geometry) -> Tensor:
    """Winners as uint8 offsets within their windows, an eighth of the flat int64 ``indices`` (..., pooled).

    ``input_sizes`` are those of the spatial dimensions; a window has 256 places at most.
    """
    kernel, _, _, dilation = geometry
    offsets, left, place = torch.zeros_like(indices), indices, 1
    for dim in reversed(range(len(kernel))):
        at = left % input_sizes[dim]
        left = left.div(input_sizes[dim], rounding_mode="floor")
        steps = (at - _corner(dim, indices, geometry)).div_(dilation[dim], rounding_mode="floor")
        offsets += steps.mul_(place)
        place *= kernel[dim]
    return offsets.to(torch.uint8)


def indices_of_offsets(offsets: Tensor, input_sizes: Sequence[int], geometry: Geometry) -> Tensor:
    """The flat indices that ``window_offsets`` was given."""
    kernel, _, _, dilation = geometry
    left, place = offsets.to(torch.int64), 1
    indices = torch.zeros_like(left)
    for dim in reversed(range(len(kernel))):
        at = (left % kernel[dim]).mul_(dilation[dim]).add_(_corner(dim, offsets, geometry))
        left = left.div(kernel[dim], rounding_mode="floor")
        indices += at.mul_(place)
        place *= input_sizes[dim]
    return indices
