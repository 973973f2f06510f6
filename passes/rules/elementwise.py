"""Elementwise nonlinearities: the identity rule, as a gate where f(x) = x g(x), else on relevance (RULES.md 1.5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrp_compiler.kernels.gates import GATES
from lrp_compiler.kernels.linear import conjugate
from lrp_compiler.kernels.offset_gates import OFFSET_GATES
from lrp_compiler.passes.operation import Operand, Operation, gates_a_product
from lrp_compiler.passes.optable import op_name
from lrp_compiler.passes.program import facts
from lrp_compiler.passes.rules.base import EdgeKind, Edges, Rule, Sinks
from lrp_compiler.passes.site import Site

aten = torch.ops.aten


def gated(gate: Callable[..., Tensor], c: Tensor, args: Any, kwargs: Any) -> Tensor:
    """c * g(x); the conjugate of g where values are complex, since R = Re(conj(c) a)."""
    given = gate(*args, **kwargs)
    return c * (conjugate(given) if c.is_complex() else given)


def half_gated(c: Tensor, twice: Tensor) -> Tensor:
    """c g of twice the gate."""
    return c * (0.5 * twice)


@dataclass(frozen=True)
class Identity(Rule):
    """R_x = R_y in coefficient space: c_x = c_y g(x), g from the table of gates; no division (P4)."""

    name: ClassVar[str] = "identity"
    by_row: ClassVar[bool] = True

    def receivers(self, op: Operation) -> tuple[Operand, ...]:
        return op.flowing[:1]

    def propagate(self, site: Site, edge: Any) -> Edges:
        (receiver,) = self.receivers(site.op)
        key = op_name(site.node)
        if key == "aten::relu":
            # The mask of y > 0 is that of x > 0, and ATen has it fused with the product.
            made = site.emitter.call(aten.threshold_backward.default, edge, site.node, 0)
        elif key == "pattern::gelu_tanh" and not gates_a_product(site.op):
            # What the forward pass has of the gate saves making it again of x; gated products have a kernel for that.
            (twice,) = facts(site.node).pattern.saved  # type: ignore[union-attr]
            made = site.emit(half_gated, edge, site.op.nodes[twice])
        else:
            made = site.emit(gated, GATES[key], edge, site.op.args, site.op.kwargs)
        return {receiver: made}


def deconv_filter(c: Tensor) -> Tensor:
    """max(c, 0)."""
    return c.clamp(min=0)


def guided_filter(c: Tensor, x: Tensor) -> Tensor:
    """c where both c and x are positive."""
    return torch.where((c > 0) & (x > 0), c, 0)


def smooth_gate(c: Tensor, x: Tensor, beta: float) -> Tensor:
    """c sigmoid(beta x)."""
    return c * torch.sigmoid(beta * x)


@dataclass(frozen=True)
class DeconvNet(Rule):
    """c_x = max(c_y, 0), whatever x is (Zeiler and Fergus 2014); not linear in the seed."""

    name: ClassVar[str] = "deconvnet"
    linear_in_seed: ClassVar[bool] = False

    def propagate(self, site: Site, edge: Any) -> Edges:
        return {receiver: site.emit(deconv_filter, edge) for receiver in self.receivers(site.op)}


@dataclass(frozen=True)
class GuidedBackprop(Rule):
    """c_x = c_y where x > 0 and c_y > 0 (Springenberg et al. 2015); not linear in the seed."""

    name: ClassVar[str] = "guided_backprop"
    linear_in_seed: ClassVar[bool] = False

    def propagate(self, site: Site, edge: Any) -> Edges:
        return {receiver: site.emit(guided_filter, edge, receiver.node) for receiver in self.receivers(site.op)}


@dataclass(frozen=True)
class BetaSmooth(Rule):
    """c_x = c_y sigmoid(beta x): the derivative of softplus in place of ReLU's (Dombrowski et al. 2019)."""

    beta: float = 10.0
    name: ClassVar[str] = "beta_smooth"
    by_row: ClassVar[bool] = True

    def propagate(self, site: Site, edge: Any) -> Edges:
        return {r: site.emit(smooth_gate, edge, r.node, self.beta) for r in self.receivers(site.op)}


@dataclass(frozen=True)
class OffsetGate(Rule):
    """c_x = c_y g(x) with f(x) = f(0) + x g(x): the share of f(0) is a constant's, and sinks (linear interpreter)."""

    name: ClassVar[str] = "offset_gate"
    by_row: ClassVar[bool] = True

    def receivers(self, op: Operation) -> tuple[Operand, ...]:
        return op.flowing[:1]

    def propagate(self, site: Site, edge: Any) -> Edges:
        gate, _ = OFFSET_GATES[op_name(site.node)]
        return {
            receiver: site.emit(gated, gate, edge, site.op.args, site.op.kwargs) for receiver in self.receivers(site.op)
        }

    def sinks(self, site: Site, edge: Any, edges: Edges) -> Sinks:
        _, at_zero = OFFSET_GATES[op_name(site.node)]
        return {"constant": site.scale(edge, at_zero(*site.op.args[1:], **site.op.kwargs))}


@dataclass(frozen=True)
class IdentityRelevance(Rule):
    """R_x = R_y as relevance, for f(0) != 0, where no coefficient exists at x = 0."""

    name: ClassVar[str] = "identity_relevance"
    kind: ClassVar[EdgeKind] = "relevance"

    def receivers(self, op: Operation) -> tuple[Operand, ...]:
        return op.flowing[:1]

    def propagate(self, site: Site, edge: Any) -> Edges:
        return dict.fromkeys(self.receivers(site.op), edge)
