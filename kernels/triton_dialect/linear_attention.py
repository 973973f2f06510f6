"""linear_attention_transpose in Triton: states carried back from chunk to chunk, then every chunk on its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrp_compiler.kernels.launch import Config, Launch, cdiv, config, next_power_of_2
from lrp_compiler.kernels.spec import contiguous_like
from lrp_compiler.kernels.triton_dialect.products import multiplicand, precision

SMALLEST_TILE = 16
"""What tl.dot takes in each dimension."""

FOR_FLOAT32 = config(8, 2, BLOCK_T=64, BLOCK_N=16, BLOCK_P=64, CARRIED_N=64, CARRIED_P=32)
"""What float32's products, made of scalar ones, hold in registers."""

CONFIGS_LINEAR_ATTENTION_TRANSPOSE = (
    config(4, 3, BLOCK_T=64, BLOCK_N=64, BLOCK_P=64, CARRIED_N=64, CARRIED_P=32),
    config(8, 2, BLOCK_T=128, BLOCK_N=32, BLOCK_P=64, CARRIED_N=64, CARRIED_P=64),
    FOR_FLOAT32,
)


@triton.jit
def running_sums(log_decay, times, steps, time_stride):
    """log a summed up from the start of a chunk, and to its end; nothing decays after the last step.

    In float64: decays between two steps are differences of these.
    """
    decays = tl.load(log_decay + times * time_stride, mask=times < steps, other=0.0).to(tl.float64)
    return tl.cumsum(decays, 0), tl.sum(decays, 0)


@triton.jit
def product(left, right, total, PRECISION: tl.constexpr):
    """total + left @ right."""
    return tl.dot(multiplicand(left), multiplicand(right), total, input_precision=PRECISION)


@triton.jit
def carried_states_kernel(
    c, read, log_decay, states,
    heads, heads_per_group, steps, chunks, width, size,
    c_strides, read_strides, decay_strides,
    HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, CARRIED_N: tl.constexpr, CARRIED_P: tl.constexpr,
):  # fmt: skip
    """states[b, h, k] (N, P): what reaches the end of chunk k from all later ones."""
    # Rows times strides pass 2^31 in large tensors.
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    state = tl.program_id(1).to(tl.int64) * CARRIED_N + tl.arange(0, CARRIED_N)
    column = tl.program_id(2).to(tl.int64) * CARRIED_P + tl.arange(0, CARRIED_P)
    c += batch * c_strides[0] + head * c_strides[1] + column[None, :] * c_strides[3]
    read += batch * read_strides[0] + head // heads_per_group * read_strides[1] + state[:, None] * read_strides[3]
    if HAS_DECAY:
        log_decay += batch * decay_strides[0] + head * decay_strides[1]
    written = (state < size)[:, None] & (column < width)[None, :]
    states += row * chunks * size * width + state[:, None] * width + column[None, :]
    carried = tl.zeros((CARRIED_N, CARRIED_P), tl.float32)
    for before in range(0, chunks):
        chunk = (chunks - 1 - before).to(tl.int64)
        tl.store(states + chunk * size * width, carried.to(states.dtype.element_ty), mask=written)
        times = chunk * BLOCK_T + tl.arange(0, BLOCK_T)
        known = times < steps
        reads = tl.load(
            read + times[None, :] * read_strides[2], mask=(state < size)[:, None] & known[None, :], other=0.0
        )
        given = tl.load(c + times[:, None] * c_strides[2], mask=known[:, None] & (column < width)[None, :], other=0.0)
        if HAS_DECAY:
            sums, total = running_sums(log_decay, times, steps, decay_strides[2])
            carried *= tl.exp(total.to(tl.float32))
            reads = (reads.to(tl.float32) * tl.exp(sums.to(tl.float32))[None, :]).to(given.dtype)
        carried = product(reads, given, carried, PRECISION)


