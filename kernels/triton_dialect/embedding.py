"""embedding_relevance in Triton, a tile of rows per program; token_relevance, a program per run of equal sorted ids."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrp_compiler.kernels.dialect.embedding import leading_dims
from lrp_compiler.kernels.launch import Config, Launch, cdiv, config

CONFIGS_EMBEDDING_RELEVANCE = (
    config(num_warps=4, ROWS=1, COLUMNS=1024),
    config(num_warps=4, ROWS=4, COLUMNS=256),
    config(num_warps=8, ROWS=1, COLUMNS=4096),
    config(num_warps=4, ROWS=32, COLUMNS=32),
)
CONFIGS_TOKEN_RELEVANCE = (config(num_warps=1, TOKENS=64), config(num_warps=1, TOKENS=256))


@triton.jit
def embedding_relevance_kernel(
    x, c, out, rows, inner, size, x_outer, x_inner, x_column, c_outer, c_inner, c_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Rows times strides pass 2^31 in large tensors.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    outer, within = (row // inner)[:, None], (row % inner)[:, None]
    x_row = x + outer * x_outer + within * x_inner
    c_row = c + outer * c_outer + within * c_inner
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = (row < rows)[:, None] & (column < size)
        far = column.to(tl.int64)
        value = tl.load(x_row + far * x_column, mask=inside, other=0.0).to(tl.float32)
        total += value * tl.load(c_row + far * c_column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row, tl.sum(total, 1), mask=row < rows)


def plan_embedding_relevance(x: Tensor, c: Tensor, config: Config | None = None) -> tuple[Tensor, list[Launch]]:
    """The result and the launch that fills it."""
    out = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    size = x.shape[-1]
    chosen = config or _fitting(size)
    # Ones in front, so that there are two.
    (_, x_outer, c_outer), (inner, x_inner, c_inner) = ((1, 0, 0), (1, 0, 0), *leading_dims(x, c))[-2:]
    arguments = {
        "x": x, "c": c, "out": out, "rows": out.numel(), "inner": max(inner, 1), "size": size,
        "x_outer": x_outer, "x_inner": x_inner, "x_column": x.stride(-1),
        "c_outer": c_outer, "c_inner": c_inner, "c_column": c.stride(-1),
        **dict(chosen.blocks),
    }  # fmt: skip
    grid = (cdiv(out.numel(), chosen["ROWS"]),)
    return out, [Launch(embedding_relevance_kernel, grid, arguments, chosen.num_warps, chosen.num_stages)]


def _fitting(size: int) -> Config:
    """Of the configurations, the default where rows are long, else one with rows as long as these."""
    wide, middle, _, narrow = CONFIGS_EMBEDDING_RELEVANCE
    return wide if size > 512 else middle if size > 64 else narrow


@triton.jit
def token_relevance_kernel(relevance, order, ids, out, tokens, vocabulary, relevance_stride, TOKENS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64)
    token = tl.load(ids + first)
    before = tl.load(ids + first - 1, mask=first > 0, other=-1)
    # Only where a run begins, and never outside the result.
    if (token != before) & (token < vocabulary) & (token >= 0):
        lane = tl.arange(0, TOKENS)
        total = tl.zeros((TOKENS,), tl.float32)
        start = first
        equal = tl.load(ids + start + lane, mask=start + lane < tokens, other=-1) == token
        count = tl.sum(equal.to(tl.int32), 0)
        while count > 0:
            place = tl.load(order + start + lane, mask=equal, other=0)
            total += tl.load(relevance + place * relevance_stride, mask=equal, other=0.0).to(tl.float32)
            start += TOKENS
            equal = tl.load(ids + start + lane, mask=start + lane < tokens, other=-1) == token
            count = tl.sum(equal.to(tl.int32), 0)
        tl.store(out + token, tl.sum(total, 0))


def plan_token_relevance(
    relevance: Tensor, ids: Tensor, vocabulary: int, config: Config | None = None
) -> tuple[Tensor, list[Launch]]:
    """The result, zero where no token stands, and the launch that fills in the others."""
    chosen = config or CONFIGS_TOKEN_RELEVANCE[0]
    out = torch.zeros(vocabulary, dtype=torch.float32, device=relevance.device)
    found, order = ids.sort(stable=True)
    if found.numel():
        # Reads no value back, which would wait for the device.
        known = (found[0] >= 0) & (found[-1] < vocabulary)
        torch._assert_async(known, f"token_relevance: an id is not in [0, {vocabulary})")
    arguments = {
        "relevance": relevance, "order": order, "ids": found, "out": out, "tokens": ids.shape[0],
        "vocabulary": vocabulary, "relevance_stride": relevance.stride(0), **dict(chosen.blocks),
    }  # fmt: skip
    return out, [Launch(token_relevance_kernel, (ids.shape[0],), arguments, chosen.num_warps, chosen.num_stages)]
