"""Masked mean pooling: the sum of x times a mask, over the sum of that mask."""

from __future__ import annotations

import torch
from torch import fx

from lrp_compiler.passes.dataflow import RESHAPES, Flow, number, stripped
from lrp_compiler.passes.optable import aten_names, op_name
from lrp_compiler.passes.program import Structure, facts, learn

aten = torch.ops.aten
SUMS = frozenset({aten.sum.dim_IntList})
GUARDS = aten_names("clamp clamp_min add maximum")
"""What keeps a count from zero."""

NEGATIONS = aten_names("logical_not bitwise_not rsub")


def recognise_pooling(flow: Flow) -> None:
    """Mark each quotient of a masked sum and what its mask sums to."""
    for node in flow.nodes:
        if node.op != "call_function" or op_name(node) != "aten::div" or node not in flow.signals:
            continue
        total, count = node.args[:2]
        if not isinstance(total, fx.Node) or not isinstance(count, fx.Node):
            continue
        counted = _counted(flow, count)
        for value, mask, masked in _masked_sums(flow, stripped(total)):
            if counted is not None and _origin(mask) is _origin(counted):
                members = flow.inside(node, (stripped(total), masked))
                roles = (("value", value.name), ("mask", mask.name), ("count", count.name))
                learn(node, structures=(*facts(node).structures, Structure("masked_mean", roles, members)))
                break


def _masked_sums(flow: Flow, total: fx.Node) -> list[tuple[fx.Node, fx.Node, fx.Node]]:
    """(value, mask, the masked value) of a sum, as many ways as it can be read."""
    masked = total.args[0] if total.target in SUMS else None
    if not isinstance(masked, fx.Node) or masked not in flow.signals:
        return []
    name, args = op_name(masked), masked.args
    pairs: list[tuple[object, object]] = []
    if name == "aten::mul" and len(args) == 2:
        pairs = [(args[0], args[1]), (args[1], args[0])]
    elif name == "aten::masked_fill" and number(args[2]) == 0:
        pairs = [(args[0], args[1])]
    elif name == "aten::where" and len(args) == 3:
        pairs = [(args[1], args[0])]
    return [
        (value, mask, masked)
        for value, mask in pairs
        if isinstance(value, fx.Node) and isinstance(mask, fx.Node) and value in flow.signals and flow.is_fixed(mask)
    ]


def _counted(flow: Flow, count: fx.Node) -> fx.Node | None:
    """The mask whose sum ``count`` is, kept from zero perhaps."""
    while count.op == "call_function" and op_name(count) in RESHAPES | GUARDS and isinstance(count.args[0], fx.Node):
        count = count.args[0]
    summed = count.args[0] if count.target in SUMS else None
    return summed if isinstance(summed, fx.Node) and flow.is_fixed(summed) else None


def _origin(mask: fx.Node) -> fx.Node:
    """The mask as it was given, before it was moved, cast or negated."""
    while mask.op == "call_function" and op_name(mask) in RESHAPES | NEGATIONS and isinstance(mask.args[0], fx.Node):
        mask = mask.args[0]
    return mask
