"""Normalisation restated: the transpose of the explicit matrix of a norm with its deviation held constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def norm_bwd(
    c: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    residual: Tensor | None,
    centred: bool,
    groups: int,
    divides: bool = False,
) -> Tensor:
    """Per row the matrix diag(w) (I - 1/n) / deviation of the norm, transposed, times c (Ali et al. 2022, eq. 8).

    Autograd transposes the map x -> w (x - mean(x)) / deviation, in which the deviation is a number.
    """
    rows, size = c.shape
    made = torch.zeros(rows, size, dtype=torch.float64)
    for row in range(rows):
        gains = torch.ones(size, dtype=torch.float64)
        if weight is not None and groups:
            channels = weight.shape[0] // groups
            for channel in range(channels):
                length = size // channels
                gains[channel * length : (channel + 1) * length] = weight[(row % groups) * channels + channel]
        elif weight is not None:
            gains = weight
        deviation = scale[row] if divides else 1 / scale[row]

        def normalised(x: Tensor, gains: Tensor = gains, deviation: Tensor = deviation) -> Tensor:
            return gains * (x - x.sum() / size if centred and size else x) / deviation

        made[row] = torch.func.vjp(normalised, torch.zeros(size, dtype=torch.float64))[1](c[row])[0]
    return made if residual is None else made + residual


RESTATED_NORMS: dict[str, Callable[..., Any]] = {"norm_bwd": norm_bwd}
