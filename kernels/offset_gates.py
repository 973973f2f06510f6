"""Gates of functions that do not vanish at zero: f(x) = f(0) + x g(x), without the cancellation of f(x) - f(0).

The linear interpreter needs them: f(0) goes to the offset r of y = W x + r, g(x) stays in W.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lrp_compiler.kernels.gates import smooth_ratio


def sigmoid(x: Tensor) -> Tensor:
    """(sigmoid(x) - 1/2) / x = tanh(x / 2) / (2 x)."""
    return smooth_ratio(torch.tanh(x / 2) / 2, x, 0.25)


def hardsigmoid(x: Tensor) -> Tensor:
    """clamp(x, -3, 3) / (6 x)."""
    linear = x.abs() <= 3
    return torch.where(linear, torch.full_like(x, 1 / 6), torch.clamp(x, -3, 3) / 6 / torch.where(linear, 1, x))


def log_cosh(x: Tensor) -> Tensor:
    """log(cosh(x)): as log1p(2 sinh(x / 2)^2) near zero, as |x| + log1p(exp(-2 |x|)) - log 2 elsewhere."""
    near = torch.log1p(2 * torch.sinh(torch.clamp(x, -1, 1) / 2).square())
    far = x.abs() + torch.log1p(torch.exp(-2 * x.abs())) - math.log(2)
    return torch.where(x.abs() < 1, near, far)


def softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """(softplus(x) - log(2) / beta) / x = 1/2 + log(cosh(beta x / 2)) / (beta x), torch's cut at ``threshold`` kept."""
    smooth = 0.5 + smooth_ratio(log_cosh(x * beta / 2) / beta, x, 0.0, beta / 8)
    cut = x * beta > threshold
    return torch.where(cut, 1 - math.log(2) / beta / torch.where(cut, x, 1), smooth)


def log_sigmoid(x: Tensor) -> Tensor:
    """(log sigmoid(x) + log 2) / x = 1/2 - log(cosh(x / 2)) / x."""
    return 0.5 - smooth_ratio(log_cosh(x / 2), x, 0.0, 0.125)


def exp(x: Tensor) -> Tensor:
    """(exp(x) - 1) / x."""
    return smooth_ratio(torch.expm1(x), x, 1.0, 0.5)


def cos(x: Tensor) -> Tensor:
    """(cos(x) - 1) / x = -2 sin(x / 2)^2 / x."""
    return smooth_ratio(-2 * torch.sin(x / 2).square(), x, 0.0, -0.5)


def cosh(x: Tensor) -> Tensor:
    """(cosh(x) - 1) / x = 2 sinh(x / 2)^2 / x."""
    return smooth_ratio(2 * torch.sinh(x / 2).square(), x, 0.0, 0.5)


OFFSET_GATES: dict[str, tuple[Callable[..., Tensor], Callable[..., float]]] = {
    "aten::sigmoid": (sigmoid, lambda: 0.5),
    "aten::hardsigmoid": (hardsigmoid, lambda: 0.5),
    "aten::softplus": (softplus, lambda beta=1, threshold=20: math.log(2) / beta),
    "aten::log_sigmoid": (log_sigmoid, lambda: -math.log(2)),
    "aten::exp": (exp, lambda: 1.0),
    "aten::cos": (cos, lambda: 1.0),
    "aten::cosh": (cosh, lambda: 1.0),
}
"""ATen op -> its gate g and f(0), both taking the op's further arguments."""
