"""Tiles of attention in Triton: loads, masked scores, softcap's gate; shared by all kernels of attention."""

from __future__ import annotations

import triton
import triton.language as tl

from lrp_compiler.kernels.spec import interpreting

INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def nearest(value, dtype: tl.constexpr):
    """float32 rounded to the nearest of ``dtype``; Triton's interpreter would cut bfloat16 off instead."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def product(left, right, PRECISION: tl.constexpr):
    """left @ right in float32; Triton's interpreter would multiply the bits of bfloat16 as integers."""
    if INTERPRETED and left.dtype == tl.bfloat16:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def added_product(left, right, total, PRECISION: tl.constexpr):
    """total + left @ right, likewise; ``left`` is rounded to the dtype of ``right``."""
    if INTERPRETED and right.dtype == tl.bfloat16:
        left, right = nearest(left, right.dtype).to(tl.float32), right.to(tl.float32)
    return tl.dot(left.to(right.dtype), right, total, input_precision=PRECISION)


@triton.jit
def load_tile(base, rows, columns, row_stride, column_stride, length, WIDTH: tl.constexpr):
    """Rows of a head, zero past its end and past its width: [rows, columns]."""
    place = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    inside = (rows < length)[:, None]
    if columns.shape[0] > WIDTH:
        inside = inside & (columns < WIDTH)[None, :]
    return tl.load(base + place, mask=inside, other=0.0)


@triton.jit
def store_tile(base, rows, columns, row_stride, column_stride, length, WIDTH: tl.constexpr, value):
    """Write [rows, columns] in the dtype of the memory, but not past its end and width."""
    place = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    inside = (rows < length)[:, None]
    if columns.shape[0] > WIDTH:
        inside = inside & (columns < WIDTH)[None, :]
    tl.store(base + place, nearest(value, base.dtype.element_ty), mask=inside)


@triton.jit
def cap_gate(x):
    """tanh(x) / x: a Pade approximant where 1 - 2 / (1 + exp(2 |x|)) would cancel."""
    size = tl.abs(x)
    square = tl.minimum(size, 1.0) * tl.minimum(size, 1.0)
    near = (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + 15.0 * square))
    # Beyond 10 the tanh is 1 in float32; its exponential must not overflow.
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.minimum(size, 10.0)))
    return tl.where(size < 0.625, near, far / tl.maximum(size, 0.625))


@triton.jit
def masked_scores(
    scores, query_at, key_at, query_length, key_length, scale,
    bias, bias_row, bias_column, window, softcap,
    HAS_BIAS: tl.constexpr, BIAS_IS_MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, KEY_TAIL: tl.constexpr,
):  # fmt: skip
    """(scores, -inf where nothing may attend; softcap's gate) of a tile of Q K^T or of its transpose.

    ``query_at`` and ``key_at`` are indices that broadcast to the tile. Queries past the end are not masked.
    """
    scores *= scale
    gate = scores
    if HAS_SOFTCAP:
        gate = cap_gate(scores / softcap)
        scores = scores * gate
    if HAS_BIAS:
        place = query_at.to(tl.int64) * bias_row + key_at.to(tl.int64) * bias_column
        inside = (query_at < query_length) & (key_at < key_length)
        added = tl.load(bias + place, mask=inside, other=0)
        if BIAS_IS_MASK:
            scores = tl.where(added != 0, scores, -float("inf"))
        else:
            scores += added.to(tl.float32)
    if IS_CAUSAL:
        scores = tl.where(key_at <= query_at, scores, -float("inf"))
    if KEY_TAIL:
        scores = tl.where(key_at < key_length, scores, -float("inf"))
    if HAS_WINDOW:
        scores = tl.where(query_at - window < key_at, scores, -float("inf"))
    return scores, gate


@triton.jit
def keys_seen(
    first, window, key_length, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """The range of keys that a tile of queries may attend to; it begins with a tile."""
    begin = first * 0
    end = begin + key_length
    if HAS_WINDOW:
        begin = tl.maximum(first - window + 1, 0) // BLOCK_KEYS * BLOCK_KEYS
    if IS_CAUSAL:
        end = tl.minimum(end, first + BLOCK_QUERIES)
    return begin, end


@triton.jit
def queries_seeing(
    first, window, query_length, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """The range of queries that may attend to a tile of keys; it begins with a tile."""
    begin = first * 0
    end = begin + query_length
    if IS_CAUSAL:
        begin = first // BLOCK_QUERIES * BLOCK_QUERIES
    if HAS_WINDOW:
        end = tl.minimum(end, first + BLOCK_KEYS - 1 + window)
    return begin, end


@triton.jit
def load_logsumexp(base, rows, stride, length):
    """The log-sum-exp of rows; inf, which makes all their weights zero, past the end and where nothing is attended."""
    found = tl.load(base + rows.to(tl.int64) * stride, mask=rows < length, other=float("inf"))
    return tl.where(found > -float("inf"), found, float("inf"))
