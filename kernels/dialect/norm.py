"""norm_bwd: coefficients through LayerNorm, RMSNorm and GroupNorm with the statistics held constant (LN-rule)."""

from __future__ import annotations

import itertools
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

LARGEST_ROW = 65536
"""Elements of a row that one program holds in registers."""


def norm_bwd(
    c: Tensor, weight: Tensor | None, rstd: Tensor, residual: Tensor | None, centred: bool, groups: int
) -> Tensor:
    """residual + rstd (w c - mean(w c)); without ``centred`` no mean is taken (RMSNorm).

    ``c`` (rows, size), ``rstd`` (rows,) in float32 or the dtype of ``c``, ``residual`` like ``c``. With ``groups`` 0
    ``weight`` is (size,); otherwise (C,), and row r holds the channels r % groups * C / groups onwards, each
    size * groups / C elements long (GroupNorm).
    """
    weighted = c if weight is None else c * _spread(weight, c, groups)
    if centred:
        weighted = weighted - weighted.mean(-1, keepdim=True)
    made = (weighted * rstd.unsqueeze(-1)).to(c.dtype)
    return made.contiguous() if residual is None else residual + made


def _spread(weight: Tensor, c: Tensor, groups: int) -> Tensor:
    """The weight of every element of ``c``."""
    if not groups:
        return weight
    per_group = weight.view(groups, -1).repeat_interleave(c.shape[1] * groups // weight.shape[0], 1)
    return per_group.repeat(c.shape[0] // groups, 1)


def _fake(
    c: Tensor, weight: Tensor | None, rstd: Tensor, residual: Tensor | None, centred: bool, groups: int
) -> Tensor:
    return contiguous_like(c)


def _supports(
    c: Tensor, weight: Tensor | None, rstd: Tensor, residual: Tensor | None, centred: bool, groups: int
) -> Supported:
    fits = c.shape[1] <= LARGEST_ROW
    return all_supported(
        (
            same_device(c, weight, rstd, residual),
            known_dtypes(c, weight, residual),
            rstd.dtype in (c.dtype, torch.float32) or Refusal(f"its deviation is of {rstd.dtype}"),
            fits or Refusal(f"a row of {c.shape[1]} elements does not fit in registers (at most {LARGEST_ROW})"),
        )
    )


def _arguments(
    dtype: torch.dtype, device: torch.device, rows: int, size: int, *, centred: bool, groups: int = 0, channels: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool, int]:
    c, residual = (torch.randn(rows, size, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(channels if groups else size, device=device).to(dtype)
    rstd = torch.rand(rows, device=device) + 0.5
    return c, weight, rstd, residual, centred, groups


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for (rows, size), centred in itertools.product([(5, 63), (3, 1), (2, 130), (1, 2049)], (True, False)):
        c, weight, rstd, residual, *rest = _arguments(dtype, device, rows, size, centred=centred)
        yield Sample(f"{rows}x{size} centred={centred}", (c, weight, rstd, None, *rest))
        yield Sample(f"{rows}x{size} centred={centred} residual", (c, weight, rstd, residual, *rest))
    grouped = _arguments(dtype, device, 6, 4 * 5, centred=True, groups=2, channels=8)
    yield Sample("groups", grouped)
    c, weight, rstd, residual, *rest = _arguments(dtype, device, 9, 32, centred=True)
    yield Sample("no weight, 16-bit deviation", (c, None, rstd.to(dtype), residual, *rest))
    yield Sample("columns of a wider tensor", (c[:, 3:20], weight[3:20], rstd, residual[:, 3:20], *rest))
    yield Sample("transposed", (c[:, :9].t(), weight[:9], rstd, residual[:, :9].t(), *rest))
    yield Sample("no rows", (c[:0], weight, rstd[:0], residual[:0], *rest))
    yield Sample("no columns", (c[:, :0], weight[:0], rstd, residual[:, :0], *rest))


def _refused(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    c, weight, rstd, residual, *rest = _arguments(dtype, torch.device("meta"), 2, LARGEST_ROW + 1, centred=True)
    yield Sample("a row too long", (c, weight, rstd, residual, *rest))
    c, weight, rstd, residual, *rest = _arguments(torch.float64, device, 2, 4, centred=True)
    yield Sample("float64", (c, weight, rstd, residual, *rest))


def _workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    yield Sample("LayerNorm 8x197x768 (ViT-B/16)", _arguments(dtype, device, 8 * 197, 768, centred=True))
    yield Sample("RMSNorm 4x2048x4096 (Llama 8B)", _arguments(dtype, device, 4 * 2048, 4096, centred=False))
    unet = _arguments(dtype, device, 8 * 32, 10 * 64 * 64, centred=True, groups=32, channels=320)
    yield Sample("GroupNorm 8x320x64x64 (U-Net)", unet)


def _flops(c: Tensor, *rest: object) -> int:
    return 5 * c.numel()


NORM_BWD = KernelSpec(
    name="norm_bwd",
    summary="residual + rstd (w c - mean(w c)): the transpose of LayerNorm, RMSNorm or GroupNorm",
    source="Ali et al. 2022, LN-rule; RULES.md 1.6",
    reference=norm_bwd,
    fake=_fake,
    supports=_supports,
    samples=_samples,
    refused=_refused,
    workloads=_workloads,
    flops=_flops,
    bound="memory",
)
