"""The ordinary gradient of every op, for the composites gradient and input_x_gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lrp_compiler.passes.operation import Operand, Operation
from lrp_compiler.passes.optable import OpClass
from lrp_compiler.passes.rules.attention import KEY, QUERY, VALUE, sinks_with_shares
from lrp_compiler.passes.rules.base import Edges, Rule, Sinks
from lrp_compiler.passes.rules.norm import BatchNorm, softmax_sink
from lrp_compiler.passes.rules.plain import Plain
from lrp_compiler.passes.rules.recurrent import recurrent_sinks
from lrp_compiler.passes.site import Site

AFFINE = frozenset({OpClass.ADD, OpClass.MOVEMENT, OpClass.REDUCTION})
"""Classes whose gradient is their plain rule: only constants are left over."""


@dataclass(frozen=True)
class Gradient(Rule):
    """c_x = VJP(c), whatever the op."""

    name: ClassVar[str] = "gradient"
    by_row: ClassVar[bool] = True

    def receivers(self, op: Operation) -> tuple[Operand, ...]:
        return op.flowing

    def propagate(self, site: Site, edge: Any) -> Edges:
        if _is_affine_norm(site.op):
            # Torch's derivative divides by the batch size, reads the input and gives the same.
            return BatchNorm().propagate(site, edge)
        return site.vjp(edge, self.receivers(site.op))

    def parameter_edges(self, site: Site, edge: Any, parameters: tuple[Operand, ...]) -> Edges:
        return site.vjp(edge, parameters)

    def map_share(self, op: Operation) -> float:
        return 1.0

    def sinks(self, site: Site, edge: Any, edges: Edges) -> Sinks:
        """c (f(x) - J x): a gradient does not conserve, and this is by how much."""
        if not edges:
            return {}
        if site.op.op_class in AFFINE:
            return Plain().sinks(site, edge, edges)
        if site.op.op_class is OpClass.ATTENTION:
            present = {operand.argument for operand in edges}
            return sinks_with_shares(site, edge, {side: 1.0 for side in (QUERY, KEY, VALUE) if side in present})
        if site.op.op_class is OpClass.RECURRENT:
            return recurrent_sinks(site, edge, edges)
        if site.op.op_class is OpClass.SOFTMAX:
            return softmax_sink(site, edge)
        if _is_affine_norm(site.op):
            return BatchNorm().sinks(site, edge, edges)
        first = edge[0] if isinstance(edge, list) else edge
        return {"gradient": site.remainder(first, edges)} if first is not None else {}


def _is_affine_norm(op: Operation) -> bool:
    """Whether a batch norm uses its running statistics, and relevance flows to what it normalises alone."""
    is_eval = op.op_class is OpClass.BATCH_NORM and not op.args[5]
    return is_eval and all(operand.argument == 0 for operand in op.flowing)
