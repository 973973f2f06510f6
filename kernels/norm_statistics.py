"""The derivatives of normalisation statistics, which torch's fused norms return as constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


class _Statistics(torch.autograd.Function):
    """mean and rstd of x over ``dims`` as they were computed, with the derivatives that they have at x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, mean: Tensor, rstd: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return mean.detach(), rstd.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, _, _, ctx.dims = inputs
        # The outputs rather than the inputs: these have a history, for a second derivative.
        ctx.save_for_backward(x, *output)

    @staticmethod
    def backward(ctx: Any, on_mean: Tensor, on_rstd: Tensor) -> Any:
        """d mean / dx = 1 / n, d rstd / dx = -rstd^3 (x - mean) / n."""
        x, mean, rstd = ctx.saved_tensors
        made = (on_mean - on_rstd * rstd.pow(3) * (x - mean)) / (x.numel() / max(mean.numel(), 1))
        return made.to(x.dtype), None, None, None


def with_derivatives(x: Tensor, mean: Tensor, rstd: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(mean, rstd) of their own shapes, differentiable where ``x`` is; both are over ``dims`` of ``x``."""
    if not mean.numel() or not (torch.is_grad_enabled() and x.requires_grad):
        return mean, rstd
    kept = [1 if dim - x.dim() in dims else size for dim, size in enumerate(x.shape)]
    found = _Statistics.apply(x, mean.view(kept), rstd.view(kept), dims)  # type: ignore[no-untyped-call]
    return found[0].view(mean.shape), found[1].view(rstd.shape)


def layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """aten.native_layer_norm, with mean and rstd that can be differentiated."""
    made, mean, rstd = aten.native_layer_norm.default(x, shape, weight, bias, eps)
    return made, *with_derivatives(x, mean, rstd, tuple(range(-len(shape), 0)))


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, hxw: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """aten.native_group_norm, with mean and rstd (N, groups) that can be differentiated."""
    made, mean, rstd = aten.native_group_norm.default(x, weight, bias, n, c, hxw, groups, eps)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return made, mean, rstd
    return made, *with_derivatives(x.reshape(n, groups, -1), mean, rstd, (-1,))


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """aten.native_batch_norm, with the batch's mean and rstd (C,), which it has in training, differentiable."""
    made, mean, rstd = aten.native_batch_norm.default(
        x, weight, bias, running_mean, running_var, training, momentum, eps
    )
    dims = tuple(dim - x.dim() for dim in range(x.dim()) if dim != 1)
    return made, *(with_derivatives(x, mean, rstd, dims) if training else (mean, rstd))
