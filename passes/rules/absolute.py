"""DynamicLRP's absolute-ratio rules: shares by magnitude, biases credited (Lee & Arias; RULES.md 1.1 to 1.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from lrp_compiler.passes.linear_map import LinearMap, linear_map
from lrp_compiler.passes.operation import Operand, Operation
from lrp_compiler.passes.optable import op_name
from lrp_compiler.passes.rules.base import EdgeKind, Edges, Rule, Sinks
from lrp_compiler.passes.site import Site

EPSILON = 1e-11
"""DynamicLRP's stabiliser of non-negative denominators."""


def _sign(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)


def added_share(c: Tensor, one: Tensor, z: Tensor, factor: float) -> Tensor:
    """c_a = c sgn(t) z |factor| / (|t| + |z - t|) for the addend a of z, its term t = factor a; summed to a's shape."""
    term = factor * one
    share = c * _sign(one) * abs(factor) * z / (term.abs() + (z - term).abs() + EPSILON)
    return share.sum_to_size(one.shape)


@dataclass(frozen=True)
class AbsoluteAdd(Rule):
    """R_a = R |a| / (|a| + |b|); a constant addend keeps its share in the sink ``credited``."""

    name: ClassVar[str] = "absolute_add"
    real_only: ClassVar[bool] = True

    def propagate(self, site: Site, edge: Any) -> Edges:
        factors = self._factors(site.op)
        z = site.node
        return {o: site.emit(added_share, edge, o.node, z, factors[o.argument]) for o in site.op.flowing}

    def sinks(self, site: Site, edge: Any, edges: Edges) -> Sinks:
        op = site.op
        factors = self._factors(op)
        if op_name(site.node) == "aten::neg":
            return {"epsilon": site.emit(stabilised_share, edge, site.node, site.node)}
        if len(op.flowing) > 1:
            sizes = site.emit(added_sizes, op.flowing[0].node, site.node, factors[op.flowing[0].argument])
            return {"epsilon": site.emit(stabilised_share, edge, site.node, sizes)}
        (flowing,) = op.flowing
        return {"credited": site.emit(credited_rest, edge, flowing.node, site.node, factors[flowing.argument])}

    def _factors(self, op: Operation) -> dict[Any, float]:
        """By which number each argument enters the sum."""
        name, alpha = op_name(op.node), float(op.kwargs.get("alpha", 1))
        if name == "aten::neg":
            return {0: -1.0}
        return {"aten::sub": {0: 1.0, 1: -alpha}, "aten::rsub": {0: -alpha, 1: 1.0}}.get(name, {0: 1.0, 1: alpha})


def added_sizes(one: Tensor, z: Tensor, factor: float) -> Tensor:
    """|t| + |z - t| of a sum's two terms."""
    return (factor * one).abs() + (z - factor * one).abs()


def multiplied_sizes(one: Tensor, other: Tensor) -> Tensor:
    """|a| + |b|."""
    return one.abs() + other.abs()


def stabilised_share(c: Tensor, y: Tensor, sizes: Tensor) -> Tensor:
    """R epsilon / (sizes + epsilon): what the stabiliser of shares by magnitude keeps."""
    return c * y * (EPSILON / (sizes.abs() + EPSILON))


def credited_rest(c: Tensor, one: Tensor, z: Tensor, factor: float) -> Tensor:
    """What the other addend, k = z - factor * one, is credited with, R |k| / (|k| + |z - k|), and the stabiliser."""
    term = factor * one
    size = (z - term).abs()
    return c * z * (size + EPSILON) / (size + term.abs() + EPSILON)


