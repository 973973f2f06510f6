"""elementwise_chain in Triton: the program is a constexpr, which the kernel interprets while it is compiled."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrp_compiler.kernels.dialect.elementwise import empty_results
from lrp_compiler.kernels.launch import Config, Launch, cdiv, config
from lrp_compiler.kernels.pointwise import DTYPES, parse
from lrp_compiler.kernels.strides import Walk, tile_of, walk
from lrp_compiler.kernels.triton_dialect import maths
from lrp_compiler.kernels.triton_dialect.tiles import row_offset

CONFIGS_ELEMENTWISE_CHAIN = (
    config(num_warps=4, BLOCK=1024),
    config(num_warps=4, BLOCK=2048),
    config(num_warps=8, BLOCK=4096),
)


@triton.constexpr_function
def length(program):
    """How many instructions a program has."""
    return len(program.split(";")) if program else 0


@triton.constexpr_function
def word(program, line, place):
    """A word of an instruction: its name, an operand ("3" or "0.25") or a dtype; "" behind the last."""
    words = program.split(";")[line].split()
    return words[place] if place < len(words) else ""


@triton.constexpr_function
def is_register(token):
    """Whether an operand is the number of a register."""
    return token.isdecimal()


@triton.constexpr_function
def number(token):
    """The number that an operand is or names."""
    return int(token) if token.isdecimal() else float(token)


@triton.jit
def operand(registers, TOKEN: tl.constexpr):
    """The value of an operand; a literal is a tile of one element, which broadcasts."""
    if is_register(TOKEN):
        return registers[number(TOKEN)]
    else:
        return tl.full((1, 1), number(TOKEN), tl.float32)


@triton.jit
def as_number(value):
    """0 or 1 for a mask."""
    return value.to(tl.float32)


@triton.jit
def as_mask(value):
    """Where ``value`` is not zero."""
    return value != 0


@triton.jit
def unary(NAME: tl.constexpr, x, EXACT: tl.constexpr):
    """An instruction on one number."""
    if NAME == "neg":
        return -x
    elif NAME == "reciprocal":
        return maths.divide(1.0, x, EXACT)
    elif NAME == "abs":
        return tl.abs(x)
    elif NAME == "sign":
        return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
    elif NAME == "exp":
        return maths.exp(x, EXACT)
    elif NAME == "log":
        return maths.log(x, EXACT)
    elif NAME == "sqrt":
        return tl.sqrt_rn(x)
    elif NAME == "rsqrt":
        return tl.rsqrt(x)
    elif NAME == "tanh":
        return maths.tanh(x, EXACT)
    elif NAME == "sigmoid":
        return maths.sigmoid(x, EXACT)
    elif NAME == "silu":
        return x * maths.sigmoid(x, EXACT)
    elif NAME == "erf":
        return tl.erf(x)
    elif NAME == "erfc":
        return maths.erfc(x, EXACT)
    else:
        tl.static_assert(NAME == "relu", "no such instruction on one number")
        return tl.where(x < 0, 0.0, x)


@triton.jit
def binary(NAME: tl.constexpr, x, y, EXACT: tl.constexpr):
    """An instruction on two numbers."""
    if NAME == "add":
        return x + y
    elif NAME == "sub":
        return x - y
    elif NAME == "mul":
        return x * y
    elif NAME == "div":
        return maths.divide(x, y, EXACT)
    elif NAME == "gt":
        return x > y
    elif NAME == "ge":
        return x >= y
    elif NAME == "lt":
        return x < y
    elif NAME == "le":
        return x <= y
    elif NAME == "eq":
        return x == y
    elif NAME == "ne":
        return x != y
    elif NAME == "minimum" or NAME == "clamp_max":
        return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)
    else:
        tl.static_assert(NAME == "maximum" or NAME == "clamp_min", "no such instruction on two numbers")
        return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def cast(value, DTYPE: tl.constexpr):
    """``value`` rounded through a dtype."""
    if DTYPE == "bool":
        return as_mask(value)
    elif DTYPE == "bf16":
        return as_number(value).to(tl.bfloat16).to(tl.float32)
    elif DTYPE == "fp16":
        return as_number(value).to(tl.float16).to(tl.float32)
    else:
        return as_number(value)


@triton.jit
def evaluate(registers, PROGRAM: tl.constexpr, LINE: tl.constexpr, EXACT: tl.constexpr):
    """The value of one instruction."""
    name: tl.constexpr = word(PROGRAM, LINE, 0)
    first = operand(registers, word(PROGRAM, LINE, 1))
    if name == "cast":
        return cast(first, word(PROGRAM, LINE, 2))
    elif name == "logical_not":
        return as_mask(first) == 0
    elif word(PROGRAM, LINE, 2) == "":
        return unary(name, as_number(first), EXACT)
    else:
        second = operand(registers, word(PROGRAM, LINE, 2))
        if name == "logical_and":
            return as_mask(first) & as_mask(second)
        elif name == "logical_or":
            return as_mask(first) | as_mask(second)
        elif name == "where":
            third = operand(registers, word(PROGRAM, LINE, 3))
            return tl.where(as_mask(first), as_number(second), as_number(third))
        elif name == "threshold_backward":
            third = operand(registers, word(PROGRAM, LINE, 3))
            return tl.where(as_number(second) <= as_number(third), 0.0, as_number(first))
        else:
            return binary(name, as_number(first), as_number(second), EXACT)


@triton.jit
def elementwise_chain_kernel(
    inputs, results, rows, columns, sizes, row_strides, column_strides,
    PROGRAM: tl.constexpr, SPANS: tl.constexpr, RESULTS: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Offsets pass 2^31 in large tensors.
    across = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = ((tl.program_id(0) % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    some_row = (row < rows)[:, None]
    some_column = column < columns
    registers = ()
    for place in tl.static_range(len(inputs)):
        along_rows = row_offset(row, sizes, row_strides[place])[:, None]
        # What broadcasts is read once and stays narrow until it meets something wider; idle lanes can divide by 1.
        if SPANS[place] == 3:
            address = inputs[place] + along_rows + column * column_strides[place]
            value = tl.load(address, mask=some_row & some_column, other=1)
        elif SPANS[place] == 2:
            value = tl.load(inputs[place] + along_rows, mask=some_row, other=1)
        elif SPANS[place] == 1:
            value = tl.load(inputs[place] + column * column_strides[place], mask=some_column, other=1)
        else:
            value = tl.load(inputs[place] + tl.zeros((1, 1), tl.int32))
        registers += (as_number(value),)  # type: ignore[assignment]
    for line in tl.static_range(length(PROGRAM)):
        registers += (evaluate(registers, PROGRAM, line, EXACT),)  # type: ignore[assignment]
    address = row[:, None] * columns + column
    for place in tl.static_range(len(results)):
        register = registers[RESULTS[place]]  # type: ignore[var-annotated]
        made = as_mask(register) if results[place].dtype.element_ty == tl.uint8 else as_number(register)
        made = tl.broadcast_to(made.to(results[place].dtype.element_ty), (ROWS, COLUMNS))
        tl.store(results[place] + address, made, mask=some_row & some_column)


def plan_elementwise_chain(
    inputs: list[Tensor], program: str, config: Config | None = None
) -> tuple[list[Tensor], list[Launch]]:
    """The results and the launch that fills them."""
    chosen = config or CONFIGS_ELEMENTWISE_CHAIN[0]
    results = empty_results(inputs, program)
    if not results[0].numel():
        return results, []
    way = walk(results[0].shape, inputs)
    rows, columns = tile_of(way.columns, chosen["BLOCK"])
    arguments = {
        "inputs": tuple(map(_bytes, inputs)), "results": tuple(map(_bytes, results)),
        "rows": way.rows, "columns": way.columns, "sizes": way.sizes,
        "row_strides": way.outer, "column_strides": way.inner,
        "PROGRAM": _spelled(program, len(inputs)), "SPANS": _spans(way),
        "RESULTS": tuple(one.operands[0] for one in parse(program, len(inputs)) if one.name == "out"),
        "EXACT": torch.float32 in (one.dtype for one in results), "ROWS": rows, "COLUMNS": columns,
    }  # fmt: skip
    grid = cdiv(way.rows, rows) * cdiv(way.columns, columns)
    return results, [Launch(elementwise_chain_kernel, (grid,), arguments, num_warps=chosen.num_warps)]


def _spelled(program: str, inputs: int) -> str:
    """The instructions that write registers, as the kernel's functions read them."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    lines = [
        " ".join([one.name, *map(repr, one.operands), *([names[one.dtype]] if one.dtype else [])])
        for one in parse(program, inputs)
        if one.name != "out"
    ]
    return ";".join(lines)


def _spans(way: Walk) -> tuple[int, ...]:
    """For every input 2 if it varies along rows, plus 1 if along columns."""
    return tuple(2 * any(outer) + (inner != 0) for outer, inner in zip(way.outer, way.inner, strict=True))


def _bytes(value: Tensor) -> Tensor:
    """Masks as bytes: kernels read and write these alike on every backend."""
    return value.view(torch.uint8) if value.dtype == torch.bool else value
