"""How attention's kernels are called: tiles that fit operands and chip, and arguments by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrp_compiler.kernels.launch import Config, Launch, cdiv, config, next_power_of_2
from lrp_compiler.kernels.triton_dialect.attention_rows import attention_rows_kernel, row_products_kernel

SMALLEST = 16
"""The least tile that a product of tiles takes."""

HEADS = ("batch", "head", "row", "column")

CONFIGS = (
    config(BLOCK_OWN=128, BLOCK_OTHER=64, num_warps=8, num_stages=3),
    config(BLOCK_OWN=64, BLOCK_OTHER=64, num_warps=8, num_stages=2),
    config(BLOCK_OWN=64, BLOCK_OTHER=32, num_warps=4, num_stages=2),
    config(BLOCK_OWN=32, BLOCK_OTHER=32, num_warps=8, num_stages=2),
)
"""OWN is the tile that a program holds, OTHER the one that it walks over; narrowed by ``fitted``."""

HOPPER, AMPERE = 200, 160
"""KiB of shared memory that a program may have at least: on data centres' GPUs since Hopper, and on A100."""


def default(query: Tensor, value: Tensor) -> Config:
    """The first configuration, or the largest whose shared memory and registers the GPU has."""
    if query.device.type != "cuda":
        return CONFIGS[0]
    kibibytes = getattr(torch.cuda.get_device_properties(query.device), "shared_memory_per_block_optin", 0) // 1024
    if kibibytes >= HOPPER:
        return CONFIGS[0]
    if kibibytes >= AMPERE:
        return CONFIGS[1]
    return CONFIGS[2] if widest_tile(query, value) <= 128 else CONFIGS[3]


def widest_tile(query: Tensor, value: Tensor) -> int:
    """The larger of the widths of tiles of queries and of values."""
    return max(padded(query.shape[3]), padded(value.shape[3]))


def fitted(chosen: Config, query: Tensor, value: Tensor, own: int, other: int, softcap: float) -> Config:
    """``chosen`` with tiles and warps that keep all in registers, for ``own`` and ``other`` rows.

    Sequences shorter than a few tiles are cut into smaller ones, so that there is more than one program.
    """
    widest = widest_tile(query, value)
    tiles = {"BLOCK_OWN": chosen["BLOCK_OWN"], "BLOCK_OTHER": chosen["BLOCK_OTHER"]}
    warps, stages = chosen.num_warps, chosen.num_stages
    if query.dtype == torch.float32:
        # Products in full float32 leave the tensor cores: both factors lie in registers.
        own_most, other_most = (32, 32) if widest <= 64 else (32, 16) if widest <= 128 else (16, 16)
        tiles, warps, stages = {"BLOCK_OWN": own_most, "BLOCK_OTHER": other_most}, 8, 2
    elif widest > 128:
        tiles, warps, stages = {"BLOCK_OWN": min(tiles["BLOCK_OWN"], 64), "BLOCK_OTHER": 32}, 8, 2
    elif widest > 64 and softcap:
        tiles["BLOCK_OTHER"] = 32
    tiles = {name: min(size, _share(rows)) for (name, size), rows in zip(tiles.items(), (own, other), strict=True)}
    return config(num_warps=warps, num_stages=stages, **tiles)


