"""Products of values that relevance flows to: shared evenly, or handed to one side (RULES.md 1.1, 1.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lrp_compiler.passes.operation import Operand, Operation
from lrp_compiler.passes.rules.base import Edges, Rule, Sinks
from lrp_compiler.passes.rules.plain import bias_sink
from lrp_compiler.passes.site import Site


@dataclass(frozen=True)
class Uniform(Rule):
    """c_k = VJP_k(c) / k over the k flowing factors (AttnLRP Prop. 3.2 and 3.3); with one factor the plain rule."""

    name: ClassVar[str] = "uniform"
    by_row: ClassVar[bool] = True

    def propagate(self, site: Site, edge: Any) -> Edges:
        edges = site.vjp(edge, self.receivers(site.op))
        factors = site.op.flowing_factors
        return {o: site.scale(made, 1 / len(factors)) if o in factors else made for o, made in edges.items()}

    def parameter_edges(self, site: Site, edge: Any, parameters: tuple[Operand, ...]) -> Edges:
        return site.vjp(edge, parameters)

    def sinks(self, site: Site, edge: Any, edges: Edges) -> Sinks:
        return bias_sink(site, edge)


@dataclass(frozen=True)
class Numerator(Rule):
    """Everything to the numerator, the denominator held constant (LN-rule for a / b)."""

    name: ClassVar[str] = "numerator"
    by_row: ClassVar[bool] = True

    def receivers(self, op: Operation) -> tuple[Operand, ...]:
        return tuple(operand for operand in op.flowing if operand.argument == 0)

    def propagate(self, site: Site, edge: Any) -> Edges:
        return site.vjp(edge, self.receivers(site.op))

    def parameter_edges(self, site: Site, edge: Any, parameters: tuple[Operand, ...]) -> Edges:
        return site.vjp(edge, tuple(operand for operand in parameters if operand.argument == 0))
