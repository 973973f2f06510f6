"""Transposes written out: ops whose VJP is one or two calls, or reads fewer values than torch's own derivative.

What is not here is traced from torch's derivative (vjp.py); a form returns None for a call it does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from lrp_compiler.kernels.fourier import complex_to_real_transpose, real_to_complex_transpose
from lrp_compiler.kernels.linear import (
    convolution_transpose,
    grouped_weights,
    linear_transpose,
    matmul_left,
    matmul_right,
)
from lrp_compiler.kernels.pooling import max_pool_transpose
from lrp_compiler.kernels.softmax import softmax_transpose
from lrp_compiler.passes.optable import GROUPED_PRODUCT, OP_TABLE, OpClass, op_name
from lrp_compiler.passes.program import tensor_of
from lrp_compiler.passes.recurrent import carried, recurrent_edges

if TYPE_CHECKING:
    from lrp_compiler.passes.operation import Operand
    from lrp_compiler.passes.site import Site

aten = torch.ops.aten
Transpose = Callable[["Site", Any, "Operand"], fx.Node | None]


def _linear(site: Site, edge: fx.Node, receiver: Operand) -> fx.Node | None:
    if receiver.argument != 0:
        return None
    return site.emit(linear_transpose, edge, site.op.args[1])  # type: ignore[no-any-return]


def _matmul(site: Site, edge: fx.Node, receiver: Operand) -> fx.Node | None:
    left, right = site.op.args[:2]
    shapes = [tensor_of(operand).shape for operand in (left, right)]
    if min(map(len, shapes)) < 2 or shapes[0][:-2] != shapes[1][:-2]:
        return None
    if receiver.argument == 0:
        return site.emit(matmul_left, edge, right)  # type: ignore[no-any-return]
    return site.emit(matmul_right, edge, left)  # type: ignore[no-any-return]


def _grouped(site: Site, edge: fx.Node, receiver: Operand) -> fx.Node | None:
    """A product of row groups with a matrix each: to the rows the same with transposed matrices."""
    rows, matrices = site.op.args[:2]
    offsets = site.op.argument(2, "offs")
    if receiver.argument == 0 and (tensor_of(rows).dim(), tensor_of(matrices).dim()) == (2, 3):
        back = site.emitter.call(aten.transpose.int, matrices, -2, -1)
        return site.emitter.call(site.node.target, edge, back, offsets)
    if receiver.argument == 1 and op_name(site.node) == GROUPED_PRODUCT:
        return site.emit(grouped_weights, edge, rows, matrices, offsets)  # type: ignore[no-any-return]
    return None


def _convolution(dims: int, transposed: bool) -> Transpose:
    def transpose(site: Site, edge: fx.Node, receiver: Operand) -> fx.Node | None:
        op = site.op
        shape = list(tensor_of(op.args[0]).shape)
        padding = op.argument(4, "padding", 0)
        if receiver.argument != 0 or len(shape) != dims + 2 or isinstance(padding, str) or tensor_of(edge).is_complex():
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


def _max_pool(dims: int) -> Transpose:
    def transpose(site: Site, edge: list[fx.Node | None], receiver: Operand) -> fx.Node | None:
        shape = list(tensor_of(receiver.node).shape)
        if edge[0] is None or math.prod(shape) == 0:
            return None
        indices = site.output(1)
        return site.emit(max_pool_transpose, edge[0], indices, shape, dims)  # type: ignore[no-any-return]

    return transpose


def _reshaped(site: Site, edge: fx.Node, receiver: Operand) -> fx.Node | None:
    shape = list(tensor_of(receiver.node).shape)
    if tensor_of(receiver.node).dtype != tensor_of(edge).dtype:
        return None
    if shape == list(tensor_of(edge).shape):
        return edge
    return site.emitter.call(aten.reshape.default, edge, shape)


def _swapped(site: Site, edge: fx.Node, receiver: Operand) -> fx.Node | None:
    return site.emitter.call(aten.transpose.int, edge, *site.op.args[1:])


def _permuted_back(site: Site, edge: fx.Node, receiver: Operand) -> fx.Node | None:
    order = [dim % tensor_of(edge).dim() for dim in site.op.args[1]]
    return site.emitter.call(aten.permute.default, edge, [order.index(dim) for dim in range(len(order))])


def _put_back(site: Site, edge: fx.Node, receiver: Operand) -> fx.Node | None:
    dim, index = site.op.args[1:3]
    shape = list(tensor_of(receiver.node).shape)
    return site.emitter.call(aten.select_backward.default, edge, shape, dim, index)


def _cast_back(site: Site, edge: fx.Node, receiver: Operand) -> fx.Node | None:
    before, after = tensor_of(receiver.node), tensor_of(edge)
    if before.device != after.device:
        return None
    if after.is_complex() and not before.is_complex():
        edge = site.emitter.call(aten.real.default, edge)
        after = tensor_of(edge)
    return edge if before.dtype == after.dtype else site.emitter.call(aten.to.dtype, edge, before.dtype)


def _addend(site: Site, edge: fx.Node, receiver: Operand) -> fx.Node | None:
    """c for an addend that was not broadcast or promoted; alpha other than 1 is left to torch."""
    one, edged = tensor_of(receiver.node), tensor_of(edge)
    if one.shape != edged.shape or one.dtype != edged.dtype or site.op.kwargs.get("alpha", 1) != 1:
        return None
    negative = receiver.argument == 1 and site.node.target is aten.sub.Tensor
    return site.emitter.call(aten.neg.default, edge) if negative else edge


def _factor(site: Site, edge: fx.Node, receiver: Operand) -> fx.Node | None:
    """c times the other factor, where nothing was broadcast into this one."""
    one, edged = tensor_of(receiver.node), tensor_of(edge)
    # Of complex factors torch's derivative takes the conjugate.
    if one.shape != edged.shape or one.dtype != edged.dtype or one.is_complex():
        return None
    other = site.op.args[1 - int(receiver.argument)]
    return site.emitter.call(aten.mul.Tensor, edge, other)


def _real_to_complex(site: Site, edge: fx.Node, receiver: Operand) -> fx.Node | None:
    _, dims, normalisation, onesided = site.op.args
    size = tensor_of(receiver.node).shape[dims[-1]]
    return site.emit(real_to_complex_transpose, edge, dims, normalisation, onesided, size)  # type: ignore[no-any-return]


def _complex_to_real(site: Site, edge: fx.Node, receiver: Operand) -> fx.Node | None:
    return site.emit(complex_to_real_transpose, edge, *site.op.args[1:3])  # type: ignore[no-any-return]


def _complex_to_complex(site: Site, edge: fx.Node, receiver: Operand) -> fx.Node | None:
    _, dims, normalisation, forward = site.op.args
    return site.emitter.call(aten._fft_c2c.default, edge, dims, normalisation, not forward)


def _softmax(site: Site, edge: fx.Node, receiver: Operand) -> fx.Node | None:
    if site.op.is_moved or tensor_of(edge).dtype != tensor_of(site.node).dtype:
        return None
    made = site.emit(softmax_transpose, edge, site.node, site.op.args[1])
    dtype = tensor_of(receiver.node).dtype
    return made if tensor_of(made).dtype == dtype else site.emitter.call(aten.to.dtype, made, dtype)


def _recurrent(site: Site, edge: Any, receiver: Operand) -> fx.Node | None:
    if receiver not in carried(site.op):
        return None
    return recurrent_edges(site, edge, gradient=True)[receiver.leaf]


TRANSPOSES: dict[str, Transpose] = {
    **dict.fromkeys(
        (
            "aten::view",
            "aten::reshape",
            "aten::_unsafe_view",
            "aten::flatten",
            "aten::unflatten",
            "aten::clone",
        ),
        _reshaped,
    ),
    **dict.fromkeys(("aten::squeeze", "aten::unsqueeze", "aten::contiguous"), _reshaped),
    "aten::transpose": _swapped,
    "aten::permute": _permuted_back,
    "aten::select": _put_back,
    "aten::to": _cast_back,
    "aten::add": _addend,
    "aten::sub": _addend,
    "aten::mul": _factor,
    "aten::linear": _linear,
    "aten::matmul": _matmul,
    "aten::bmm": _matmul,
    "aten::mm": _matmul,
    "aten::_grouped_mm": _grouped,
    GROUPED_PRODUCT: _grouped,
    "aten::conv1d": _convolution(1, False),
    "aten::conv2d": _convolution(2, False),
    "aten::conv3d": _convolution(3, False),
    "aten::conv_transpose1d": _convolution(1, True),
    "aten::conv_transpose2d": _convolution(2, True),
    "aten::conv_transpose3d": _convolution(3, True),
    "aten::_fft_r2c": _real_to_complex,
    "aten::_fft_c2r": _complex_to_real,
    "aten::_fft_c2c": _complex_to_complex,
    "aten::max_pool2d_with_indices": _max_pool(2),
    "aten::max_pool3d_with_indices": _max_pool(3),
    **dict.fromkeys(("aten::softmax", "aten::_softmax", "aten::_safe_softmax"), _softmax),
    **{name: _recurrent for name, entry in OP_TABLE.items() if entry.op_class is OpClass.RECURRENT},
}
"""ATen op -> its transpose for one operand."""
