"""Functions as modules, and a function for every activation that the compiler has a gate for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Op(nn.Module):
    """A function of the inputs, and of parameters if any are given, as a module."""

    def __init__(self, fn: Callable[..., Any], *parameters: Tensor) -> None:
        super().__init__()
        self.fn = fn
        self.constants = nn.ParameterList(parameters)

    def forward(self, *inputs: Tensor) -> Any:
        return self.fn(*inputs, *self.constants)


def gelu_new(x: Tensor) -> Tensor:
    """GELU as GPT-2 spells it."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "aten::relu": F.relu,
    "aten::relu6": F.relu6,
    "aten::leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "aten::prelu": lambda x: F.prelu(x, torch.tensor([0.3])),
    "aten::threshold": lambda x: F.threshold(x, -0.2, -0.7),
    "aten::gelu": F.gelu,
    "pattern::gelu_tanh": gelu_new,
    "pattern::softcap": lambda x: 2.5 * torch.tanh(x / 2.5),
    "aten::silu": F.silu,
    "aten::mish": F.mish,
    "aten::hardswish": F.hardswish,
    "aten::elu": lambda x: F.elu(x, 1.7),
    "aten::selu": F.selu,
    "aten::celu": lambda x: F.celu(x, 1.3),
    "aten::tanh": torch.tanh,
    "aten::sin": torch.sin,
    "aten::sinh": torch.sinh,
    "aten::asinh": torch.asinh,
    "aten::atan": torch.atan,
    "aten::erf": torch.erf,
    "aten::expm1": torch.expm1,
    "aten::log1p": lambda x: torch.log1p(x.clamp_min(-0.9)),
    "aten::abs": torch.abs,
    "aten::hardtanh": F.hardtanh,
    "aten::clamp": lambda x: torch.clamp(x, -0.5, 0.8),
    "aten::clamp_min": lambda x: torch.clamp_min(x, -0.5),
    "aten::clamp_max": lambda x: torch.clamp_max(x, 0.5),
    "aten::hardshrink": F.hardshrink,
    "aten::softshrink": F.softshrink,
    "aten::pow": lambda x: x.pow(3),
    "aten::square": torch.square,
}
"""Every op that has a gate, vanishing at zero as written here."""

WITH_OFFSET: dict[str, Callable[[Tensor], Tensor]] = {
    "aten::sigmoid": torch.sigmoid,
    "aten::hardsigmoid": F.hardsigmoid,
    "aten::softplus": F.softplus,
    "aten::log_sigmoid": F.logsigmoid,
    "aten::exp": torch.exp,
    "aten::cos": torch.cos,
    "aten::cosh": torch.cosh,
}
"""Every op that has a gate and an offset, its value at zero."""
