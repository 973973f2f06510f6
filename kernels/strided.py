"""Transposes of convolutions on CPU: strided ones without the products with zeros that a backward pass makes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 16
"""oneDNN pads channels to so many: fewer results take as long as these."""

Sizes = Sequence[int]


def transpose(c: Tensor, weight: Tensor, input_shape: Sizes, stride: Sizes, padding: Sizes) -> Tensor | None:
    """The transpose of a convolution without dilation or groups where a form below fits it, else None.

    ``c`` (N, C_out, ...), ``weight`` (C_out, C_in, ...) -> ``input_shape`` (N, C_in, ...).
    """
    kernel = list(weight.shape[2:])
    if kernel == list(stride) and not any(padding):
        rows = weight.flatten(1).t().matmul(c.flatten(2))
        return side_by_side(rows.reshape([c.shape[0], weight.shape[1], *kernel, *c.shape[2:]]), input_shape)
    if set(kernel) == {1} and not any(padding):
        points = weight.flatten(1).t().matmul(c.flatten(2)).reshape([c.shape[0], weight.shape[1], *c.shape[2:]])
        return spread_out(points, input_shape, stride)
    if len(kernel) == 2 and stride[0] == stride[1] and weight.shape[1] * math.prod(stride) <= BLOCK:
        return by_phases(c, weight, input_shape, stride[0], padding)
    return None


def transposed(
    c: Tensor, weight: Tensor, input_shape: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
) -> Tensor:
    """Any convolution's transpose as torch's transposed convolution, ``c`` (N, C_out, ...) -> ``input_shape``."""
    geometry = zip(input_shape[2:], c.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    rest = [size - ((have - 1) * s - 2 * p + d * (k - 1) + 1) for size, have, k, s, p, d in geometry]
    made: Tensor = torch.ops.aten.convolution.default(c, weight, None, stride, padding, dilation, True, rest, groups)
    return made


def side_by_side(tiles: Tensor, input_shape: Sizes) -> Tensor:
    """Tiles (N, C, kernel, positions) where they lie in the input."""
    dims = len(input_shape) - 2
    order = [axis for dim in range(dims) for axis in (2 + dims + dim, 2 + dim)]
    sizes = [tiles.shape[2 + dim] * tiles.shape[2 + dims + dim] for dim in range(dims)]
    return resized(tiles.permute([0, 1, *order]).reshape([*input_shape[:2], *sizes]), input_shape)


def spread_out(points: Tensor, input_shape: Sizes, stride: Sizes) -> Tensor:
    """``points`` (N, C, ...) at every stride-th place of zeros of ``input_shape``."""
    separate = points.reshape([*input_shape[:2], *(size for pooled in points.shape[2:] for size in (pooled, 1))])
    gaps = [gap for step in reversed(stride) for gap in (0, step - 1, 0, 0)]
    sizes = [pooled * step for pooled, step in zip(points.shape[2:], stride, strict=True)]
    return resized(F.pad(separate, gaps).reshape([*input_shape[:2], *sizes]), input_shape)


def by_phases(c: Tensor, weight: Tensor, input_shape: Sizes, step: int, padding: Sizes) -> Tensor:
    """A dense convolution that makes every phase of the stride a channel, then the phases side by side (2-D)."""
    made, given = weight.shape[:2]
    taps = [-(-size // step) for size in weight.shape[2:]]
    missing = [tap * step - size for tap, size in zip(taps, weight.shape[2:], strict=True)]
    padded = F.pad(weight, (0, missing[1], 0, missing[0]))
    phases = padded.view(made, given, taps[0], step, taps[1], step).flip(2, 4).permute(1, 3, 5, 0, 2, 4)
    dense = phases.reshape(given * step * step, made, *taps)
    whole = F.pixel_shuffle(F.conv2d(c, dense, None, 1, [tap - 1 for tap in taps]), step)
    return resized(whole[:, :, padding[0] :, padding[1] :], input_shape)


def resized(x: Tensor, shape: Sizes) -> Tensor:
    """``x`` cut at its end, or with zeros behind it where no window reaches."""
    behind = [size - have for size, have in zip(shape[2:], x.shape[2:], strict=True)]
    return F.pad(x, [gap for one in reversed(behind) for gap in (0, one)]) if any(behind) else x
