"""Questions about where values come from that recognisers of state-space models and linear attention share."""

from __future__ import annotations

import torch
from torch import fx

from lrp_compiler.passes.optable import OpClass, aten_names, classify, op_name
from lrp_compiler.passes.program import InputKind, Program, carries_float

aten = torch.ops.aten

RESHAPES = aten_names(
    "view reshape _unsafe_view transpose permute t mT numpy_T squeeze unsqueeze flatten unflatten expand expand_as"
    " contiguous clone to _to_copy type_as alias movedim swapaxes view_as repeat_interleave"
)
"""Movement that keeps all of its one input."""

CONTRACTIONS = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default})
PRODUCTS = frozenset({aten.mul.Tensor, *CONTRACTIONS})


def factors(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors that ``node`` multiplies, or None."""
    if node.target not in PRODUCTS:
        return None
    left, right = node.args[:2]
    return (left, right) if isinstance(left, fx.Node) and isinstance(right, fx.Node) else None


def stripped(node: fx.Node) -> fx.Node:
    """The value that ``node`` shows in another shape."""
    while node.op == "call_function" and op_name(node) in RESHAPES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def is_movement(node: fx.Node) -> bool:
    """Whether ``node`` only moves values about."""
    entry = classify(node) if node.op == "call_function" else None
    return entry is not None and entry.op_class in (OpClass.MOVEMENT, OpClass.TUPLE)


def float_operands(node: fx.Node) -> list[fx.Node]:
    """The operands of ``node`` that hold floats."""
    return [operand for operand in node.all_input_nodes if carries_float(operand)]


def value_operands(node: fx.Node) -> list[fx.Node]:
    """The operands whose values ``node`` is computed from; of reshapes such as expand_as only the first counts."""
    first = node.args[0] if node.args else None
    return [first] if op_name(node) in RESHAPES and isinstance(first, fx.Node) else list(node.all_input_nodes)


def data_nodes(program: Program) -> set[fx.Node]:
    """The nodes that depend on what the user passes in."""
    users = {spec.node for spec in program.inputs if spec.kind is InputKind.USER}
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.name in users or (
            node.op == "call_function" and any(operand in found for operand in value_operands(node))
        ):
            found.add(node)
    return found


ELEMENTWISE = frozenset({OpClass.ADD, OpClass.MULTIPLY, OpClass.DIVIDE, OpClass.ACTIVATION, OpClass.NONLINEAR})


def kin(node: fx.Node, data: set[fx.Node]) -> set[fx.Node]:
    """``node`` and the data it is computed from by elementwise ops, running sums and movement.

    Of the decay exp(Delta A) of a state-space model these hold Delta, and neither B, C nor the signal.
    """
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current in found or current not in data or not carries_float(current):
            continue
        found.add(current)
        entry = classify(current) if current.op == "call_function" else None
        takes_part = current.target in (aten.select.int, aten.slice.Tensor) or op_name(current) in RESHAPES | KEEPERS
        if takes_part or (entry is not None and entry.op_class in ELEMENTWISE):
            waiting += value_operands(current)
    return found


KEEPERS = aten_names("cumsum masked_fill pad constant_pad_nd tril triu sum where")
"""Ops that compute a log-decay's running sums from its steps."""
