"""topk_filter in Triton: the k-th largest relevance by radix, over the bits of integers that order as the floats do.

A sample that fits in registers is bisected, a bit at a time, by one program. A longer one is split over programs: for
every 8 bits of the key, from the highest, a launch writes how often each value occurs among the elements that agree
with what is known of the k-th largest; the next launch adds these histograms up and knows 8 bits more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrp_compiler.kernels.dialect.topk import kept_of, rows_of
from lrp_compiler.kernels.launch import Config, Launch, cdiv, config, next_power_of_2
from lrp_compiler.kernels.spec import contiguous_like

CONFIGS_TOPK_FILTER = (
    config(num_warps=8, BLOCK=4096, PROGRAMS=512),
    config(num_warps=4, BLOCK=2048, PROGRAMS=1024),
    config(num_warps=16, BLOCK=8192, PROGRAMS=256),
)
"""Elements of a long sample that a program takes at a time, and how many programs share the samples."""
LONGEST_ROW = 16384
"""Elements of a sample that one program holds in registers."""
INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
"""The bits of infinity; those of nan, without their sign, are larger."""


@triton.jit
def _keys(place, mask, BITS: tl.constexpr, INFINITY: tl.constexpr):
    """Signed integers in the order of the floats at ``place``: both zeros 0, every nan the greatest, no float least."""
    GREATEST: tl.constexpr = (1 << (BITS - 1)) - 1
    value = tl.load(place, mask=mask, other=0.0)
    bits = value.to(tl.int32, bitcast=True) if BITS == 32 else value.to(tl.int16, bitcast=True).to(tl.int32)
    magnitude = bits & GREATEST
    # Floats below zero order backwards.
    key = tl.where(magnitude == 0, 0, bits ^ ((bits >> 31) & GREATEST))
    key = tl.where(magnitude > INFINITY, GREATEST, key)
    return tl.where(mask, key, -GREATEST - 1)


@triton.jit
def topk_row_kernel(
    edge, relevance, out, size, kept, edge_row, edge_column, relevance_row, relevance_column,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Rows times strides pass 2^31 in large tensors.
    row = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, BLOCK)
    inside = position < size
    far = position.to(tl.int64)
    key = _keys(relevance + row * relevance_row + far * relevance_column, inside, BITS, INFINITY)
    # The greatest number that as many keys as are kept reach; what is outside reaches only the least.
    reached = tl.sum((key >= 0).to(tl.int32), 0) >= kept
    threshold = tl.where(reached, 0, -(1 << (BITS - 1)))
    for step in range(BITS - 1):
        tried = threshold + (1 << (BITS - 2 - step))
        reached = tl.sum((key >= tried).to(tl.int32), 0) >= kept
        threshold = tl.where(reached, tried, threshold)
    above = key > threshold
    equal = key == threshold
    rank = tl.cumsum(equal.to(tl.int32), 0)
    keep = inside & (above | (equal & (rank <= kept - tl.sum(above.to(tl.int32), 0))))
    value = tl.load(edge + row * edge_row + far * edge_column, mask=keep, other=0.0)
    tl.store(out + row * size + far, value, mask=inside)


@triton.jit
def _narrowed(histograms, state, row, splits, kept, PASS: tl.constexpr, SPLITS: tl.constexpr):
    """(bits of the k-th largest key after ``PASS`` passes, how many with these bits are kept, how many there are)."""
    prefix = 0
    wanted = kept
    if PASS > 1:
        prefix = tl.load(state + row * 2)
        wanted = tl.load(state + row * 2 + 1)
    digits = tl.arange(0, 256)
    counts = tl.zeros((256,), tl.int32)
    for first in range(0, splits, SPLITS):
        split = (first + tl.arange(0, SPLITS))[:, None]
        place = histograms + (row * splits + split) * 256 + digits[None, :]
        counts += tl.sum(tl.load(place, mask=split < splits, other=0), 0)
    reach = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
    digit = tl.max(tl.where(reach >= wanted, digits, 0), 0)
    wanted -= tl.sum(tl.where(digits > digit, counts, 0), 0)
    found = tl.sum(tl.where(digits == digit, counts, 0), 0)
    # The first digit holds the sign, which orders the other way round.
    prefix = digit - 128 if PASS == 1 else prefix * 256 + digit
    return prefix, wanted, found


@triton.jit
def topk_histogram_kernel(
    relevance, earlier, state, histograms, new_state, size, kept, splits, steps, relevance_row, relevance_column,
    PASS: tl.constexpr, BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    SHIFT: tl.constexpr = BITS - 8 - 8 * PASS
    program = tl.program_id(0).to(tl.int64)
    row, split = program // splits, program % splits
    prefix = 0
    if PASS > 0:
        prefix, wanted, _ = _narrowed(earlier, state, row, splits, kept, PASS, SPLITS)
        if split == 0:
            tl.store(new_state + row * 2, prefix)
            tl.store(new_state + row * 2 + 1, wanted)
    counts = tl.zeros((256,), tl.int32)
    for step in range(0, steps):
        position = (split * steps + step) * BLOCK + tl.arange(0, BLOCK)
        inside = position < size
        key = _keys(relevance + row * relevance_row + position * relevance_column, inside, BITS, INFINITY)
        digit = (key >> SHIFT) & 255
        if PASS == 0:
            counts += tl.histogram(digit ^ 128, 256, mask=inside)
        else:
            candidate = inside & (key >> (SHIFT + 8) == prefix)
            if tl.max(candidate.to(tl.int32), 0) > 0:
                counts += tl.histogram(digit, 256, mask=candidate)
    tl.store(histograms + program * 256 + tl.arange(0, 256), counts)


@triton.jit
def topk_write_kernel(
    edge, relevance, earlier, state, out, size, kept, splits, steps,
    edge_row, edge_column, relevance_row, relevance_column,
    PASS: tl.constexpr, BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, split = program // splits, program % splits
    threshold, wanted, found = _narrowed(earlier, state, row, splits, kept, PASS, SPLITS)
    # Those equal to the threshold in the parts of the sample before this one.
    before = tl.zeros((SPLITS,), tl.int32)
    for first in range(0, splits, SPLITS):
        other = first + tl.arange(0, SPLITS)
        place = earlier + (row * splits + other) * 256 + (threshold & 255)
        before += tl.load(place, mask=other < split, other=0)
    seen = tl.sum(before, 0)
    for step in range(0, steps):
        position = (split * steps + step) * BLOCK + tl.arange(0, BLOCK)
        inside = position < size
        key = _keys(relevance + row * relevance_row + position * relevance_column, inside, BITS, INFINITY)
        if wanted == found:
            keep = key >= threshold
        else:
            equal = (key == threshold).to(tl.int32)
            keep = (key > threshold) | ((equal > 0) & (seen + tl.cumsum(equal, 0) <= wanted))
            seen += tl.sum(equal, 0)
        value = tl.load(edge + row * edge_row + position * edge_column, mask=inside & keep, other=0.0)
        tl.store(out + row * size + position, value, mask=inside)


def plan_topk_filter(
    edge: Tensor, relevance: Tensor, fraction: float, config: Config | None = None
) -> tuple[Tensor, list[Launch]]:
    """The result and the launches that fill it; operands whose samples do not lie evenly in memory are copied."""
    out = contiguous_like(edge)
    edge_rows, rows = rows_of(edge), rows_of(relevance)
    size = rows.shape[1]
    common = {
        "relevance": rows, "size": size, "kept": kept_of(fraction, size),
        "relevance_row": rows.stride(0), "relevance_column": rows.stride(1),
        "BITS": 8 * rows.element_size(), "INFINITY": INFINITY[rows.dtype],
    }  # fmt: skip
    written = {"edge": edge_rows, "out": out, "edge_row": edge_rows.stride(0), "edge_column": edge_rows.stride(1)}
    if size > LONGEST_ROW:
        return out, _split(common, written, config or CONFIGS_TOPK_FILTER[0])
    block = next_power_of_2(size)
    warps = min(max(block // 512, 1), 16)
    grid = (rows.shape[0] if size else 0,)
    return out, [Launch(topk_row_kernel, grid, {**common, **written, "BLOCK": block}, num_warps=warps)]


def _split(common: dict[str, object], written: dict[str, object], chosen: Config) -> list[Launch]:
    """A launch per 8 bits of the keys, and one that writes."""
    rows = common["relevance"]
    assert isinstance(rows, Tensor)
    samples, size = rows.shape
    blocks = cdiv(size, chosen["BLOCK"])
    steps = cdiv(blocks, min(max(chosen["PROGRAMS"] // max(samples, 1), 1), blocks))
    splits = cdiv(blocks, steps)
    # What a launch reads of the one before, and what it writes for the next, in turns.
    histograms = torch.empty((2, samples, splits, 256), dtype=torch.int32, device=rows.device)
    states = torch.empty((2, samples, 2), dtype=torch.int32, device=rows.device)
    shared = {**common, "splits": splits, "steps": steps, "BLOCK": chosen["BLOCK"], "SPLITS": 16}
    passes = rows.element_size()
    launches = []
    for turn in range(passes + 1):
        before = {"earlier": histograms[(turn + 1) % 2], "state": states[(turn + 1) % 2], "PASS": turn}
        after = {"histograms": histograms[turn % 2], "new_state": states[turn % 2]}
        kernel, other = (topk_write_kernel, written) if turn == passes else (topk_histogram_kernel, after)
        arguments = {**shared, **before, **other}
        launches.append(Launch(kernel, (samples * splits,), arguments, chosen.num_warps, chosen.num_stages))
    return launches
