"""Gated MLPs: act(gate) times up, where both come from linear maps of one value."""

from __future__ import annotations

from torch import fx

from lrp_compiler.passes.dataflow import Flow, is_movement, summands, uncast
from lrp_compiler.passes.optable import OpClass, classify, op_name
from lrp_compiler.passes.program import Structure, facts, learn

ACTIVATIONS = frozenset({OpClass.ACTIVATION, OpClass.NONLINEAR})


def recognise_gates(flow: Flow) -> None:
    """Mark each product of an activated linear map and another one of the same input."""
    for node in flow.nodes:
        if node.op != "call_function" or op_name(node) != "aten::mul" or node not in flow.signals:
            continue
        factors = [factor for factor in node.args if isinstance(factor, fx.Node) and factor in flow.signals]
        if len(factors) != 2:
            continue
        for activated, up in (factors, factors[::-1]):
            gate = _gate_of(flow, activated)
            if gate is not None and gate is not up and _of_one_input(flow, gate, up):
                roles = (("activated", activated.name), ("gate", gate.name), ("up", up.name))
                structure = Structure("gated_mlp", roles, flow.inside(node, (activated,)))
                learn(node, structures=(*facts(node).structures, structure))
                break


def _gate_of(flow: Flow, activated: fx.Node) -> fx.Node | None:
    """What an activation is applied to."""
    activated = uncast(activated)
    entry = classify(activated) if activated.op == "call_function" else None
    if entry is None or entry.op_class not in ACTIVATIONS:
        return None
    pattern = facts(activated).pattern
    if pattern is not None:
        return flow.named[pattern.inputs[0]]
    first = activated.args[0]
    return first if isinstance(first, fx.Node) else None


def _of_one_input(flow: Flow, gate: fx.Node, up: fx.Node) -> bool:
    """Whether linear maps of one value, or parts of one linear map, give both."""
    maps = [_linear_map(flow, value) for value in (gate, up)]
    if maps[0] is None or maps[1] is None:
        return False
    return maps[0] is maps[1] or _mapped(flow, maps[0]) is _mapped(flow, maps[1])


def _linear_map(flow: Flow, node: fx.Node) -> fx.Node | None:
    """The linear map whose output, moved or with a bias, is ``node``."""
    while node.op == "call_function":
        signals = [operand for operand in node.all_input_nodes if operand in flow.signals]
        entry = classify(node)
        if len(signals) != 1 or entry is None:
            return None
        if entry.op_class is OpClass.LINEAR:
            return node
        if not is_movement(node) and summands(node) is None:
            return None
        node = signals[0]
    return None


def _mapped(flow: Flow, linear: fx.Node) -> fx.Node:
    """The value that a linear map is applied to, however it is laid out."""
    (node,) = (operand for operand in linear.all_input_nodes if operand in flow.signals)
    while node.op == "call_function" and is_movement(node):
        signals = [operand for operand in node.all_input_nodes if operand in flow.signals]
        if len(signals) != 1:
            break
        node = signals[0]
    return node
