"""The transpose of a scan h_t = a_t h_{t-1} + w_t u_t, y_t = r_t(h_t) with a, w and r held constant (MambaLRP).

With s_t the coefficient that y_t gives to h_t, lambda_t = s_t + a_{t+1} lambda_{t+1} and c_{u,t} = w_t lambda_t, summed
over what u is broadcast along: for Mamba's a = exp(Delta A), w = Delta B, r = C the formula of RULES.md 1.8 (Jafari et
al. 2024). No state h is read.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("lrp::selective_scan_transpose", mutates_args=())
def selective_scan_transpose(states: Tensor, decay: Tensor, write: Tensor | None, sizes: list[int]) -> Tensor:
    """c_u of shape ``sizes`` = (T, ...) from ``states`` (T, ...), the coefficients each y_t gives to its h_t.

    ``decay`` (a) and ``write`` (w, or None for ones) have the rank of ``states`` and broadcast against it.
    """
    result = states.new_empty(sizes)
    carried: Tensor | None = None
    for t in reversed(range(states.shape[0])):
        carried = states[t] if carried is None else torch.addcmul(states[t], decay[t + 1], carried)
        result[t] = (carried if write is None else write[t] * carried).sum_to_size(sizes[1:])
    return result


def scan_transpose(states: Tensor, decay: Tensor, write: Tensor | None, sizes: list[int]) -> Tensor:
    """``selective_scan_transpose`` in plain ops, which torch can differentiate."""
    parts: list[Tensor] = []
    carried: Tensor | None = None
    for t in reversed(range(states.shape[0])):
        carried = states[t] if carried is None else torch.addcmul(states[t], decay[t + 1], carried)
        parts.append((carried if write is None else write[t] * carried).sum_to_size(sizes[1:]))
    return torch.stack(parts[::-1]) if parts else states.new_empty(sizes)


@selective_scan_transpose.register_fake
def _(states: Tensor, decay: Tensor, write: Tensor | None, sizes: list[int]) -> Tensor:
    return states.new_empty(sizes)


@selective_scan_transpose.register_vmap
def _mapped(
    info: object,
    in_dims: tuple[int | None, ...],
    states: Tensor,
    decay: Tensor,
    write: Tensor | None,
    sizes: list[int],
) -> tuple[Tensor, int]:
    """The mapped dimension follows time; what is not mapped broadcasts along it."""
    batch: int = info.batch_size  # type: ignore[attr-defined]
    over_states, over_decay, over_write, _ = in_dims
    states = _second(states, over_states).expand(-1, batch, *([-1] * (len(sizes) - 1)))
    mapped_write = None if write is None else _second(write, over_write)
    sizes = [sizes[0], batch, *sizes[1:]]
    return selective_scan_transpose(states, _second(decay, over_decay), mapped_write, sizes), 1


def _second(value: Tensor, dim: int | None) -> Tensor:
    """``value`` with its mapped dimension, or one of size 1, behind time."""
    return value.unsqueeze(1) if dim is None else value.movedim(dim, 1)
