"""What sign-split and epsilon kernels compute per output, in float32: kernels/signsplit.py's shares on tiles.

The pairs that are stored make both right-hand sides of the transpose by changes of sign alone, so that 16-bit products
of them cancel exactly: (ratio, ratio) for z+, (ratio - aside, ratio + aside) for alpha-beta, and for gamma
((1 + gamma / 2) ratio, (gamma / 2) sign(z) ratio), the factors put on after the sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lrp_compiler.kernels.signsplit import VANISHING
from lrp_compiler.kernels.triton_dialect.products import nearest

NOISE = tl.constexpr(VANISHING * torch.finfo(torch.float32).eps)


@triton.jit
def stabilise(z, epsilon):
    """z + epsilon sign(z) with sign(0) = +1."""
    return tl.where(z < 0, z - epsilon, z + epsilon)


@triton.jit
def share(relevance, part, u, bias, epsilon):
    """R / stab(part + bias), 0 where the part is the rounding error of its two halves."""
    vanishes = tl.abs(part) <= u * NOISE
    return tl.where(vanishes, 0.0, relevance / tl.where(vanishes, 1.0, stabilise(part + bias, epsilon)))


@triton.jit
def z_plus_ratio(relevance, z0, u, bias, epsilon):
    """R / (2 stab(P + b+)) with P = (u + z0) / 2."""
    return share(relevance, (u + z0) * 0.5, u, tl.where(bias > 0, bias, 0.0), epsilon) * 0.5


@triton.jit
def alpha_beta_ratios(relevance, z0, u, bias, alpha, beta, epsilon):
    """(alpha R / (2 stab(P + b+)), beta R / (2 stab(N + b-))) with N = (z0 - u) / 2."""
    negative = share(relevance, (z0 - u) * 0.5, u, tl.where(bias < 0, bias, 0.0), epsilon)
    return alpha * z_plus_ratio(relevance, z0, u, bias, epsilon), beta * negative * 0.5


@triton.jit
def gamma_ratio(relevance, z, z0, u, bias, gamma, epsilon):
    """R / stab(D), 0 where z is, with D = (1 + gamma/2) z0 + sign(z) (gamma/2) u + b + gamma b of z's sign."""
    half = gamma * 0.5
    signed_bias = tl.where((bias > 0) == (z > 0), bias, 0.0)
    favoured = (1 + half) * z0 + tl.where(z < 0, -half, half) * u + bias + gamma * signed_bias
    return tl.where(z == 0, 0.0, relevance / tl.where(z == 0, 1.0, stabilise(favoured, epsilon)))


@triton.jit
def epsilon_ratio(c, z, epsilon):
    """c z / stab(z)."""
    return c * (z / stabilise(z, epsilon))


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """``value`` in ``dtype``; what is finite stays finite in float16, lest inf - inf blot out a whole row."""
    if dtype == tl.float16:
        within = tl.clamp(value, -65504.0, 65504.0)
        value = tl.where(tl.abs(value) < float("inf"), within, value)
    return nearest(value, dtype)


@triton.jit
def packed(flags, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A (ROWS, COLUMNS) tile of flags as (ROWS, COLUMNS / 8) bytes: bit b of byte j is column 8 j + b."""
    grouped = tl.reshape(flags.to(tl.int32), (ROWS, COLUMNS // 8, 8))
    return tl.sum(grouped << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)


@triton.jit
def unpacked(given, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The (ROWS, COLUMNS) flags in the (ROWS, COLUMNS / 8) bytes of ``packed``."""
    bits = (given.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, COLUMNS)) != 0
