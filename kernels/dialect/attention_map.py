"""attention_lrp_map and attention_lrp_heads: relevance of the attention map, and of every head and query."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lrp_compiler.kernels.attention import repeat_heads
from lrp_compiler.kernels.dialect.attention import attention_map, supports_attention
from lrp_compiler.kernels.dialect.attention_samples import (
    KEPT,
    LLAMA_8B,
    SMALL,
    VIT,
    Shape,
    masked_calls,
    published,
)
from lrp_compiler.kernels.spec import (
    KernelSpec,
    Refusal,
    Sample,
    Supported,
    all_supported,
    known_dtypes,
    same_device,
)

LARGEST_ROW = 4096
"""Elements of a row of which one program holds one at least."""


def attention_lrp_map(
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
) -> Tensor:
    """share * P * (c V^T), (B, H, L, S) in the dtype of ``query``: the relevance of P as a factor of O = P V.

    Operands are those of ``attention_lrp_bwd``; what nothing attends to has relevance 0.
    """
    weights, _ = attention_map(query, key, bias, sink, is_causal, scale, window, softcap)
    return (share * weights * (c @ repeat_heads(value, query).mT)).contiguous()


def _map_fake(c: Tensor, query: Tensor, key: Tensor, *rest: Any) -> Tensor:
    return query.new_empty(*query.shape[:3], key.shape[2])


def _map_supports(c: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Supported:
    logsumexp, bias, sink = rest[:3]
    return supports_attention(c, query, key, value, None, logsumexp, bias, sink)


def _map_call(shape: Shape, dtype: torch.dtype, device: torch.device, **masks: Any) -> tuple[Any, ...]:
    return (*shape.operands(dtype, device), None, *shape.masks(**masks), 0.5)


def _map_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for label, shape, masks in masked_calls(dtype, device):
        yield Sample(label, _map_call(shape, dtype, device, **masks))
    c, query, key, value, _, *rest = _map_call(KEPT, dtype, device)
    sums = torch.logsumexp(query.float() @ key.float().mT / math.sqrt(KEPT.width), -1)
    apart = [operand.mT.contiguous().mT for operand in (c, query, key, value)]
    yield Sample("log-sum-exp kept, strides", (*apart, sums.mT.contiguous().mT, *rest))
    yield Sample("no queries", _map_call(Shape(1, 2, 1, 0, 5, 4, 4), dtype, device))
    yield Sample("no keys", _map_call(Shape(1, 2, 1, 5, 0, 4, 4), dtype, device))


def _map_refused(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    yield Sample("heads too wide", _map_call(Shape(1, 1, 1, 3, 3, 8, 300), dtype, torch.device("meta")))
    yield Sample("float64", _map_call(SMALL, torch.float64, device))


def _map_workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for label, shape, masks in published(dtype, device):
        c, query, key, value, _, *rest = _map_call(shape, dtype, device, **masks)
        yield Sample(label, (c, query, key, value, torch.full(c.shape[:3], 5.0, device=device), *rest))
    yield Sample("ViT-B/16 8x12x197x64, nothing kept", _map_call(VIT, dtype, device))


def _map_flops(c: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> int:
    """Q K^T and c V^T, dense as the result is."""
    return 2 * query.shape[:3].numel() * key.shape[2] * (query.shape[3] + value.shape[3])


def attention_lrp_heads(c: Tensor, out: Tensor, share: float) -> Tensor:
    """share * sum(c * out) over a head's elements, (B, H, L) in float32: relevance of every head and query.

    ``c`` and ``out`` (B, H, L, Ev), of one dtype.
    """
    return share * (c.float() * out.float()).sum(-1)


def _heads_fake(c: Tensor, out: Tensor, share: float) -> Tensor:
    return c.new_empty(c.shape[:3], dtype=torch.float32)


def _heads_supports(c: Tensor, out: Tensor, share: float) -> Supported:
    fits = c.shape[3] <= LARGEST_ROW
    size = Refusal(f"a head of {c.shape[3]} elements: at most {LARGEST_ROW} fit")
    return all_supported((same_device(c, out), known_dtypes(c, out), fits or size))


def _heads_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def pair(*size: int) -> list[Tensor]:
        return [torch.randn(*size, device=device).to(dtype) for _ in range(2)]

    yield Sample("several programs, odd sizes", (*pair(2, 3, 37, 70), 1.0))
    c, out = pair(2, 19, 3, 33)
    yield Sample(
        "heads inside the sequence, one contiguous", (c.transpose(1, 2), out.transpose(1, 2).contiguous(), 0.5)
    )
    one = c[:, :, :1, :1].expand(2, 19, 3, 2)
    yield Sample("elements of a head apart, one coefficient for all", (one, out[..., ::17], -2.0))
    yield Sample("two rows for a program", (*pair(1, 2, 20, 1050), 0.25))
    yield Sample("no queries", (*pair(2, 3, 0, 8), 1.0))
    yield Sample("no elements", (*pair(1, 2, 3, 0), 1.0))


def _heads_refused(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    wide = torch.empty(1, 1, 1, LARGEST_ROW + 1, dtype=dtype, device="meta")
    yield Sample("heads too wide", (wide, wide, 1.0))
    c, out = (torch.zeros(1, 1, 2, 3, dtype=kind, device=device) for kind in (dtype, torch.float64))
    yield Sample("several dtypes", (c, out, 1.0))


def _heads_workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for label, shape in {"ViT-B/16 8x12x197x64": VIT, "Llama 8B 1x32x4096x128": LLAMA_8B}.items():
        c, query, *_ = shape.operands(dtype, device)
        yield Sample(label, (c, query, 1.0))


def _heads_flops(c: Tensor, out: Tensor, share: float) -> int:
    return 2 * c.numel()


ATTENTION_LRP_MAP = KernelSpec(
    name="attention_lrp_map",
    summary="share * P * (c V^T): relevance of the attention map",
    source="Achtibat et al. 2024 (AttnLRP), proposition 3.3; RULES.md 4",
    reference=attention_lrp_map,
    fake=_map_fake,
    supports=_map_supports,
    samples=_map_samples,
    refused=_map_refused,
    workloads=_map_workloads,
    flops=_map_flops,
    unread=(4,),
    bound="memory",
)

ATTENTION_LRP_HEADS = KernelSpec(
    name="attention_lrp_heads",
    summary="share * sum(c * out): relevance of every head and query",
    source="RULES.md 4",
    reference=attention_lrp_heads,
    fake=_heads_fake,
    supports=_heads_supports,
    samples=_heads_samples,
    refused=_heads_refused,
    workloads=_heads_workloads,
    flops=_heads_flops,
    bound="memory",
)
