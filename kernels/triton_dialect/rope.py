"""rope_bwd in Triton: a program turns some tokens of one head back and copies the columns that are not turned."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lrp_compiler.kernels.dialect.rope import ordered_like
from lrp_compiler.kernels.launch import Config, Launch, cdiv, config, next_power_of_2

CONFIGS_ROPE_BWD = (
    config(num_warps=4, BLOCK=2048),
    config(num_warps=4, BLOCK=1024),
    config(num_warps=8, BLOCK=4096),
)
"""BLOCK: columns times tokens of a program."""


@triton.jit
def turned_back(first, second, cos_first, cos_second, sin_first, sin_second):
    """The two columns of every pair."""
    return first * cos_first + second * sin_second, second * cos_second - first * sin_first


@triton.jit
def columns_of(values, step, column, row_inside, size):
    """Columns of a tile in float32, 0 where there are none."""
    return tl.load(values + column * step, mask=row_inside & (column < size), other=0.0).to(tl.float32)


@triton.jit
def turn_pairs(c, cos, sin, out, c_step, cos_step, sin_step, out_step, row_inside, turned, PAIRS: tl.constexpr):
    """Columns 2 j and 2 j + 1 are a pair: read and written side by side."""
    column = tl.arange(0, 2 * PAIRS).to(tl.int64)[None, :]
    tokens: tl.constexpr = row_inside.shape[0]
    first, second = tl.split(columns_of(c, c_step, column, row_inside, turned).reshape(tokens, PAIRS, 2))
    cos_first, cos_second = tl.split(columns_of(cos, cos_step, column, row_inside, turned).reshape(tokens, PAIRS, 2))
    sin_first, sin_second = tl.split(columns_of(sin, sin_step, column, row_inside, turned).reshape(tokens, PAIRS, 2))
    first, second = turned_back(first, second, cos_first, cos_second, sin_first, sin_second)
    made = tl.join(first, second).reshape(tokens, 2 * PAIRS).to(out.dtype.element_ty)
    tl.store(out + column * out_step, made, mask=row_inside & (column < turned))


@triton.jit
def turn_halves(c, cos, sin, out, c_step, cos_step, sin_step, out_step, row_inside, turned, PAIRS: tl.constexpr):
    """Columns j and j + turned / 2 are a pair."""
    half = turned // 2
    near = tl.arange(0, PAIRS).to(tl.int64)[None, :]
    inside = row_inside & (near < half)
    far = near + half
    first, second = turned_back(
        columns_of(c, c_step, near, row_inside, half), columns_of(c, c_step, far, inside, turned),
        columns_of(cos, cos_step, near, row_inside, half), columns_of(cos, cos_step, far, inside, turned),
        columns_of(sin, sin_step, near, row_inside, half), columns_of(sin, sin_step, far, inside, turned),
    )  # fmt: skip
    tl.store(out + near * out_step, first.to(out.dtype.element_ty), mask=inside)
    tl.store(out + far * out_step, second.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rope_bwd_kernel(
    c, cos, sin, out, tokens, heads, size, turned, c_strides, cos_strides, sin_strides, out_strides,
    INTERLEAVED: tl.constexpr, TOKENS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    # Heads fastest: programs side by side read the same angles. Strides times indices pass 2^31 in large tensors.
    head = (tl.program_id(0) % heads).to(tl.int64)
    block = tl.program_id(0) // heads
    blocks = tl.cdiv(tokens, TOKENS)
    batch = (block // blocks).to(tl.int64)
    token = ((block % blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    inside = token < tokens
    c += batch * c_strides[0] + head * c_strides[1] + token * c_strides[2]
    cos += batch * cos_strides[0] + head * cos_strides[1] + token * cos_strides[2]
    sin += batch * sin_strides[0] + head * sin_strides[1] + token * sin_strides[2]
    out += batch * out_strides[0] + head * out_strides[1] + token * out_strides[2]
    if PAIRS > 0:
        steps = (c_strides[3], cos_strides[3], sin_strides[3], out_strides[3])
        if INTERLEAVED:
            turn_pairs(c, cos, sin, out, steps[0], steps[1], steps[2], steps[3], inside, turned, PAIRS)
        else:
            turn_halves(c, cos, sin, out, steps[0], steps[1], steps[2], steps[3], inside, turned, PAIRS)
    if REST > 0:
        column = turned + tl.arange(0, REST).to(tl.int64)[None, :]
        kept = inside & (column < size)
        value = tl.load(c + column * c_strides[3], mask=kept, other=0.0)
        tl.store(out + column * out_strides[3], value, mask=kept)


def plan_rope_bwd(
    c: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, config: Config | None = None
) -> tuple[Tensor, list[Launch]]:
    """The result and the launch that fills it."""
    chosen = config or CONFIGS_ROPE_BWD[0]
    out = ordered_like(c)
    if not c.numel():
        return out, []
    batch, heads, tokens, size = c.shape
    turned = cos.shape[-1]
    spread = [batch, heads, tokens, turned]
    pairs = next_power_of_2(turned // 2) if turned else 0
    rest = next_power_of_2(size - turned) if size > turned else 0
    together = min(max(1, chosen["BLOCK"] // (2 * pairs + rest)), next_power_of_2(tokens))
    together = 1 << (together.bit_length() - 1)
    arguments = {
        "c": c, "cos": cos, "sin": sin, "out": out, "tokens": tokens, "heads": heads, "size": size, "turned": turned,
        "c_strides": c.stride(), "cos_strides": cos.expand(spread).stride(), "sin_strides": sin.expand(spread).stride(),
        "out_strides": out.stride(), "INTERLEAVED": interleaved,
        "TOKENS": together, "PAIRS": pairs, "REST": rest,
    }  # fmt: skip
    grid = batch * heads * cdiv(tokens, together)
    return out, [Launch(rope_bwd_kernel, (grid,), arguments, num_warps=chosen.num_warps)]
