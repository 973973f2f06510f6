"""Sign-split rules of conv2d in Triton: implicit GEMMs with two products from one read of each tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrp_compiler.kernels.dialect.signsplit_conv2d import empty_shares
from lrp_compiler.kernels.launch import Config, Launch
from lrp_compiler.kernels.triton_dialect.conv_plans import (
    CONFIGS,
    along_pixels,
    channels_inside,
    flattened,
    forwards,
    in_tf32,
    strides_of,
    transposed,
)
from lrp_compiler.kernels.triton_dialect.conv_shares import write_shares
from lrp_compiler.kernels.triton_dialect.conv_tiles import (
    in_plane,
    inner_of,
    load_pixels,
    operand,
    pairs,
    pixels_of,
    place_of,
    program_of,
    signs_of,
    store_pixels,
    tap_of_phase,
    upright,
)
from lrp_compiler.kernels.triton_dialect.products import columns_of, multiplicand, nearest, precision

CONFIGS_SIGNSPLIT_CONV2D_FWD = CONFIGS
CONFIGS_SIGNSPLIT_CONV2D_BWD = CONFIGS


@triton.jit
def signsplit_conv2d_fwd_kernel(
    c, x, weight, bias, z, ratio, aside,
    pixels, plane, out_width, height, width, channels, outputs, all_outputs, groups, tiles_m, tiles_n,
    taps, tap_columns, blocks, steps, bias_stride,
    c_n, c_c, c_h, c_w, x_n, x_c, x_h, x_w, w_n, w_c, w_h, w_w, z_n, z_c, z_h, z_w,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, first, second, epsilon,
    METHOD: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
    X_ALONG: tl.constexpr, C_ALONG: tl.constexpr, Z_ALONG: tl.constexpr,
    BLOCK_PIXEL: tl.constexpr, BLOCK_CHANNEL: tl.constexpr, BLOCK_INNER: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n, group, _ = program_of(tiles_n, groups, tiles_m)
    image, row, column, is_pixel = pixels_of(tile_m, pixels, plane, out_width, BLOCK_PIXEL)
    within = tile_n * BLOCK_CHANNEL + tl.arange(0, BLOCK_CHANNEL)
    is_output = within < outputs
    output = (group * outputs + within).to(tl.int64)
    # A row past the last pixel lies outside of the plane for every tap.
    top = tl.where(is_pixel, row * stride_h - padding_h, height + 1)
    left = column * stride_w - padding_w
    corner = place_of(image, top, left, x_n, x_h, x_w) + (group * channels).to(tl.int64) * x_c
    z0 = tl.zeros((BLOCK_PIXEL, BLOCK_CHANNEL), tl.float32)
    u = tl.zeros((BLOCK_PIXEL, BLOCK_CHANNEL), tl.float32)
    for step in range(steps):
        tap_row, tap_column, channel, there = inner_of(step, blocks, channels, taps, tap_columns, INNER, BLOCK_INNER)
        down, right = tap_row * dilation_h, tap_column * dilation_w
        inside = in_plane(top, left, down, right, there, height, width, X_ALONG)
        from_corner = place_of(channel, down, right, x_c, x_h, x_w)
        window = operand(tl.load(x + pairs(corner, from_corner, X_ALONG), mask=inside, other=0.0), X_ALONG)
        of_tap = place_of(channel, tap_row, tap_column, w_c, w_h, w_w)
        matrix = tl.load(
            weight + of_tap[:, None] + (output * w_n)[None, :], mask=there[:, None] & is_output[None, :], other=0.0
        )
        matrix = multiplicand(matrix)
        if z is None:
            z0 = tl.dot(window, matrix, z0, input_precision=PRECISION)
        u = tl.dot(tl.abs(window), tl.abs(matrix), u, input_precision=PRECISION)
    for part in tl.static_range(PARTS):
        first_output = tile_n * BLOCK_CHANNEL + part * (BLOCK_CHANNEL // PARTS)
        write_shares(
            columns_of(z0, part, PARTS), columns_of(u, part, PARTS), c, bias, z, ratio, aside,
            tile_m, first_output, group, pixels, plane, out_width, outputs, all_outputs, bias_stride,
            c_n, c_c, c_h, c_w, z_n, z_c, z_h, z_w, first, second, epsilon, METHOD, C_ALONG, Z_ALONG,
            BLOCK_PIXEL, BLOCK_CHANNEL // PARTS,
        )  # fmt: skip


@triton.jit
def signsplit_conv2d_bwd_kernel(
    ratio, aside, x, weight, out,
    pixels, plane, columns, height, width, out_height, out_width, channels, outputs, groups,
    tiles_m, tiles_n, tap_rows, tap_columns, blocks, phases_w,
    r_n, r_c, r_h, r_w, x_n, x_c, x_h, x_w, w_n, w_c, w_h, w_w, o_n, o_c, o_h, o_w, aside_row, aside_column,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, apart_h, apart_w, advance_h, advance_w, first,
    METHOD: tl.constexpr, AS_RELEVANCE: tl.constexpr, ADDS_FIRST: tl.constexpr, INNER: tl.constexpr,
    PRECISION: tl.constexpr, R_ALONG: tl.constexpr, X_ALONG: tl.constexpr, O_ALONG: tl.constexpr,
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
    counted = (image * out_height + top) * out_width + left
    within = tile_n * BLOCK_CHANNEL + tl.arange(0, BLOCK_CHANNEL)
    is_channel = within < channels
    plain = tl.zeros((BLOCK_PIXEL, BLOCK_CHANNEL), tl.float32)
    absolute = tl.zeros((BLOCK_PIXEL, BLOCK_CHANNEL), tl.float32)
    for step in range(steps):
        tap_row, tap_column, output, there = inner_of(step, blocks, outputs, taps, across, INNER, BLOCK_INNER)
        down, right = -tap_row * advance_h, -tap_column * advance_w
        output += group * outputs
        inside = in_plane(top, left, down, right, there, out_height, out_width, R_ALONG)
        places = pairs(corner, place_of(output, down, right, r_c, r_h, r_w), R_ALONG)
        share = operand(tl.load(ratio + places, mask=inside, other=0.0), R_ALONG)
        of_tap = place_of(output, first_row + tap_row * apart_h, first_column + tap_column * apart_w, w_n, w_h, w_w)
        matrix = tl.load(
            weight + of_tap[:, None] + (within.to(tl.int64) * w_c)[None, :],
            mask=there[:, None] & is_channel[None, :], other=0.0,
        )  # fmt: skip
        matrix = multiplicand(matrix)
        other = share
        if METHOD == "alpha_beta":
            other = operand(tl.load(aside + places, mask=inside, other=0.0), R_ALONG)
        elif METHOD == "gamma":
            bit = pairs(counted, down * out_width + right, R_ALONG)
            of_output = tl.expand_dims(output.to(tl.int64) * aside_column, R_ALONG)
            signs = tl.load(aside + (bit >> 3).to(tl.int64) * aside_row + of_output, mask=inside, other=0)
            other = tl.where(upright(signs_of(signs, bit), R_ALONG), -share, share)
        if METHOD == "alpha_beta" and ADDS_FIRST:
            plain = tl.dot(share - other, matrix, plain, input_precision=PRECISION)
            other = share + other
        elif METHOD == "alpha_beta":
            # Sums of pairs would be rounded anew in 16 bits: four products of what is stored are exact.
            plain = tl.dot(share, matrix, plain, input_precision=PRECISION)
            plain = tl.dot(-other, matrix, plain, input_precision=PRECISION)
            absolute = tl.dot(share, tl.abs(matrix), absolute, input_precision=PRECISION)
        else:
            plain = tl.dot(share, matrix, plain, input_precision=PRECISION)
        absolute = tl.dot(other, tl.abs(matrix), absolute, input_precision=PRECISION)
    if METHOD == "gamma":
        plain *= 1 + first * 0.5
        absolute *= first * 0.5
    row, column = i * stride_h + phase // phases_w, j * stride_w + phase % phases_w
    is_pixel = is_pixel & (row < height) & (column < width)
    x_place = place_of(image, row, column, x_n, x_h, x_w)
    place = place_of(image, row, column, o_n, o_h, o_w)
    for part in tl.static_range(PARTS):
        lane = tile_n * BLOCK_CHANNEL + part * (BLOCK_CHANNEL // PARTS) + tl.arange(0, BLOCK_CHANNEL // PARTS)
        channel = (group * channels + lane).to(tl.int64)
        factor = load_pixels(x, x_place, channel * x_c, is_pixel, lane < channels, X_ALONG)
        other = columns_of(absolute, part, PARTS)
        made = columns_of(plain, part, PARTS) + tl.where(factor > 0, other, tl.where(factor < 0, -other, 0.0))
        if AS_RELEVANCE:
            made *= factor
        made = nearest(made, out.dtype.element_ty)
        store_pixels(out, place, channel * o_c, is_pixel, lane < channels, made, O_ALONG)


def plan_signsplit_conv2d_fwd(
    c: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    method: str,
    first: float,
    second: float,
    epsilon: float,
    config: Config | None = None,
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """Both results and the launch that fills them."""
    ratio, aside = empty_shares(c, method)
    # Another kernel cuts numbers to TF32 in its own way, and u + z0 would be the difference.
    z = None if in_tf32(c.dtype) else z
    taps = weight.shape[2:].numel()
    x, weight = channels_inside(x, groups, taps), channels_inside(weight, 1, taps)
    c, x, z = flattened((c, x, z), weight.shape[2:], stride, padding)
    tile, sizes, grid = forwards(c, x, weight, stride, padding, dilation, groups, config)
    arguments = {
        "c": c, "x": x, "weight": weight, "bias": bias, "z": z, "ratio": ratio,
        "aside": None if method == "z_plus" else aside, **sizes,
        "bias_stride": 0 if bias is None else bias.stride(0),
        **strides_of("c", c), **strides_of("x", x), **strides_of("w", weight), **strides_of("z", z),
        "first": float(first), "second": float(second), "epsilon": float(epsilon),
        "METHOD": method, "PRECISION": precision(), "X_ALONG": along_pixels(x), "C_ALONG": along_pixels(c),
        "Z_ALONG": 0 if z is None else along_pixels(z), **dict(tile.blocks),
    }  # fmt: skip
    return (ratio, aside), [Launch(signsplit_conv2d_fwd_kernel, grid, arguments, tile.num_warps, tile.num_stages)]


def plan_signsplit_conv2d_bwd(
    ratio: Tensor,
    aside: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    method: str,
    first: float,
    second: float,
    as_relevance: bool,
    config: Config | None = None,
) -> tuple[Tensor, list[Launch]]:
    """The result and the launch that fills it."""
    out = torch.empty_like(x)
    taps = weight.shape[2:].numel()
    shares = [channels_inside(value, groups, taps) for value in (ratio, aside)[: 2 if method == "alpha_beta" else 1]]
    if len({value.stride() for value in shares}) > 1:
        shares = [value.contiguous(memory_format=torch.channels_last) for value in shares]
    weight = channels_inside(weight, 1, taps)
    *shares, x, written = flattened((*shares, x, out), weight.shape[2:], stride, padding)
    tile, sizes, grid = transposed(x, shares[0], weight, stride, padding, dilation, groups, config)
    arguments = {
        "ratio": shares[0], "aside": None if method == "z_plus" else (*shares, aside)[1], "x": x, "weight": weight,
        "out": written, **sizes, **strides_of("r", shares[0]), **strides_of("x", x), **strides_of("w", weight),
        **strides_of("o", written),
        "aside_row": aside.stride(0) if method == "gamma" else 0,
        "aside_column": aside.stride(1) if method == "gamma" else 0, "first": float(first),
        "METHOD": method, "AS_RELEVANCE": as_relevance, "ADDS_FIRST": x.dtype == torch.float32 and not in_tf32(x.dtype),
        "PRECISION": precision(), "R_ALONG": along_pixels(shares[0]), "X_ALONG": along_pixels(x),
        "O_ALONG": along_pixels(written),  **dict(tile.blocks),
    }  # fmt: skip
    return out, [Launch(signsplit_conv2d_bwd_kernel, grid, arguments, tile.num_warps, tile.num_stages)]
