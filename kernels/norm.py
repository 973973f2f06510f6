"""Coefficients through normalisation layers with the statistics held constant (LN-rule, Ali et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from lrp_compiler.kernels.linear import masked_product


def _channels(parameter: Tensor, like: Tensor) -> Tensor:
    """A (C,) parameter shaped to multiply an (N, C, ...) tensor."""
    return parameter.view([-1 if dim == 1 else 1 for dim in range(like.dim())])


def layer_norm_transpose(c: Tensor, weight: Tensor | None, rstd: Tensor, normalised_dims: int) -> Tensor:
    """rstd * (w c - mean(w c)); ``c`` of the input's shape, ``rstd`` with the normalised dimensions of size 1."""
    weighted = c if weight is None else c * weight
    mean = weighted.mean(list(range(-normalised_dims, 0)), keepdim=True)
    return (weighted - mean) * rstd


def group_norm_transpose(c: Tensor, weight: Tensor | None, rstd: Tensor, groups: int) -> Tensor:
    """As layer_norm_transpose over each group; ``c`` (N, C, ...), ``rstd`` (N, groups)."""
    weighted = c if weight is None else c * _channels(weight, c)
    grouped = weighted.reshape(c.shape[0], groups, -1)
    centred = (grouped - grouped.mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
    return centred.reshape(c.shape)


def rms_norm_transpose(c: Tensor, scale: Tensor, divides: bool, dtype: torch.dtype) -> Tensor:
    """c / rms(x) as ``dtype``: the weight is an op of its own.

    ``scale`` broadcasts against ``c``; it is 1 / rms(x), or where the norm ``divides`` by it, rms(x).
    """
    made = c / scale if divides else c * scale
    return made if made.dtype == dtype else made.to(dtype)


def centred_norm_transpose(
    c: Tensor, scale: Tensor, divides: bool, dtype: torch.dtype, dims: tuple[int, ...]
) -> Tensor:
    """(c - mean(c)) / std over ``dims``: layer norm without its weight; the rest as in rms_norm_transpose."""
    return rms_norm_transpose(c - c.mean(dims, keepdim=True), scale, divides, dtype)


def batch_norm_scale(weight: Tensor | None, rstd: Tensor) -> Tensor:
    """The factor (C,) by which batch normalisation multiplies a channel."""
    return rstd if weight is None else weight * rstd


def batch_norm_transpose(c: Tensor, weight: Tensor | None, rstd: Tensor) -> Tensor:
    """c * w * rstd per channel; ``c`` (N, C, ...), ``rstd`` (C,)."""
    return c * _channels(batch_norm_scale(weight, rstd), c)


def reciprocal_std(variance: Tensor, eps: float) -> Tensor:
    """1 / sqrt(variance + eps)."""
    return torch.rsqrt(variance + eps)


def batch_norm_offset(c: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor) -> Tensor:
    """c * (b - mean w rstd): what batch normalisation adds, as a sink of the shape of ``c``."""
    offset = -mean * batch_norm_scale(weight, rstd)
    return c * _channels(offset if bias is None else offset + bias, c)


def bias_share(c: Tensor, bias: Tensor) -> Tensor:
    """b c with ``b`` broadcast from the last dimensions; an additive mask of -inf takes nothing."""
    return masked_product(c, bias)


def channel_bias_share(c: Tensor, bias: Tensor, spatial_dims: int) -> Tensor:
    """c * b with ``b`` (C,) along the dimension before the last ``spatial_dims``."""
    return masked_product(c, bias.view([-1] + [1] * spatial_dims))
