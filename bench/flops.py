"""Floating-point operations of a call's products, convolutions and attention, by torch's own formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q.shape, k.shape, v.shape))


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape))


ON_CPU = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Attention that torch's table has for GPUs alone."""


class _Counter(TorchDispatchMode):
    """Counts what runs under it; the formulas' own context registers hooks, under which autograd.grad fails."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._formulas: dict[Any, Callable[..., int]] = {**FlopCounterMode(display=False).flop_registry, **ON_CPU}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops(call: Callable[[], object]) -> int:
    """How many ``call`` takes."""
    with _Counter() as counter:
        call()
    return counter.total
