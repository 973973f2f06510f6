"""Kernel forms of what picks and sums up: pooling's winners, the largest relevance of a sample, that of a token."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx
from torch._guards import detect_fake_mode

from lrp_compiler.kernels.dialect.embedding import EMBEDDING_RELEVANCE
from lrp_compiler.kernels.dialect.pooling import MAXPOOL_BWD
from lrp_compiler.kernels.dialect.topk import TOPK_FILTER
from lrp_compiler.kernels.spec import NotSupportedError
from lrp_compiler.passes.compress import pooled
from lrp_compiler.passes.emitter import promise
from lrp_compiler.passes.fusing.replacement import Replacement, check_whole, replacement_of
from lrp_compiler.passes.matching import Match
from lrp_compiler.passes.packing import WINNERS
from lrp_compiler.passes.program import FACTS, Facts, facts, first_argument, tensor_of


def max_pool(match: Match) -> Replacement | None:
    """The transpose of 2-D max pooling from winners that are bytes, made in the forward pass."""
    check_whole(match)
    c, indices, _, dims = match.arguments
    known = pooled(first_argument(indices)) if _is_promise(indices) else None
    if dims != 2 or known is None:
        raise NotSupportedError("the kernel is for 2-D pooling whose windows have 256 places at most")
    sizes, geometry = known
    return replacement_of(match, max_pool_form, (c, _packed(indices, known), sizes, *map(list, geometry)))


def _packed(indices: fx.Node, geometry: tuple[Any, ...]) -> fx.Node:
    """The winners as offsets within their windows, right behind their promise."""
    with indices.graph.inserting_after(indices):
        made = indices.graph.call_function(WINNERS.packs, (indices, *geometry))
    value = tensor_of(indices)
    mode = detect_fake_mode(value)
    assert mode is not None
    with mode:
        made.meta = {"val": WINNERS.packed_like(value), FACTS: Facts(part="relevance", origin=facts(indices).origin)}
    return made


def max_pool_form(
    c: Tensor,
    offsets: Tensor,
    sizes: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """As max_pool_transpose."""
    if c.dim() == 3:
        alone: Tensor = MAXPOOL_BWD(c.unsqueeze(0), offsets.unsqueeze(0), sizes, kernel, stride, padding, dilation)
        return alone.squeeze(0)
    made: Tensor = MAXPOOL_BWD(c, offsets, sizes, kernel, stride, padding, dilation)
    return made


def _is_promise(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is promise and first_argument(node).target is operator.getitem


def top_form(edge: Tensor, relevance: Tensor, fraction: float) -> Tensor:
    """As keep_top; of equal relevance the earliest positions stay."""
    if not edge.dim():
        raise NotSupportedError("the kernel is for samples along the first dimension")
    made: Tensor = TOPK_FILTER(edge, relevance, fraction)
    return made


def token_form(c: Tensor, embedding: Tensor) -> Tensor:
    """As token_relevance of kernels/linear.py."""
    made: Tensor = EMBEDDING_RELEVANCE(embedding, c)
    return made
