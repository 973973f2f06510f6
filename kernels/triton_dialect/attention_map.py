"""attention_lrp_map and attention_lrp_heads in Triton: one tile of the map per program, and a sum per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrp_compiler.kernels.launch import Config, Launch
from lrp_compiler.kernels.launch import config as configured
from lrp_compiler.kernels.triton_dialect.attention import plan_rows
from lrp_compiler.kernels.triton_dialect.attention_calls import (
    fitted,
    launch,
    operand,
    row_products_launch,
    shared_arguments,
    tiling,
)
from lrp_compiler.kernels.triton_dialect.attention_tiles import (
    load_logsumexp,
    load_tile,
    masked_scores,
    nearest,
    product,
)

CONFIGS_ATTENTION_LRP_MAP = (
    configured(BLOCK_OWN=64, BLOCK_OTHER=64, num_warps=4, num_stages=1),
    configured(BLOCK_OWN=128, BLOCK_OTHER=64, num_warps=8, num_stages=1),
)


@triton.jit
def attention_map_kernel(
    c, query, key, value, bias, logsumexp, total, relevance,
    query_length, key_length, heads, group, query_tiles, key_tiles, scale, window, softcap, share,
    c_batch, c_head, c_row, c_column, query_batch, query_head, query_row, query_column,
    key_batch, key_head, key_row, key_column, value_batch, value_head, value_row, value_column,
    bias_batch, bias_head, bias_row, bias_column, logsumexp_batch, logsumexp_head, logsumexp_row,
    HAS_BIAS: tl.constexpr, BIAS_IS_MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_TOTAL: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE_WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """share * P * (c V^T) of a tile of queries and keys."""
    # Heads times strides pass 2^31 in large tensors.
    tile = tl.program_id(0).to(tl.int64)
    place = tile // key_tiles // query_tiles
    batch, head = place // heads, place % heads
    rows = (tile // key_tiles % query_tiles).to(tl.int32) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    others = (tile % key_tiles).to(tl.int32) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    columns, value_columns = tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_VALUE_WIDTH)
    query_here = query + batch * query_batch + head * query_head
    key_here = key + batch * key_batch + head // group * key_head
    queries = load_tile(query_here, rows, columns, query_row, query_column, query_length, WIDTH)
    keys = load_tile(key_here, others, columns, key_row, key_column, key_length, WIDTH)
    scores = product(queries, tl.trans(keys), PRECISION)
    bias_here = bias + batch * bias_batch + head * bias_head if HAS_BIAS else 0
    scores, _ = masked_scores(
        scores, rows[:, None], others[None, :], query_length, key_length, scale,
        bias_here, bias_row, bias_column, window, softcap,
        HAS_BIAS, BIAS_IS_MASK, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, HAS_BIAS,
    )  # fmt: skip
    logsumexp_here = logsumexp + batch * logsumexp_batch + head * logsumexp_head
    scores -= load_logsumexp(logsumexp_here, rows, logsumexp_row, query_length)[:, None]
    weights = tl.exp(scores)
    if HAS_TOTAL:
        weights /= tl.load(total + place * query_length + rows, mask=rows < query_length, other=1.0)[:, None]
    c_here = c + batch * c_batch + head * c_head
    value_here = value + batch * value_batch + head // group * value_head
    arriving = load_tile(c_here, rows, value_columns, c_row, c_column, query_length, VALUE_WIDTH)
    values = load_tile(value_here, others, value_columns, value_row, value_column, key_length, VALUE_WIDTH)
    made = share * weights * product(arriving, tl.trans(values), PRECISION)
    first = relevance + place * query_length * key_length
    inside = (rows < query_length)[:, None] & (others < key_length)[None, :]
    at = rows.to(tl.int64)[:, None] * key_length + others[None, :]
    tl.store(first + at, nearest(made, relevance.dtype.element_ty), mask=inside)


def plan_attention_lrp_map(
    c: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor | None,
    bias: Tensor | None,
    sink: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int,
    softcap: float,
    share: float,
    config: Config | None = None,
) -> tuple[Tensor, list[Launch]]:
    """The relevance and the launches that fill it."""
    chosen = config or CONFIGS_ATTENTION_LRP_MAP[0]
    tiles = fitted(chosen, query, value, query.shape[2], key.shape[2], softcap)
    given = shared_arguments(query, key, value, bias, sink, scale, softcap) | operand("c", c)
    given |= tiling(query, key, is_causal, window, tiles, "BLOCK_QUERIES", "BLOCK_KEYS")
    launches, rows = plan_rows(given, tiles, None, logsumexp, with_delta=False)
    relevance = query.new_empty(*query.shape[:3], key.shape[2])
    programs = query.shape[0] * query.shape[1] * given["query_tiles"] * given["key_tiles"]
    own = {**given, **rows, "relevance": relevance, "share": share}
    return relevance, [*launches, launch(attention_map_kernel, programs, own, tiles)]


def plan_attention_lrp_heads(
    c: Tensor, out: Tensor, share: float, config: Config | None = None
) -> tuple[Tensor, list[Launch]]:
    """The relevance and the launch that fills it."""
    relevance = torch.empty(c.shape[:3], dtype=torch.float32, device=c.device)
    return relevance, [row_products_launch(c, out, relevance, share)]
