"""Gate functions: activations written as f(x) = x * g(x), so that the identity rule is c_x = c_y * g(x).

No division: g is the closed form of f(x)/x with its limit at zero (RULES.md 1.5). Every function takes the
arguments of its ATen op and returns g of the shape and dtype of ``x``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def ratio(value: Tensor, x: Tensor, limit: float) -> Tensor:
    """value / x with ``limit`` at x = 0; only where no closed form without division exists."""
    zero = x == 0
    return torch.where(zero, limit, value / torch.where(zero, 1, x))


def smooth_ratio(value: Tensor, x: Tensor, limit: float, slope: float = 0.0) -> Tensor:
    """value / x for a value that is x (limit + slope x + ...) near zero, with the derivative that this has.

    Where the next term is below rounding the series takes the quotient's place: autograd would find the quotient's
    derivative to be a difference of two numbers of size 1 / x, and zero at zero.
    """
    small = x.abs() < torch.finfo(x.dtype).eps ** 0.5
    near = limit + slope * x if slope else limit
    return torch.where(small, near, value / torch.where(small, 1, x))


def relu(x: Tensor) -> Tensor:
    """[x > 0]."""
    return (x > 0).to(x.dtype)


def relu6(x: Tensor) -> Tensor:
    """relu6(x) / x: 1 inside (0, 6), 6/x above, 0 below."""
    return hardtanh(x, 0.0, 6.0)


def leaky_relu(x: Tensor, negative_slope: float = 0.01) -> Tensor:
    """1 above zero, the slope below."""
    return torch.where(x > 0, torch.ones_like(x), negative_slope)


def prelu(x: Tensor, weight: Tensor) -> Tensor:
    """1 above zero, the channel's learned slope below; ``weight`` has 1 or C elements."""
    if weight.numel() > 1:
        weight = weight.view([-1 if dim == 1 else 1 for dim in range(x.dim())])
    return torch.where(x > 0, torch.ones_like(x), weight)


def threshold(x: Tensor, threshold: float, value: float) -> Tensor:
    """1 above the threshold; below it the constant ``value`` over x."""
    return torch.where(x > threshold, torch.ones_like(x), ratio(torch.full_like(x, value), x, 0.0))


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """The normal distribution function of x, or its tanh approximation."""
    if approximate == "tanh":
        return gelu_tanh(x)
    return 0.5 * torch.erfc(x * -math.sqrt(0.5))


def gelu_tanh(x: Tensor) -> Tensor:
    """(1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap tanh(x / cap) / x, 1 at zero."""
    return tanh(x / cap)


def silu(x: Tensor) -> Tensor:
    """sigmoid(x)."""
    return torch.sigmoid(x)


def silu_backward(c: Tensor, x: Tensor) -> Tensor:
    """c (x sigmoid(x))', which torch has as an op without a derivative."""
    gate = torch.sigmoid(x)
    return c * gate * (1 + x * (1 - gate))


def mish_backward(c: Tensor, x: Tensor) -> Tensor:
    """c (x tanh(softplus(x)))', likewise."""
    gate = mish(x)
    return c * (gate + x * torch.sigmoid(x) * (1 - gate * gate))


def log_sigmoid_backward(c: Tensor, x: Tensor, buffer: Tensor | None) -> Tensor:
    """c sigmoid(-x) without the value that torch kept."""
    return c * torch.sigmoid(-x)


def hardsigmoid_backward(c: Tensor, x: Tensor) -> Tensor:
    """c / 6 where |x| < 3, likewise."""
    return torch.where(x.abs() < 3, c / 6, 0)


def mish(x: Tensor) -> Tensor:
    """tanh(softplus(x))."""
    return torch.tanh(torch.nn.functional.softplus(x))


def hardswish(x: Tensor) -> Tensor:
    """relu6(x + 3) / 6."""
    return torch.clamp(x + 3, 0, 6) / 6


def elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    """scale * (input_scale above zero, alpha * expm1(input_scale x) / x below)."""
    below = smooth_ratio(torch.expm1(torch.clamp(x * input_scale, max=0.0)), x, input_scale, input_scale**2 / 2)
    return scale * torch.where(x > 0, torch.full_like(x, input_scale), alpha * below)


def selu(x: Tensor) -> Tensor:
    """elu with the self-normalising constants."""
    return elu(x, 1.6732632423543772, 1.0507009873554805)


