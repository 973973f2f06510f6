"""Excitation pullbacks: the gradient of a softened network (RULES.md 5.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lrp_compiler.passes.errors import DerivativeError
from lrp_compiler.passes.rules.base import Edges, Rule
from lrp_compiler.passes.site import Site
from lrp_compiler.passes.source_lines import user_source


@dataclass(frozen=True)
class Window:
    """The window of a pooling op, two numbers each."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def soft_max_pool(x: Tensor, window: Window, temperature: float) -> Tensor:
    """sum_k softmax(x / T)_k x_k over each window, (N, C, positions); padded zeros take part."""
    patches = F.unfold(x, window.kernel, window.dilation, window.padding, window.stride)
    grouped = patches.reshape(x.shape[0], x.shape[1], -1, patches.shape[-1])
    pooled: Tensor = (grouped * (grouped / temperature).softmax(2)).sum(2)
    return pooled


def soft_pool_pullback(c: Tensor, x: Tensor, window: Window, temperature: float) -> Tensor:
    """The derivative of the soft pool at ``x``, applied to ``c`` (N, C, H', W')."""
    _, pull, *_ = torch.func.vjp(lambda value: soft_max_pool(value, window, temperature), x)
    (made,) = pull(c.flatten(2))
    pulled: Tensor = made
    return pulled


@dataclass(frozen=True)
class SoftMaxPool(Rule):
    """A max-pool that pulls back through a softmax of temperature T: w_k (1 + (x_k - y) / T) per window."""

    temperature: float = 1.0
    name: ClassVar[str] = "soft_max_pool"

    def propagate(self, site: Site, edge: Any) -> Edges:
        (receiver,) = self.receivers(site.op)
        x, kernel, stride, padding, dilation, ceil_mode = site.op.args
        if ceil_mode:
            raise DerivativeError(op=str(site.op), cause="ceil_mode has no soft form", source=user_source(site.node))
        window = Window(tuple(kernel), tuple(stride or kernel), tuple(padding), tuple(dilation))
        return {receiver: site.emit(soft_pool_pullback, edge[0], x, window, self.temperature, autograd=True)}
