"""Routing weights of mixtures of experts held constant: relevance flows through the experts alone (RULES.md 1.7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lrp_compiler.passes.operation import Operand, Operation
from lrp_compiler.passes.program import structure_of
from lrp_compiler.passes.rules.plain import Plain

ROUTING = "routing"


def is_routing(op: Operation) -> bool:
    """Whether an op multiplies an expert's output by its routing weight."""
    return structure_of(op.node, ROUTING) is not None


@dataclass(frozen=True)
class ConstantRouter(Plain):
    """c_expert = c w, the routing weight w a gate that gets nothing."""

    name: ClassVar[str] = "constant_router"

    def receivers(self, op: Operation) -> tuple[Operand, ...]:
        structure = structure_of(op.node, ROUTING)
        assert structure is not None
        expert = tuple(operand for operand in op.flowing if operand.node.name == structure.named("expert"))
        # Where nothing flows to the expert, the weight is all there is.
        return expert or op.flowing
