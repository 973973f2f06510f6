"""Coefficients through linear maps: transposes that read no activation, and the epsilon ratio."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrp_compiler.kernels import strided

aten = torch.ops.aten


def conjugate(x: Tensor) -> Tensor:
    """The complex conjugate; a real ``x`` itself."""
    return x.conj() if x.is_complex() else x


def relevance_of(c: Tensor, value: Tensor) -> Tensor:
    """R = a c; of complex numbers R = Re(conj(c) a), the product of pairs of real numbers, which is real."""
    if c.is_complex() or value.is_complex():
        return c.real * value.real + c.imag * value.imag
    return c * value


def summed_over_dimensions(relevance: Tensor) -> Tensor:
    """Relevance per token from that of its embedding's dimensions, (..., D) -> (...), in float32 or wider."""
    return relevance.sum(-1, dtype=torch.promote_types(relevance.dtype, torch.float32))


def token_relevance(c: Tensor, embedding: Tensor) -> Tensor:
    """sum of a c over the dimensions of an embedding, (..., D) -> (...), summed in float32 or wider."""
    return summed_over_dimensions(relevance_of(c, embedding))


def stabilise(z: Tensor, epsilon: float) -> Tensor:
    """z + epsilon * sign(z) with sign(0) = +1 (zennit's convention, RULES.md 0.1 ST-Z); complex z: z / |z|."""
    if z.is_complex():
        return z + epsilon * torch.where(z == 0, 1, torch.sgn(z))
    if z.device.type == "cpu" and z.dtype in (torch.float32, torch.float64):
        # The same bits several times faster than where, which is not vectorised there; adding 0 makes -0 positive.
        return z + torch.copysign(z.new_full((), epsilon), z + 0.0)
    # Adding within where keeps z's dtype; where of two numbers would round epsilon to float32.
    return torch.where(z < 0, z - epsilon, z + epsilon)


def epsilon_ratio(c: Tensor, z: Tensor, epsilon: float) -> Tensor:
    """c * z / stab(z): the epsilon rule's ratio in coefficient space; ``c`` and ``z`` have one shape."""
    return c * (z / stabilise(z, epsilon))


def linear_transpose(c: Tensor, weight: Tensor) -> Tensor:
    """W^T c; ``c`` (..., out), ``weight`` (out, in) -> (..., in)."""
    return aten.matmul.default(c, conjugate(weight))  # type: ignore[no-any-return]


def matmul_left(c: Tensor, right: Tensor) -> Tensor:
    """c B^T (B^H where complex) for O = A B with equal batch dimensions."""
    return aten.matmul.default(c, conjugate(aten.transpose.int(right, -2, -1)))  # type: ignore[no-any-return]


def matmul_right(c: Tensor, left: Tensor) -> Tensor:
    """A^T c (A^H where complex) for O = A B with equal batch dimensions."""
    return aten.matmul.default(conjugate(aten.transpose.int(left, -2, -1)), c)  # type: ignore[no-any-return]


def grouped_product(x: Tensor, weight: Tensor, offs: Tensor, bias: Tensor | None = None) -> Tensor:
    """x_s W_e + b for the rows s of each group e; ``x`` (S, in), ``weight`` (E, in, out) -> (S, out), in any dtype.

    ``offs`` (E,) says where each group ends; rows behind the last belong to none. Every row reads a copy of its
    matrix, so this is for where the op that multiplies whole groups cannot go.
    """
    rows = torch.arange(x.shape[0], device=x.device, dtype=offs.dtype)
    group = torch.searchsorted(offs, rows, right=True).clamp(max=weight.shape[0] - 1)
    product: Tensor = aten.matmul.default(x.unsqueeze(1), weight[group]).squeeze(1)
    return product if bias is None else product + bias


def grouped_weights(c: Tensor, x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """x_e^T c_e of every group e: the transpose of the product by groups for its matrices, (E, in, out)."""
    # Whoever calls the op has registered this one beside it.
    made: Tensor = torch.ops.transformers.grouped_mm_fallback_backward.default(x, weight, offs, c)[1]
    return made


def grouped_weights_by_group(x: Tensor, weight: Tensor, offs: Tensor, c: Tensor) -> tuple[None, Tensor]:
    """What ``grouped_weights`` takes of the op it calls, one group after the other, which torch can differentiate."""
    rows = torch.arange(x.shape[0], device=x.device, dtype=offs.dtype)
    group = torch.searchsorted(offs, rows, right=True).unsqueeze(-1)
    return None, torch.stack([torch.where(group == e, x, 0).t() @ c for e in range(weight.shape[0])])


def convolution_transpose(
    c: Tensor,
    weight: Tensor,
    input_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    """The transpose of a convolution: ``c`` (N, C_out, ...) -> ``input_shape`` (N, C_in, ...).

    The backward op takes the input for its shape only, so memory that nobody fills stands in for it; where
    the sizes of images are known, torch's transposed convolution does without.
    """
    if weight.dtype != c.dtype:
        # Under autocast a coefficient may be wider than the weight.
        weight = weight.to(c.dtype)
    is_known = all(isinstance(size, int) for size in (*c.shape[2:], *input_shape[2:]))
    if c.device.type == "cpu" and not transposed and is_known:
        made = None
        if groups == 1 and set(dilation) == {1} and max(stride) > 1:
            made = strided.transpose(c, weight, input_shape, stride, padding)
        return strided.transposed(c, weight, input_shape, stride, padding, dilation, groups) if made is None else made
    shape_only = c.new_empty(input_shape)
    result: Any = aten.convolution_backward.default(
        c,
        shape_only,
        weight,
        None,
        stride,
        padding,
        dilation,
        transposed,
        output_padding,
        groups,
        [True, False, False],
    )
    return result[0]  # type: ignore[no-any-return]


def masked_product(c: Tensor, value: Tensor) -> Tensor:
    """R = a c, 0 where c is zero and a not finite: a masked score is -inf and still carries nothing."""
    # The value is replaced, not the product: the derivative at c is a, also where c is zero.
    return relevance_of(c, torch.where((c == 0) & ~torch.isfinite(value), 0, value))
