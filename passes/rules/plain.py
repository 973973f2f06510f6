"""Rules whose coefficient form is the op's own transpose: linear maps, sums, data movement (RULES.md 1.1 to 1.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lrp_compiler.kernels.linear import epsilon_ratio, masked_product, relevance_of, stabilise
from lrp_compiler.kernels.norm import bias_share, channel_bias_share
from lrp_compiler.passes.errors import RuleParameterError
from lrp_compiler.passes.operation import Operand, Operation
from lrp_compiler.passes.optable import OpClass, aten_names, op_name
from lrp_compiler.passes.program import value_of
from lrp_compiler.passes.rules.base import Edges, Rule, Sinks
from lrp_compiler.passes.site import Site

WITH_CONSTANTS = aten_names(
    "cat stack concat hstack vstack where masked_fill pad constant_pad_nd index_put scatter "
    "select_scatter slice_scatter diagonal_scatter masked_scatter index_copy scatter_add index_add copy complex"
)


def zero_response(target: Any, args: Any, kwargs: Any, leaves: tuple[int, ...], c: torch.Tensor) -> torch.Tensor:
    """c times what an affine op returns when the operands at ``leaves`` are zero: its constants' share."""
    flat, tree = pytree.tree_flatten((args, kwargs))
    for leaf in leaves:
        flat[leaf] = torch.zeros_like(flat[leaf])
    call_args, call_kwargs = pytree.tree_unflatten(flat, tree)
    return masked_product(c, target(*call_args, **call_kwargs))


@dataclass(frozen=True)
class Plain(Rule):
    """c_in = VJP(c): the LRP-0 rule of linear maps, the ratio rule of sums, the inverse of data movement."""

    name: ClassVar[str] = "plain"
    by_row: ClassVar[bool] = True

    def propagate(self, site: Site, edge: Any) -> Edges:
        return site.vjp(edge, self.receivers(site.op))

    def parameter_edges(self, site: Site, edge: Any, parameters: tuple[Operand, ...]) -> Edges:
        return site.vjp(edge, parameters)

    def sinks(self, site: Site, edge: Any, edges: Edges) -> Sinks:
        op = site.op
        if op.op_class in (OpClass.LINEAR, OpClass.BILINEAR):
            return bias_sink(site, edge)
        with_constants = op.op_class is OpClass.SELECTION and bool(op.constants())
        if with_constants or op_name(op.node) in ("aten::logsumexp", "aten::nan_to_num"):
            return {"constant": site.remainder(edge, edges)}
        adds_constant = op.op_class is OpClass.ADD and len(op.flowing) < _addends(op)
        if not adds_constant and op_name(op.node) not in WITH_CONSTANTS:
            return {}
        leaves = tuple(operand.leaf for operand in op.flowing)
        return {"constant": site.emit(zero_response, op.node.target, op.args, op.kwargs, leaves, edge)}


def _addends(op: Operation) -> int:
    """How many values a sum adds up: a negation has one."""
    return 1 if op_name(op.node) == "aten::neg" else 2


def bias_sink(site: Site, edge: fx.Node) -> Sinks:
    """b * c for the bias of a linear map (beta b c for addmm's beta), in the shape of its output."""
    op = site.op
    terms = op.entry.terms if op.entry is not None else ()
    for position in terms:
        bias = op.argument(position, "bias")
        if isinstance(bias, fx.Node) and not any(operand.node is bias for operand in op.flowing):
            return {"bias": site.scale(_bias_share(site, edge, bias), float(op.kwargs.get("beta", 1)))}
    return {}


def _bias_share(site: Site, edge: fx.Node, bias: fx.Node) -> fx.Node:
    if not op_name(site.node).startswith("aten::conv"):
        return site.emit(bias_share, edge, bias)  # type: ignore[no-any-return]
    spatial = value_of(site.op.args[1]).dim() - 2
    return site.emit(channel_bias_share, edge, bias, spatial)  # type: ignore[no-any-return]


def epsilon_leak(c: torch.Tensor, z: torch.Tensor, epsilon: float) -> torch.Tensor:
    """z c (1 - z / stab(z)): the share that a real epsilon absorbs."""
    return relevance_of(c, z - z * (z / stabilise(z, epsilon)))


@dataclass(frozen=True)
class Epsilon(Plain):
    """c_in = W^T (c z / stab(z)) with a real epsilon; the bias stays in the denominator (RULES.md 1.1)."""

    epsilon: float = 1e-6
    name: ClassVar[str] = "epsilon"
    by_row: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (isinstance(self.epsilon, (int, float)) and self.epsilon > 0 and math.isfinite(self.epsilon)):
            cause = f"epsilon must be a positive number, not {self.epsilon!r}; use Plain() for none"
            raise RuleParameterError(rule="Epsilon", cause=cause)

    def propagate(self, site: Site, edge: Any) -> Edges:
        return site.vjp(self._ratio(site, edge), self.receivers(site.op))

    def parameter_edges(self, site: Site, edge: Any, parameters: tuple[Operand, ...]) -> Edges:
        return site.vjp(self._ratio(site, edge), parameters)

    def sinks(self, site: Site, edge: Any, edges: Edges) -> Sinks:
        leak = site.emit(epsilon_leak, edge, site.node, self.epsilon)
        return {**bias_sink(site, self._ratio(site, edge)), "epsilon": leak}

    def _ratio(self, site: Site, edge: fx.Node) -> fx.Node:
        return site.emit(epsilon_ratio, edge, site.node, self.epsilon)  # type: ignore[no-any-return]

    def __str__(self) -> str:
        return f"epsilon({self.epsilon:g})"


@dataclass(frozen=True)
class Stop(Rule):
    """Nothing flows: statistics of a norm, gates and attention maps in CP-LRP (P3)."""

    name: ClassVar[str] = "stop"
    by_row: ClassVar[bool] = True

    def receivers(self, op: Operation) -> tuple[Operand, ...]:
        return ()

    def propagate(self, site: Site, edge: Any) -> Edges:
        return {}