def celu(x: Tensor, alpha: float = 1.0) -> Tensor:
    """1 above zero, alpha * expm1(x / alpha) / x below."""
    below = smooth_ratio(alpha * torch.expm1(torch.clamp(x / alpha, max=0.0)), x, 1.0, 1 / (2 * alpha))
    return torch.where(x > 0, torch.ones_like(x), below)


def tanh(x: Tensor) -> Tensor:
    """tanh(x) / x, 1 at zero."""
    return smooth_ratio(torch.tanh(x), x, 1.0)


def sin(x: Tensor) -> Tensor:
    """sin(x) / x, 1 at zero."""
    return smooth_ratio(torch.sin(x), x, 1.0)


def sinh(x: Tensor) -> Tensor:
    """sinh(x) / x, 1 at zero."""
    return smooth_ratio(torch.sinh(x), x, 1.0)


def asinh(x: Tensor) -> Tensor:
    """asinh(x) / x, 1 at zero."""
    return smooth_ratio(torch.asinh(x), x, 1.0)


def atan(x: Tensor) -> Tensor:
    """atan(x) / x, 1 at zero."""
    return smooth_ratio(torch.atan(x), x, 1.0)


def erf(x: Tensor) -> Tensor:
    """erf(x) / x, 2 / sqrt(pi) at zero."""
    return smooth_ratio(torch.erf(x), x, 2 / math.sqrt(math.pi))


def expm1(x: Tensor) -> Tensor:
    """expm1(x) / x, 1 at zero."""
    return smooth_ratio(torch.expm1(x), x, 1.0, 0.5)


def log1p(x: Tensor) -> Tensor:
    """log1p(x) / x, 1 at zero."""
    return smooth_ratio(torch.log1p(x), x, 1.0, -0.5)


def absolute(x: Tensor) -> Tensor:
    """sign(x), x / |x| of a complex x."""
    return torch.sgn(x)


def hardtanh(x: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    """clamp(x) / x; 1 at zero when zero lies inside the range."""
    return clamp(x, min_val, max_val)


def clamp(x: Tensor, min: float | None = None, max: float | None = None) -> Tensor:
    """clamp(x, min, max) / x; 1 wherever nothing is clamped."""
    clamped = torch.clamp(x, min, max)
    kept = clamped == x
    return torch.where(kept, torch.ones_like(x), ratio(clamped, torch.where(kept, 1, x), 0.0))


def clamp_min(x: Tensor, min: float) -> Tensor:
    """clamp(x, min=min) / x."""
    return clamp(x, min=min)


def clamp_max(x: Tensor, max: float) -> Tensor:
    """clamp(x, max=max) / x."""
    return clamp(x, max=max)


def hardshrink(x: Tensor, lambd: float = 0.5) -> Tensor:
    """[|x| > lambd]."""
    return (x.abs() > lambd).to(x.dtype)


def softshrink(x: Tensor, lambd: float = 0.5) -> Tensor:
    """max(0, 1 - lambd / |x|)."""
    return 1 - lambd / torch.clamp(x.abs(), min=max(lambd, torch.finfo(x.dtype).tiny))


def power(x: Tensor, exponent: float) -> Tensor:
    """x^(p-1), the gate of x^p."""
    return torch.pow(x, exponent - 1)


def square(x: Tensor) -> Tensor:
    """x, the gate of x^2."""
    return x


GATES: dict[str, Callable[..., Tensor]] = {
    "aten::relu": relu,
    "aten::relu6": relu6,
    "aten::leaky_relu": leaky_relu,
    "aten::prelu": prelu,
    "aten::threshold": threshold,
    "aten::gelu": gelu,
    "pattern::gelu_tanh": gelu_tanh,
    "pattern::softcap": softcap,
    "aten::silu": silu,
    "aten::mish": mish,
    "aten::hardswish": hardswish,
    "aten::elu": elu,
    "aten::selu": selu,
    "aten::celu": celu,
    "aten::tanh": tanh,
    "aten::sin": sin,
    "aten::sinh": sinh,
    "aten::asinh": asinh,
    "aten::atan": atan,
    "aten::erf": erf,
    "aten::expm1": expm1,
    "aten::log1p": log1p,
    "aten::abs": absolute,
    "aten::hardtanh": hardtanh,
    "aten::clamp": clamp,
    "aten::clamp_min": clamp_min,
    "aten::clamp_max": clamp_max,
    "aten::hardshrink": hardshrink,
    "aten::softshrink": softshrink,
    "aten::pow": power,
    "aten::square": square,
}
"""ATen op (or recognised pattern) -> its gate function."""
