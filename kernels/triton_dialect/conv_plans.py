"""How calls of conv2d kernels are laid out: tiles, sizes, and operands as their tiles are read best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrp_compiler.kernels.launch import Config, cdiv, config, next_power_of_2
from lrp_compiler.kernels.triton_dialect.products import FULL, precision

CONFIGS = (
    config(8, 3, BLOCK_PIXEL=128, BLOCK_CHANNEL=128, BLOCK_INNER=32),
    config(8, 3, BLOCK_PIXEL=128, BLOCK_CHANNEL=64, BLOCK_INNER=64),
    config(4, 3, BLOCK_PIXEL=64, BLOCK_CHANNEL=64, BLOCK_INNER=64),
    config(4, 3, BLOCK_PIXEL=64, BLOCK_CHANNEL=16, BLOCK_INNER=64),
)
"""Tiles for two sums at once, the largest first: PIXEL x CHANNEL results, INNER terms at a time."""

FLOAT32 = config(8, 3, BLOCK_PIXEL=64, BLOCK_CHANNEL=64, BLOCK_INNER=16)
"""The most that float32's products, made of scalar ones, hold in registers."""

NARROW_INNER = 32
"""Inner indices of a tile that is read element by element, each with an address of its own."""

SMALLEST_TILE = 16
"""Rows, columns and inner indices that tensor cores multiply at once."""


def along_pixels(value: Tensor) -> int:
    """ALONG of tiles of ``value`` (N, C, H, W): whether its neighbouring elements are pixels."""
    return int(value.stride(1) != 1 or value.shape[1] == 1)


def channels_inside(value: Tensor, groups: int, taps: int) -> Tensor:
    """``value`` (N, C, H, W), copied to channels last where windows shall be read in wide words.

    A window begins at any pixel, so only channels can lie at multiples of 16 bytes. One tap and few channels need none.
    """
    few = value.shape[1] < groups * SMALLEST_TILE
    kept = taps == 1 or few or value.stride(1) == 1
    return value if kept else value.contiguous(memory_format=torch.channels_last)


