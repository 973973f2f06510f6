"""Functions in float32: with EXACT to about one rounding on every backend, else as fast as 16-bit results allow.

Triton's own functions are approximations on some backends. Range reductions and polynomials are those of the Cephes
library (Moshier 1992), the tail of erfc is that of Numerical Recipes (Press et al. 1992, 6.2).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp(x, EXACT: tl.constexpr):
    """e^x."""
    return exact_exp(x) if EXACT else tl.exp(x)


@triton.jit
def exact_exp(x):
    """e^x = 2^n e^r with |r| <= log(2) / 2."""
    largest: tl.constexpr = 88.72283
    bounded = tl.where(x > -110.0, tl.where(x < largest, x, largest), -110.0)
    power = tl.floor(bounded * 1.44269504088896341 + 0.5)
    r = (bounded - power * 0.693359375) + power * 2.12194440e-4
    series = 1.9875691500e-4 * r + 1.3981999507e-3
    series = (series * r + 8.3334519073e-3) * r + 4.1665795894e-2
    series = (series * r + 1.6666665459e-1) * r + 5.0000001201e-1
    # 2^n alone may pass float32's range where the product does not.
    half = tl.floor(power * 0.5)
    made = (series * r * r + r + 1.0) * tl.exp2(half) * tl.exp2(power - half)
    return tl.where(x <= largest, made, tl.where(x == x, float("inf"), x))


@triton.jit
def log(x, EXACT: tl.constexpr):
    """log(x)."""
    return exact_log(x) if EXACT else tl.log(x)


@triton.jit
def exact_log(x):
    """log(2^n m) = n log(2) + log(m) with m in [sqrt(1/2), sqrt(2))."""
    tiny = x < 1.17549435e-38
    bits = tl.where(tiny, x * 8388608.0, x).to(tl.int32, bitcast=True)
    power = ((bits >> 23) & 0xFF).to(tl.float32) - tl.where(tiny, 149.0, 126.0)
    m = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    low = m < 0.707106781186547524
    power -= tl.where(low, 1.0, 0.0)
    f = tl.where(low, m + m - 1.0, m - 1.0)
    series = 7.0376836292e-2 * f - 1.1514610310e-1
    series = (series * f + 1.1676998740e-1) * f - 1.2420140846e-1
    series = (series * f + 1.4249322787e-1) * f - 1.6668057665e-1
    series = (series * f + 2.0000714765e-1) * f - 2.4999993993e-1
    series = series * f + 3.3333331174e-1
    square = f * f
    made = f + (series * f * square - power * 2.12194440e-4 - 0.5 * square) + power * 0.693359375
    made = tl.where(x < float("inf"), made, x)
    return tl.where(x > 0, made, tl.where(x == 0, float("-inf"), float("nan")))


@triton.jit
def divide(x, y, EXACT: tl.constexpr):
    """x / y."""
    return tl.div_rn(x, y) if EXACT else x / y


@triton.jit
def sigmoid(x, EXACT: tl.constexpr):
    """1 / (1 + e^-x)."""
    return divide(1.0, 1.0 + exp(-x, EXACT), EXACT)


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """tanh(x), near zero by its series."""
    near = tl.where(tl.abs(x) < 0.625, x, 0.0)
    square = near * near
    series = (-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2
    series = (series * square + 1.33314422036e-1) * square - 3.33332819422e-1
    size = 1.0 - divide(2.0, exp(2.0 * tl.abs(x), EXACT) + 1.0, EXACT)
    return tl.where(tl.abs(x) < 0.625, near + near * square * series, tl.where(x < 0, -size, size))


@triton.jit
def erfc(x, EXACT: tl.constexpr):
    """1 - erf(x), without the cancellation for large x."""
    far = tl.minimum(tl.maximum(x, 0.5) if EXACT else tl.abs(x), 20.0)
    t = divide(1.0, 1.0 + 0.5 * far, EXACT)
    series = (0.17087277 * t - 0.82215223) * t + 1.48851587
    series = ((series * t - 1.13520398) * t + 0.27886807) * t - 0.18628806
    series = ((series * t + 0.09678418) * t + 0.37409196) * t + 1.00002368
    tail = t * exp(series * t - 1.26551223 - far * far, EXACT)
    made = tl.where(x > 0.7, tail, 1.0 - tl.erf(x)) if EXACT else tl.where(x < 0, 2.0 - tail, tail)
    return tl.where(x == x, made, x)
