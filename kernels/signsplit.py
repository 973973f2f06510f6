"""Sign-split rules (gamma, alpha-beta, z+) of a linear map from one extra forward product (RULES.md section 3).

With z0 = W x, u = |W| |x| and the parts P = (u + z0) / 2 >= 0, N = (z0 - u) / 2 <= 0 of what adds up to z0, every such
rule is c_x = W^T v1 + sign(x) |W|^T v2. The functions here give (v1, v2) of the shape of z from the relevance R of z.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrp_compiler.kernels.linear import stabilise

VANISHING = 16
"""A part that is smaller than this many rounding errors of u is noise: no term of that sign exists."""


def share(relevance: Tensor, part: Tensor, u: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """R / stab(part + bias), nothing where the part is the rounding error of its two halves.

    Without the guard an output with no term of one sign would divide by the stabiliser alone.
    """
    vanishes = part.abs() <= VANISHING * torch.finfo(u.dtype).eps * u
    return torch.where(vanishes, 0, relevance / stabilise(part + bias, epsilon))


def z_plus(relevance: Tensor, z0: Tensor, u: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """v1 = v2 = R / (2 stab(P + b+)); zennit's ZPlus, alpha 1 and beta 0 with signed x."""
    half = share(relevance, (u + z0) / 2, u, bias.clamp(min=0), epsilon) / 2
    return half, half


def alpha_beta(
    relevance: Tensor, z0: Tensor, u: Tensor, bias: Tensor, alpha: float, beta: float, epsilon: float
) -> tuple[Tensor, Tensor]:
    """v1 = (alpha s_p - beta s_n) / 2, v2 = (alpha s_p + beta s_n) / 2 with s_p, s_n the ratios to either part."""
    positive = alpha * share(relevance, (u + z0) / 2, u, bias.clamp(min=0), epsilon)
    negative = beta * share(relevance, (z0 - u) / 2, u, bias.clamp(max=0), epsilon)
    return (positive - negative) / 2, (positive + negative) / 2


def gamma(
    relevance: Tensor, z: Tensor, z0: Tensor, u: Tensor, bias: Tensor, gamma: float, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The generalised gamma rule: parts of the sign of z are favoured by gamma; R is dropped where z is zero."""
    favoured = gamma_share(relevance, z, z0, u, bias, gamma, epsilon)
    return (1 + gamma / 2) * favoured, (gamma / 2) * torch.sign(z) * favoured


def gamma_share(
    relevance: Tensor, z: Tensor, z0: Tensor, u: Tensor, bias: Tensor, gamma: float, epsilon: float
) -> Tensor:
    """R / stab(z + gamma times the part of z that has its sign), 0 where z is zero."""
    signed_bias = torch.where(z > 0, bias.clamp(min=0), bias.clamp(max=0))
    favoured = (1 + gamma / 2) * z0 + torch.sign(z) * (gamma / 2) * u + bias + gamma * signed_bias
    return torch.where(z == 0, 0, relevance / stabilise(favoured, epsilon))
