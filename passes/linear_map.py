"""A linear op as y(x; W) + b with other inputs and weights put in: what sign-split and terminal rules are made of.

Weights are read where relevance runs, batch normalisation folded in if the op carries one, so that nothing derived from
parameters outlives a parameter update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lrp_compiler.kernels.linear import grouped_product, grouped_weights
from lrp_compiler.passes.optable import GROUPED_PRODUCT, schema_name
from lrp_compiler.passes.program import tensor_of

if TYPE_CHECKING:
    from lrp_compiler.passes.operation import Operation

aten = torch.ops.aten


@dataclass(frozen=True)
class LinearMap:
    """Where input, weight and bias stand among the leaves of a call of ``target``; ``bias_shape`` broadcasts the bias,
    which counts ``bias_factor`` times (addmm's beta).

    A dataclass of plain values, so that it is part of the signature under which traced functions are cached.
    """

    target: Any
    x: int
    weight: int
    bias: int | None
    bias_shape: tuple[int, ...]
    bias_factor: float = 1.0

    def __call__(self, operands: Any, x: Tensor, weight: Tensor) -> Tensor:
        """y(x; weight) without bias; ``operands`` is the call's (args, kwargs)."""
        flat, tree = pytree.tree_flatten(operands)
        flat[self.x], flat[self.weight] = x, weight
        if self.bias is not None:
            flat[self.bias] = torch.zeros_like(flat[self.bias])
        args, kwargs = pytree.tree_unflatten(flat, tree)
        result: Tensor = self.target(*args, **kwargs)
        return result

    @property
    def by_groups(self) -> bool:
        """Whether ``target`` is the product by groups that has no derivative for torch.func."""
        return schema_name(self.target) == GROUPED_PRODUCT

    def given(self, operands: Any, leaf: int) -> Tensor:
        """The operand at ``leaf`` as the call has it; its relevance is of its dtype."""
        found: Tensor = pytree.tree_leaves(operands)[leaf]
        return found

    def transpose(self, operands: Any, x: Tensor, weight: Tensor, v: Tensor) -> Tensor:
        """W^T v at the shape of ``x``."""
        if self.by_groups:
            return self(operands, v, weight.transpose(-2, -1))
        _, pull, *_ = torch.func.vjp(lambda value: self(operands, value, weight), x)
        (product,) = pull(v)
        made: Tensor = product
        return made

    def weight_transpose(self, operands: Any, x: Tensor, weight: Tensor, v: Tensor) -> Tensor:
        """The transpose for the weight, x^T v summed over the batch, at the shape of ``weight``."""
        if self.by_groups:
            return grouped_weights(v, x, weight, pytree.tree_leaves(operands)[2])
        _, pull, *_ = torch.func.vjp(lambda value: self(operands, x, value), weight)
        (product,) = pull(v)
        made: Tensor = product
        return made

    def parts(self, operands: Any, fold: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """(x, weight, bias), the bias shaped to add to the output, batch normalisation ``fold`` put into both.

        ``fold`` is empty, or (weight, bias, running mean, running variance, eps) of the batch norm that follows.
        """
        flat = pytree.tree_leaves(operands)
        x, weight = flat[self.x], flat[self.weight]
        bias = torch.zeros((), dtype=x.dtype, device=x.device) if self.bias is None else flat[self.bias]
        bias = bias if self.bias_factor == 1 else bias * self.bias_factor
        if fold:
            gain, shift, mean, variance, eps = fold
            scale = torch.rsqrt(variance + eps)
            scale = scale if gain is None else scale * gain
            weight = weight * scale.view([-1] + [1] * (weight.dim() - 1))
            bias = (bias - mean) * scale
            bias = bias if shift is None else bias + shift
        return x, weight, bias.view(self.bias_shape) if bias.dim() else bias


HALF = (torch.float16, torch.bfloat16)


def in_full_precision(values: Any) -> Any:
    """A tree of values with 16-bit tensors widened to float32."""
    return pytree.tree_map_only(Tensor, lambda value: value.float() if value.dtype in HALF else value, values)


def linear_map(op: Operation) -> LinearMap:
    """The linear map of an op with one flowing factor and one constant factor."""
    (x,) = op.flowing_factors
    assert op.entry is not None
    (weight_position,) = [position for position in op.entry.factors if position != x.argument]
    weight = next(operand for operand in op.operands if operand.argument == weight_position)
    bias = next((operand for operand in op.operands if operand.argument in op.entry.terms), None)
    spatial = tensor_of(weight.node).dim() - 2 if "conv" in op.linear_name else 0
    bias_leaf = None if bias is None else bias.leaf
    factor = float(op.kwargs.get("beta", 1))
    # torch's own op for this takes 16-bit numbers alone, and rules compute in 32.
    target = grouped_product if op.call.target is aten._grouped_mm.default else op.call.target
    return LinearMap(target, x.leaf, weight.leaf, bias_leaf, (-1, *([1] * spatial)), factor)
