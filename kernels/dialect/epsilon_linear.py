"""epsilon_linear_bwd: the epsilon rule's ratio and the transpose of a linear layer in one product."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lrp_compiler.kernels.dialect.layers import LAYERS, columns_first, fits_linear, linear_operands
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


def epsilon_linear_bwd(
    c: Tensor, z: Tensor, weight: Tensor, epsilon: float, x: Tensor | None, residual: Tensor | None
) -> Tensor:
    """W^T (c z / stab(z)) + residual, all of it times x where that is given.

    ``c``, ``z`` (..., N), ``weight`` (N, K), ``x``, ``residual`` (..., K), all of one dtype; stab(z) is
    z + epsilon sign(z) with sign(0) = +1. The result is (..., K), a coefficient, or a relevance with ``x``.
    """
    made = epsilon_ratio(c, z, epsilon) @ weight
    made = made if residual is None else made + residual
    return (made if x is None else made * x).contiguous()


def _fake(c: Tensor, z: Tensor, weight: Tensor, epsilon: float, x: Tensor | None, residual: Tensor | None) -> Tensor:
    return c.new_empty((*c.shape[:-1], weight.shape[-1]))


def _supports(
    c: Tensor, z: Tensor, weight: Tensor, epsilon: float, x: Tensor | None, residual: Tensor | None
) -> Supported:
    known = all_supported((same_device(c, z, weight, x, residual), known_dtypes(c, z, weight, x, residual)))
    if not known or weight.dim() != 2 or c.dim() == 0:
        return known and Refusal(f"a linear map has a matrix, not a weight of shape {tuple(weight.shape)}")
    given = [value for value in (x, residual) if value is not None]
    return all_supported(
        (
            z.shape == c.shape or Refusal("its output and coefficient differ in shape"),
            *(fits_linear(c, value, weight) for value in given or [_fake(c, z, weight, epsilon, x, residual)]),
        )
    )


def _arguments(
    dtype: torch.dtype, device: torch.device, leading: tuple[int, ...], outputs: int, inputs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(c, z, weight, x, residual); some of z zero."""
    c, x, weight, _ = linear_operands(dtype, device, leading, inputs, outputs)
    z, residual = torch.randn_like(c), torch.randn_like(x)
    return c, z * (z.abs() > 0.1), weight, x, residual


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    c, z, weight, x, residual = _arguments(dtype, device, (3, 11), 43, 70)
    yield Sample("3x11x43->70", (c, z, weight, 0.25, None, None))
    yield Sample("relevance", (c, z, weight, 0.25, x, None))
    yield Sample("residual", (c, z, weight, 0.25, None, residual))
    yield Sample("relevance with residual, a small stabiliser", (c, z, weight, 1e-6, x, residual))
    yield Sample("no leading dimension", (c[0, 0], z[0, 0], weight, 0.25, x[0, 0], residual[0, 0]))
    c, z, weight, x, residual = _arguments(dtype, device, (5,), 34, 21)
    transposed = [columns_first(value) for value in (c, z, weight, x, residual)]
    yield Sample("transposed", (*transposed[:3], 0.25, *transposed[3:]))
    strided = (c[:, ::2], z[:, ::2], weight[::2, ::2], 0.25, x[:, ::2], residual[:, ::2])
    yield Sample("every second input and output", strided)
    yield Sample("one output for all rows", (c[:1].expand(5, 34), z, weight, 0.25, None, residual[:1].expand(5, 21)))
    yield Sample("no rows", (c[:0], z[:0], weight, 0.25, x[:0], residual[:0]))
    yield Sample("no outputs", (c[:, :0], z[:, :0], weight[:0], 0.25, x, residual))
    yield Sample("no inputs", (c, z, weight[:, :0], 0.25, x[:, :0], residual[:, :0]))


def _refused(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    c, z, weight, x, residual = _arguments(dtype, device, (3,), 5, 4)
    yield Sample("float64", (c.double(), z.double(), weight.double(), 0.25, None, None))
    yield Sample("several dtypes", (c, z.half(), weight, 0.25, None, None))
    yield Sample("a vector for a weight", (c, z, weight[0], 0.25, None, None))
    yield Sample("an output of another shape", (c, z[:2], weight, 0.25, None, None))
    yield Sample("a weight that does not fit", (c, z, weight[1:], 0.25, None, None))
    yield Sample("an input that does not fit", (c, z, weight, 0.25, x[:, 1:], None))
    yield Sample("a residual that does not fit", (c, z, weight, 0.25, x, residual[:2]))


def _workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for layer, with_residual, as_relevance in zip(LAYERS, (True, False, False), (False, False, True), strict=True):
        c, z, weight, x, residual = _arguments(dtype, device, layer.leading, layer.outputs, layer.inputs)
        rest = (x if as_relevance else None, residual if with_residual else None)
        yield Sample(f"{layer}{' residual' * with_residual}{' relevance' * as_relevance}", (c, z, weight, 1e-6, *rest))


def _flops(c: Tensor, z: Tensor, weight: Tensor, *rest: Any) -> int:
    return 2 * c.numel() * weight.shape[1]


EPSILON_LINEAR_BWD = KernelSpec(
    name="epsilon_linear_bwd",
    summary="W^T (c z / stab(z)) + residual: the epsilon rule's ratio made where the product reads it",
    source="Bach et al. 2015, eq. 58; RULES.md 3",
    reference=epsilon_linear_bwd,
    fake=_fake,
    supports=_supports,
    samples=_samples,
    refused=_refused,
    workloads=_workloads,
    flops=_flops,
    bound="compute",
)
