"""maxpool_bwd in Triton: every input position gathers from the windows it lies in, so none is written twice."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lrp_compiler.kernels.dialect.pooling import empty_input
from lrp_compiler.kernels.launch import Config, Launch, cdiv, config, next_power_of_2

CONFIGS_MAXPOOL_BWD = (
    config(num_warps=4, ELEMENTS=1024),
    config(num_warps=4, ELEMENTS=2048),
    config(num_warps=8, ELEMENTS=4096),
    config(num_warps=2, ELEMENTS=512),
)
"""ELEMENTS of the input per program; their shape follows the sizes and the memory format."""
UNROLLED = 9
"""Windows over one position up to which the loop over them is unrolled."""


@triton.jit
def maxpool_bwd_kernel(
    c, offsets, out,
    channels, rows, columns, pooled_rows, pooled_columns, channel_tiles, row_tiles, column_tiles, pad_row, pad_column,
    c_image, c_channel, c_row, c_column, offset_image, offset_channel, offset_row, offset_column,
    out_image, out_channel, out_row, out_column,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, WINDOWS_H: tl.constexpr, WINDOWS_W: tl.constexpr,
    UNROLL: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    column = (tile % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    tile = tile // column_tiles
    row = (tile % row_tiles) * ROWS + tl.arange(0, ROWS)[None, :, None]
    tile = tile // row_tiles
    channel = (tile % channel_tiles) * CHANNELS + tl.arange(0, CHANNELS)[:, None, None]
    # Images times strides pass 2^31 in large tensors.
    image = (tile // channel_tiles).to(tl.int64)
    far_channel = channel.to(tl.int64)
    c_plane = c + image * c_image + far_channel * c_channel
    offset_plane = offsets + image * offset_image + far_channel * offset_channel
    made = tl.zeros((CHANNELS, ROWS, COLUMNS), tl.float32)
    for window in tl.range(0, WINDOWS_H * WINDOWS_W, loop_unroll_factor=UNROLL):
        # In order, up to the last window that begins at or before the position.
        pooled_row = (row + pad_row) // STRIDE_H - (WINDOWS_H - 1) + window // WINDOWS_W
        pooled_column = (column + pad_column) // STRIDE_W - (WINDOWS_W - 1) + window % WINDOWS_W
        steps_row = row + pad_row - pooled_row * STRIDE_H
        steps_column = column + pad_column - pooled_column * STRIDE_W
        place_row, place_column = steps_row // DILATION_H, steps_column // DILATION_W
        there_row = (pooled_row >= 0) & (pooled_row < pooled_rows)
        there_column = (pooled_column >= 0) & (pooled_column < pooled_columns)
        there_row &= (place_row < KERNEL_H) & (steps_row % DILATION_H == 0)
        there_column &= (place_column < KERNEL_W) & (steps_column % DILATION_W == 0)
        there = (channel < channels) & there_row & there_column
        far_row, far_column = pooled_row.to(tl.int64), pooled_column.to(tl.int64)
        value = tl.load(c_plane + far_row * c_row + far_column * c_column, mask=there, other=0.0)
        winner = tl.load(offset_plane + far_row * offset_row + far_column * offset_column, mask=there, other=0)
        won = winner.to(tl.int32) == place_row * KERNEL_W + place_column
        made += tl.where(won, value.to(tl.float32), 0.0)
    place = image * out_image + far_channel * out_channel + row.to(tl.int64) * out_row
    inside = (channel < channels) & (row < rows) & (column < columns)
    tl.store(out + place + column.to(tl.int64) * out_column, made.to(out.dtype.element_ty), mask=inside)


def tile_of(elements: int, shape: tuple[int, ...], last: bool) -> tuple[int, int, int]:
    """(channels, rows, columns) of a tile: as much as fits of the fastest dimension, then of the next."""
    order = (0, 2, 1) if last else (2, 1, 0)
    sides = [1, 1, 1]
    for dim in order:
        sides[dim] = min(_fitting(shape[dim]) if dim == order[0] else next_power_of_2(shape[dim]), elements)
        elements //= sides[dim]
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
    images, *shape = out.shape
    sides = tile_of(chosen["ELEMENTS"], tuple(shape), out.stride(1) == 1 and shape[0] > 1)
    tiles = [cdiv(size, side) for size, side in zip(shape, sides, strict=True)]
    # How many windows may lie over one position.
    windows = [cdiv((k - 1) * d + 1, s) for k, d, s in zip(kernel, dilation, stride, strict=True)]
    over = windows[0] * windows[1]
    arguments = {
        "c": c, "offsets": offsets, "out": out,
        "channels": shape[0], "rows": shape[1], "columns": shape[2],
        "pooled_rows": c.shape[2], "pooled_columns": c.shape[3],
        "channel_tiles": tiles[0], "row_tiles": tiles[1], "column_tiles": tiles[2],
        "pad_row": padding[0], "pad_column": padding[1],
        **_strides("c", c), **_strides("offset", offsets), **_strides("out", out),
        "KERNEL_H": kernel[0], "KERNEL_W": kernel[1], "STRIDE_H": stride[0], "STRIDE_W": stride[1],
        "DILATION_H": dilation[0], "DILATION_W": dilation[1], "WINDOWS_H": windows[0], "WINDOWS_W": windows[1],
        "UNROLL": over if over <= UNROLLED else 1,
        "CHANNELS": sides[0], "ROWS": sides[1], "COLUMNS": sides[2],
    }  # fmt: skip
    grid = (images * tiles[0] * tiles[1] * tiles[2],)
    return out, [Launch(maxpool_bwd_kernel, grid, arguments, chosen.num_warps, chosen.num_stages)]


def _strides(name: str, value: Tensor) -> dict[str, int]:
    return dict(zip([f"{name}_image", f"{name}_channel", f"{name}_row", f"{name}_column"], value.stride(), strict=True))
