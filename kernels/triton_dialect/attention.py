"""attention_lrp_bwd in Triton: weights again from the log-sum-exp, a tile at a time, and no atomic additions."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrp_compiler.kernels.dialect.attention import Triple, empty_results
from lrp_compiler.kernels.launch import Config, Launch
from lrp_compiler.kernels.triton_dialect.attention_calls import (
    CONFIGS,
    HEADS,
    default,
    fitted,
    launch,
    operand,
    row_products_launch,
    rows_launch,
    shared_arguments,
    tiling,
)
from lrp_compiler.kernels.triton_dialect.attention_tiles import (
    added_product,
    keys_seen,
    load_logsumexp,
    load_tile,
    masked_scores,
    product,
    queries_seeing,
    store_tile,
)

CONFIGS_ATTENTION_LRP_BWD = CONFIGS


@triton.jit
def attention_keys_kernel(
    c, query, key, value, bias, logsumexp, total, delta, c_key, c_value,
    query_length, key_length, heads, key_heads, group, key_tiles, scale, window, softcap, key_share, value_share,
    c_batch, c_head, c_row, c_column, query_batch, query_head, query_row, query_column,
    key_batch, key_head, key_row, key_column, value_batch, value_head, value_row, value_column,
    bias_batch, bias_head, bias_row, bias_column, logsumexp_batch, logsumexp_head, logsumexp_row,
    c_key_batch, c_key_head, c_key_row, c_key_column, c_value_batch, c_value_head, c_value_row, c_value_column,
    HAS_BIAS: tl.constexpr, BIAS_IS_MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_TOTAL: tl.constexpr, TO_KEYS: tl.constexpr, TO_VALUES: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE_WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Coefficients of a tile of keys and values, from all queries of all heads that share it."""
    # Heads times strides pass 2^31 in large tensors.
    place = tl.program_id(0).to(tl.int64)
    batch, shared_head = place // key_tiles // key_heads, place // key_tiles % key_heads
    first = (place % key_tiles).to(tl.int32) * BLOCK_KEYS
    own = first + tl.arange(0, BLOCK_KEYS)
    columns, value_columns = tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_VALUE_WIDTH)
    key_here = key + batch * key_batch + shared_head * key_head
    keys = load_tile(key_here, own, columns, key_row, key_column, key_length, WIDTH)
    if TO_KEYS:
        value_here = value + batch * value_batch + shared_head * value_head
        values = load_tile(value_here, own, value_columns, value_row, value_column, key_length, VALUE_WIDTH)
        to_keys = tl.zeros([BLOCK_KEYS, BLOCK_WIDTH], tl.float32)
    if TO_VALUES:
        to_values = tl.zeros([BLOCK_KEYS, BLOCK_VALUE_WIDTH], tl.float32)
    begin, end = queries_seeing(first, window, query_length, BLOCK_QUERIES, BLOCK_KEYS, IS_CAUSAL, HAS_WINDOW)
    steps = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_QUERIES)
    for step in range(group * steps):
        head = shared_head * group + step // steps
        query_here = query + batch * query_batch + head * query_head
        c_here = c + batch * c_batch + head * c_head
        bias_here = bias + batch * bias_batch + head * bias_head if HAS_BIAS else 0
        logsumexp_here = logsumexp + batch * logsumexp_batch + head * logsumexp_head
        first_row = (batch * heads + head) * query_length
        rows = begin + step % steps * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
        queries = load_tile(query_here, rows, columns, query_row, query_column, query_length, WIDTH)
        scores = product(keys, tl.trans(queries), PRECISION)
        scores, gate = masked_scores(
            scores, rows[None, :], own[:, None], query_length, key_length, scale,
            bias_here, bias_row, bias_column, window, softcap,
            HAS_BIAS, BIAS_IS_MASK, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, HAS_BIAS,
        )  # fmt: skip
        scores -= load_logsumexp(logsumexp_here, rows, logsumexp_row, query_length)[None, :]
        weights = tl.exp(scores)
        if HAS_TOTAL:
            weights /= tl.load(total + first_row + rows, mask=rows < query_length, other=1.0)[None, :]
        arriving = load_tile(c_here, rows, value_columns, c_row, c_column, query_length, VALUE_WIDTH)
        if TO_VALUES:
            to_values = added_product(weights, arriving, to_values, PRECISION)
        if TO_KEYS:
            on_weights = product(values, tl.trans(arriving), PRECISION)
            given = tl.load(delta + first_row + rows, mask=rows < query_length, other=0.0)
            c_scores = weights * (on_weights - given[None, :])
            if HAS_SOFTCAP:
                c_scores *= gate
            to_keys = added_product(c_scores, queries, to_keys, PRECISION)
    if TO_KEYS:
        made = c_key + batch * c_key_batch + shared_head * c_key_head
        store_tile(made, own, columns, c_key_row, c_key_column, key_length, WIDTH, to_keys * (scale * key_share))
    if TO_VALUES:
        made = c_value + batch * c_value_batch + shared_head * c_value_head
        spread = to_values * value_share
        store_tile(made, own, value_columns, c_value_row, c_value_column, key_length, VALUE_WIDTH, spread)


