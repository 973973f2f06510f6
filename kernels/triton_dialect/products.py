"""What kernels around matrix products share: tiles of the result in an order that L2 likes, and the choice of tiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrp_compiler.kernels.launch import Config, cdiv, config, next_power_of_2
from lrp_compiler.kernels.spec import interpreting

INTERPRETED = tl.constexpr(interpreting())

CONFIGS = (
    config(8, 3, BLOCK_ROW=128, BLOCK_COLUMN=128, BLOCK_INNER=64),
    config(4, 4, BLOCK_ROW=128, BLOCK_COLUMN=64, BLOCK_INNER=64),
    config(8, 4, BLOCK_ROW=128, BLOCK_COLUMN=64, BLOCK_INNER=32),
    config(4, 4, BLOCK_ROW=64, BLOCK_COLUMN=64, BLOCK_INNER=32),
    config(4, 2, BLOCK_ROW=32, BLOCK_COLUMN=32, BLOCK_INNER=32),
)
"""Tiles for two sums at once, the largest first: results of ROW x COLUMN, INNER terms at a time."""

LARGEST_FLOAT32 = config(8, 3, BLOCK_ROW=64, BLOCK_COLUMN=64, BLOCK_INNER=16)
"""What float32's products, made of scalar ones, hold in registers."""

FULL = 120
"""Tiles that keep a large GPU busy."""


def fitted(configs: tuple[Config, ...], given: Config | None, rows: int, columns: int, like: Tensor) -> Config:
    """``given``, or the first whose tiles keep the device of ``like`` busy, the last if none does; as float32 fits."""
    chosen = given or next((one for one in configs if _suits(one, rows, columns, like.device)), configs[-1])
    too_large = like.dtype == torch.float32 and chosen["BLOCK_ROW"] >= LARGEST_FLOAT32["BLOCK_ROW"]
    return LARGEST_FLOAT32 if too_large else chosen


def _suits(tiles: Config, rows: int, columns: int, device: torch.device) -> bool:
    """Whether there are enough tiles, none mostly empty, and the chip has room for them."""
    count = cdiv(rows, tiles["BLOCK_ROW"]) * cdiv(columns, tiles["BLOCK_COLUMN"])
    fills = count >= FULL and tiles["BLOCK_ROW"] <= next_power_of_2(rows)
    return fills and (tiles["BLOCK_INNER"] <= 32 or _is_roomy(device))


def _is_roomy(device: torch.device) -> bool:
    """Whether 64 terms fit: before Hopper they spill, and AMD's chips have less shared memory."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def precision() -> str:
    """How float32 numbers are multiplied: exactly, unless the user allows TF32."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def as_matrix(value: Tensor) -> Tensor:
    """(..., size) as (rows, size), without a copy where strides allow."""
    return value.reshape(value.shape[:-1].numel(), value.shape[-1])


def strides_of(**matrices: Tensor | None) -> dict[str, int]:
    """Every matrix's strides as <name>_row and <name>_column; 0 for none."""
    given = [(name, (0, 0) if value is None else value.stride()) for name, value in matrices.items()]
    return {
        f"{name}_{way}": stride for name, pair in given for way, stride in zip(("row", "column"), pair, strict=True)
    }


@triton.jit
def multiplicand(tile):
    """``tile`` as it may be multiplied; Triton's interpreter would multiply the bits of bfloat16 as integers."""
    if INTERPRETED and tile.dtype == tl.bfloat16:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def nearest(value, dtype: tl.constexpr):
    """float32 rounded to the nearest of ``dtype``; Triton's interpreter would cut bfloat16 off instead."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def tile_of(program, rows, columns, BLOCK_ROW: tl.constexpr, BLOCK_COLUMN: tl.constexpr, GROUP: tl.constexpr = 8):
    """The tile's row and column: GROUP rows of tiles go together, so that their operands are still in L2."""
    row_tiles = (rows + BLOCK_ROW - 1) // BLOCK_ROW
    column_tiles = (columns + BLOCK_COLUMN - 1) // BLOCK_COLUMN
    per_group = GROUP * column_tiles
    first = program // per_group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    within = program % per_group
    return first + within % height, within // height


@triton.jit
def columns_of(tile, part: tl.constexpr, PARTS: tl.constexpr):
    """One of 1, 2 or 4 parts of a tile's columns; they stay in the registers that hold them."""
    if PARTS == 1:
        chosen = tile
    else:
        halves = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        half = left if part < PARTS // 2 else right
        chosen = columns_of(half, part % (PARTS // 2), PARTS // 2)
    return chosen
