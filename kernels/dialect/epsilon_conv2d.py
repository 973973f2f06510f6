"""epsilon_conv2d_bwd: the epsilon rule's ratio and the transpose of a convolution."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lrp_compiler.kernels.dialect.conv2d import CASES, WORKLOADS, Case, fits, transpose
from lrp_compiler.kernels.linear import epsilon_ratio
from lrp_compiler.kernels.spec import (
    KernelSpec,
    Refusal,
    Sample,
    Supported,
    all_supported,
    known_dtypes,
    same_device,
)


def epsilon_conv2d_bwd(
    c: Tensor,
    z: Tensor,
    weight: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    epsilon: float,
    x: Tensor | None,
) -> Tensor:
    """W^T (c z / stab(z)) of ``input_size`` (N, C, H, W), times x where that is given.

    ``c``, ``z`` (N, O, OH, OW), ``weight`` (O, C / groups, KH, KW) and ``x`` have one dtype; stab(z) is
    z + epsilon sign(z) with sign(0) = +1. The result lies in memory as ``x`` does, or without it as ``c``: with
    channels last or planes last. It is a coefficient, or with ``x`` a relevance.
    """
    made = transpose(epsilon_ratio(c, z, epsilon), weight, input_size, stride, padding, dilation, groups)
    made = made.to(c.dtype)
    return _fake(c, z, weight, input_size, stride, padding, dilation, groups, epsilon, x).copy_(
        made if x is None else made * x
    )


def _fake(
    c: Tensor,
    z: Tensor,
    weight: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    epsilon: float,
    x: Tensor | None,
) -> Tensor:
    return unwritten(c, input_size, x)


def unwritten(c: Tensor, input_size: list[int], x: Tensor | None) -> Tensor:
    """The result before anything is written."""
    if x is not None:
        return torch.empty_like(x)
    layout = torch.channels_last if c.stride(1) == 1 and c.shape[1] > 1 else torch.contiguous_format
    return torch.empty(input_size, dtype=c.dtype, device=c.device, memory_format=layout)


def _supports(
    c: Tensor,
    z: Tensor,
    weight: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    epsilon: float,
    x: Tensor | None,
) -> Supported:
    return all_supported(
        (
            same_device(c, z, weight, x),
            known_dtypes(c, z, weight, x),
            z.shape == c.shape or Refusal("its output and coefficient differ in shape"),
            fits(input_size, weight, c.shape, stride, padding, dilation, groups),
            x is None or list(x.shape) == list(input_size) or Refusal("its input is not of the size asked for"),
        )
    )


def _arguments(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(c, z, weight, x); some of z zero."""
    x, weight, c, _ = case.draw(dtype, device)
    _, _, z, _ = case.draw(dtype, device)
    return c, z.mul_(z.abs() > 0.1), weight, x


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for index, case in enumerate(CASES):
        c, z, weight, x = _arguments(case, dtype, device)
        given = x if index % 2 else None
        yield Sample(case.label, (c, z, weight, list(x.shape), *case.lists, 0.25, given))
    c, z, weight, x = _arguments(CASES[1], dtype, device)
    rest = (list(x.shape), *CASES[1].lists, 1e-6)
    yield Sample("channels last, a small stabiliser", (c, z, weight, *rest, None))
    yield Sample("layouts that differ", (c.contiguous(), z, weight.contiguous(), *rest, x.contiguous()))


def _refused(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    case = CASES[3]
    c, z, weight, x = _arguments(case, dtype, device)
    rest = (*case.lists, 0.25)
    size = list(x.shape)
    yield Sample("float64", (c.double(), z.double(), weight.double(), size, *rest, None))
    yield Sample("another output", (c, z[:, 1:], weight, size, *rest, None))
    yield Sample("a size that does not fit", (c, z, weight, [*size[:3], size[3] + 1], *rest, None))
    yield Sample("another input", (c, z, weight, size, *rest, x[:, 1:]))
    yield Sample("no batch", (c[0], z[0], weight, size[1:], *rest, None))


def _workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for case in WORKLOADS:
        c, z, weight, x = _arguments(case, dtype, device)
        yield Sample(case.label, (c, z, weight, list(x.shape), *case.lists, 0.25, None))


def _flops(c: Tensor, z: Tensor, weight: Tensor, *rest: Any) -> int:
    return 2 * c.numel() * weight[:1].numel()


EPSILON_CONV2D_BWD = KernelSpec(
    name="epsilon_conv2d_bwd",
    summary="W^T (c z / stab(z)), times x where asked: the epsilon rule through conv2d",
    source="Bach et al. 2015, eq. 58; RULES.md 1.1",
    reference=epsilon_conv2d_bwd,
    fake=_fake,
    supports=_supports,
    samples=_samples,
    refused=_refused,
    workloads=_workloads,
    flops=_flops,
    bound="compute",
)
