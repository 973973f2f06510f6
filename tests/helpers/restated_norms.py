"""Normalisation restated: the transpose of the explicit matrix of a norm with its deviation held constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def norm_bwd(
    c: Tensor, weight: Tensor | None, rstd: Tensor, residual: Tensor | None, centred: bool, groups: int
) -> Tensor:
    """Per row the matrix rstd diag(w) (I - 1/n) of the norm, transposed, times c (Ali et al. 2022, eq. 8)."""
    rows, size = c.shape
    made = torch.zeros(rows, size, dtype=torch.float64)
    for row in range(rows):
        gains = torch.ones(size, dtype=torch.float64)
        for place in range(size):
            if weight is not None and groups:
                channels = weight.shape[0] // groups
                gains[place] = weight[(row % groups) * channels + place // (size // channels)]
            elif weight is not None:
                gains[place] = weight[place]
        centre = torch.eye(size, dtype=torch.float64) - (1 / size if centred and size else 0)
        made[row] = (rstd[row] * torch.diag(gains) @ centre).T @ c[row]
    return made if residual is None else made + residual


RESTATED_NORMS: dict[str, Callable[..., Any]] = {"norm_bwd": norm_bwd}
