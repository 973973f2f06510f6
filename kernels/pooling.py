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
    # Integers are divided one by one, floats in vectors; below this size float32 tells (i + 1/2) / n from a whole one.
    dtype = torch.float32 if math.prod(input_sizes) < 2**22 else torch.float64
    left, place = indices.to(dtype), 1
    offsets = torch.zeros_like(left)
    for dim in reversed(range(len(kernel))):
        above = (left + 0.5).div_(input_sizes[dim]).floor_()
        steps = left.sub_(above * input_sizes[dim]).sub_(_corner(dim, indices, geometry))
        offsets.add_(steps, alpha=place / dilation[dim])
        left, place = above, place * kernel[dim]
    return offsets.round_().to(torch.uint8)


def indices_of_offsets(offsets: Tensor, input_sizes: Sequence[int], geometry: Geometry) -> Tensor:
    """The flat indices that ``window_offsets`` was given."""
    kernel, _, _, dilation = geometry
    place, corners = 1, torch.zeros([], dtype=torch.int64, device=offsets.device)
    inside = corners
    for dim in reversed(range(len(kernel))):
        steps = torch.arange(kernel[dim], device=offsets.device) * (dilation[dim] * place)
        inside = steps.view([-1] + [1] * (len(kernel) - 1 - dim)) + inside
        corners = corners + _corner(dim, offsets, geometry) * place
        place *= input_sizes[dim]
    return inside.flatten()[offsets.to(torch.int32)].add_(corners)
