"""epsilon_conv2d_bwd in Triton: the ratio once per output where windows overlap, else in the product itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrp_compiler.kernels.dialect.conv2d import channels_last
from lrp_compiler.kernels.dialect.epsilon_conv2d import unwritten
from lrp_compiler.kernels.launch import Config, Launch, cdiv
from lrp_compiler.kernels.triton_dialect.conv_plans import (
    CONFIGS,
    along_pixels,
    channels_inside,
    flattened,
    strides_of,
    transposed,
)
from lrp_compiler.kernels.triton_dialect.conv_tiles import (
    in_plane,
    inner_of,
    load_pixels,
    operand,
    pairs,
    pixels_of,
    place_of,
    program_of,
    store_pixels,
    tap_of_phase,
)
from lrp_compiler.kernels.triton_dialect.products import columns_of, multiplicand, nearest, precision
from lrp_compiler.kernels.triton_dialect.shares import epsilon_ratio

CONFIGS_EPSILON_CONV2D_BWD = CONFIGS

RATIO_TILE = 64
"""Pixels and channels of a tile whose ratio is stored."""


@triton.jit
def epsilon_conv2d_ratio_kernel(
    c, z, ratio,
    pixels, plane, width, channels, tiles_n, c_n, c_c, c_h, c_w, z_n, z_c, z_h, z_w, epsilon,
    C_ALONG: tl.constexpr, Z_ALONG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // tiles_n
    image, row, column, is_pixel = pixels_of(tile, pixels, plane, width, BLOCK)
    lane = tl.program_id(0) % tiles_n * BLOCK + tl.arange(0, BLOCK)
    channel, is_channel = lane.to(tl.int64), lane < channels
    given = load_pixels(c, place_of(image, row, column, c_n, c_h, c_w), channel * c_c, is_pixel, is_channel, C_ALONG)
    output = load_pixels(z, place_of(image, row, column, z_n, z_h, z_w), channel * z_c, is_pixel, is_channel, Z_ALONG)
    place = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64) * channels
    made = nearest(epsilon_ratio(given, output, epsilon), ratio.dtype.element_ty)
    store_pixels(ratio, place, channel, is_pixel, is_channel, made, 0)


@triton.jit
def epsilon_conv2d_bwd_kernel(
    ratio, z, x, weight, out,
    pixels, plane, columns, height, width, out_height, out_width, channels, outputs, groups,
    tiles_m, tiles_n, tap_rows, tap_columns, blocks, phases_w,
    r_n, r_c, r_h, r_w, z_n, z_c, z_h, z_w, x_n, x_c, x_h, x_w, w_n, w_c, w_h, w_w, o_n, o_c, o_h, o_w,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, apart_h, apart_w, advance_h, advance_w, epsilon,
    INNER: tl.constexpr, PRECISION: tl.constexpr, R_ALONG: tl.constexpr, X_ALONG: tl.constexpr, O_ALONG: tl.constexpr,
    BLOCK_PIXEL: tl.constexpr, BLOCK_CHANNEL: tl.constexpr, BLOCK_INNER: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n, group, phase = program_of(tiles_n, groups, tiles_m)
    image, i, j, is_pixel = pixels_of(tile_m, pixels, plane, columns, BLOCK_PIXEL)
    first_row, shift_h = tap_of_phase(phase // phases_w, padding_h, tap_rows, stride_h, dilation_h)
    first_column, shift_w = tap_of_phase(phase % phases_w, padding_w, tap_columns, stride_w, dilation_w)
    across = tl.cdiv(tap_columns - first_column, apart_w)
    taps = tl.cdiv(tap_rows - first_row, apart_h) * across
    across = tl.maximum(across, 1)
    steps = tl.cdiv(taps * outputs, BLOCK_INNER) if INNER == "flat" else taps * blocks
    # A row past the last pixel lies above the plane for every tap.
    top = tl.where(is_pixel, i + shift_h, -1)
    left = j + shift_w
    corner = place_of(image, top, left, r_n, r_h, r_w)
    lane = tile_n * BLOCK_CHANNEL + tl.arange(0, BLOCK_CHANNEL)
    of_lane = (lane.to(tl.int64) * w_c)[None, :]
    total = tl.zeros((BLOCK_PIXEL, BLOCK_CHANNEL), tl.float32)
    for step in range(steps):
        tap_row, tap_column, output, there = inner_of(step, blocks, outputs, taps, across, INNER, BLOCK_INNER)
        down, right = -tap_row * advance_h, -tap_column * advance_w
        output += group * outputs
        inside = in_plane(top, left, down, right, there, out_height, out_width, R_ALONG)
        places = pairs(corner, place_of(output, down, right, r_c, r_h, r_w), R_ALONG)
        share = tl.load(ratio + places, mask=inside, other=0.0)
        if z is not None:
            z_place = place_of(image, top, left, z_n, z_h, z_w)
            places = pairs(z_place, place_of(output, down, right, z_c, z_h, z_w), R_ALONG)
            full = tl.load(z + places, mask=inside, other=1.0).to(tl.float32)
            share = nearest(epsilon_ratio(share.to(tl.float32), full, epsilon), share.dtype)
        of_tap = place_of(output, first_row + tap_row * apart_h, first_column + tap_column * apart_w, w_n, w_h, w_w)
        where = there[:, None] & (lane < channels)[None, :]
        matrix = multiplicand(tl.load(weight + of_tap[:, None] + of_lane, mask=where, other=0.0))
        total = tl.dot(operand(share, R_ALONG), matrix, total, input_precision=PRECISION)
    row, column = i * stride_h + phase // phases_w, j * stride_w + phase % phases_w
    is_pixel = is_pixel & (row < height) & (column < width)
    for part in tl.static_range(PARTS):
        lane = tile_n * BLOCK_CHANNEL + part * (BLOCK_CHANNEL // PARTS) + tl.arange(0, BLOCK_CHANNEL // PARTS)
        channel = (group * channels + lane).to(tl.int64)
        made = columns_of(total, part, PARTS)
        if x is not None:
            place = place_of(image, row, column, x_n, x_h, x_w)
            made *= load_pixels(x, place, channel * x_c, is_pixel, lane < channels, X_ALONG)
        place = place_of(image, row, column, o_n, o_h, o_w)
        made = nearest(made, out.dtype.element_ty)
        store_pixels(out, place, channel * o_c, is_pixel, lane < channels, made, O_ALONG)


def plan_epsilon_conv2d_bwd(
    c: Tensor,
    z: Tensor,
    weight: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    epsilon: float,
    x: Tensor | None,
    config: Config | None = None,
) -> tuple[Tensor, list[Launch]]:
    """The result and the launches that fill it."""
    out = unwritten(c, input_size, x)
    before: list[Launch] = []
    output: Tensor | None = z
    if weight.shape[2:].numel() > 1:
        ratio = channels_last(c.shape, c.dtype, c.device)
        before, c, output = [_ratio_launch(c, z, ratio, epsilon)], ratio, None
    elif along_pixels(c) != along_pixels(z):
        output = torch.empty_like(c).copy_(z)
    weight = channels_inside(weight, 1, weight.shape[2:].numel())
    c, output, x, written = flattened((c, output, x, out), weight.shape[2:], stride, padding)
    tile, sizes, grid = transposed(written, c, weight, stride, padding, dilation, groups, config)
    arguments = {
        "ratio": c, "z": output, "x": x, "weight": weight, "out": written, **sizes,
        **strides_of("r", c), **strides_of("z", output), **strides_of("x", x), **strides_of("w", weight),
        **strides_of("o", written), "epsilon": float(epsilon), "PRECISION": precision(),
        "R_ALONG": along_pixels(c), "X_ALONG": 0 if x is None else along_pixels(x), "O_ALONG": along_pixels(written),
        **dict(tile.blocks),
    }  # fmt: skip
    return out, [*before, Launch(epsilon_conv2d_bwd_kernel, grid, arguments, tile.num_warps, tile.num_stages)]


def _ratio_launch(c: Tensor, z: Tensor, ratio: Tensor, epsilon: float) -> Launch:
    """What writes the ratio with channels last: each is read once per tap, in wide words."""
    pixels, tiles_n = c.shape[0] * c.shape[2] * c.shape[3], cdiv(c.shape[1], RATIO_TILE)
    arguments = {
        "c": c, "z": z, "ratio": ratio, "pixels": pixels, "plane": c.shape[2] * c.shape[3], "width": c.shape[3],
        "channels": c.shape[1], "tiles_n": tiles_n, **strides_of("c", c), **strides_of("z", z),
        "epsilon": float(epsilon), "C_ALONG": along_pixels(c), "Z_ALONG": along_pixels(z), "BLOCK": RATIO_TILE,
    }  # fmt: skip
    return Launch(epsilon_conv2d_ratio_kernel, (cdiv(pixels, RATIO_TILE) * tiles_n,), arguments, num_warps=8)
