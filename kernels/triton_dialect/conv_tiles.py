"""conv2d as implicit GEMM: addresses of tiles whose rows are pixels and whose inner dimension is taps by channels.

Forwards a row is an output pixel and reads its window of x. Backwards the rows are the input pixels of one phase, their
place modulo the stride: these read, stepping the other way, the outputs whose windows hold them, and no other. Tiles
with ``ALONG`` 1 have pixels in their last dimension, where neighbouring lanes read; with 0 it is channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lrp_compiler.kernels.triton_dialect.products import multiplicand


@triton.jit
def program_of(tiles_n, groups, tiles_m):
    """(pixel tile, column tile, group, phase): neighbours in time share the pixels that they read."""
    program = tl.program_id(0)
    rest = program // tiles_n
    return (rest // groups) % tiles_m, program % tiles_n, rest % groups, rest // groups // tiles_m


@triton.jit
def pixels_of(tile, pixels, plane, width, BLOCK: tl.constexpr):
    """(image, row, column, whether it is there) of the pixels of a tile, counted over all images."""
    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    within = pixel % plane
    return pixel // plane, within // width, within % width, pixel < pixels


@triton.jit
def inner_of(step, blocks, channels, taps, tap_columns, INNER: tl.constexpr, BLOCK: tl.constexpr):
    """(tap's row, tap's column, channel, whether there is one) of a step's inner indices.

    INNER "flat": a step covers the next ``BLOCK`` channels of all taps; "tap": of one; "channel": there is but one.
    """
    lane = tl.arange(0, BLOCK)
    if INNER == "channel":
        tap = tl.zeros_like(lane)
        channel = step * BLOCK + lane
    elif INNER == "flat":
        index = step * BLOCK + lane
        tap = index // channels
        channel = index % channels
    else:
        tap = step // blocks + tl.zeros_like(lane)
        channel = (step % blocks) * BLOCK + lane
    return tap // tap_columns, tap % tap_columns, channel, (tap < taps) & (channel < channels)


@triton.jit
def place_of(image, row, column, stride_n, stride_h, stride_w):
    """How far each pixel is from the first, in elements."""
    return image.to(tl.int64) * stride_n + row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w


@triton.jit
def pairs(of_pixel, of_other, ALONG: tl.constexpr):
    """The sums of what belongs to a pixel and what belongs to a channel or tap, as a tile."""
    return tl.expand_dims(of_pixel, 1 - ALONG) + tl.expand_dims(of_other, ALONG)


@triton.jit
def in_plane(row, column, down, right, there, height, width, ALONG: tl.constexpr):
    """Where a pixel's tap, so far down and to the right of it, lies in the plane and is a tap at all."""
    at_row = tl.expand_dims(row, 1 - ALONG) + tl.expand_dims(down, ALONG)
    at_column = tl.expand_dims(column, 1 - ALONG) + tl.expand_dims(right, ALONG)
    inside = (at_row >= 0) & (at_row < height) & (at_column >= 0) & (at_column < width)
    return inside & tl.expand_dims(there, ALONG)


@triton.jit
def upright(tile, ALONG: tl.constexpr):
    """A tile with pixels as rows."""
    if ALONG:
        tile = tl.trans(tile)
    return tile


@triton.jit
def operand(tile, ALONG: tl.constexpr):
    """A tile of either factor as it is multiplied, pixels or inner indices as rows."""
    return upright(multiplicand(tile), ALONG)


@triton.jit
def load_pixels(pointer, place, channel_place, at_pixel, at_channel, ALONG: tl.constexpr):
    """A (pixel, channel) tile in float32, 0 where there is nothing."""
    where = tl.expand_dims(at_pixel, 1 - ALONG) & tl.expand_dims(at_channel, ALONG)
    tile = tl.load(pointer + pairs(place, channel_place, ALONG), mask=where, other=0.0)
    return upright(tile, ALONG).to(tl.float32)


@triton.jit
def store_pixels(pointer, place, channel_place, at_pixel, at_channel, tile, ALONG: tl.constexpr):
    """Write a (pixel, channel) tile that is of the pointer's dtype."""
    where = tl.expand_dims(at_pixel, 1 - ALONG) & tl.expand_dims(at_channel, ALONG)
    tl.store(pointer + pairs(place, channel_place, ALONG), upright(tile, ALONG), mask=where)


@triton.jit
def tap_of_phase(residue, padding, taps, stride, dilation):
    """(first tap that reaches the pixels ``residue`` + i stride, output i + shift that it comes from).

    The first is ``taps`` where none does.
    """
    first = taps
    for tap in range(taps):
        # A minimum: of a plain choice LLVM makes a search for the last match, at which its AMD backend stops.
        first = tl.minimum(first, tl.where((residue + padding - tap * dilation) % stride == 0, tap, taps))
    return first, (residue + padding - first * dilation) // stride


@triton.jit
def signs_of(given, pixel):
    """The bit of each pixel in the byte of eight that it is counted in."""
    return ((given.to(tl.int32) >> (pixel & 7)) & 1) != 0
