"""The epsilon rule of a linear layer restated: one output's share after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def epsilon_linear_bwd(
    c: Tensor, z: Tensor, weight: Tensor, epsilon: float, x: Tensor | None, residual: Tensor | None
) -> Tensor:
    """Bach et al. 2015, eq. 58, over x: every output sends c z / (z + epsilon sign(z)) along its row of W."""
    shape = (*c.shape[:-1], weight.shape[1])
    made = torch.zeros(shape, dtype=torch.float64) if residual is None else residual.clone()
    for out in range(weight.shape[0]):
        value = z[..., out]
        stabilised = torch.where(value >= 0, value + epsilon, value - epsilon)
        made = made + (c[..., out] * value / stabilised).unsqueeze(-1) * weight[out]
    return made if x is None else made * x


RESTATED_EPSILON: dict[str, Callable[..., Any]] = {"epsilon_linear_bwd": epsilon_linear_bwd}
