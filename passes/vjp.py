"""The transpose of any ATen op: written out for products, traced from torch's own derivative for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lrp_compiler.kernels.linear import convolution_transpose, linear_transpose, matmul_left, matmul_right
from lrp_compiler.kernels.pooling import max_pool_transpose
from lrp_compiler.passes.program import is_float, tensor_of

if TYPE_CHECKING:
    from lrp_compiler.passes.operation import Operand
    from lrp_compiler.passes.site import Site

ExplicitVjp = Callable[["Site", Any, "Operand"], fx.Node | None]


def _filled(args: Any, kwargs: Any, leaves: tuple[int, ...]) -> tuple[list[Any], Callable[..., list[Any]]]:
    """The values at ``leaves``, and a function of them that returns all float outputs of the call."""
    flat, tree = pytree.tree_flatten((args, kwargs))

    def rebuild(*values: Tensor) -> Any:
        filled = list(flat)
        for leaf, value in zip(leaves, values, strict=True):
            filled[leaf] = value
        return pytree.tree_unflatten(filled, tree)

    return [flat[leaf] for leaf in leaves], rebuild


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

    def call(*live: Tensor) -> tuple[Tensor, ...]:
        call_args, call_kwargs = rebuild(*live)
        results = pytree.tree_leaves(target(*call_args, **call_kwargs))
        return tuple(result for result in results if is_float(result))

    primals, pull = torch.func.vjp(call, *values)
    filled = tuple(
        torch.zeros_like(primal) if cotangent is None else cotangent
        for primal, cotangent in zip(primals, cotangents, strict=True)
    )
    known = [(primal, kept) for primal, kept in zip(primals, outputs, strict=True) if kept is not None]
    return list(pull(filled)), [primal for primal, _ in known], [kept for _, kept in known]


def linear_remainder(target: Any, args: Any, kwargs: Any, leaves: tuple[int, ...], c: Tensor) -> Tensor:
    """c * (f(x) - J_f(x) x) for a single-output ``target``; -inf scores count as zero where nothing flows."""
    values, rebuild = _filled(args, kwargs, leaves)

    def call(*live: Tensor) -> Tensor:
        call_args, call_kwargs = rebuild(*live)
        result: Tensor = pytree.tree_leaves(target(*call_args, **call_kwargs))[0]
        return result

    directions = tuple(torch.nan_to_num(value, neginf=0.0) for value in values)
    result, pull = torch.func.vjp(call, *values)
    # The transpose of u -> J^T u, applied to x, is J x; forward-mode formulas are missing for too many ops.
    _, transposed = torch.func.vjp(pull, torch.zeros_like(result))
    (linear,) = transposed(directions)
    return c * (result - linear)


def _linear(site: Site, edge: fx.Node, receiver: Operand) -> fx.Node | None:
    if receiver.argument != 0:
        return None
    return site.emit(linear_transpose, edge, site.op.args[1])  # type: ignore[no-any-return]


def _matmul(site: Site, edge: fx.Node, receiver: Operand) -> fx.Node | None:
    left, right = site.op.args[:2]
    if tensor_of(left).dim() < 2 or tensor_of(left).shape[:-2] != tensor_of(right).shape[:-2]:
        return None
    if receiver.argument == 0:
        return site.emit(matmul_left, edge, right)  # type: ignore[no-any-return]
    return site.emit(matmul_right, edge, left)  # type: ignore[no-any-return]


def _convolution(dims: int, transposed: bool) -> ExplicitVjp:
    def transpose(site: Site, edge: fx.Node, receiver: Operand) -> fx.Node | None:
        op = site.op
        shape = list(tensor_of(op.args[0]).shape)
        padding = op.argument(4, "padding", 0)
        if receiver.argument != 0 or len(shape) != dims + 2 or isinstance(padding, str):
            return None
        groups_at, dilation_at = (6, 7) if transposed else (6, 5)
        output_padding = op.argument(5, "output_padding", 0) if transposed else 0
        options = (
            _spread(op.argument(3, "stride", 1), dims),
            _spread(padding, dims),
            _spread(op.argument(dilation_at, "dilation", 1), dims),
            transposed,
            _spread(output_padding, dims),
            op.argument(groups_at, "groups", 1),
        )
        return site.emit(convolution_transpose, edge, op.args[1], shape, *options)  # type: ignore[no-any-return]

    return transpose


def _spread(value: int | list[int], dims: int) -> list[int]:
    """One number per spatial dimension."""
    sizes = [value] if isinstance(value, int) else list(value)
    return sizes * dims if len(sizes) == 1 else sizes


def _max_pool(dims: int) -> ExplicitVjp:
    def transpose(site: Site, edge: list[fx.Node | None], receiver: Operand) -> fx.Node | None:
        shape = list(tensor_of(receiver.node).shape)
        if edge[0] is None or math.prod(shape) == 0:
            return None
        indices = site.output(1)
        return site.emit(max_pool_transpose, edge[0], indices, shape, dims)  # type: ignore[no-any-return]

    return transpose


EXPLICIT_VJPS: dict[str, ExplicitVjp] = {
    "aten::linear": _linear,
    "aten::matmul": _matmul,
    "aten::bmm": _matmul,
    "aten::mm": _matmul,
    "aten::conv1d": _convolution(1, False),
    "aten::conv2d": _convolution(2, False),
    "aten::conv3d": _convolution(3, False),
    "aten::conv_transpose1d": _convolution(1, True),
    "aten::conv_transpose2d": _convolution(2, True),
    "aten::conv_transpose3d": _convolution(3, True),
    "aten::max_pool2d_with_indices": _max_pool(2),
    "aten::max_pool3d_with_indices": _max_pool(3),
}
"""ATen ops whose transpose is written out, so that it reads no activation it does not need."""