def flattened(
    values: Sequence[Tensor | None], window: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> list[Any]:
    """The same planes as single rows, if one tap in steps of one reads them and all of them lie densely.

    The length of a row is then more often a multiple of 16, which aligned loads ask for.
    """
    dense = all(
        value.shape[2] < 2 or value.stride(2) == value.shape[3] * value.stride(3)
        for value in values
        if value is not None
    )
    if not dense or (*window, *stride, *padding) != (1, 1, 1, 1, 0, 0):
        return list(values)
    return [None if value is None else _as_row(value) for value in values]


def _as_row(value: Tensor) -> Tensor:
    size = (*value.shape[:2], 1, value.shape[2] * value.shape[3])
    return value.as_strided(size, (value.stride(0), value.stride(1), 0, value.stride(3)))


def strides_of(name: str, value: Tensor | None) -> dict[str, int]:
    """The strides of (N, C, H, W) as arguments of a kernel; 0 of nothing."""
    strides = (0, 0, 0, 0) if value is None else value.stride()
    return {f"{name}_{dim}": stride for dim, stride in zip("nchw", strides, strict=True)}


def windows_of(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> dict[str, int]:
    """What both directions of space have as arguments of a kernel."""
    named = {"stride": stride, "padding": padding, "dilation": dilation}
    return {f"{name}_{dim}": pair[at] for name, pair in named.items() for at, dim in enumerate("hw")}


def inner_steps(taps: int, channels: int, block: int) -> tuple[str, int]:
    """(how ``inner_of`` counts in the fewest steps, blocks of channels per tap)."""
    blocks = cdiv(channels, block)
    if taps == 1:
        return "channel", blocks
    return "flat" if cdiv(taps * channels, block) < taps * blocks else "tap", blocks


def tile_for(given: Config | None, source: Tensor, rows: int, columns: int, inner: int) -> Config:
    """``given`` or the largest tile of which there are enough, as registers can hold it and the sizes fill it.

    ``source`` is what the pixels' windows are read from.
    """
    chosen = given or next((one for one in CONFIGS if _enough(one, rows, columns)), CONFIGS[-1])
    most, warps = dict(chosen.blocks), chosen.num_warps
    if source.dtype == torch.float32:
        most, warps = {name: min(size, FLOAT32[name]) for name, size in most.items()}, FLOAT32.num_warps
    if along_pixels(source):
        most["BLOCK_INNER"] = min(most["BLOCK_INNER"], NARROW_INNER)
    sizes = {"BLOCK_PIXEL": rows, "BLOCK_CHANNEL": columns, "BLOCK_INNER": inner}
    blocks = {name: min(most[name], max(next_power_of_2(size), SMALLEST_TILE)) for name, size in sizes.items()}
    return config(warps, chosen.num_stages, **blocks)


def parts_of(tile: Config) -> int:
    """In how many parts of its columns a tile's end is worked out, lest all of it take registers at once."""
    return 2 if tile["BLOCK_CHANNEL"] >= 64 else 1


def _enough(tile: Config, rows: int, columns: int) -> bool:
    full = columns * 2 > tile["BLOCK_CHANNEL"]
    return full and cdiv(rows, tile["BLOCK_PIXEL"]) * cdiv(columns, tile["BLOCK_CHANNEL"]) >= FULL


def in_tf32(dtype: torch.dtype) -> bool:
    """Whether tiles of ``dtype`` are multiplied as TF32."""
    return dtype == torch.float32 and precision() == "tf32"


def transposed(
    x: Tensor,
    source: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    given: Config | None,
) -> tuple[Config, dict[str, Any], tuple[int]]:
    """(tile, sizes as arguments, grid) of a transpose that reads ``source`` (N, O, OH, OW) and writes like ``x``.

    The pixels of a phase are every stride-th one, and of the taps that reach them neighbours are ``apart`` in the
    window and ``advance`` in the outputs.
    """
    window, outputs, channels = weight.shape[2:], weight.shape[0] // groups, weight.shape[1]
    rows, columns = cdiv(x.shape[2], stride[0]), cdiv(x.shape[3], stride[1])
    pixels, phases = x.shape[0] * rows * columns, stride[0] * stride[1]
    tile = tile_for(given, source, pixels, channels, window.numel() * outputs)
    inner, blocks = inner_steps(window.numel(), outputs, tile["BLOCK_INNER"])
    tiles_m, tiles_n = cdiv(pixels, tile["BLOCK_PIXEL"]), cdiv(channels, tile["BLOCK_CHANNEL"])
    common = [math.gcd(*pair) for pair in zip(stride, dilation, strict=True)]
    sizes = {
        "pixels": pixels, "plane": rows * columns, "columns": columns, "height": x.shape[2], "width": x.shape[3],
        "out_height": source.shape[2], "out_width": source.shape[3], "channels": channels, "outputs": outputs,
        "groups": groups, "tiles_m": tiles_m, "tiles_n": tiles_n,
        "tap_rows": window[0], "tap_columns": window[1], "blocks": blocks, "phases_w": stride[1],
        **windows_of(stride, padding, dilation),
        "apart_h": stride[0] // common[0], "apart_w": stride[1] // common[1],
        "advance_h": dilation[0] // common[0], "advance_w": dilation[1] // common[1], "INNER": inner,
        "PARTS": parts_of(tile),
    }  # fmt: skip
    return tile, sizes, (tiles_m * tiles_n * groups * phases,)


def forwards(
    c: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    given: Config | None,
) -> tuple[Config, dict[str, Any], tuple[int]]:
    """(tile, sizes as arguments, grid) of a product that reads windows of ``x`` and makes outputs like ``c``."""
    taps, outputs, channels = weight.shape[2:].numel(), weight.shape[0] // groups, weight.shape[1]
    plane = c.shape[2] * c.shape[3]
    tile = tile_for(given, x, c.shape[0] * plane, outputs, taps * channels)
    inner, blocks = inner_steps(taps, channels, tile["BLOCK_INNER"])
    tiles_m, tiles_n = cdiv(c.shape[0] * plane, tile["BLOCK_PIXEL"]), cdiv(outputs, tile["BLOCK_CHANNEL"])
    sizes = {
        "pixels": c.shape[0] * plane, "plane": plane, "out_width": c.shape[3], "height": x.shape[2],
        "width": x.shape[3], "channels": channels, "outputs": outputs, "all_outputs": weight.shape[0],
        "groups": groups, "tiles_m": tiles_m, "tiles_n": tiles_n, "taps": taps, "tap_columns": weight.shape[3],
        "blocks": blocks, "steps": cdiv(taps * channels, tile["BLOCK_INNER"]) if inner == "flat" else taps * blocks,
        **windows_of(stride, padding, dilation), "INNER": inner, "PARTS": parts_of(tile),
    }  # fmt: skip
    return tile, sizes, (tiles_m * tiles_n * groups,)
