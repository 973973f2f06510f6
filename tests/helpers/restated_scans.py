"""Recurrences restated: the derivative, by autograd, of the recurrence itself, one step after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def selective_scan_transpose(states: Tensor, decay: Tensor, write: Tensor | None, sizes: list[int]) -> Tensor:
    """h_t = a_t h_{t-1} + w_t u_t is linear in u once a and w are constant (Jafari et al. 2024, section 4)."""
    u = torch.zeros(sizes, dtype=torch.float64, requires_grad=True)
    h: Any = 0.0
    total = torch.zeros((), dtype=torch.float64)
    for t in range(sizes[0]):
        added = u[t] if write is None else write[t] * u[t]
        h = added if t == 0 else decay[t] * h + added
        total = total + (states[t] * h).sum()
    if not u.numel():
        return torch.zeros(sizes, dtype=torch.float64)
    (found,) = torch.autograd.grad(total, u)
    return found


RESTATED_SCANS: dict[str, Callable[..., Any]] = {
    "selective_scan_transpose": selective_scan_transpose,
}
