"""What softmax does not hand to its input under its own derivative (RULES.md 9)."""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten


def softmax_transpose(c: Tensor, s: Tensor, dim: int) -> Tensor:
    """s (c - sum(s c)), of the dtype of ``c``; rows of -inf alone, which s has as NaN, hand on nothing."""
    weights = torch.nan_to_num(s, 0.0)
    made: Tensor = aten._softmax_backward_data.default(c, weights, dim, c.dtype)
    return made


def softmax_residual(c: Tensor, x: Tensor, s: Tensor, dim: int) -> Tensor:
    """c (s - J x) with J x = s (x - sum(s x)); entries of weight zero may be -inf and count as nothing."""
    s = torch.nan_to_num(s, 0.0)
    x = torch.where(s == 0, 0, x)
    return c * (s - s * (x - (s * x).sum(dim, keepdim=True)))


def log_softmax_residual(c: Tensor, x: Tensor, y: Tensor, dim: int) -> Tensor:
    """c (y - J x) with J x = x - sum(s x) for y = log softmax(x)."""
    s = y.exp()
    x = torch.where(s == 0, 0, x)
    y = torch.where(s == 0, 0, y)
    return c * (y - (x - (s * x).sum(dim, keepdim=True)))
