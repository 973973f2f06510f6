"""What attention's backward needs of every query row: its log-sum-exp and its share of relevance, sum(c * out)."""

from __future__ import annotations

import triton
import triton.language as tl

from lrp_compiler.kernels.triton_dialect.attention_tiles import (
    added_product,
    keys_seen,
    load_tile,
    masked_scores,
    product,
)


@triton.jit
def attention_rows_kernel(
    c, query, key, value, bias, sink, logsumexp, total, delta,
    query_length, key_length, heads, group, query_tiles, scale, window, softcap,
    c_batch, c_head, c_row, c_column, query_batch, query_head, query_row, query_column,
    key_batch, key_head, key_row, key_column, value_batch, value_head, value_row, value_column,
    bias_batch, bias_head, bias_row, bias_column, sink_stride,
    HAS_BIAS: tl.constexpr, BIAS_IS_MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SINK: tl.constexpr, KEY_TAIL: tl.constexpr, WITH_DELTA: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE_WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """By the online softmax the log-sum-exp of a tile of queries, or largest score and sum; WITH_DELTA sum(c * out)."""
    # Heads times strides pass 2^31 in large tensors.
    place = tl.program_id(0).to(tl.int64)
    batch, head = place // query_tiles // heads, place // query_tiles % heads
    # Causal rows at the end see the most keys: they start first.
    first = (query_tiles - 1 - (place % query_tiles).to(tl.int32)) * BLOCK_QUERIES
    rows = first + tl.arange(0, BLOCK_QUERIES)
    columns, value_columns = tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_VALUE_WIDTH)
    query_here = query + batch * query_batch + head * query_head
    key_here = key + batch * key_batch + head // group * key_head
    queries = load_tile(query_here, rows, columns, query_row, query_column, query_length, WIDTH)
    bias_here = bias + batch * bias_batch + head * bias_head if HAS_BIAS else 0
    most = tl.full([BLOCK_QUERIES], -float("inf"), tl.float32)
    running = tl.zeros([BLOCK_QUERIES], tl.float32)
    if HAS_SINK:
        # A column that is seen before all keys.
        most = tl.zeros([BLOCK_QUERIES], tl.float32) + tl.load(sink + head * sink_stride).to(tl.float32)
        running += 1.0
    if WITH_DELTA:
        value_here = value + batch * value_batch + head // group * value_head
        made = tl.zeros([BLOCK_QUERIES, BLOCK_VALUE_WIDTH], tl.float32)
    begin, end = keys_seen(first, window, key_length, BLOCK_QUERIES, BLOCK_KEYS, IS_CAUSAL, HAS_WINDOW)
    for start in range(begin, end, BLOCK_KEYS):
        others = start + tl.arange(0, BLOCK_KEYS)
        keys = load_tile(key_here, others, columns, key_row, key_column, key_length, WIDTH)
        scores = product(queries, tl.trans(keys), PRECISION)
        scores, _ = masked_scores(
            scores, rows[:, None], others[None, :], query_length, key_length, scale,
            bias_here, bias_row, bias_column, window, softcap,
            HAS_BIAS, BIAS_IS_MASK, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, KEY_TAIL,
        )  # fmt: skip
        higher = tl.maximum(most, tl.max(scores, 1))
        # -inf - -inf would be nan for rows that have seen nothing yet.
        finite = tl.where(higher > -float("inf"), higher, 0.0)
        kept = tl.exp(most - finite)
        parts = tl.exp(scores - finite[:, None])
        running = running * kept + tl.sum(parts, 1)
        most = higher
        if WITH_DELTA:
            values = load_tile(value_here, others, value_columns, value_row, value_column, key_length, VALUE_WIDTH)
            made = added_product(parts, values, made * kept[:, None], PRECISION)
    attends = running > 0
    seen = tl.where(attends, running, 1.0)
    at = (batch * heads + head) * query_length + rows
    if HAS_TOTAL:
        tl.store(total + at, seen, mask=rows < query_length)
        found = most
    else:
        found = most + tl.log(seen)
    tl.store(logsumexp + at, tl.where(attends, found, -float("inf")), mask=rows < query_length)
    if WITH_DELTA:
        c_here = c + batch * c_batch + head * c_head
        coefficients = load_tile(c_here, rows, value_columns, c_row, c_column, query_length, VALUE_WIDTH)
        given = tl.sum(coefficients.to(tl.float32) * made, 1) / seen
        tl.store(delta + at, given, mask=rows < query_length)


@triton.jit
def row_products_kernel(
    c, out, delta, rows, heads, query_length, share,
    c_batch, c_head, c_row, c_column, out_batch, out_head, out_row, out_column,
    VALUE_WIDTH: tl.constexpr, BLOCK_VALUE_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """share * sum(c * out) of rows of all heads and batches."""
    place = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row, head, batch = place % query_length, place // query_length % heads, place // query_length // heads
    columns = tl.arange(0, BLOCK_VALUE_WIDTH).to(tl.int64)[None, :]
    inside = (place < rows)[:, None] & (columns < VALUE_WIDTH)
    c_at = (batch * c_batch + head * c_head + row * c_row)[:, None] + columns * c_column
    out_at = (batch * out_batch + head * out_head + row * out_row)[:, None] + columns * out_column
    coefficients = tl.load(c + c_at, mask=inside, other=0.0).to(tl.float32)
    activations = tl.load(out + out_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(delta + place, share * tl.sum(coefficients * activations, 1), mask=place < rows)
