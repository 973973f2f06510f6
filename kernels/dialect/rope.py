"""rope_bwd: coefficients through rotary embeddings, the transpose of x -> x cos + rotated(x) sin."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lrp_compiler.kernels.spec import KernelSpec, Refusal, Sample, Supported, all_supported, known_dtypes, same_device


def rope_bwd(c: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """c cos + rotated^T(c sin): (c1 cos1 + c2 sin2, c2 cos2 - c1 sin1) of every pair that is turned.

    ``c`` (batch, heads, tokens, D); ``cos`` and ``sin`` broadcast to its first R columns, R even, in float32 or the
    dtype of ``c``. Columns j and j + R/2 are a pair, with ``interleaved`` 2 j and 2 j + 1; columns from R onwards pass
    as they are. Angles of a pair's two columns need not agree. The result's dimensions lie in memory in the order of
    those of ``c``. Su et al. 2021, eq. 34; a rotation is linear, so the plain rule applies (RULES.md 1.1).
    """
    turned = cos.shape[-1]
    head, tail = c[..., :turned], c[..., turned:]
    by_sin = head * sin
    if interleaved:
        moved = torch.stack([by_sin[..., 1::2], -by_sin[..., ::2]], -1).flatten(-2)
    else:
        first, second = by_sin.chunk(2, -1)
        moved = torch.cat([second, -first], -1)
    made = torch.cat([(head * cos + moved).to(c.dtype), tail], -1)
    order = memory_order(c)
    return made.permute(order).contiguous().permute([order.index(dim) for dim in range(c.dim())])


def memory_order(value: Tensor) -> list[int]:
    """The dimensions from the widest stride to the smallest."""
    return sorted(range(value.dim()), key=value.stride, reverse=True)


def ordered_like(value: Tensor) -> Tensor:
    """A new dense tensor whose dimensions lie in memory in the order of those of ``value``."""
    return torch.empty_permuted(value.shape, memory_order(value), dtype=value.dtype, device=value.device)


def _fake(c: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return ordered_like(c)


def _supports(c: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Supported:
    turned = cos.shape[-1] if cos.dim() else 1
    fits = turned % 2 == 0 and c.dim() == 4 and turned <= c.shape[-1]
    checks: list[Supported] = [
        same_device(c, cos, sin),
        known_dtypes(c),
        (cos.dtype == sin.dtype and cos.dtype in (c.dtype, torch.float32)) or Refusal(f"its angles are of {cos.dtype}"),
        c.dim() == 4 or Refusal(f"it takes (batch, heads, tokens, D), not {c.dim()} dimensions"),
        fits or Refusal(f"{turned} columns cannot be turned in pairs among {c.shape[-1]}"),
        sin.shape == cos.shape or Refusal("its cosines and sines have several shapes"),
    ]
    refused = all_supported(checks)
    return _broadcasts(c, cos) if refused else refused


def _broadcasts(c: Tensor, cos: Tensor) -> Supported:
    goal = (*c.shape[:3], cos.shape[-1])
    sizes = (*[1] * (4 - cos.dim()), *cos.shape)
    fits = len(sizes) == 4 and all(size in (1, wanted) for size, wanted in zip(sizes, goal, strict=True))
    return fits or Refusal(f"angles {tuple(cos.shape)} do not spread over {tuple(c.shape)}")


def _arguments(
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, int, int, int],
    turned: int,
    angles: torch.dtype | None = None,
    batch: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    c = torch.randn(shape, device=device).to(dtype)
    angle = torch.rand(batch, 1, shape[2], turned, device=device) * 6
    return c, angle.cos().to(angles or dtype), angle.sin().to(angles or dtype)


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for interleaved in (False, True):
        for turned in (70, 22, 2):
            arguments = _arguments(dtype, device, (2, 2, 19, 70), turned)
            yield Sample(f"{turned} of 70 interleaved={interleaved}", (*arguments, interleaved))
        c, cos, sin = _arguments(dtype, device, (2, 2, 17, 24), 24, torch.float32, 2)
        by_token = c.transpose(1, 2).contiguous().transpose(1, 2)
        yield Sample(f"by token, float32 angles interleaved={interleaved}", (by_token, cos, sin, interleaved))
        c, cos, sin = _arguments(dtype, device, (1, 2, 5, 2 * 22), 14)
        spaced = c[..., ::2], cos[0, 0], sin.mT.contiguous().mT[0, 0]
        yield Sample(f"every other column interleaved={interleaved}", (*spaced, interleaved))
    c, cos, sin = _arguments(dtype, device, (2, 3, 4, 8), 8)
    yield Sample("no tokens", (c[:, :, :0], cos[:, :, :0], sin[:, :, :0], False))
    yield Sample("nothing turned", (c, cos[..., :0], sin[..., :0], False))


def _refused(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    c, cos, sin = _arguments(dtype, device, (2, 3, 4, 8), 8)
    yield Sample("float64", (c.double(), cos.double(), sin.double(), False))
    yield Sample("float64 angles", (c, cos.double(), sin.double(), False))
    yield Sample("an odd number of columns", (c, cos[..., :5], sin[..., :5], False))
    yield Sample("more angles than columns", (c[..., :6], cos, sin, False))
    yield Sample("three dimensions", (c[0], cos, sin, False))
    yield Sample("several shapes", (c, cos, sin[..., :4], False))
    yield Sample("angles of other tokens", (c[:, :, :3], cos, sin, False))


def _workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    c, cos, sin = _arguments(dtype, device, (1, 32, 4096, 128), 128)
    yield Sample("1x32x4096x128 (Llama 8B)", (c, cos, sin, False))
    c, cos, sin = _arguments(dtype, device, (1, 4096, 32, 128), 128)
    angles = cos.new_empty(1, 1, 4096, 128), sin.new_empty(1, 1, 4096, 128)
    yield Sample("1x32x4096x128 by token (Llama 8B)", (c.transpose(1, 2), *angles, False))
    yield Sample("1x16x2048x256, 64 turned (GPT-J)", (*_arguments(dtype, device, (1, 16, 2048, 256), 64), True))
    yield Sample("1x32x2048x80, 32 turned (Phi-2)", (*_arguments(dtype, device, (1, 32, 2048, 80), 32), False))


def _flops(c: Tensor, cos: Tensor, *rest: object) -> int:
    return 3 * c.numel() // c.shape[-1] * cos.shape[-1]


ROPE_BWD = KernelSpec(
    name="rope_bwd",
    summary="c cos + rotated^T(c sin): the transpose of rotary embeddings, by halves or interleaved, also partial",
    source="Su et al. 2021 (RoFormer), eq. 34; RULES.md 1.1",
    reference=rope_bwd,
    fake=_fake,
    supports=_supports,
    samples=_samples,
    refused=_refused,
    workloads=_workloads,
    flops=_flops,
    bound="memory",
)
