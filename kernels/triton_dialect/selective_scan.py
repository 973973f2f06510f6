"""selective_scan_transpose in Triton: a program walks back in time with the states of some channels in registers.

Steps are read several at a time, so that enough loads are on their way where channels are few.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lrp_compiler.kernels.dialect.selective_scan import KEPT_AXES, axes
from lrp_compiler.kernels.launch import Config, Launch, cdiv, config, next_power_of_2

FEW_LANES = 2**17
"""Channels times states below which programs are made small: fewer lanes than 1000 per multiprocessor of an H100."""

CONFIGS_SELECTIVE_SCAN_TRANSPOSE = (
    config(num_warps=1, num_stages=1, LANES=32, STEPS=32),
    config(num_warps=1, num_stages=1, LANES=64, STEPS=16),
    config(num_warps=1, num_stages=1, LANES=128, STEPS=8),
)


@triton.jit
def place(outer, middle, channel, strides):
    """Where the first step of a channel lies."""
    return outer * strides[1] + middle * strides[2] + channel * strides[3]


@triton.jit
def selective_scan_transpose_kernel(
    states, decay, write, out,
    steps, middles, channels, states_per_channel,
    states_strides, decay_strides, write_strides, out_strides,
    HAS_WRITE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Strides are those of time, the two outer axes of the result, channels and states per channel."""
    blocks = tl.cdiv(channels, BLOCK_C)
    # Steps and channels times strides pass 2^31 in large tensors.
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    outer = row // middles
    middle = row % middles
    channel = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    state = tl.arange(0, BLOCK_N)
    kept = channel < channels
    inside = kept[:, None] & (state < states_per_channel)[None, :]
    column, line = channel[:, None], state.to(tl.int64)[None, :]
    states += place(outer, middle, column, states_strides) + line * states_strides[4]
    decay += place(outer, middle, column, decay_strides) + line * decay_strides[4]
    if HAS_WRITE:
        write += place(outer, middle, column, write_strides) + line * write_strides[4]
    out += place(outer, middle, channel, out_strides)
    carried = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    for walked in range(0, steps, STEPS):
        last = (steps - 1 - walked).to(tl.int64)
        # All loads come before the first store, behind which the compiler would have to leave them.
        given, decays, writes = tl.tuple(()), tl.tuple(()), tl.tuple(())
        for back in tl.static_range(STEPS):
            t = last - back
            known = inside & (t >= 0)
            given += (tl.load(states + t * states_strides[0], mask=known, other=0.0),)
            from_later = known & (t + 1 < steps)
            decays += (tl.load(decay + (t + 1) * decay_strides[0], mask=from_later, other=0.0),)
            if HAS_WRITE:
                writes += (tl.load(write + t * write_strides[0], mask=known, other=0.0),)
        for back in tl.static_range(STEPS):
            carried = given[back].to(tl.float32) + decays[back].to(tl.float32) * carried
            signal = carried
            if HAS_WRITE:
                signal = carried * writes[back].to(tl.float32)
            t = last - back
            tl.store(out + t * out_strides[0], tl.sum(signal, 1).to(out.dtype.element_ty), mask=kept & (t >= 0))


def plan_selective_scan_transpose(
    states: Tensor, decay: Tensor, write: Tensor | None, sizes: list[int], config: Config | None = None
) -> tuple[Tensor, list[Launch]]:
    """The result and the launch that fills it."""
    out = states.new_empty(sizes)
    kept, summed = axes(states, decay, write, sizes)
    nothing = (1, (0, 0, 0, 0))
    around = [*[nothing] * (KEPT_AXES - len(kept)), *kept, *(summed or [nothing])]
    outer, middle, channels, per_channel = (size for size, _ in around)
    block_states = next_power_of_2(per_channel)
    few = outer * middle * channels * per_channel < FEW_LANES and block_states <= 256
    chosen = config or CONFIGS_SELECTIVE_SCAN_TRANSPOSE[0 if few else -1]
    block = min(max(chosen["LANES"] // block_states, 1), next_power_of_2(channels))
    operands = {"states": states, "decay": decay, "write": write, "out": out}
    strides = {
        f"{name}_strides": (0 if value is None else value.stride(0), *(strides[index] for _, strides in around))
        for index, (name, value) in enumerate(operands.items())
    }
    arguments = {
        **operands, **strides,
        "steps": sizes[0], "middles": middle, "channels": channels, "states_per_channel": per_channel,
        "HAS_WRITE": write is not None, "BLOCK_C": block, "BLOCK_N": block_states,
        "STEPS": min(chosen["STEPS"], next_power_of_2(sizes[0])),
    }  # fmt: skip
    warps = min(chosen.num_warps * max(block_states // chosen["LANES"], 1), 32)
    programs = outer * middle * cdiv(channels, block) if sizes[0] else 0
    return out, [Launch(selective_scan_transpose_kernel, (programs,), arguments, warps, chosen.num_stages)]
