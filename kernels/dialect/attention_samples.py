"""Calls of attention's ops for tests and benchmarks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrp_compiler.kernels.spec import Sample

ATTNLRP, CP = (0.25, 0.25, 0.5), (0.0, 0.0, 1.0)
"""The factors on the gradient at Q, K and V."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention: batch, heads of queries and of keys, queries, keys, elements of a head of each."""

    batch: int
    heads: int
    key_heads: int
    length: int
    key_length: int
    width: int
    value_width: int

    def operands(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(c, query, key, value), drawn."""
        sizes = (
            (self.heads, self.length, self.value_width),
            (self.heads, self.length, self.width),
            (self.key_heads, self.key_length, self.width),
            (self.key_heads, self.key_length, self.value_width),
        )
        c, query, key, value = (torch.randn(self.batch, *size, device=device).to(dtype) for size in sizes)
        return c, query, key, value

    def call(
        self,
        dtype: torch.dtype,
        device: torch.device,
        *,
        shares: tuple[float, float, float] = ATTNLRP,
        **masks: Any,
    ) -> tuple[Any, ...]:
        """The arguments of ``attention_lrp_bwd`` with neither out nor log-sum-exp."""
        return (*self.operands(dtype, device), None, None, *self.masks(**masks), *shares)

    def masks(
        self,
        bias: Tensor | None = None,
        sink: Tensor | None = None,
        is_causal: bool = False,
        window: int = 0,
        softcap: float = 0.0,
    ) -> tuple[Any, ...]:
        """(bias, sink, is_causal, scale, window, softcap)."""
        return bias, sink, is_causal, 1 / math.sqrt(max(self.width, 1)), window, softcap


SMALL = Shape(1, 1, 1, 19, 23, 8, 8)
GROUPED = Shape(1, 2, 1, 18, 18, 5, 20)
TALL = Shape(1, 2, 2, 18, 13, 4, 4)
FLAT = Shape(2, 1, 1, 7, 18, 4, 4)
TINY = Shape(1, 1, 1, 7, 5, 4, 4)
KEPT = Shape(1, 1, 1, 30, 30, 32, 32)
"""Wide, since a rounded log-sum-exp loses more than eager torch does in sums of a few terms."""


def masked_calls(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Shape, dict[str, Any]]]:
    """Small shapes under every kind of mask: (what is special, shape, masks)."""
    yield "two tiles each way", SMALL, {}
    yield "causal, grouped heads, odd widths", GROUPED, {"is_causal": True}
    padding = torch.tensor([11, 18], device=device).view(2, 1, 1, 1) > torch.arange(18, device=device)
    yield "padding", FLAT, {"bias": padding}
    nothing = torch.rand(1, 2, 18, 13, device=device) < 0.7
    nothing[:, 1, 3] = False
    yield "a mask under which a row attends to nothing", TALL, {"bias": nothing}
    added = torch.randn(2, 13, 18, device=device).to(dtype).mT
    yield "a bias with strides of its own, causal", TALL, {"bias": added, "is_causal": True}
    least = torch.where(nothing[0, 1], 0.0, torch.finfo(torch.float32).min)
    yield "the least number for a mask", Shape(1, 1, 1, 18, 13, 4, 4), {"bias": least}
    yield "causal window", Shape(1, 1, 1, 50, 50, 4, 4), {"is_causal": True, "window": 9}
    yield "window without a causal mask, more queries", Shape(1, 1, 1, 50, 20, 4, 4), {"window": 7}
    sink = torch.randn(2, device=device)
    yield "sink, softcap, causal", TALL, {"sink": sink.to(dtype), "softcap": 1.5, "is_causal": True}
    yield "softcap far from its bend", FLAT, {"softcap": 50.0}
    yield "a sink for a row without keys", TALL, {"sink": sink, "bias": nothing}


def backward_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for label, shape, masks in masked_calls(dtype, device):
        yield Sample(label, shape.call(dtype, device, **masks))
    yield Sample("queries alone", TINY.call(dtype, device, shares=(0.5, 0.0, 0.0)))
    yield Sample("keys alone", FLAT.call(dtype, device, shares=(0.0, 1.0, 0.0)))
    yield Sample("out and log-sum-exp kept", kept_call(KEPT, dtype, device))
    yield Sample("out kept, CP-LRP", kept_call(KEPT, dtype, device, CP))
    yield from _strided(dtype, device)
    for label, shape in {
        "no queries": Shape(1, 2, 1, 0, 5, 4, 4),
        "no keys": Shape(1, 2, 1, 5, 0, 4, 4),
        "no heads": Shape(1, 0, 0, 3, 3, 4, 4),
        "no width": Shape(1, 1, 1, 3, 1, 0, 4),
    }.items():
        yield Sample(label, shape.call(dtype, device))


def kept_call(
    shape: Shape, dtype: torch.dtype, device: torch.device, shares: tuple[float, float, float] = ATTNLRP
) -> tuple[Any, ...]:
    """A call that is given out and log-sum-exp, the latter with strides of its own."""
    c, query, key, value = shape.operands(dtype, device)
    masks = shape.masks()
    scores = masks[3] * query.float() @ key.float().mT
    out = (torch.softmax(scores, -1) @ value.float()).to(dtype)
    rows = torch.logsumexp(scores, -1).transpose(1, 2).contiguous().transpose(1, 2)
    return (c, query, key, value, out, rows, *masks, *shares)


def _strided(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    """Operands as projections leave them, parts of one tensor, and with heads whose elements lie apart."""
    c, query, key, value, *rest = GROUPED.call(dtype, device, shares=CP, is_causal=True)
    spread = [operand.transpose(1, 2).contiguous().transpose(1, 2) for operand in (c, query, key, value)]
    yield Sample("CP-LRP, heads inside the sequence", (*spread, *rest))
    c, query, key, value, *rest = FLAT.call(dtype, device)
    apart = [operand.mT.contiguous().mT for operand in (c, query, key, value)]
    yield Sample("elements of a head apart", (*apart, *rest))
    joined = torch.randn(2, 1, 7, 40, device=device).to(dtype)
    query, key, value = joined[..., :8], joined[..., 8:16], joined[..., 16:]
    same = c[:, :, :1, :1].expand(2, 1, 7, 24)
    yield Sample("parts of one tensor, one coefficient for all", (same, query, key, value, *rest))


def backward_refused(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    meta = torch.device("meta")
    yield Sample("heads too wide", Shape(1, 1, 1, 3, 3, 257, 8).call(dtype, meta))
    yield Sample("float64", SMALL.call(torch.float64, device))
    c, query, key, value, *rest = SMALL.call(dtype, device)
    yield Sample("other coefficients", (c.to(torch.float64), query, key, value, *rest))
    yield Sample("heads that do not divide", Shape(1, 3, 2, 3, 3, 4, 4).call(dtype, meta))
    yield Sample("whole numbers for a bias", SMALL.call(dtype, device, bias=torch.zeros(19, 23, dtype=torch.int64)))
    yield Sample("a sink of float64", SMALL.call(dtype, device, sink=torch.zeros(1, dtype=torch.float64)))
    sums = torch.zeros(1, 1, 19, dtype=torch.float64)
    yield Sample("log-sum-exp of float64", (c, query, key, value, None, sums, *rest[2:]))


VIT = Shape(8, 12, 12, 197, 197, 64, 64)
GPT_2 = Shape(8, 12, 12, 1024, 1024, 64, 64)
LLAMA_8B = Shape(1, 32, 8, 4096, 4096, 128, 128)
GEMMA_2 = Shape(1, 16, 8, 4096, 4096, 256, 256)
GPT_OSS = Shape(1, 64, 8, 4096, 4096, 64, 64)


def published(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Shape, dict[str, Any]]]:
    """Attention of real models: (name, shape, masks)."""
    yield "ViT-B/16 8x12x197x64", VIT, {}
    yield "GPT-2 8x12x1024x64, causal", GPT_2, {"is_causal": True}
    yield "Llama 8B 1x32(8)x4096x128, causal", LLAMA_8B, {"is_causal": True}
    gemma = {"is_causal": True, "window": 4096, "softcap": 50.0}
    yield "Gemma 2 9B 1x16(8)x4096x256, causal, softcap", GEMMA_2, gemma
    sink = torch.zeros(64, dtype=dtype, device=device)
    yield "gpt-oss 1x64(8)x4096x64, window, sink", GPT_OSS, {"is_causal": True, "window": 128, "sink": sink}


def backward_workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for label, shape, masks in published(dtype, device):
        yield Sample(label, _workload(shape, dtype, device, ATTNLRP, masks))
    causal = {"is_causal": True}
    yield Sample("CP-LRP of Llama 8B 1x32(8)x4096x128, causal", _workload(LLAMA_8B, dtype, device, CP, causal))
    yield Sample("ViT-B/16 8x12x197x64, nothing kept", VIT.call(dtype, device))


def _workload(
    shape: Shape, dtype: torch.dtype, device: torch.device, shares: tuple[float, float, float], masks: dict[str, Any]
) -> tuple[Any, ...]:
    """A call with out and log-sum-exp as the forward pass kept them."""
    c, query, key, value, _, _, *rest = shape.call(dtype, device, shares=shares, **masks)
    return (c, query, key, value, torch.randn_like(c), torch.full(c.shape[:3], 5.0, device=device), *rest)
