"""norm_bwd in Triton: rows held in registers, several short ones per program; long rows in chunks, summed first."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrp_compiler.kernels.launch import Config, Launch, cdiv, config, next_power_of_2
from lrp_compiler.kernels.spec import contiguous_like

CONFIGS_NORM_BWD = (
    config(num_warps=8, HELD=16384, BLOCK=4096, PER_THREAD=16),
    config(num_warps=8, HELD=8192, BLOCK=8192, PER_THREAD=8),
    config(num_warps=4, HELD=4096, BLOCK=2048, PER_THREAD=16),
)
"""HELD: the longest row held in registers; BLOCK: the chunks of longer ones; PER_THREAD: elements held by a thread."""

SHARED_TILE = 1024
"""Elements of a program that takes several short rows."""

FEW_ROWS = 264
"""With fewer long rows than this, two per multiprocessor of an H100, each is shared by several programs."""

PROGRAMS = 1024
"""How many programs share the long rows when these are few."""


@triton.jit
def norm_bwd_kernel(
    c, weight, scale, residual, out,
    rows, channels, elements, c_row, c_column, weight_stride, scale_stride, residual_row, residual_column, groups,
    HAS_WEIGHT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, CENTRED: tl.constexpr, DIVIDES: tl.constexpr,
    GROUPED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    # Rows times strides pass 2^31 in large tensors.
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None, None]
    channel = tl.arange(0, CHANNELS).to(tl.int64)[None, :, None]
    element = tl.arange(0, ELEMENTS).to(tl.int64)[None, None, :]
    inside = (row < rows) & (channel < channels) & (element < elements)
    column = channel * elements + element
    value = tl.load(c + row * c_row + column * c_column, mask=inside, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        if GROUPED:
            place = (row % groups) * channels + channel
            gain = tl.load(weight + place * weight_stride, mask=(row < rows) & (channel < channels), other=0.0)
        else:
            gain = tl.load(weight + element * weight_stride, mask=element < elements, other=0.0)
        value *= gain.to(tl.float32)
    if CENTRED:
        total = tl.sum(tl.sum(value, 2), 1) / (channels * elements)
        value -= total[:, None, None]
    deviation = tl.load(scale + row * scale_stride, mask=row < rows, other=1.0).to(tl.float32)
    value = value / deviation if DIVIDES else value * deviation
    if HAS_RESIDUAL:
        address = residual + row * residual_row + column * residual_column
        value += tl.load(address, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * (channels * elements) + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def weighted_chunk(
    c, weight, chunk, first_channel, channels, elements, c_column, weight_stride,
    HAS_WEIGHT: tl.constexpr, GROUPED: tl.constexpr, CHANNELS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """w c of one (CHANNELS, ELEMENTS) chunk of a row, its columns, and which of them exist."""
    across = tl.cdiv(elements, ELEMENTS)
    channel = ((chunk // across).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS))[:, None]
    element = ((chunk % across).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS))[None, :]
    inside = (channel < channels) & (element < elements)
    column = channel * elements + element
    value = tl.load(c + column * c_column, mask=inside, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        if GROUPED:
            gain = tl.load(weight + (first_channel + channel) * weight_stride, mask=channel < channels, other=0.0)
        else:
            gain = tl.load(weight + element * weight_stride, mask=element < elements, other=0.0)
        value *= gain.to(tl.float32)
    return value, column, inside


@triton.jit
def norm_bwd_long_kernel(
    c, weight, scale, residual, out, sums,
    channels, elements, c_row, c_column, weight_stride, scale_stride, residual_row, residual_column, groups, chunks,
    splits,
    HAS_WEIGHT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, CENTRED: tl.constexpr, DIVIDES: tl.constexpr,
    GROUPED: tl.constexpr, CHANNELS: tl.constexpr, ELEMENTS: tl.constexpr, SPLITS: tl.constexpr,
    ADDS_UP: tl.constexpr, READS_SUMS: tl.constexpr,
):  # fmt: skip
    # Program (row, part) takes every chunk whose number is the part's, modulo the parts of a row.
    row = (tl.program_id(0) // splits).to(tl.int64)
    part = tl.program_id(0) % splits
    c += row * c_row
    first_channel = (row % groups) * channels
    total = 0.0
    if READS_SUMS:
        parts = tl.arange(0, SPLITS)
        total = tl.sum(tl.load(sums + row * splits + parts, mask=parts < splits, other=0.0), 0)
    elif CENTRED:
        partial = tl.zeros((CHANNELS, ELEMENTS), tl.float32)
        for chunk in range(part, chunks, splits):
            value, column, inside = weighted_chunk(
                c, weight, chunk, first_channel, channels, elements, c_column, weight_stride,
                HAS_WEIGHT, GROUPED, CHANNELS, ELEMENTS,
            )  # fmt: skip
            partial += value
        total = tl.sum(tl.sum(partial, 1), 0)
    if ADDS_UP:
        tl.store(sums + tl.program_id(0).to(tl.int64), total)
    else:
        size = tl.cast(channels, tl.int64) * elements
        mean = total / size
        deviation = tl.load(scale + row * scale_stride).to(tl.float32)
        for chunk in range(part, chunks, splits):
            value, column, inside = weighted_chunk(
                c, weight, chunk, first_channel, channels, elements, c_column, weight_stride,
                HAS_WEIGHT, GROUPED, CHANNELS, ELEMENTS,
            )  # fmt: skip
            if CENTRED:
                value -= mean
            value = value / deviation if DIVIDES else value * deviation
            if HAS_RESIDUAL:
                address = residual + row * residual_row + column * residual_column
                value += tl.load(address, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + row * size + column, value.to(out.dtype.element_ty), mask=inside)


def plan_norm_bwd(
    c: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    residual: Tensor | None,
    centred: bool,
    groups: int,
    divides: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, list[Launch]]:
    """The result and the launches that fill it."""
    chosen = config or CONFIGS_NORM_BWD[0]
    out = contiguous_like(c)
    rows, size = c.shape
    channels = weight.shape[0] // groups if weight is not None and groups else 1
    elements = size // channels
    arguments: dict[str, Any] = {
        "c": c, "weight": weight, "scale": scale, "residual": residual, "out": out,
        "channels": channels, "elements": elements, "c_row": c.stride(0), "c_column": c.stride(1),
        "weight_stride": 0 if weight is None else weight.stride(0), "scale_stride": scale.stride(0),
        "residual_row": 0 if residual is None else residual.stride(0),
        "residual_column": 0 if residual is None else residual.stride(1), "groups": max(groups, 1),
        "HAS_WEIGHT": weight is not None, "HAS_RESIDUAL": residual is not None, "CENTRED": centred,
        "DIVIDES": divides, "GROUPED": groups > 0,
    }  # fmt: skip
    if not c.numel():
        return out, []
    tile = next_power_of_2(channels), next_power_of_2(elements)
    if tile[0] * tile[1] > chosen["HELD"]:
        return out, _in_chunks(chosen, c, arguments, channels, elements)
    together = max(1, SHARED_TILE // (tile[0] * tile[1]))
    warps = min(max(together * tile[0] * tile[1] // (32 * chosen["PER_THREAD"]), 1), 16)
    arguments |= {"rows": rows, "ROWS": together, "CHANNELS": tile[0], "ELEMENTS": tile[1]}
    return out, [Launch(norm_bwd_kernel, (cdiv(rows, together),), arguments, num_warps=warps)]


def _in_chunks(chosen: Config, c: Tensor, arguments: dict[str, Any], channels: int, elements: int) -> list[Launch]:
    """One program per row, which reads it twice while caches have it, or for few rows one launch per pass."""
    rows = c.shape[0]
    width = min(next_power_of_2(elements), chosen["BLOCK"]) if arguments["GROUPED"] else chosen["BLOCK"]
    height = min(next_power_of_2(channels), chosen["BLOCK"] // width)
    chunks = cdiv(elements, width) * cdiv(channels, height)
    splits = 1 if rows >= FEW_ROWS else min(chunks, cdiv(PROGRAMS, rows))
    sums = c.new_empty(rows * splits, dtype=torch.float32) if splits > 1 and arguments["CENTRED"] else None
    arguments |= {
        "sums": sums, "chunks": chunks, "splits": splits, "CHANNELS": height, "ELEMENTS": width,
        "SPLITS": next_power_of_2(splits),
    }  # fmt: skip
    passes = [(False, False)] if sums is None else [(True, False), (False, True)]
    return [
        Launch(
            norm_bwd_long_kernel,
            (rows * splits,),
            arguments | {"ADDS_UP": adds_up, "READS_SUMS": reads_sums},
            num_warps=chosen.num_warps,
        )
        for adds_up, reads_sums in passes
    ]
