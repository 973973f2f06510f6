"""epsilon_linear_bwd in Triton: the ratio is made of c and z as their tiles arrive, the rest as the sum leaves."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lrp_compiler.kernels.launch import Config, Launch, cdiv, config
from lrp_compiler.kernels.triton_dialect.products import (
    as_matrix,
    fitted,
    multiplicand,
    nearest,
    precision,
    strides_of,
    tile_of,
)
from lrp_compiler.kernels.triton_dialect.shares import epsilon_ratio

CONFIGS_EPSILON_LINEAR_BWD = (
    config(8, 3, BLOCK_ROW=128, BLOCK_COLUMN=128, BLOCK_INNER=64),
    config(4, 4, BLOCK_ROW=128, BLOCK_COLUMN=64, BLOCK_INNER=32),
    config(4, 4, BLOCK_ROW=64, BLOCK_COLUMN=64, BLOCK_INNER=32),
    config(4, 2, BLOCK_ROW=32, BLOCK_COLUMN=32, BLOCK_INNER=32),
)


@triton.jit
def epsilon_linear_bwd_kernel(
    c, z, weight, x, residual, out,
    rows, inputs, outputs, c_row, c_column, z_row, z_column, weight_row, weight_column, x_row, x_column,
    residual_row, residual_column, epsilon,
    PRECISION: tl.constexpr, BLOCK_ROW: tl.constexpr, BLOCK_COLUMN: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tile_of(tl.program_id(0), rows, inputs, BLOCK_ROW, BLOCK_COLUMN)
    # Rows times strides pass 2^31 in large tensors.
    row = (row_tile.to(tl.int64) * BLOCK_ROW + tl.arange(0, BLOCK_ROW))[:, None]
    column = (column_tile.to(tl.int64) * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN))[None, :]
    inner = tl.arange(0, BLOCK_INNER)
    step = tl.full((), BLOCK_INNER, tl.int64)
    c_tile = c + row * c_row + inner[None, :].to(tl.int64) * c_column
    z_tile = z + row * z_row + inner[None, :].to(tl.int64) * z_column
    weight_tile = weight + inner[:, None].to(tl.int64) * weight_row + column * weight_column
    total = tl.zeros((BLOCK_ROW, BLOCK_COLUMN), tl.float32)
    for start in range(0, outputs, BLOCK_INNER):
        left = outputs - start
        here = (row < rows) & (inner[None, :] < left)
        coefficient = tl.load(c_tile, mask=here, other=0.0).to(tl.float32)
        # Ones past the end: 0 / 0 without a stabiliser would reach every sum.
        output = tl.load(z_tile, mask=here, other=1.0).to(tl.float32)
        weights = tl.load(weight_tile, mask=(inner[:, None] < left) & (column < inputs), other=0.0)
        ratio = nearest(epsilon_ratio(coefficient, output, epsilon), c.dtype.element_ty)
        total = tl.dot(multiplicand(ratio), multiplicand(weights), total, input_precision=PRECISION)
        c_tile += step * c_column
        z_tile += step * z_column
        weight_tile += step * weight_row
    inside = (row < rows) & (column < inputs)
    if residual is not None:
        total += tl.load(residual + row * residual_row + column * residual_column, mask=inside, other=0.0)
    if x is not None:
        total *= tl.load(x + row * x_row + column * x_column, mask=inside, other=0.0)
    tl.store(out + row * inputs + column, nearest(total, out.dtype.element_ty), mask=inside)


def plan_epsilon_linear_bwd(
    c: Tensor,
    z: Tensor,
    weight: Tensor,
    epsilon: float,
    x: Tensor | None,
    residual: Tensor | None,
    config: Config | None = None,
) -> tuple[Tensor, list[Launch]]:
    """The result and the launch that fills it."""
    outputs, inputs = weight.shape
    out = c.new_empty((*c.shape[:-1], inputs))
    c, z = as_matrix(c), as_matrix(z)
    x, residual = (None if value is None else as_matrix(value) for value in (x, residual))
    chosen = fitted(CONFIGS_EPSILON_LINEAR_BWD, config, c.shape[0], inputs, c)
    arguments = {
        "c": c, "z": z, "weight": weight, "x": x, "residual": residual, "out": out,
        "rows": c.shape[0], "inputs": inputs, "outputs": outputs, "epsilon": float(epsilon),
        **strides_of(c=c, z=z, weight=weight, x=x, residual=residual),
        "PRECISION": precision(), **dict(chosen.blocks),
    }  # fmt: skip
    grid = (cdiv(c.shape[0], chosen["BLOCK_ROW"]) * cdiv(inputs, chosen["BLOCK_COLUMN"]),)
    return out, [Launch(epsilon_linear_bwd_kernel, grid, arguments, chosen.num_warps, chosen.num_stages)]
