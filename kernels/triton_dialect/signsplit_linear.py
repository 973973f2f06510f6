"""signsplit_linear_fwd and signsplit_linear_bwd in Triton: two products from one read of each tile, nothing between."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrp_compiler.kernels.dialect.shares import packed_size
from lrp_compiler.kernels.dialect.signsplit_linear import empty_aside
from lrp_compiler.kernels.launch import Config, Launch, cdiv
from lrp_compiler.kernels.spec import contiguous_like
from lrp_compiler.kernels.triton_dialect.products import (
    CONFIGS,
    as_matrix,
    columns_of,
    fitted,
    multiplicand,
    nearest,
    precision,
    strides_of,
    tile_of,
)
from lrp_compiler.kernels.triton_dialect.shares import (
    alpha_beta_ratios,
    gamma_ratio,
    packed,
    rounded,
    unpacked,
    z_plus_ratio,
)

CONFIGS_SIGNSPLIT_LINEAR_FWD = CONFIGS
CONFIGS_SIGNSPLIT_LINEAR_BWD = CONFIGS

HELD = 32 * 16
"""Elements of each sum per warp, from which on what is stored of them is made of one quarter after the other."""


@triton.jit
def write_shares(
    z0, u, c, bias, z, ratio, aside,
    row, first_column, rows, outputs, bytes_per_row, c_row, c_column, bias_stride, z_row, z_column, first, second,
    epsilon,
    METHOD: tl.constexpr, BLOCK_ROW: tl.constexpr, BLOCK_COLUMN: tl.constexpr,
):  # fmt: skip
    """What is stored of a (BLOCK_ROW, BLOCK_COLUMN) tile of z0 and u."""
    column = (first_column + tl.arange(0, BLOCK_COLUMN))[None, :]
    inside = (row < rows) & (column < outputs)
    added = tl.zeros((1, BLOCK_COLUMN), tl.float32)
    if bias is not None:
        added = tl.load(bias + column * bias_stride, mask=column < outputs, other=0.0).to(tl.float32)
    if z is None:
        output = z0 + added
    else:
        output = tl.load(z + row * z_row + column * z_column, mask=inside, other=0.0)
        z0 = output - added
    place = row * outputs + column
    coefficient = c + row * c_row + column * c_column
    dtype: tl.constexpr = ratio.dtype.element_ty
    # Shares of R / c first: they take the registers of both sums before the coefficient needs any.
    if METHOD == "z_plus":
        made = z_plus_ratio(output, z0, u, added, epsilon)
    elif METHOD == "alpha_beta":
        made, lowered = alpha_beta_ratios(output, z0, u, added, first, second, epsilon)
        lowered *= tl.load(coefficient, mask=inside, other=0.0).to(tl.float32)
        tl.store(aside + place, rounded(lowered, dtype), mask=inside)
    else:
        made = gamma_ratio(output, output, z0, u, added, first, epsilon)
        group = first_column // 8 + tl.arange(0, BLOCK_COLUMN // 8)[None, :]
        negative = packed((output < 0) & inside, BLOCK_ROW, BLOCK_COLUMN)
        tl.store(aside + row * bytes_per_row + group, negative, mask=(row < rows) & (group < bytes_per_row))
    made *= tl.load(coefficient, mask=inside, other=0.0).to(tl.float32)
    tl.store(ratio + place, rounded(made, dtype), mask=inside)


@triton.jit
def signsplit_linear_fwd_kernel(
    c, x, weight, bias, z, ratio, aside,
    rows, inputs, outputs, bytes_per_row, c_row, c_column, x_row, x_column, weight_row, weight_column, bias_stride,
    z_row, z_column, first, second, epsilon,
    METHOD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROW: tl.constexpr, BLOCK_COLUMN: tl.constexpr,
    BLOCK_INNER: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tile_of(tl.program_id(0), rows, outputs, BLOCK_ROW, BLOCK_COLUMN)
    # Rows times strides pass 2^31 in large tensors.
    row = (row_tile.to(tl.int64) * BLOCK_ROW + tl.arange(0, BLOCK_ROW))[:, None]
    column = (column_tile.to(tl.int64) * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN))[None, :]
    inner = tl.arange(0, BLOCK_INNER)
    step = tl.full((), BLOCK_INNER, tl.int64)
    x_tile = x + row * x_row + inner[None, :].to(tl.int64) * x_column
    weight_tile = weight + column * weight_row + inner[:, None].to(tl.int64) * weight_column
    z0 = tl.zeros((BLOCK_ROW, BLOCK_COLUMN), tl.float32)
    u = tl.zeros((BLOCK_ROW, BLOCK_COLUMN), tl.float32)
    for start in range(0, inputs, BLOCK_INNER):
        left = inputs - start
        factor = multiplicand(tl.load(x_tile, mask=(row < rows) & (inner[None, :] < left), other=0.0))
        weights = multiplicand(tl.load(weight_tile, mask=(column < outputs) & (inner[:, None] < left), other=0.0))
        if z is None:
            z0 = tl.dot(factor, weights, z0, input_precision=PRECISION)
        u = tl.dot(tl.abs(factor), tl.abs(weights), u, input_precision=PRECISION)
        x_tile += step * x_column
        weight_tile += step * weight_column
    for part in tl.static_range(PARTS):
        part_column = column_tile.to(tl.int64) * BLOCK_COLUMN + part * (BLOCK_COLUMN // PARTS)
        write_shares(
            columns_of(z0, part, PARTS), columns_of(u, part, PARTS), c, bias, z, ratio, aside,
            row, part_column, rows, outputs, bytes_per_row, c_row, c_column, bias_stride, z_row, z_column,
            first, second, epsilon, METHOD, BLOCK_ROW, BLOCK_COLUMN // PARTS,
        )  # fmt: skip


@triton.jit
def signsplit_linear_bwd_kernel(
    ratio, aside, x, weight, out,
    rows, inputs, outputs, ratio_row, ratio_column, aside_row, aside_column, x_row, x_column, weight_row, weight_column,
    plain_factor, absolute_factor,
    METHOD: tl.constexpr, AS_RELEVANCE: tl.constexpr, ADDS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_COLUMN: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tile_of(tl.program_id(0), rows, inputs, BLOCK_ROW, BLOCK_COLUMN)
    row = (row_tile.to(tl.int64) * BLOCK_ROW + tl.arange(0, BLOCK_ROW))[:, None]
    column = (column_tile.to(tl.int64) * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN))[None, :]
    inner = tl.arange(0, BLOCK_INNER)
    step = tl.full((), BLOCK_INNER, tl.int64)
    ratio_tile = ratio + row * ratio_row + inner[None, :].to(tl.int64) * ratio_column
    weight_tile = weight + inner[:, None].to(tl.int64) * weight_row + column * weight_column
    group = tl.arange(0, BLOCK_INNER // 8)[None, :]
    if METHOD == "alpha_beta":
        aside_tile = aside + row * aside_row + inner[None, :].to(tl.int64) * aside_column
    elif METHOD == "gamma":
        aside_tile = aside + row * aside_row + group.to(tl.int64) * aside_column
    plain = tl.zeros((BLOCK_ROW, BLOCK_COLUMN), tl.float32)
    absolute = tl.zeros((BLOCK_ROW, BLOCK_COLUMN), tl.float32)
    for start in range(0, outputs, BLOCK_INNER):
        left = outputs - start
        here = (row < rows) & (inner[None, :] < left)
        raising = multiplicand(tl.load(ratio_tile, mask=here, other=0.0))
        weights = multiplicand(tl.load(weight_tile, mask=(inner[:, None] < left) & (column < inputs), other=0.0))
        size = tl.abs(weights)
        if METHOD == "alpha_beta":
            lowering = multiplicand(tl.load(aside_tile, mask=here, other=0.0))
            aside_tile += step * aside_column
            if ADDS_FIRST:
                plain = tl.dot(raising - lowering, weights, plain, input_precision=PRECISION)
                absolute = tl.dot(raising + lowering, size, absolute, input_precision=PRECISION)
            else:
                # Sums rounded to what is multiplied would no longer cancel between both products.
                plain = tl.dot(raising, weights, plain, input_precision=PRECISION)
                plain = tl.dot(-lowering, weights, plain, input_precision=PRECISION)
                absolute = tl.dot(raising, size, absolute, input_precision=PRECISION)
                absolute = tl.dot(lowering, size, absolute, input_precision=PRECISION)
        else:
            signed = raising
            if METHOD == "gamma":
                bits = tl.load(aside_tile, mask=(row < rows) & (group * 8 < left), other=0)
                aside_tile += (step // 8) * aside_column
                signed = tl.where(unpacked(bits, BLOCK_ROW, BLOCK_INNER), -raising, raising)
            plain = tl.dot(raising, weights, plain, input_precision=PRECISION)
            absolute = tl.dot(signed, size, absolute, input_precision=PRECISION)
        ratio_tile += step * ratio_column
        weight_tile += step * weight_row
    inside = (row < rows) & (column < inputs)
    factor = tl.load(x + row * x_row + column * x_column, mask=inside, other=0.0).to(tl.float32)
    sign = tl.where(factor > 0, 1.0, tl.where(factor < 0, -1.0, 0.0))
    made = plain_factor * plain + sign * (absolute_factor * absolute)
    if AS_RELEVANCE:
        made *= factor
    tl.store(out + row * inputs + column, nearest(made, out.dtype.element_ty), mask=inside)


def plan_signsplit_linear_fwd(
    c: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    method: str,
    first: float,
    second: float,
    epsilon: float,
    config: Config | None = None,
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """Both results and the launch that fills them."""
    outputs, inputs = weight.shape
    ratio, aside = contiguous_like(c), empty_aside(c, method)
    c, x = as_matrix(c), as_matrix(x)
    chosen = fitted(CONFIGS, config, c.shape[0], outputs, c)
    # Another kernel cuts numbers to TF32 in its own way, and u + z0 would be the difference.
    z = None if z is None or _in_tf32(c.dtype) else as_matrix(z)
    arguments = {
        "c": c, "x": x, "weight": weight, "bias": bias, "z": z, "ratio": ratio,
        "aside": None if method == "z_plus" else aside,
        "rows": c.shape[0], "inputs": inputs, "outputs": outputs, "bytes_per_row": packed_size(outputs),
        "bias_stride": 0 if bias is None else bias.stride(0),
        **strides_of(c=c, x=x, weight=weight, z=z),
        "first": float(first), "second": float(second), "epsilon": float(epsilon),
        "METHOD": method, "PRECISION": precision(), **dict(chosen.blocks),
        "PARTS": 4 if chosen["BLOCK_ROW"] * chosen["BLOCK_COLUMN"] >= HELD * chosen.num_warps else 1,
    }  # fmt: skip
    grid = (cdiv(c.shape[0], chosen["BLOCK_ROW"]) * cdiv(outputs, chosen["BLOCK_COLUMN"]),)
    return (ratio, aside), [Launch(signsplit_linear_fwd_kernel, grid, arguments, chosen.num_warps, chosen.num_stages)]


def plan_signsplit_linear_bwd(
    ratio: Tensor,
    aside: Tensor,
    x: Tensor,
    weight: Tensor,
    method: str,
    first: float,
    second: float,
    as_relevance: bool,
    config: Config | None = None,
) -> tuple[Tensor, list[Launch]]:
    """The result and the launch that fills it."""
    outputs, inputs = weight.shape
    out = contiguous_like(x)
    ratio, x = as_matrix(ratio), as_matrix(x)
    aside_matrix = None if method == "z_plus" else as_matrix(aside)
    chosen = fitted(CONFIGS, config, x.shape[0], inputs, x)
    favour = first / 2 if method == "gamma" else 0.0
    arguments = {
        "ratio": ratio, "aside": aside_matrix, "x": x, "weight": weight, "out": out,
        "rows": x.shape[0], "inputs": inputs, "outputs": outputs,
        **strides_of(ratio=ratio, aside=aside_matrix, x=x, weight=weight),
        "plain_factor": 1.0 + favour, "absolute_factor": favour if method == "gamma" else 1.0,
        "METHOD": method, "AS_RELEVANCE": as_relevance,
        "ADDS_FIRST": x.dtype == torch.float32 and not _in_tf32(x.dtype),
        "PRECISION": precision(), **dict(chosen.blocks),
    }  # fmt: skip
    grid = (cdiv(x.shape[0], chosen["BLOCK_ROW"]) * cdiv(inputs, chosen["BLOCK_COLUMN"]),)
    return out, [Launch(signsplit_linear_bwd_kernel, grid, arguments, chosen.num_warps, chosen.num_stages)]


def _in_tf32(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and precision() == "tf32"