def _share(rows: int) -> int:
    return max(next_power_of_2(rows) // 2, SMALLEST)


def padded(width: int) -> int:
    """The width of a tile that holds ``width`` columns."""
    return max(next_power_of_2(width), SMALLEST)


def strides(name: str, value: Tensor | None, dims: tuple[str, ...] = HEADS) -> dict[str, int]:
    """The strides of an operand as arguments ``<name>_<dim>``; zeros where it is absent."""
    given = (0,) * len(dims) if value is None else value.stride()
    return {f"{name}_{dim}": stride for dim, stride in zip(dims, given, strict=True)}


def operand(name: str, value: Tensor | None, dims: tuple[str, ...] = HEADS) -> dict[str, Any]:
    """A tensor and its strides as arguments."""
    return {name: value, **strides(name, value, dims)}


def shared_arguments(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, sink: Tensor | None, scale: float, softcap: float
) -> dict[str, Any]:
    """What all kernels of attention take, by name."""
    (batch, heads, length, width), key_heads = query.shape, key.shape[1]
    spread = None if bias is None else bias.expand(batch, heads, length, key.shape[2])
    is_mask = bias is not None and bias.dtype == torch.bool
    if spread is not None and is_mask:
        # Triton loads bytes more readily than booleans.
        spread = spread.view(torch.uint8)
    return {
        **operand("query", query), **operand("key", key), **operand("value", value), **operand("bias", spread),
        **operand("sink", sink, ("stride",)),
        "query_length": length, "key_length": key.shape[2], "heads": heads, "key_heads": key_heads,
        "group": heads // max(key_heads, 1), "scale": scale, "softcap": softcap,
        "WIDTH": width, "VALUE_WIDTH": value.shape[3],
        "BLOCK_WIDTH": padded(width), "BLOCK_VALUE_WIDTH": padded(value.shape[3]),
        "HAS_BIAS": bias is not None, "BIAS_IS_MASK": is_mask, "HAS_SOFTCAP": softcap > 0,
        "HAS_SINK": sink is not None,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
    }  # fmt: skip


def tiling(
    query: Tensor, key: Tensor, is_causal: bool, window: int, tiles: Config, own: str, other: str
) -> dict[str, Any]:
    """Tiles of queries and keys, how many there are, and which masks they need."""
    length, key_length = query.shape[2], key.shape[2]
    blocks = {own: tiles["BLOCK_OWN"], other: tiles["BLOCK_OTHER"]}
    narrow = 0 < window < length
    # A causal mask also covers the keys past the end where there are as many queries.
    tail = key_length % blocks["BLOCK_KEYS"] > 0 and not (is_causal and length <= key_length)
    return {
        **blocks,
        "query_tiles": cdiv(length, blocks["BLOCK_QUERIES"]),
        "key_tiles": cdiv(key_length, blocks["BLOCK_KEYS"]),
        "window": window if narrow else 0,
        "IS_CAUSAL": is_causal,
        "HAS_WINDOW": narrow,
        "KEY_TAIL": tail,
    }


def launch(kernel: Any, programs: int, given: dict[str, Any], tiles: Config) -> Launch:
    """A launch of ``kernel`` with those of the arguments that it names."""
    taken = {name: given[name] for name in kernel.arg_names}
    return Launch(kernel, (programs,), taken, num_warps=tiles.num_warps, num_stages=tiles.num_stages)


def rows_launch(
    given: dict[str, Any], tiles: Config, delta: Tensor | None, logsumexp: Tensor, total: Tensor | None
) -> Launch:
    """Fill ``delta`` where wanted and ``logsumexp``, or in its place, with ``total``, the largest score and the sum."""
    heads = given["query"].shape[0] * given["heads"]
    own = {
        **given, "logsumexp": logsumexp, "total": total, "delta": delta, "WITH_DELTA": delta is not None,
        "HAS_TOTAL": total is not None,
    }  # fmt: skip
    return launch(attention_rows_kernel, heads * given["query_tiles"], own, tiles)


def row_products_launch(c: Tensor, out: Tensor, delta: Tensor, share: float) -> Launch:
    """Fill ``delta`` with share * sum(c * out)."""
    block = padded(c.shape[3])
    rows = max(4096 // block, 1)
    given = {
        **operand("c", c), **operand("out", out), "delta": delta, "rows": delta.numel(), "heads": c.shape[1],
        "query_length": c.shape[2], "share": share, "VALUE_WIDTH": c.shape[3], "BLOCK_VALUE_WIDTH": block,
        "BLOCK_ROWS": rows,
    }  # fmt: skip
    return launch(row_products_kernel, cdiv(delta.numel(), rows), given, config(num_warps=4, num_stages=1))
