"""embedding_relevance and token_relevance: a c summed over the embedding, and summed again by token of a vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lrp_compiler.kernels.spec import (
    FLOATS,
    KernelSpec,
    Refusal,
    Sample,
    Supported,
    all_supported,
    known_dtypes,
    same_device,
)


def embedding_relevance(x: Tensor, c: Tensor) -> Tensor:
    """sum(x c) over the last dimension, products and sum in float32: the relevance of every token.

    ``x`` and ``c`` (..., dim) of one dtype; returns (...) float32. Source: kernels/README.md, R = a c.
    """
    return (x.float() * c.float()).sum(-1)


def token_relevance(relevance: Tensor, ids: Tensor, vocabulary: int) -> Tensor:
    """The sum of ``relevance`` over the places where each token of the vocabulary stands.

    ``relevance`` (tokens,); ``ids`` (tokens,) int32 or int64 in [0, vocabulary). Returns (vocabulary,) float32, zero
    where no token stands. An id that is not of the vocabulary is an error: IndexError (RuntimeError from the kernel) on
    the CPU, an assertion of the device on CUDA. The kernel adds in the order of the tokens' places.
    """
    made = torch.zeros(vocabulary, dtype=torch.float32, device=relevance.device)
    return made.index_add(0, ids, relevance.float())


Leading = tuple[tuple[int, int, int], ...]
"""Dimensions as (size, stride in x, stride in c)."""


def leading_dims(x: Tensor, c: Tensor) -> Leading:
    """The dimensions before the last, those that lie evenly in both tensors merged."""
    merged: list[tuple[int, int, int]] = []
    for size, x_stride, c_stride in zip(x.shape[:-1], x.stride()[:-1], c.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1:] == (size * x_stride, size * c_stride):
            merged[-1] = (merged[-1][0] * size, x_stride, c_stride)
        else:
            merged.append((size, x_stride, c_stride))
    return tuple(merged)


def _embedding_fake(x: Tensor, c: Tensor) -> Tensor:
    return torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)


def _embedding_supports(x: Tensor, c: Tensor) -> Supported:
    if x.shape != c.shape or not x.dim():
        return Refusal(f"coefficients {tuple(c.shape)} for embeddings {tuple(x.shape)}: one for each is needed")
    dims = leading_dims(x, c)
    few = len(dims) <= 2 or Refusal(f"its leading dimensions lie in memory as {len(dims)}: the kernel walks along two")
    return all_supported((same_device(x, c), known_dtypes(x, c), few))


def _drawn(dtype: torch.dtype, device: torch.device, *shape: int) -> tuple[Tensor, Tensor]:
    x, c = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return x, c


def _embedding_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    x, c = _drawn(dtype, device, 3, 5, 63)
    yield Sample("3x5x63", (x, c))
    yield Sample("transposed", (x.transpose(0, 1), c.transpose(0, 1)))
    yield Sample("columns of a wider tensor", (x[..., 3:40], c[..., 7:44]))
    yield Sample("backwards in memory", (x.permute(2, 1, 0), c.permute(2, 1, 0)))
    yield Sample("one embedding for all", (x[:, :1].expand(x.shape), c))
    yield Sample("no tokens", (x[:, :0], c[:, :0]))
    yield Sample("no dimensions", (x[..., :0], c[..., :0]))
    yield Sample("7x1", _drawn(dtype, device, 7, 1))
    # Whole numbers, so that the single sum is exact in whatever order.
    yield Sample("one token", tuple((4 * value).round() for value in _drawn(dtype, device, 130)))
    yield Sample("9x1100", _drawn(dtype, device, 9, 1100))
    yield Sample("2x3x4x33", _drawn(dtype, device, 2, 3, 4, 33))


def _embedding_refused(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    x, c = _drawn(dtype, device, 2, 3, 4, 5)
    yield Sample("float64", (x.double(), c.double()))
    yield Sample("two dtypes", (x, c.bfloat16()))
    yield Sample("broadcast", (x, c[:1]))
    yield Sample("three leading dimensions", (x.permute(2, 1, 0, 3), c.permute(2, 1, 0, 3)))


def _embedding_workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    yield Sample("8x512x768 (BERT)", _drawn(dtype, device, 8, 512, 768))
    yield Sample("4x2048x4096 (Llama 8B)", _drawn(dtype, device, 4, 2048, 4096))


def _embedding_flops(x: Tensor, c: Tensor) -> int:
    return 2 * x.numel()


def _token_fake(relevance: Tensor, ids: Tensor, vocabulary: int) -> Tensor:
    return torch.empty(vocabulary, dtype=torch.float32, device=relevance.device)


def _token_supports(relevance: Tensor, ids: Tensor, vocabulary: int) -> Supported:
    flat = relevance.dim() == 1 and relevance.shape == ids.shape
    return all_supported(
        (
            same_device(relevance, ids),
            relevance.dtype in FLOATS or Refusal(f"no kernel for {relevance.dtype}: kernels accumulate in float32"),
            ids.dtype in (torch.int32, torch.int64) or Refusal(f"its ids are {ids.dtype}, not int32 or int64"),
            flat or Refusal(f"relevance {tuple(relevance.shape)} for ids {tuple(ids.shape)}: one flat row is needed"),
        )
    )


def _tokens(dtype: torch.dtype, device: torch.device, tokens: int, vocabulary: int) -> tuple[Tensor, Tensor, int]:
    # In steps of 1/32, so that sums are exact in float32 in whatever order.
    relevance = (32 * torch.randn(tokens, device=device)).round().clamp(-127, 127).div(32).to(dtype)
    # A few tokens make most of a text.
    ids = (torch.rand(tokens, device=device) ** 4 * vocabulary).long()
    return relevance, ids, vocabulary


def _token_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    relevance, ids, vocabulary = _tokens(dtype, device, 31, 40)
    yield Sample("31 tokens of 40", (relevance, ids, vocabulary))
    yield Sample("int32 ids", (relevance, ids.int(), vocabulary))
    yield Sample("every third", (relevance[:30:3], ids[1::3], vocabulary))
    yield Sample("one relevance for all", (relevance[:1].expand(31), ids, vocabulary))
    yield Sample("all different", (relevance[:11], torch.arange(10, -1, -1, device=device), 11))
    longer, few, _ = _tokens(dtype, device, 79, 3)
    yield Sample("mostly padding", (longer, few.where(few == 0, vocabulary - 1), vocabulary))
    yield Sample("no tokens", (relevance[:0], ids[:0], vocabulary))
    yield Sample("one token", (relevance[:1], torch.zeros(1, dtype=torch.int64, device=device), 1))


def _token_refused(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    relevance, ids, vocabulary = _tokens(dtype, device, 6, 4)
    yield Sample("float64", (relevance.double(), ids, vocabulary))
    yield Sample("ids as floats", (relevance, ids.float(), vocabulary))
    yield Sample("a batch", (relevance.view(2, 3), ids.view(2, 3), vocabulary))


def _token_workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    yield Sample("8x512 tokens of 30522 (BERT)", _tokens(dtype, device, 8 * 512, 30522))
    yield Sample("4x2048 tokens of 128256 (Llama 8B)", _tokens(dtype, device, 4 * 2048, 128256))


def _token_flops(relevance: Tensor, ids: Tensor, vocabulary: int) -> int:
    return relevance.numel()


EMBEDDING_RELEVANCE = KernelSpec(
    name="embedding_relevance",
    summary="sum of x c over the embedding dimension, in float32: the relevance of every token",
    source="kernels/README.md, R = a c; summed over the embedding as in Achtibat et al. 2024",
    reference=embedding_relevance,
    fake=_embedding_fake,
    supports=_embedding_supports,
    samples=_embedding_samples,
    refused=_embedding_refused,
    workloads=_embedding_workloads,
    flops=_embedding_flops,
    bound="memory",
)
TOKEN_RELEVANCE = KernelSpec(
    name="token_relevance",
    summary="the relevance of every token of a vocabulary: the sum over its places, in a fixed order",
    source="the transpose of the one-hot matrix of tokens; kernels/dialect/README.md",
    reference=token_relevance,
    fake=_token_fake,
    supports=_token_supports,
    samples=_token_samples,
    refused=_token_refused,
    workloads=_token_workloads,
    flops=_token_flops,
    bound="memory",
)
