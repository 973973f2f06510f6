"""softmax_bwd in Triton: rows held in registers, several short ones per program; long rows in two passes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lrp_compiler.kernels.launch import Config, Launch, cdiv, config, next_power_of_2
from lrp_compiler.kernels.spec import contiguous_like
from lrp_compiler.kernels.strides import walk
from lrp_compiler.kernels.triton_dialect.tiles import row_offset

CONFIGS_SOFTMAX_BWD = (
    config(num_warps=8, HELD=16384, BLOCK=4096, PER_THREAD=16, SHARED=1024),
    config(num_warps=8, HELD=8192, BLOCK=8192, PER_THREAD=8, SHARED=2048),
    config(num_warps=4, HELD=4096, BLOCK=2048, PER_THREAD=16, SHARED=2048),
)
"""HELD: the longest row held in registers; BLOCK: the chunks of longer ones, by ``num_warps``; PER_THREAD: elements
held by a thread; SHARED: elements of a program that takes several short rows."""


@triton.jit
def weights_and_coefficients(c, s, inside):
    """s, with 0 for nan, and c in float32."""
    weight = tl.load(s, mask=inside, other=0.0).to(tl.float32)
    return tl.where(weight == weight, weight, 0.0), tl.load(c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def softmax_bwd_kernel(
    c, s, residual, out,
    rows, size, sizes, c_rows, s_rows, residual_rows, c_column, s_column, residual_column,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Rows times strides pass 2^31 in large tensors.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK).to(tl.int64)[None, :]
    inside = (row < rows)[:, None] & (column < size)
    weight, value = weights_and_coefficients(
        c + row_offset(row, sizes, c_rows)[:, None] + column * c_column,
        s + row_offset(row, sizes, s_rows)[:, None] + column * s_column,
        inside,
    )
    made = weight * (value - tl.sum(weight * value, 1)[:, None])
    if HAS_RESIDUAL:
        address = residual + row_offset(row, sizes, residual_rows)[:, None] + column * residual_column
        made += tl.load(address, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * size + column, made.to(out.dtype.element_ty), mask=inside)


@triton.jit
def softmax_bwd_long_kernel(
    c, s, residual, out,
    rows, size, sizes, c_rows, s_rows, residual_rows, c_column, s_column, residual_column,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c += row_offset(row, sizes, c_rows)
    s += row_offset(row, sizes, s_rows)
    partial = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        column = tl.cast(start, tl.int64) + tl.arange(0, BLOCK)
        weight, value = weights_and_coefficients(c + column * c_column, s + column * s_column, column < size)
        partial += weight * value
    total = tl.sum(partial, 0)
    if HAS_RESIDUAL:
        residual += row_offset(row, sizes, residual_rows)
    for start in range(0, size, BLOCK):
        column = tl.cast(start, tl.int64) + tl.arange(0, BLOCK)
        inside = column < size
        weight, value = weights_and_coefficients(c + column * c_column, s + column * s_column, inside)
        made = weight * (value - total)
        if HAS_RESIDUAL:
            made += tl.load(residual + column * residual_column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * size + column, made.to(out.dtype.element_ty), mask=inside)


def plan_softmax_bwd(
    c: Tensor, s: Tensor, residual: Tensor | None, config: Config | None = None
) -> tuple[Tensor, list[Launch]]:
    """The result and the launch that fills it."""
    chosen = config or CONFIGS_SOFTMAX_BWD[0]
    out = contiguous_like(c)
    if not c.numel():
        return out, []
    way = walk(c.shape, (c, s, residual), rowwise=True)
    arguments = {
        "c": c, "s": s, "residual": residual, "out": out, "rows": way.rows, "size": way.columns, "sizes": way.sizes,
        "c_rows": way.outer[0], "s_rows": way.outer[1], "residual_rows": way.outer[2],
        "c_column": way.inner[0], "s_column": way.inner[1], "residual_column": way.inner[2],
        "HAS_RESIDUAL": residual is not None,
    }  # fmt: skip
    block = next_power_of_2(way.columns)
    if block > chosen["HELD"]:
        arguments |= {"BLOCK": chosen["BLOCK"]}
        return out, [Launch(softmax_bwd_long_kernel, (way.rows,), arguments, num_warps=chosen.num_warps)]
    together = max(1, chosen["SHARED"] // block)
    arguments |= {"ROWS": together, "BLOCK": block}
    warps = min(max(together * block // (32 * chosen["PER_THREAD"]), 1), 16)
    return out, [Launch(softmax_bwd_kernel, (cdiv(way.rows, together),), arguments, num_warps=warps)]