@triton.jit
def attention_queries_kernel(
    c, query, key, value, bias, logsumexp, total, delta, c_query,
    query_length, key_length, heads, group, query_tiles, scale, window, softcap, query_share,
    c_batch, c_head, c_row, c_column, query_batch, query_head, query_row, query_column,
    key_batch, key_head, key_row, key_column, value_batch, value_head, value_row, value_column,
    bias_batch, bias_head, bias_row, bias_column, logsumexp_batch, logsumexp_head, logsumexp_row,
    c_query_batch, c_query_head, c_query_row, c_query_column,
    HAS_BIAS: tl.constexpr, BIAS_IS_MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_TOTAL: tl.constexpr, KEY_TAIL: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE_WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Coefficients of a tile of queries, from all keys it sees."""
    # Heads times strides pass 2^31 in large tensors.
    place = tl.program_id(0).to(tl.int64)
    batch, head = place // query_tiles // heads, place // query_tiles % heads
    # Causal rows at the end see the most keys: they start first.
    first = (query_tiles - 1 - (place % query_tiles).to(tl.int32)) * BLOCK_QUERIES
    rows = first + tl.arange(0, BLOCK_QUERIES)
    columns, value_columns = tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_VALUE_WIDTH)
    query_here = query + batch * query_batch + head * query_head
    c_here = c + batch * c_batch + head * c_head
    key_here = key + batch * key_batch + head // group * key_head
    value_here = value + batch * value_batch + head // group * value_head
    bias_here = bias + batch * bias_batch + head * bias_head if HAS_BIAS else 0
    logsumexp_here = logsumexp + batch * logsumexp_batch + head * logsumexp_head
    queries = load_tile(query_here, rows, columns, query_row, query_column, query_length, WIDTH)
    arriving = load_tile(c_here, rows, value_columns, c_row, c_column, query_length, VALUE_WIDTH)
    normal = load_logsumexp(logsumexp_here, rows, logsumexp_row, query_length)
    at = (batch * heads + head) * query_length + rows
    given = tl.load(delta + at, mask=rows < query_length, other=0.0)
    if HAS_TOTAL:
        sums = tl.load(total + at, mask=rows < query_length, other=1.0)
    to_queries = tl.zeros([BLOCK_QUERIES, BLOCK_WIDTH], tl.float32)
    begin, end = keys_seen(first, window, key_length, BLOCK_QUERIES, BLOCK_KEYS, IS_CAUSAL, HAS_WINDOW)
    for start in range(begin, end, BLOCK_KEYS):
        others = start + tl.arange(0, BLOCK_KEYS)
        keys = load_tile(key_here, others, columns, key_row, key_column, key_length, WIDTH)
        values = load_tile(value_here, others, value_columns, value_row, value_column, key_length, VALUE_WIDTH)
        scores = product(queries, tl.trans(keys), PRECISION)
        scores, gate = masked_scores(
            scores, rows[:, None], others[None, :], query_length, key_length, scale,
            bias_here, bias_row, bias_column, window, softcap,
            HAS_BIAS, BIAS_IS_MASK, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, KEY_TAIL,
        )  # fmt: skip
        scores -= normal[:, None]
        weights = tl.exp(scores)
        if HAS_TOTAL:
            weights /= sums[:, None]
        c_scores = weights * (product(arriving, tl.trans(values), PRECISION) - given[:, None])
        if HAS_SOFTCAP:
            c_scores *= gate
        to_queries = added_product(c_scores, keys, to_queries, PRECISION)
    made = c_query + batch * c_query_batch + head * c_query_head
    store_tile(
        made, rows, columns, c_query_row, c_query_column, query_length, WIDTH, to_queries * (scale * query_share)
    )


def plan_attention_lrp_bwd(
    c: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    logsumexp: Tensor | None,
    bias: Tensor | None,
    sink: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int,
    softcap: float,
    query_share: float,
    key_share: float,
    value_share: float,
    config: Config | None = None,
) -> tuple[Triple, list[Launch]]:
    """The results and the launches that fill them: statistics of rows, then keys and values, then queries."""
    made = empty_results(query, key, value, (query_share, key_share, value_share))
    chosen = config or default(query, value)
    of_queries = fitted(chosen, query, value, query.shape[2], key.shape[2], softcap)
    of_keys = fitted(chosen, query, value, key.shape[2], query.shape[2], softcap)
    given = shared_arguments(query, key, value, bias, sink, scale, softcap) | operand("c", c)
    by_query = given | tiling(query, key, is_causal, window, of_queries, "BLOCK_QUERIES", "BLOCK_KEYS")
    by_key = given | tiling(query, key, is_causal, window, of_keys, "BLOCK_KEYS", "BLOCK_QUERIES")
    launches, rows = plan_rows(by_query, of_queries, out, logsumexp, bool(query_share or key_share))
    if key_share or value_share:
        own = {
            **by_key, **rows, **operand("c_key", made[1] if key_share else None, HEADS),
            **operand("c_value", made[2] if value_share else None, HEADS),
            "key_share": key_share, "value_share": value_share,
            "TO_KEYS": key_share != 0, "TO_VALUES": value_share != 0,
        }  # fmt: skip
        programs = key.shape[0] * key.shape[1] * by_key["key_tiles"]
        launches.append(launch(attention_keys_kernel, programs, own, of_keys))
    if query_share:
        own = {**by_query, **rows, **operand("c_query", made[0]), "query_share": query_share}
        programs = query.shape[0] * query.shape[1] * by_query["query_tiles"]
        launches.append(launch(attention_queries_kernel, programs, own, of_queries))
    return made, launches


def plan_rows(
    given: dict[str, Any], tiles: Config, out: Tensor | None, logsumexp: Tensor | None, with_delta: bool
) -> tuple[list[Launch], dict[str, Any]]:
    """Launches for the log-sum-exp and sum(c * out) of every query, as far as not given, and both as arguments."""
    query, c = given["query"], given["c"]
    delta = query.new_empty(query.shape[:3], dtype=torch.float32) if with_delta else None
    launches, total = [], None
    # Beside the least number of a dtype, as masks are written, the sum of a row is lost in its log-sum-exp.
    has_addend = bool(given["HAS_BIAS"]) and not given["BIAS_IS_MASK"]
    if logsumexp is None or has_addend or (with_delta and out is None):
        logsumexp = query.new_empty(query.shape[:3], dtype=torch.float32)
        # One float32 holds a log-sum-exp to 1e-7 of its size, which all weights of the row would lose.
        total = torch.empty_like(logsumexp) if query.dtype == torch.float32 or has_addend else None
        launches.append(rows_launch(given, tiles, delta if out is None else None, logsumexp, total))
    if delta is not None and out is not None:
        launches.append(row_products_launch(c, out, delta, 1.0))
    made = {"delta": delta, "total": total, "HAS_TOTAL": total is not None}
    return launches, {**operand("logsumexp", logsumexp, HEADS[:3]), **made}
