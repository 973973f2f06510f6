"""The transpose of any ATen op, traced from torch's own derivative of that op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lrp_compiler.kernels.linear import masked_product
from lrp_compiler.passes.program import is_float


def _filled(args: Any, kwargs: Any, leaves: tuple[int, ...]) -> tuple[list[Any], Callable[..., list[Any]]]:
    """The values at ``leaves``, and a function of them that returns all float outputs of the call."""
    flat, tree = pytree.tree_flatten((args, kwargs))

    def rebuild(*values: Tensor) -> Any:
        filled = list(flat)
        for leaf, value in zip(leaves, values, strict=True):
            filled[leaf] = value
        return pytree.tree_unflatten(filled, tree)

    return [flat[leaf] for leaf in leaves], rebuild


def _mean_of_images(x: Tensor, _: Any) -> Tensor:
    return x.mean((-2, -1), keepdim=True)


def _differentiated(target: Any, args: Any) -> Any:
    """``target``, or the same map in a form whose derivative takes fewer ops.

    Of a channels_last image torch makes the average over all of it with strides of its own; the derivative of that
    writes into a storage, which it cannot map over several targets.
    """
    is_mean = target is torch.ops.aten.adaptive_avg_pool2d.default and list(args[1]) == [1, 1]
    return _mean_of_images if is_mean else target


def pullback(
    target: Any,
    args: Any,
    kwargs: Any,
    leaves: tuple[int, ...],
    cotangents: list[Tensor | None],
    outputs: list[Tensor | None],
) -> tuple[list[Tensor], list[Any], list[Any]]:
    """VJP of ``target(*args, **kwargs)`` for the tensors at ``leaves``; absent cotangents are zero.

    Returns the products, then the recomputed outputs and the values that already hold them, pairwise.
    """
    values, rebuild = _filled(args, kwargs, leaves)
    function = _differentiated(target, args)

    def call(*live: Tensor) -> tuple[Tensor, ...]:
        call_args, call_kwargs = rebuild(*live)
        results = pytree.tree_leaves(function(*call_args, **call_kwargs))
        return tuple(result for result in results if is_float(result))

    primals, pull, *_ = torch.func.vjp(call, *values)
    filled = tuple(
        torch.zeros_like(primal) if cotangent is None else cotangent
        for primal, cotangent in zip(primals, cotangents, strict=True)
    )
    known = [(primal, kept) for primal, kept in zip(primals, outputs, strict=True) if kept is not None]
    return list(pull(filled)), [primal for primal, _ in known], [kept for _, kept in known]


def linear_remainder(target: Any, args: Any, kwargs: Any, leaves: tuple[int, ...], c: Tensor) -> Tensor:
    """c (f(x) - J_f(x) x) for a single-output ``target``; -inf scores count as zero where nothing flows."""
    values, rebuild = _filled(args, kwargs, leaves)

    def call(*live: Tensor) -> Tensor:
        call_args, call_kwargs = rebuild(*live)
        result: Tensor = pytree.tree_leaves(target(*call_args, **call_kwargs))[0]
        return result

    directions = tuple(torch.nan_to_num(value, neginf=0.0) for value in values)
    result, pull, *_ = torch.func.vjp(call, *values)
    # The transpose of u -> J^T u, applied to x, is J x; forward-mode formulas are missing for too many ops.
    _, transposed, *_ = torch.func.vjp(pull, torch.zeros_like(result))
    (linear,) = transposed(directions)
    return masked_product(c, result - linear)
