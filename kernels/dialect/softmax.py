"""softmax_bwd: coefficients through softmax over the last dimension, by its own derivative (AttnLRP)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from lrp_compiler.kernels.softmax import softmax_transpose
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
from lrp_compiler.kernels.strides import walkable


def softmax_bwd(c: Tensor, s: Tensor, residual: Tensor | None) -> Tensor:
    """residual + s (c - sum(s c)) over the last dimension; nan in ``s``, a row of -inf alone, counts as 0.

    ``c``, ``s`` (..., size) and ``residual`` of one shape and dtype; the result is contiguous. Achtibat et al. 2024,
    proposition 3.1.
    """
    made = softmax_transpose(c, s, -1)
    return (made if residual is None else residual + made).contiguous()


def _fake(c: Tensor, s: Tensor, residual: Tensor | None) -> Tensor:
    return contiguous_like(c)


def _supports(c: Tensor, s: Tensor, residual: Tensor | None) -> Supported:
    given = [one for one in (c, s, residual) if one is not None]
    one_shape = all(one.shape == c.shape for one in given)
    checks: list[Supported] = [
        same_device(*given),
        known_dtypes(*given),
        c.dim() > 0 or Refusal("it has no dimension to sum over"),
        one_shape or Refusal(f"its operands have several shapes: {[tuple(one.shape) for one in given]}"),
    ]
    refused = all_supported(checks)
    return walkable(c.shape, given, rowwise=True) if refused else refused


def _arguments(dtype: torch.dtype, device: torch.device, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    c, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return c, torch.randn(shape, device=device).softmax(-1).to(dtype), residual


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for rows, size in itertools.product((1, 37), (1, 33, 130)):
        c, s, residual = _arguments(dtype, device, rows, size)
        yield Sample(f"{rows}x{size}", (c, s, None))
        yield Sample(f"{rows}x{size} residual", (c, s, residual))
    yield Sample("1x16700", _arguments(dtype, device, 1, 16700))
    c, s, residual = _arguments(dtype, device, 2, 5, 3, 24)
    masked = s.masked_fill(torch.arange(5, device=device)[:, None, None] == 2, float("nan"))
    yield Sample("a row of nan", (c, masked, None))
    yield Sample("heads and tokens transposed", (c.transpose(1, 2), s.transpose(1, 2), residual.transpose(1, 2)))
    yield Sample("other strides each", (c.transpose(0, 2), s.movedim(0, 2).transpose(0, 1), None))
    yield Sample("every other column", (c[..., ::2], s[..., 1::2], residual[..., ::2]))
    yield Sample("one coefficient for all", (c[:, :1, :1, :1].expand(2, 5, 3, 24), s, residual))
    yield Sample("a vector", (c[0, 0, 0], s[0, 0, 0], None))
    yield Sample("no rows", (c[:0], s[:0], residual[:0]))
    yield Sample("no columns", (c[..., :0], s[..., :0], residual[..., :0]))


def _refused(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    c, s, _ = _arguments(dtype, device, 2, 3)
    yield Sample("float64", (c.double(), s.double(), None))
    yield Sample("several dtypes", (c.bfloat16(), s.float(), None))
    yield Sample("several shapes", (c, s[:1], None))
    yield Sample("a number", (c[0, 0], s[0, 0], None))
    wide = torch.empty((3,) * 12, device="meta", dtype=dtype)[::2, :, ::2, :, ::2, :, ::2, :, ::2, :, ::2]
    yield Sample("too many strides", (wide, wide, None))


def _workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    c, s, _ = _arguments(dtype, device, 8, 12, 1024, 1024)
    yield Sample("8x12x1024x1024 (GPT-2)", (c, s, None))
    c, s, residual = _arguments(dtype, device, 8, 12, 197, 197)
    yield Sample("8x12x197x197 residual (ViT-B/16)", (c, s, residual))
    yield Sample("1x8x1024x16384 residual", _arguments(dtype, device, 1, 8, 1024, 16384))
    c, s, _ = _arguments(dtype, device, 2048, 32000)
    yield Sample("2048x32000 (vocabulary of Llama 2)", (c, s, None))


def _flops(c: Tensor, *rest: object) -> int:
    return 4 * c.numel()


SOFTMAX_BWD = KernelSpec(
    name="softmax_bwd",
    summary="residual + s (c - sum(s c)): the transpose of softmax's derivative",
    source="Achtibat et al. 2024 (AttnLRP), proposition 3.1; RULES.md 1.7",
    reference=softmax_bwd,
    fake=_fake,
    supports=_supports,
    samples=_samples,
    refused=_refused,
    workloads=_workloads,
    flops=_flops,
    bound="memory",
)
