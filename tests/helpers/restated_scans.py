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


def linear_attention_transpose(c: Tensor, write: Tensor, read: Tensor, log_decay: Tensor | None) -> Tensor:
    """y_t = C_t h_t, h_t = a_t h_{t-1} + B_t u_t^T per head (Dao and Gu 2024, eq. 1; Katharopoulos et al. 2020)."""
    batch, heads, steps, width = c.shape
    found = torch.zeros(c.shape, dtype=torch.float64)
    for sample in range(batch):
        for head in range(heads):
            group = head * write.shape[1] // heads
            u = torch.zeros(steps, width, dtype=torch.float64, requires_grad=True)
            h = torch.zeros(write.shape[-1], width, dtype=torch.float64)
            total = u.sum() * 0
            for t in range(steps):
                kept = 1.0 if log_decay is None else log_decay[sample, head, t].exp()
                h = kept * h + torch.outer(write[sample, group, t], u[t])
                total = total + (read[sample, group, t] @ h) @ c[sample, head, t]
            (found[sample, head],) = torch.autograd.grad(total, u)
    return found


RESTATED_SCANS: dict[str, Callable[..., Any]] = {
    "selective_scan_transpose": selective_scan_transpose,
    "linear_attention_transpose": linear_attention_transpose,
}