def multiplied_share(c: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """c_a = c b |a| / (|a| + |b|), summed to a's shape."""
    return (c * other * one.abs() / (one.abs() + other.abs() + EPSILON)).sum_to_size(one.shape)


@dataclass(frozen=True)
class AbsoluteMultiply(Rule):
    """R_a = R |a| / (|a| + |b|) for two live factors; a constant factor hands everything to the other."""

    name: ClassVar[str] = "absolute_multiply"
    real_only: ClassVar[bool] = True

    def propagate(self, site: Site, edge: Any) -> Edges:
        factors = site.op.flowing_factors
        if len(factors) < 2:
            return site.vjp(edge, factors)
        left, right = factors
        pairs = ((left, right), (right, left))
        return {one: site.emit(multiplied_share, edge, one.node, other.node) for one, other in pairs}

    def sinks(self, site: Site, edge: Any, edges: Edges) -> Sinks:
        factors = site.op.flowing_factors
        if len(factors) < 2:
            return {}
        sizes = site.emit(multiplied_sizes, *(factor.node for factor in factors))
        return {"epsilon": site.emit(stabilised_share, edge, site.node, sizes)}


def summed_share(target: Any, c: Tensor, x: Tensor, y: Tensor, args: Any, kwargs: Any) -> Tensor:
    """c_x = sgn(x) y / f(|x|) VJP_f(c) for a sum or mean f: shares by magnitude."""
    size, pull, *_ = torch.func.vjp(lambda value: target(value, *args, **kwargs), x.abs())
    (spread,) = pull(c * y / (size + EPSILON))
    share: Tensor = _sign(x) * spread
    return share


@dataclass(frozen=True)
class AbsoluteSum(Rule):
    """R_i = R |x_i| / sum |x| for sums and means."""

    name: ClassVar[str] = "absolute_sum"
    real_only: ClassVar[bool] = True

    def propagate(self, site: Site, edge: Any) -> Edges:
        (receiver,) = self.receivers(site.op)
        arguments = (site.node.target, edge, receiver.node, site.node, list(site.op.args[1:]), dict(site.op.kwargs))
        return {receiver: site.emit(summed_share, *arguments, autograd=True)}

    def sinks(self, site: Site, edge: Any, edges: Edges) -> Sinks:
        (receiver,) = self.receivers(site.op)
        arguments = (site.node.target, receiver.node, list(site.op.args[1:]), dict(site.op.kwargs))
        return {"epsilon": site.emit(stabilised_share, edge, site.node, site.emit(summed_sizes, *arguments))}


def summed_sizes(target: Any, x: Tensor, args: Any, kwargs: Any) -> Tensor:
    """f(|x|) of a sum or mean f."""
    size: Tensor = target(x.abs(), *args, **kwargs)
    return size


def credited_linear(lin: LinearMap, operands: Any, c: Tensor, z: Tensor) -> Tensor:
    """c_x = W^T (c z sgn(z0) / (|z0| + |b|)): the bias is an addend that keeps its share."""
    x, weight, bias = lin.parts(operands, [])
    z0 = z - bias
    return lin.transpose(operands, x, weight, c * z * _sign(z0) / (z0.abs() + bias.abs() + EPSILON))


def credited_bias(lin: LinearMap, operands: Any, c: Tensor, z: Tensor) -> Tensor:
    """R (1 - |z0| / (|z0| + |b|)): the bias's share, with what the stabiliser takes."""
    _, _, bias = lin.parts(operands, [])
    size = (z - bias).abs()
    return c * z * (1 - size / (size + bias.abs() + EPSILON))


@dataclass(frozen=True)
class CreditedBias(Rule):
    """DynamicLRP's linear maps: the bias is credited by absolute ratio, the rest follows the epsilon rule."""

    name: ClassVar[str] = "credited_bias"
    real_only: ClassVar[bool] = True

    def receivers(self, op: Operation) -> tuple[Operand, ...]:
        return op.flowing_factors

    def propagate(self, site: Site, edge: Any) -> Edges:
        arguments = self._arguments(site, edge)
        return {o: site.emit(credited_linear, *arguments, autograd=True) for o in self.receivers(site.op)}

    def sinks(self, site: Site, edge: Any, edges: Edges) -> Sinks:
        return {"credited": site.emit(credited_bias, *self._arguments(site, edge), autograd=True)}

    def _arguments(self, site: Site, edge: fx.Node) -> tuple[Any, ...]:
        return linear_map(site.op), [list(site.op.args), dict(site.op.kwargs)], edge, site.node


@dataclass(frozen=True)
class NormIdentity(Rule):
    """R_x = R_y at a norm, as relevance: weight and bias get nothing (DynamicLRP)."""

    name: ClassVar[str] = "norm_identity"
    real_only: ClassVar[bool] = True
    kind: ClassVar[EdgeKind] = "relevance"

    def receivers(self, op: Operation) -> tuple[Operand, ...]:
        return tuple(operand for operand in op.flowing if operand.argument == 0)

    def propagate(self, site: Site, edge: Any) -> Edges:
        first: fx.Node = edge[0] if isinstance(edge, list) else edge
        return dict.fromkeys(self.receivers(site.op), first)
