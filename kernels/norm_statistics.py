"""Fused norms whose statistics and whose gradients autograd can differentiate; torch returns constants for some."""

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
    if not (x.requires_grad and torch.is_grad_enabled() and mean.numel()):
        return mean, rstd
    kept = [1 if dim - x.dim() in dims else size for dim, size in enumerate(x.shape)]
    found = _Statistics.apply(x, mean.view(kept), rstd.view(kept), dims)  # type: ignore[no-untyped-call]
    return found[0].view(mean.shape), found[1].view(rstd.shape)


def layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """aten.native_layer_norm, with mean and rstd that can be differentiated."""
    made, mean, rstd = aten.native_layer_norm.default(x, shape, weight, bias, eps)
    if not x.requires_grad:
        return made, mean, rstd
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


def layer_norm_backward(
    c: Tensor,
    x: Tensor,
    shape: list[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: list[bool],
) -> Any:
    """aten.native_layer_norm_backward; torch's derivative of it knows the statistics as functions of x already."""
    statistics = mean.detach(), rstd.detach()
    return aten.native_layer_norm_backward.default(c, x, shape, *statistics, weight, bias, mask)


def batch_norm_backward(
    c: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    training: bool,
    eps: float,
    mask: list[bool],
) -> Any:
    """aten.native_batch_norm_backward, likewise."""
    given = [None if value is None else value.detach() for value in (running_mean, running_var, mean, rstd)]
    return aten.native_batch_norm_backward.default(c, x, weight, *given, training, eps, mask)


def group_norm_backward(
    c: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    n: int,
    channels: int,
    hxw: int,
    groups: int,
    mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """aten.native_group_norm_backward by plain ops: coefficients of x, weight and bias."""
    centred = x.reshape(n, groups, -1) - mean.unsqueeze(-1)
    scaled = centred * rstd.unsqueeze(-1)
    per_channel = [-1 if dim == 1 else 1 for dim in range(x.dim())]
    weighted = (c if weight is None else c * weight.view(per_channel)).reshape(n, groups, -1)
    along = weighted - weighted.mean(-1, keepdim=True) - scaled * (weighted * scaled).mean(-1, keepdim=True)
    by_channel = (n, channels, -1)
    on_weight = (c.reshape(by_channel) * scaled.reshape(by_channel)).sum((0, 2))
    return (along * rstd.unsqueeze(-1)).reshape(x.shape), on_weight, c.reshape(by_channel).sum((0, 2))
