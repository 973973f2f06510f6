"""maxpool_bwd in Triton: every input position gathers from the windows over it, so that none is written twice.

The input is walked in cells of one stride: all positions at one phase of their cell lie at the same places of the
windows over them, so that a window's offset is compared with a number, and its coefficient is read in rows.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from lrp_compiler.kernels.dialect.pooling import empty_input
from lrp_compiler.kernels.launch import Config, Launch, cdiv, config, next_power_of_2

CONFIGS_MAXPOOL_BWD = (
    config(num_warps=4, CELLS=512),
    config(num_warps=4, CELLS=1024),
    config(num_warps=8, CELLS=1024),
    config(num_warps=4, CELLS=256),
)
"""CELLS of the input per program; their shape follows the sizes and the memory format."""
UNROLLED = 16
"""Windows, over all positions of a cell, up to which loops over them are unrolled."""


@triton.jit
def _gathered(
    c_plane, offset_plane, inside, cell_row, cell_column, ahead_row, ahead_column, pooled_rows, pooled_columns,
    c_row, c_column, offset_row, offset_column,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, WINDOWS_H: tl.constexpr, WINDOWS_W: tl.constexpr,
    UNROLL: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sums of the cells' positions ``ahead`` of where the window of the cell's own number begins."""
    made = tl.full((CHANNELS, ROWS, COLUMNS), 0.0, tl.float32)
    for window in tl.range(0, WINDOWS_H * WINDOWS_W, loop_unroll_factor=UNROLL):
        # In order, up to the last window that begins at or before the position.
        back_row, back_column = WINDOWS_H - 1 - window // WINDOWS_W, WINDOWS_W - 1 - window % WINDOWS_W
        steps_row = ahead_row % STRIDE_H + back_row * STRIDE_H
        steps_column = ahead_column % STRIDE_W + back_column * STRIDE_W
        place_row, place_column = steps_row // DILATION_H, steps_column // DILATION_W
        covers = (place_row < KERNEL_H) & (place_column < KERNEL_W)
        covers &= (steps_row % DILATION_H == 0) & (steps_column % DILATION_W == 0)
        pooled_row = cell_row + (ahead_row // STRIDE_H - back_row)
        pooled_column = cell_column + (ahead_column // STRIDE_W - back_column)
        there = inside & (pooled_row >= 0) & (pooled_row < pooled_rows)
        there = there & (pooled_column >= 0) & (pooled_column < pooled_columns) & covers
        far_row, far_column = pooled_row.to(tl.int64), pooled_column.to(tl.int64)
        value = tl.load(c_plane + far_row * c_row + far_column * c_column, mask=there, other=0.0)
        winner = tl.load(offset_plane + far_row * offset_row + far_column * offset_column, mask=there, other=0)
        won = winner.to(tl.int32) == place_row * KERNEL_W + place_column
        made += tl.where(won, value.to(tl.float32), 0.0)
    return made


@triton.jit
def maxpool_bwd_kernel(
    c, offsets, out,
    channels, rows, columns, pooled_rows, pooled_columns, channel_tiles, row_tiles, column_tiles,
    c_image, c_channel, c_row, c_column, offset_image, offset_channel, offset_row, offset_column,
    out_image, out_channel, out_row, out_column,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, WINDOWS_H: tl.constexpr, WINDOWS_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, UNROLL: tl.constexpr, UNROLL_ROWS: tl.constexpr,
    UNROLL_COLUMNS: tl.constexpr, PAIRED: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first_column = (tile % column_tiles) * COLUMNS
    cell_column = first_column + tl.arange(0, COLUMNS)[None, None, :]
    tile = tile // column_tiles
    cell_row = (tile % row_tiles) * ROWS + tl.arange(0, ROWS)[None, :, None]
    tile = tile // row_tiles
    channel = (tile % channel_tiles) * CHANNELS + tl.arange(0, CHANNELS)[:, None, None]
    inside = channel < channels
    # Images times strides pass 2^31 in large tensors.
    image = (tile // channel_tiles).to(tl.int64)
    far_channel = channel.to(tl.int64)
    c_plane = c + image * c_image + far_channel * c_channel
    offset_plane = offsets + image * offset_image + far_channel * offset_channel
    out_plane = out + image * out_image + far_channel * out_channel
    for phase_row in tl.range(0, STRIDE_H, loop_unroll_factor=UNROLL_ROWS):
        row = cell_row * STRIDE_H + phase_row
        place = out_plane + row.to(tl.int64) * out_row
        if PAIRED:
            # Two phases side by side are written in one piece.
            even = _gathered(
                c_plane, offset_plane, inside, cell_row, cell_column, phase_row + PAD_H, PAD_W,
                pooled_rows, pooled_columns, c_row, c_column, offset_row, offset_column,
                KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, DILATION_H, DILATION_W, WINDOWS_H, WINDOWS_W,
                UNROLL, CHANNELS, ROWS, COLUMNS,
            )  # fmt: skip
            odd = _gathered(
                c_plane, offset_plane, inside, cell_row, cell_column, phase_row + PAD_H, PAD_W + 1,
                pooled_rows, pooled_columns, c_row, c_column, offset_row, offset_column,
                KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, DILATION_H, DILATION_W, WINDOWS_H, WINDOWS_W,
                UNROLL, CHANNELS, ROWS, COLUMNS,
            )  # fmt: skip
            made = tl.interleave(even, odd).to(out.dtype.element_ty)
            column = first_column * 2 + tl.arange(0, 2 * COLUMNS)[None, None, :]
            within = inside & (row < rows) & (column < columns)
            tl.store(place + column.to(tl.int64) * out_column, made, mask=within)
        else:
            for phase_column in tl.range(0, STRIDE_W, loop_unroll_factor=UNROLL_COLUMNS):
                made = _gathered(
                    c_plane, offset_plane, inside, cell_row, cell_column, phase_row + PAD_H,
                    phase_column + PAD_W, pooled_rows, pooled_columns, c_row, c_column, offset_row, offset_column,
                    KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, DILATION_H, DILATION_W, WINDOWS_H, WINDOWS_W,
                    UNROLL, CHANNELS, ROWS, COLUMNS,
                )  # fmt: skip
                column = cell_column * STRIDE_W + phase_column
                within = inside & (row < rows) & (column < columns)
                tl.store(place + column.to(tl.int64) * out_column, made.to(out.dtype.element_ty), mask=within)


def tile_of(cells: int, shape: tuple[int, ...], last: bool) -> tuple[int, int, int]:
    """(channels, rows, columns) of a tile: as much as fits of the fastest dimension, then of the next."""
    order = (0, 2, 1) if last else (2, 1, 0)
    sides = [1, 1, 1]
    for dim in order:
        sides[dim] = min(_fitting(shape[dim]) if dim == order[0] else next_power_of_2(shape[dim]), cells)
        cells //= sides[dim]
    return sides[0], sides[1], sides[2]


def _fitting(size: int) -> int:
    """The power of two, of those that make a wide access, that covers ``size`` with the least to spare."""
    return min((128, 64, 32), key=lambda side: cdiv(size, side) * side) if size > 32 else next_power_of_2(size)


def plan_maxpool_bwd(
    c: Tensor,
    offsets: Tensor,
    input_size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    config: Config | None = None,
) -> tuple[Tensor, list[Launch]]:
    """The result and the launch that fills it."""
    chosen = config or CONFIGS_MAXPOOL_BWD[0]
    out = empty_input(c, input_size)
    images, channels, rows, columns = out.shape
    cells = (channels, cdiv(rows, stride[0]), cdiv(columns, stride[1]))
    last = out.stride(1) == 1 and channels > 1
    sides = tile_of(chosen["CELLS"], cells, last)
    tiles = [cdiv(size, side) for size, side in zip(cells, sides, strict=True)]
    # How many windows may lie over one position.
    windows = [cdiv((k - 1) * d + 1, s) for k, d, s in zip(kernel, dilation, stride, strict=True)]
    turns = (windows[0] * windows[1], stride[0], stride[1])
    unrolled = turns if math.prod(turns) <= UNROLLED else (1, 1, 1)
    arguments = {
        "c": c, "offsets": offsets, "out": out,
        "channels": channels, "rows": rows, "columns": columns,
        "pooled_rows": c.shape[2], "pooled_columns": c.shape[3],
        "channel_tiles": tiles[0], "row_tiles": tiles[1], "column_tiles": tiles[2],
        **_strides("c", c), **_strides("offset", offsets), **_strides("out", out),
        "KERNEL_H": kernel[0], "KERNEL_W": kernel[1], "STRIDE_H": stride[0], "STRIDE_W": stride[1],
        "DILATION_H": dilation[0], "DILATION_W": dilation[1], "WINDOWS_H": windows[0], "WINDOWS_W": windows[1],
        "PAD_H": padding[0], "PAD_W": padding[1],
        "UNROLL": unrolled[0], "UNROLL_ROWS": unrolled[1], "UNROLL_COLUMNS": unrolled[2],
        "PAIRED": stride[1] == 2 and not last, "CHANNELS": sides[0], "ROWS": sides[1], "COLUMNS": sides[2],
    }  # fmt: skip
    grid = (images * tiles[0] * tiles[1] * tiles[2],)
    return out, [Launch(maxpool_bwd_kernel, grid, arguments, chosen.num_warps, chosen.num_stages)]


def _strides(name: str, value: Tensor) -> dict[str, int]:
    return dict(zip([f"{name}_image", f"{name}_channel", f"{name}_row", f"{name}_column"], value.stride(), strict=True))
