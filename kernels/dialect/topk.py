"""topk_filter: only the largest relevance of every sample goes on, and of equal ones the first."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lrp_compiler.kernels.spec import (
    KernelSpec,
    Refusal,
    Sample,
    Supported,
    all_supported,
    contiguous_like,
    known_dtypes,
    same_device,
)

LARGEST_SAMPLE = 2**31 - 1
"""Elements of a sample that 32-bit integers count."""


def topk_filter(edge: Tensor, relevance: Tensor, fraction: float) -> Tensor:
    """``edge`` where ``relevance`` is among the k largest of its sample, exactly zero elsewhere.

    Samples lie along dimension 0 (a number is one sample), k = max(1, round(fraction * n)) of n elements. ``relevance``
    is signed, of the shape of ``edge``, nan counts as the largest; exactly k elements are kept, of equal ones those at
    the earliest positions in the order of indices, however the tensors lie in memory. Source: the relevance filter of
    DynamicLRP; torch.topk leaves its choice among equal ones open, so this is a stable sort.
    """
    rows = rows_of(relevance)
    order = rows.sort(dim=1, descending=True, stable=True).indices
    first = order[:, : kept_of(fraction, rows.shape[1])]
    kept = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device).scatter_(1, first, True)
    return torch.where(kept.view(relevance.shape), edge, torch.zeros_like(edge)).contiguous()


def rows_of(value: Tensor) -> Tensor:
    """(samples, elements of each): a view, or a copy of what does not lie evenly in memory."""
    return value.reshape(value.shape[0], math.prod(value.shape[1:])) if value.dim() else value.reshape(1, 1)


def kept_of(fraction: float, size: int) -> int:
    """How many of ``size`` elements are kept."""
    return min(max(1, round(fraction * size)), size)


def _fake(edge: Tensor, relevance: Tensor, fraction: float) -> Tensor:
    return contiguous_like(edge)


def _supports(edge: Tensor, relevance: Tensor, fraction: float) -> Supported:
    if edge.shape != relevance.shape:
        return Refusal(f"relevance {tuple(relevance.shape)} for an edge {tuple(edge.shape)}: one for each is needed")
    size = math.prod(edge.shape[1:])
    fits = size <= LARGEST_SAMPLE or Refusal(f"a sample of {size} elements (at most {LARGEST_SAMPLE})")
    return all_supported((same_device(edge, relevance), known_dtypes(edge), known_dtypes(relevance), fits))


def _drawn(dtype: torch.dtype, device: torch.device, *shape: int) -> tuple[Tensor, Tensor]:
    edge, relevance = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return edge, relevance


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    edge, relevance = _drawn(dtype, device, 3, 5, 7, 9)
    yield Sample("3x5x7x9", (edge, relevance, 0.1))
    yield Sample("its own relevance", (edge, edge, 0.5))
    yield Sample("one is kept", (edge, relevance, 1e-9))
    yield Sample("all are kept", (edge, relevance, 1.0))
    yield Sample("many are equal", (edge, relevance.round(), 0.3))
    yield Sample("all are equal", (edge, torch.zeros_like(relevance), 0.4))
    special = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1.0, -1.0, 6e-8, -6e-8], device=device)
    for fraction in (0.15, 0.5, 0.8):
        yield Sample(f"special numbers, {fraction:g} kept", (edge, special.to(dtype).expand(3, 5, 7, 9), fraction))
    yield Sample("channels last", (edge.contiguous(memory_format=torch.channels_last), relevance.round(), 0.3))
    yield Sample("transposed", (edge.transpose(0, 3), relevance.round().transpose(0, 3), 0.3))
    flat_edge, flat_relevance = edge.flatten(1), relevance.round().flatten(1)
    yield Sample("every other element", (flat_edge[:, :314:2], flat_relevance[:, 1::2], 0.3))
    yield Sample("samples side by side", (flat_edge[:, :5].t(), flat_relevance[:, :5].t(), 0.4))
    yield Sample("another dtype of relevance", (edge, relevance.bfloat16(), 0.1))
    edge_of_long, relevance_of_long = _drawn(dtype, device, 1, 17001)
    yield Sample("1x17001", (edge_of_long, relevance_of_long, 0.01))
    yield Sample("1x17001, many are equal", (edge_of_long, (2 * relevance_of_long).round(), 0.5))
    yield Sample("no samples", (edge[:0], relevance[:0], 0.5))
    yield Sample("empty samples", (edge[:, :0], relevance[:, :0], 0.5))
    yield Sample("one element each", (edge[:, 0, 0, 0], relevance[:, 0, 0, 0], 0.5))
    yield Sample("a number", (edge[0, 0, 0, 0], relevance[0, 0, 0, 0], 0.5))


def _refused(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    edge, relevance = _drawn(dtype, device, 2, 6)
    yield Sample("float64", (edge.double(), relevance.double(), 0.5))
    yield Sample("another shape", (edge, relevance[:, :3], 0.5))
    long = torch.empty((1, LARGEST_SAMPLE + 1), dtype=dtype, device="meta")
    yield Sample("a long sample", (long, long, 0.5))


def _workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    yield Sample("8x1000000, 1 %", (*_drawn(dtype, device, 8, 1000000), 0.01))
    yield Sample("8x512x14x14, 10 % (VGG-16)", (*_drawn(dtype, device, 8, 512, 14, 14), 0.1))
    yield Sample("2048x4096, 10 % (Llama 8B)", (*_drawn(dtype, device, 2048, 4096), 0.1))
    yield Sample("2048x14336, 10 % (Llama 8B, its MLP)", (*_drawn(dtype, device, 2048, 14336), 0.1))


def _flops(edge: Tensor, relevance: Tensor, fraction: float) -> int:
    """Comparisons: one per element at least."""
    return edge.numel()


def _traffic(spec: KernelSpec, edge: Tensor, relevance: Tensor, fraction: float) -> int:
    """Relevance and result once, and of the edge what is kept."""
    samples = edge.shape[0] if edge.dim() else 1
    kept = samples * kept_of(fraction, edge.numel() // max(samples, 1))
    return relevance.numel() * relevance.element_size() + (edge.numel() + kept) * edge.element_size()


TOPK_FILTER = KernelSpec(
    name="topk_filter",
    summary="the edge where relevance is among the k largest of its sample, of equal ones the first; zero elsewhere",
    source="the topk of DynamicLRP's engine; kernels/dialect/README.md",
    reference=topk_filter,
    fake=_fake,
    supports=_supports,
    samples=_samples,
    refused=_refused,
    workloads=_workloads,
    flops=_flops,
    bound="memory",
    traffic=_traffic,
)
