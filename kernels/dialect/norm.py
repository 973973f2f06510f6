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


def norm_bwd(
    c: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    residual: Tensor | None,
    centred: bool,
    groups: int,
    divides: bool = False,
) -> Tensor:
    """residual + scale (w c - mean(w c)); without ``centred`` no mean is taken (RMSNorm).

    ``c`` (rows, size), ``scale`` (rows,) in float32 or the dtype of ``c``: one over the deviation, or with ``divides``
    the deviation itself; ``residual`` like ``c``. With ``groups`` 0 ``weight`` is (size,); otherwise (C,), and row r
    holds the channels r % groups * C / groups onwards, each size * groups / C elements long (GroupNorm). The result is
    contiguous. Ali et al. 2022, LN-rule.
    """
    weighted = c if weight is None else c * _spread(weight, c, groups)
    if centred:
        weighted = weighted - weighted.mean(-1, keepdim=True)
    deviation = scale.unsqueeze(-1)
    made = (weighted / deviation if divides else weighted * deviation).to(c.dtype)
    return (made if residual is None else residual + made).contiguous()


def _spread(weight: Tensor, c: Tensor, groups: int) -> Tensor:
    """The weight of every element of ``c``."""
    if not groups:
        return weight
    per_group = weight.view(groups, -1).repeat_interleave(c.shape[1] * groups // weight.shape[0], 1)
    return per_group.repeat(c.shape[0] // groups, 1)


def _fake(
    c: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    residual: Tensor | None,
    centred: bool,
    groups: int,
    divides: bool = False,
) -> Tensor:
    return contiguous_like(c)


def _supports(
    c: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    residual: Tensor | None,
    centred: bool,
    groups: int,
    divides: bool = False,
) -> Supported:
    return all_supported(
        (
            same_device(c, weight, scale, residual),
            known_dtypes(c, weight, residual),
            scale.dtype in (c.dtype, torch.float32) or Refusal(f"its deviation is of {scale.dtype}"),
        )
    )


def _arguments(
    dtype: torch.dtype, device: torch.device, rows: int, size: int, *, centred: bool, groups: int = 0, channels: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool, int]:
    c, residual = (torch.randn(rows, size, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(channels if groups else size, device=device).to(dtype)
    scale = torch.rand(rows, device=device) + 0.5
    return c, weight, scale, residual, centred, groups


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for (rows, size), centred in itertools.product([(5, 63), (33, 1), (2, 130), (1, 2049)], (True, False)):
        c, weight, scale, residual, *rest = _arguments(dtype, device, rows, size, centred=centred)
        yield Sample(f"{rows}x{size} centred={centred}", (c, weight, scale, None, *rest))
        yield Sample(f"{rows}x{size} centred={centred} residual", (c, weight, scale, residual, *rest))
    for channels, elements in ((8, 5), (12, 1)):
        grouped = _arguments(dtype, device, 4, channels // 2 * elements, centred=True, groups=2, channels=channels)
        yield Sample(f"2 groups of {channels // 2}x{elements}", grouped)
    yield Sample("1x16600", _arguments(dtype, device, 1, 16600, centred=True))
    c, weight, scale, residual, *rest = _arguments(dtype, device, 9, 32, centred=True)
    yield Sample("no weight, 16-bit deviation", (c, None, scale.to(dtype), residual, *rest))
    yield Sample("divides", (c, weight, scale, residual, *rest, True))
    yield Sample("columns of a wider tensor", (c[:, 3:20], weight[3:20], scale, residual[:, 3:20], *rest))
    yield Sample("transposed", (c[:, :9].t(), weight[:9], scale, residual[:, :9].t(), *rest))
    every_other = torch.cat([scale, scale]).to(dtype)[::2]
    yield Sample("every other weight", (c[:, ::2], weight[::2], every_other, residual[:, ::2], *rest))
    yield Sample("no rows", (c[:0], weight, scale[:0], residual[:0], *rest))
    yield Sample("no columns", (c[:, :0], weight[:0], scale, residual[:, :0], *rest))


def _refused(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    c, weight, scale, residual, *rest = _arguments(torch.float64, device, 2, 4, centred=True)
    yield Sample("float64", (c, weight, scale, residual, *rest))
    yield Sample("several dtypes", (c.float(), weight.bfloat16(), scale, residual.float(), *rest))
    yield Sample("float64 deviation", (c.float(), weight.float(), scale.double(), residual.float(), *rest))


def _workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    yield Sample("LayerNorm 8x197x768 (ViT-B/16)", _arguments(dtype, device, 8 * 197, 768, centred=True))
    yield Sample("RMSNorm 4x2048x4096 (Llama 8B)", _arguments(dtype, device, 4 * 2048, 4096, centred=False))
    yield Sample("RMSNorm 2048x16384 (Llama 405B)", _arguments(dtype, device, 2048, 16384, centred=False))
    yield Sample("LayerNorm 2048x12288 (GPT-3)", _arguments(dtype, device, 2048, 12288, centred=True))
    for batch in (8, 16):
        unet = _arguments(dtype, device, batch * 32, 10 * 64 * 64, centred=True, groups=32, channels=320)
        yield Sample(f"GroupNorm {batch}x320x64x64 (U-Net)", unet)
    image = _arguments(dtype, device, 32, 4 * 512 * 512, centred=True, groups=32, channels=128)
    yield Sample("GroupNorm 1x128x512x512 (VAE)", image)


def _flops(c: Tensor, *rest: object) -> int:
    return 5 * c.numel()


NORM_BWD = KernelSpec(
    name="norm_bwd",
    summary="residual + scale (w c - mean(w c)): the transpose of LayerNorm, RMSNorm or GroupNorm",
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
