"""gated_mlp_bwd in Triton: one read of the coefficient and both operands, one write of both results."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lrp_compiler.kernels.launch import Config, Launch, cdiv, config
from lrp_compiler.kernels.spec import contiguous_like
from lrp_compiler.kernels.strides import tile_of, walk
from lrp_compiler.kernels.triton_dialect import maths
from lrp_compiler.kernels.triton_dialect.tiles import row_offset

CONFIGS_GATED_MLP_BWD = (
    config(num_warps=4, BLOCK=1024),
    config(num_warps=4, BLOCK=2048),
    config(num_warps=8, BLOCK=4096),
)


@triton.jit
def gate_function(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """g(x) of f(x) = x g(x); not for "identity"."""
    if ACTIVATION == "silu":
        return maths.sigmoid(x, EXACT)
    elif ACTIVATION == "quick_gelu":
        return maths.sigmoid(1.702 * x, EXACT)
    elif ACTIVATION == "gelu":
        return 0.5 * maths.erfc(x * -0.70710678118654752, EXACT)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u).
        return maths.sigmoid(1.59576912160573071 * (x + 0.044715 * x * x * x), EXACT)
    else:
        tl.static_assert(ACTIVATION == "relu", "no gate function of this activation")
        return tl.where(x > 0, 1.0, 0.0)


@triton.jit
def gated_mlp_bwd_kernel(
    c, gate, up, c_gate, c_up,
    rows, columns, sizes, c_rows, gate_rows, up_rows, c_column, gate_column, up_column, share,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Offsets pass 2^31 in large tensors.
    across = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = ((tl.program_id(0) % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows)[:, None] & (column < columns)
    c_address = c + row_offset(row, sizes, c_rows)[:, None] + column * c_column
    gate_address = gate + row_offset(row, sizes, gate_rows)[:, None] + column * gate_column
    up_address = up + row_offset(row, sizes, up_rows)[:, None] + column * up_column
    given = tl.load(c_address, mask=inside, other=0.0).to(tl.float32) * share
    x = tl.load(gate_address, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(up_address, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION != "identity":
        opened = gate_function(x, ACTIVATION, c_gate.dtype.element_ty == tl.float32)
        x *= opened
        other *= opened
    place = row[:, None] * columns + column
    tl.store(c_gate + place, (given * other).to(c_gate.dtype.element_ty), mask=inside)
    tl.store(c_up + place, (given * x).to(c_up.dtype.element_ty), mask=inside)


def plan_gated_mlp_bwd(
    c: Tensor, gate: Tensor, up: Tensor, activation: str, share: float, config: Config | None = None
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """(c_gate, c_up) and the launch that fills both."""
    chosen = config or CONFIGS_GATED_MLP_BWD[0]
    results = contiguous_like(c), contiguous_like(c)
    if not c.numel():
        return results, []
    way = walk(c.shape, (c, gate, up))
    rows, columns = tile_of(way.columns, chosen["BLOCK"])
    arguments = {
        "c": c, "gate": gate, "up": up, "c_gate": results[0], "c_up": results[1],
        "rows": way.rows, "columns": way.columns, "sizes": way.sizes,
        "c_rows": way.outer[0], "gate_rows": way.outer[1], "up_rows": way.outer[2],
        "c_column": way.inner[0], "gate_column": way.inner[1], "up_column": way.inner[2], "share": float(share),
        "ACTIVATION": activation, "ROWS": rows, "COLUMNS": columns,
    }  # fmt: skip
    grid = cdiv(way.rows, rows) * cdiv(way.columns, columns)
    return results, [Launch(gated_mlp_bwd_kernel, (grid,), arguments, num_warps=chosen.num_warps)]