@triton.jit
def linear_attention_transpose_kernel(
    c, write, read, log_decay, states, out,
    heads, heads_per_group, steps, chunks, width, size,
    c_strides, write_strides, read_strides, decay_strides,
    HAS_DECAY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # Rows times strides pass 2^31 in large tensors.
    program = tl.program_id(0).to(tl.int64)
    row, chunk = program // chunks, program % chunks
    batch, head = row // heads, row % heads
    group = head // heads_per_group
    times = chunk * BLOCK_T + tl.arange(0, BLOCK_T)
    known = times < steps
    column = tl.program_id(1).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = column < width
    write += batch * write_strides[0] + group * write_strides[1] + times[:, None] * write_strides[2]
    read += batch * read_strides[0] + group * read_strides[1] + times[None, :] * read_strides[2]
    states += program * size * width + column[None, :]
    scores = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    made = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    for first in range(0, size, BLOCK_N):
        state = first + tl.arange(0, BLOCK_N).to(tl.int64)
        real = state < size
        writes = tl.load(write + state[None, :] * write_strides[3], mask=known[:, None] & real[None, :], other=0.0)
        reads = tl.load(read + state[:, None] * read_strides[3], mask=real[:, None] & known[None, :], other=0.0)
        carried = tl.load(states + state[:, None] * width, mask=real[:, None] & inside[None, :], other=0.0)
        scores = product(writes, reads, scores, PRECISION)
        made = product(writes, carried, made, PRECISION)
    later = times[None, :] >= times[:, None]
    scores = tl.where(later, scores, 0.0)
    if HAS_DECAY:
        sums, total = running_sums(
            log_decay + batch * decay_strides[0] + head * decay_strides[1], times, steps, decay_strides[2]
        )
        # Differences in two halves of float32 lose no more than one of float64; e^x is 1 + x for the lower.
        high = sums.to(tl.float32)
        low = (sums - high).to(tl.float32)
        made *= tl.exp((total - sums).to(tl.float32))[:, None]
        scores *= tl.exp(tl.where(later, high[None, :] - high[:, None], 0.0))
        scores += scores * (low[None, :] - low[:, None])
    c += batch * c_strides[0] + head * c_strides[1] + times[:, None] * c_strides[2] + column[None, :] * c_strides[3]
    given = tl.load(c, mask=known[:, None] & inside[None, :], other=0.0)
    made = product(scores.to(given.dtype), given, made, PRECISION)
    out += (row * steps + times[:, None]) * width + column[None, :]
    tl.store(out, made.to(out.dtype.element_ty), mask=known[:, None] & inside[None, :])


def plan_linear_attention_transpose(
    c: Tensor, write: Tensor, read: Tensor, log_decay: Tensor | None, config: Config | None = None
) -> tuple[Tensor, list[Launch]]:
    """The result and the launches that fill it: first the states between chunks, then the chunks."""
    out = contiguous_like(c)
    batch, heads, steps, width = c.shape
    groups, size = write.shape[1], write.shape[3]
    chosen = FOR_FLOAT32 if c.dtype == torch.float32 else config or CONFIGS_LINEAR_ATTENTION_TRANSPOSE[0]
    extents = {"BLOCK_T": steps, "BLOCK_N": size, "BLOCK_P": width, "CARRIED_N": size, "CARRIED_P": width}
    tiles = {name: min(chosen[name], max(SMALLEST_TILE, next_power_of_2(extent))) for name, extent in extents.items()}
    rows, chunks = batch * heads, cdiv(steps, tiles["BLOCK_T"])
    states = torch.empty((rows, chunks, size, width), dtype=c.dtype, device=c.device)
    common = {
        "c": c, "read": read, "log_decay": log_decay, "states": states,
        "heads": heads, "heads_per_group": max(heads // max(groups, 1), 1), "steps": steps, "chunks": chunks,
        "width": width, "size": size,
        "c_strides": c.stride(), "read_strides": read.stride(),
        "decay_strides": (0, 0, 0) if log_decay is None else log_decay.stride(),
        "HAS_DECAY": log_decay is not None, "PRECISION": precision(), "BLOCK_T": tiles["BLOCK_T"],
    }  # fmt: skip
    carrying = {"CARRIED_N": tiles["CARRIED_N"], "CARRIED_P": tiles["CARRIED_P"]}
    own = {
        "write": write, "out": out, "write_strides": write.stride(),
        "BLOCK_N": tiles["BLOCK_N"], "BLOCK_P": tiles["BLOCK_P"],
    }  # fmt: skip
    of_states = (rows if chunks else 0, cdiv(size, tiles["CARRIED_N"]), cdiv(width, tiles["CARRIED_P"]))
    of_chunks = (rows * chunks, cdiv(width, tiles["BLOCK_P"]))
    tuning = (chosen.num_warps, chosen.num_stages)
    return out, [
        Launch(carried_states_kernel, of_states, common | carrying, *tuning),
        Launch(linear_attention_transpose_kernel, of_chunks, common | own, *tuning),
    ]
